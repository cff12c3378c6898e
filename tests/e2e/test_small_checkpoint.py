"""The issue's first promise: one command turns a checkpoint and a task into a verified artifact.

The vectors it is held against are what the model authors' own `encode` returned (fixtures/README).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from jexport.artifacts import manifest, store

TASKS = (
    "retrieval.query",
    "retrieval.passage",
    "separation",
    "classification",
    "text-matching",
    "none",
)
TOLERANCE = 1e-6


@pytest.mark.parametrize("task", TASKS)
def test_artifact_gives_the_authors_vectors(
    task: str, builds: Callable[..., Any], small: Path, texts: list[str]
) -> None:
    answer = builds(task)
    truth = np.load(small.with_name(f"{small.name}.{task}.npy"))
    with jexport.open_artifact(answer.path) as model:
        vectors = model.encode(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == truth.shape
    assert np.abs(vectors - truth).max() <= TOLERANCE
    assert answer.path.parts[-4:-1] == ("small", task, "onnx-fp32")


@pytest.mark.parametrize("task", TASKS)
def test_artifacts_of_two_tasks_differ(
    task: str, builds: Callable[..., Any], small: Path, texts: list[str]
) -> None:
    # Guards the test above: vectors of another task must not pass it.
    other = "separation" if task != "separation" else "classification"
    truth = np.load(small.with_name(f"{small.name}.{other}.npy"))
    with jexport.open_artifact(builds(task).path) as model:
        assert np.abs(model.encode(texts) - truth).max() > 100 * TOLERANCE


def test_fp16_artifact_is_near(builds: Callable[..., Any], small: Path, texts: list[str]) -> None:
    truth = np.load(small.with_name(f"{small.name}.retrieval.query.npy"))
    half, full = builds("retrieval.query", "fp16"), builds("retrieval.query")
    with jexport.open_artifact(half.path) as model:
        vectors = model.encode(texts)
    assert (vectors * truth).sum(1).min() >= 0.999
    # Not half: the tables of 8,192 positions stay float32, and the matrices are small here.
    weights = "model.onnx_data"
    assert (half.path / weights).stat().st_size < 0.9 * (full.path / weights).stat().st_size
    assert half.path.parent.name == "onnx-fp16"


def test_stdout_is_the_path_alone(builds: Callable[..., Any]) -> None:
    answer = builds("retrieval.query")
    assert answer.out == f"{answer.path}\n"
    manifest.verify(answer.path)
    shown = [line.split()[0] for line in answer.err.splitlines()]
    assert shown == ["jexport", "load", "merge", "export", "compile", "validate", "package"]


def test_base_model_is_not_merged(builds: Callable[..., Any]) -> None:
    assert "merge" not in builds("none").err
    stages = [r["stage"] for r in store.measured(builds("none").path)["stages"]]
    assert stages == ["load", "export", "compile", "validate", "package"]


def test_manifest_says_where_time_and_memory_went(artifact: Path) -> None:
    records = store.measured(artifact)["stages"]
    assert [r["stage"] for r in records] == [
        "load",
        "merge",
        "export",
        "compile",
        "validate",
        "package",
    ]
    assert all(r["peak_memory_mib"] > 30 for r in records)
    assert sum(r["seconds"] for r in records) > 0.5


def test_json_lines(small: Path, cli: Callable[..., Any], canned: Any, tmp_path: Path) -> None:
    words = ("build", "--model", small, "--task", "separation", "--target", "onnx", "--json")
    answer = cli(*words, "--out", tmp_path)
    lines = [json.loads(line) for line in answer.err.splitlines()]
    assert answer.out == f"{answer.path}\n"
    done = [line["stage"] for line in lines if line["kind"] == "done"]
    assert done == ["load", "merge", "export", "compile", "validate", "package"]
    assert all(line["time"] > 1.7e9 for line in lines)
    again = cli(*words, "--out", tmp_path)
    assert again.path == answer.path
    assert [json.loads(line)["kind"] for line in again.err.splitlines()] == [
        "start",
        "done",
        "note",
    ]


def test_late_chunking_is_the_pooled_token_vectors(
    builds: Callable[..., Any], small: Path, texts: list[str]
) -> None:
    """Against transformers' tokenizer and the graph itself, token by token."""
    import onnxruntime
    from transformers import AutoTokenizer

    folder = builds("retrieval.passage").path
    chunks = ["The tower is tall. ", "It was built in 1889. ", "Paris lies on the Seine."]
    prompt = "Represent the document for retrieval: "
    tokens = AutoTokenizer.from_pretrained(small)(
        prompt + "".join(chunks), return_offsets_mapping=True
    )
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    ids = np.array([tokens["input_ids"]], dtype=np.int64)
    hidden = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]
    borders = np.cumsum([len(prompt), *map(len, chunks)])
    text = prompt + "".join(chunks)
    wanted = []
    for low, high in itertools.pairwise(borders):
        rows = []
        for row, (start, end) in enumerate(tokens["offset_mapping"]):
            piece = text[start:end]
            start += len(piece) - len(piece.lstrip()) if piece.strip() else 0
            if end > start and low <= start < high:
                rows.append(row)
        pooled = hidden[rows].mean(0)
        wanted.append(pooled / np.linalg.norm(pooled))
    with jexport.open_artifact(folder) as model:
        vectors = model.late_chunking(chunks)
        alone = model.encode(chunks)
    np.testing.assert_allclose(vectors, np.stack(wanted), atol=1e-6)
    assert np.abs(vectors - alone).max() > 1e-3  # each chunk has seen the others


def test_dimensions_normalize_and_prompt(artifact: Path, texts: list[str]) -> None:
    with jexport.open_artifact(artifact) as model:
        full = model.encode(texts)
        cut = model.encode(texts, dimensions=16)
        raw = model.encode(texts, normalize=False)
        bare = model.encode(texts, prompt=False)
        prompted = model.encode([model.embedding.prompt + t for t in texts], prompt=False)
    wanted = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, wanted, atol=1e-6)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), full, atol=1e-6)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 1e-2
    np.testing.assert_allclose(prompted, full, atol=1e-6)
    assert np.abs(bare - full).max() > 1e-3
