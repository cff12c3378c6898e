"""The onnx target on the provider that JEXPORT_TEST_PROVIDER names, against torch on its device.

The judge is the merged checkpoint in torch, float32 without TF32, a text at a time. What only a GPU
can show is in test_onnx_on_cuda.py.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import jexport
from jexport import gates, recipe
from jexport.artifacts import manifest
from jexport.datasets import calibration
from jexport.errors import DependencyError
from jexport.evaluation import parity
from jexport.runtime.tokenise import TextTokenizer
from jexport.tasks import JINA_V3_PROMPTS

pytestmark = pytest.mark.device

PROVIDER = os.environ.get("JEXPORT_TEST_PROVIDER", "cpu")
ON_CUDA = PROVIDER == "cuda"
PASSAGE = "retrieval.passage"
CASES = [
    (task, precision)
    for task in (JINA_V3_PROMPTS if ON_CUDA else (PASSAGE,))
    for precision in ("fp32", "fp16")
]
NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
HIDDEN, POOLED = "last_hidden_state", "sentence_embedding"


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    """One text a language, and more of them on a GPU."""
    known = calibration.read("parity", task="none").samples
    chosen = {sample.language: sample for sample in known}
    return [*chosen.values(), *known[::7]] if ON_CUDA else list(chosen.values())[::3]


def tokenizer_of(path: Path) -> TextTokenizer:
    content = manifest.read(path).content
    return TextTokenizer.open(path, max_tokens=content["embedding"]["max_tokens"])


def ids_of(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids as the model is given them, the task's prompt included."""
    prompt = manifest.read(path).content["embedding"]["prompt"]
    return tokenizer_of(path).model_ids(list(texts), prefix=prompt)


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    one, two = found.astype(np.float64), wanted.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    values: np.ndarray = (one * two).sum(-1) / lengths
    return values


def judged(
    found: np.ndarray, alone: np.ndarray, wanted: np.ndarray, samples: Any, ids: Any, path: Path
) -> dict[str, Any]:
    """The metrics that a recipe's gates read."""
    embedding = manifest.read(path).content["embedding"]
    labels = parity.Labels(
        languages=tuple(sample.language for sample in samples),
        lengths=tuple(map(len, ids)),
        dimensions=(*embedding["matryoshka"], embedding["dimension"]),
    )
    metrics = parity.compare(
        parity.Outputs(embeddings=wanted), parity.Outputs(embeddings=found), labels
    )
    return metrics | {"batch": parity.invariance(alone, found)}


@pytest.mark.parametrize(("task", "precision"), CASES)
def test_every_task_and_precision_by_the_recipes_gates(
    task: str,
    precision: str,
    artifacts: Callable[..., Path],
    truth: Callable[[str], Any],
    samples: list[Any],
    device: str,
) -> None:
    path = artifacts(task, precision)
    texts = [sample.text for sample in samples]
    ids = ids_of(path, texts)
    wanted = truth(task).vectors(ids)
    with jexport.open_artifact(path, device=device) as model:
        found = model.encode(texts)
        alone = np.stack([model.encode(text) for text in texts])
    metrics = judged(found, alone, wanted, samples, ids, path)
    assert not gates.gate(metrics, recipe.DEFAULT_GATES[precision])
    if precision == "fp32":
        # Float32 is float32: with TF32 the factors have 10 bits, and this is 1e-4.
        assert metrics["overall"]["largest_difference"] < 1e-5
    with jexport.open_artifact(path, device="cpu") as model:
        by_cpu = model.encode(texts)
    assert cosines(found, by_cpu).min() > recipe.DEFAULT_GATES[precision]["cosine_min"]
    # A wrong task, or a wrong text, is not taken for right.
    assert cosines(found, np.roll(wanted, 1, axis=0)).max() < 0.999


def test_the_whole_window_of_8192_tokens(
    artifacts: Callable[..., Path], truth: Callable[[str], Any], device: str
) -> None:
    path = artifacts(PASSAGE, "fp16" if ON_CUDA else "fp32")
    text = "a long text of many words " * 4000
    (ids,) = ids_of(path, [text])
    assert len(ids) == 8192
    with jexport.open_artifact(path, device=device) as model:
        found = model.encode(text)
        assert model.truncated == 1
    assert cosines(found, truth(PASSAGE).vectors([ids])[0]) > 0.9999


def test_late_chunking_averages_torchs_token_vectors(
    artifacts: Callable[..., Path], truth: Callable[[str], Any], device: str
) -> None:
    path = artifacts(PASSAGE, "fp32")
    chunks = ["The ferry leaves at seven. ", "It crosses the strait ", "in about an hour."]
    prompt = manifest.read(path).content["embedding"]["prompt"]
    tokens = tokenizer_of(path).offsets(prompt + "".join(chunks))
    hidden = truth(PASSAGE).tokens(tokens.ids).astype(np.float64)
    borders = len(prompt) + np.cumsum([0, *map(len, chunks)])
    wanted = np.stack(
        [
            hidden[~tokens.special & (tokens.starts >= begin) & (tokens.starts < end)].mean(0)
            for begin, end in itertools.pairwise(borders)
        ]
    )
    with jexport.open_artifact(path, device=device) as model:
        found = model.late_chunking(chunks)
    assert cosines(found, wanted).min() > 0.999999
    assert cosines(found, wanted[[1, 2, 0]]).max() < 0.999


def test_smaller_dimensions_are_cut_then_normalised(
    artifacts: Callable[..., Path], truth: Callable[[str], Any], device: str
) -> None:
    path, texts = artifacts(PASSAGE, "fp32"), ["a ferry", "two ferries and a much longer text"]
    wanted = truth(PASSAGE).vectors(ids_of(path, texts))[:, :32]
    with jexport.open_artifact(path, device=device) as model:
        found = model.encode(texts, dimensions=32)
    assert found.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert cosines(found, wanted).min() > 0.99999


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_several_threads_share_one_session(
    precision: str, artifacts: Callable[..., Path], device: str
) -> None:
    sets = [[f"text {n} of thread {i} " * (1 + n % 7) for n in range(20)] for i in range(4)]
    results: list[Any] = [None] * len(sets)
    with jexport.open_artifact(artifacts(PASSAGE, precision), device=device) as model:
        wanted = [model.encode(texts) for texts in sets]

        def run(number: int) -> None:
            for _ in range(3):
                results[number] = model.encode(sets[number])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(sets))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for found, right in zip(results, wanted, strict=True):
        # Texts of several threads share batches, and those decide how much is padded: in fp16 that
        # moves last bits, here by at most half a step of float16 at 0.03 to 0.06.
        np.testing.assert_allclose(
            found, right, rtol=0, atol=1e-6 if precision == "fp32" else 2**-16
        )


# --- devices ------------------------------------------------------------------------------------


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The sessions that are opened meanwhile, each with its profile on."""
    opened: list[Any] = []
    make = onnxruntime.InferenceSession

    def profiled(path: Any, options: Any = None, *words: Any, **more: Any) -> Any:
        options = options or more.pop("sess_options", None) or onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile{len(opened)}")
        opened.append(make(path, options, *words, **more))
        return opened[-1]

    monkeypatch.setattr(onnxruntime, "InferenceSession", profiled)
    return opened


def nodes_of(session: Any) -> list[dict[str, Any]]:
    """Operator and provider of every node that a session ran, from its profile."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [
        event["args"]
        for event in events
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_node_runs_on_the_device(
    precision: str, artifacts: Callable[..., Path], device: str, sessions: list[Any]
) -> None:
    path = artifacts(PASSAGE, precision)
    with jexport.open_artifact(path, device=device, verify=False) as model:
        model.encode(["one", "a longer text than the other"])  # padded
        model.encode("one alone")
        (session,) = sessions
        nodes = nodes_of(session)
    assert len(nodes) > 20
    assert {node["provider"] for node in nodes} == {NAMES[device]}
    assert not [node["op_name"] for node in nodes if node["op_name"].startswith("Memcpy")]


def test_auto_takes_the_device(
    artifacts: Callable[..., Path], device: str, sessions: list[Any]
) -> None:
    with jexport.open_artifact(artifacts(PASSAGE, "fp32"), device="auto", verify=False) as model:
        vectors = model.encode(["a text"])
    assert sessions[-1].get_providers()[0] == NAMES[device]
    assert np.isfinite(vectors).all()


def test_only_what_is_asked_for_comes_back(
    artifacts: Callable[..., Path], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the pooled vectors alone; token vectors for late chunking."""
    fetched: list[str] = []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def run(self, names: Any, *words: Any, **more: Any) -> Any:
            fetched.extend(names)
            return super().run(names, *words, **more)

        def run_with_iobinding(self, binding: Any, *words: Any) -> Any:
            result = super().run_with_iobinding(binding, *words)
            outputs = binding.get_outputs()
            fetched.extend(HIDDEN if len(one.shape()) == 3 else POOLED for one in outputs)
            return result

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with jexport.open_artifact(artifacts(PASSAGE, "fp32"), device=device, verify=False) as model:
        model.encode(["one", "two texts"])
        assert set(fetched) == {POOLED if device == "cuda" else HIDDEN}
        fetched.clear()
        model.late_chunking(["one ", "text"])
        assert set(fetched) == {HIDDEN}


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA"])
def test_a_name_of_no_device(name: str, artifacts: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="cuda"):
        jexport.open_artifact(artifacts(PASSAGE, "fp32"), device=name, verify=False)


def test_a_gpu_that_is_not_there(artifacts: Callable[..., Path]) -> None:
    with pytest.raises(DependencyError) as caught:
        jexport.open_artifact(artifacts(PASSAGE, "fp32"), device="cuda:97", verify=False)
    assert caught.value.evidence.strip()
    assert caught.value.fix


def test_a_provider_that_cannot_start(artifacts: Callable[..., Path], tmp_path: Path) -> None:
    """No GPU is visible: 'cuda' says so with exit code 15 and leaves nothing."""
    lines, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    lines.write_text("a text\n", encoding="utf-8")
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "jexport",
            "embed",
            str(artifacts(PASSAGE, "fp32")),
            "--input",
            str(lines),
            "--output",
            str(out),
            "--device",
            "cuda",
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 15, answer.stderr
    assert "CUDA provider" in answer.stderr
    assert "fix:" in answer.stderr
    assert not out.exists()
