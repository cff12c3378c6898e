"""jina-embeddings-v5-text built and opened: each target gives what PEFT gives for the checkpoint.

Every build is also judged while it is made (validate); here vectors, uses and files are looked at.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jexport
from jexport.artifacts import manifest
from jexport.evaluation import reference_library_jina_v5
from jexport.toy import checkpoint

TEXTS = ["the harbour at night", "SHIPS and Boats, 1923!\n", "", "港の灯台は夜になると光ります。"]
LONG = "the harbour at night and " * 250
SMALL, NANO = "jina-v5-small", "jina-v5-nano"
RECIPES = {
    SMALL: "jina-embeddings-v5-text-small",
    NANO: "jina-embeddings-v5-text-nano",
}
HALF = {"fp16": 0.9995, "bf16": 0.99, "int8": 0.95}
LEAST = [
    pytest.param(SMALL, "onnx", "retrieval", "fp32"),
    pytest.param(NANO, "hf", "classification", "fp32"),
]
REFUSED = pytest.param(
    *(NANO, "hf", "clustering", "bf16"),
    marks=[
        pytest.mark.rare,
        pytest.mark.xfail(strict=True, reason="drawn weights keep 0.9978, the gate asks for 0.998"),
    ],
)
MORE = [
    pytest.param(kind, target, task, precision, marks=pytest.mark.rare)
    for kind, target, task, precision in (
        (NANO, "onnx", "text-matching", "fp32"),
        (NANO, "openvino", "clustering", "fp32"),
        (SMALL, "hf", "classification", "fp32"),
        (SMALL, "openvino", "text-matching", "fp32"),
        (NANO, "hf", "retrieval", "fp32"),
        (SMALL, "vllm", "clustering", "fp32"),
        (NANO, "vllm", "retrieval", "fp32"),
        (SMALL, "vllm", "text-matching", "bf16"),
        (SMALL, "onnx", "clustering", "fp16"),
        (NANO, "onnx", "retrieval", "fp16"),
        (SMALL, "onnx", "retrieval", "int8"),
        (NANO, "openvino", "clustering", "int8"),
    )
]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("v5")
    return {kind: checkpoint.write(folder / kind, layout=kind) for kind in (SMALL, NANO)}


@pytest.mark.parametrize(("kind", "target", "task", "precision"), [*LEAST, *MORE, REFUSED])
def test_an_artifact_gives_the_vectors_of_peft(
    kind: str,
    target: str,
    task: str,
    precision: str,
    toys: dict[str, Path],
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    answer = cli(
        *("build", "--recipe", RECIPES[kind], "--model", toys[kind], "--task", task),
        *("--target", target, "--precision", precision, "--out", tmp_path / "out"),
        *("--validate-tokens", 64, *(["--allow-slower"] if precision == "int8" else [])),
    )
    assert answer.code == 0, answer.err
    content = manifest.verify(answer.path).content
    assert content["licence"] == "CC-BY-NC-4.0"
    assert content["embedding"]["pooling"] == "last"
    judge = reference_library_jina_v5.assemble(toys[kind], task)
    lowest = HALF.get(precision, 0.999999)
    with jexport.open_artifact(answer.path) as model:
        for use in ("encode", "encode_query", "encode_document"):
            wanted = getattr(judge, use)([*TEXTS, LONG], normalize_embeddings=True)
            found = getattr(model, use)([*TEXTS, LONG])
            assert (found * wanted).sum(axis=1).min() > lowest, use
        by_name = model.encode(TEXTS, prompt_name="query")
        assert np.array_equal(by_name, model.encode_query(TEXTS))
        for size in (32, 64):
            cut = judge.encode(TEXTS)[:, :size]
            cut = cut / np.linalg.norm(cut, axis=1, keepdims=True)
            assert (model.encode(TEXTS, dimensions=size) * cut).sum(axis=1).min() > lowest
    listed = json.loads((answer.path / "modules.json").read_text(encoding="utf-8"))
    assert [one["type"].rsplit(".", 1)[-1] for one in listed] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    if target == "hf":
        check_sentence_transformers(answer.path, judge)


def check_sentence_transformers(path: Path, judge: Any) -> None:
    """The folder opens without remote code, and gives the same with its own prompts."""
    from sentence_transformers import SentenceTransformer

    opened = SentenceTransformer(
        str(path), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
    )
    for use in ("encode", "encode_query", "encode_document"):
        wanted, found = (getattr(one, use)(TEXTS) for one in (judge, opened))
        assert (found * wanted).sum(axis=1).min() > 0.999, use


def list_modules(folder: Path) -> None:
    """A fine-tune with a pooling and a projection of its own behind the authors' module."""
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling

    listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))[:1]
    torch.manual_seed(4)
    for number, module in enumerate((Pooling(128, "mean"), Dense(128, 48)), 1):
        home = f"{number}_{type(module).__name__}"
        (folder / home).mkdir()
        module.save(str(folder / home))
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        listed.append({"idx": number, "name": str(number), "path": home, "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")


@pytest.mark.rare
@pytest.mark.parametrize("target", ["onnx", "vllm"])
def test_a_fine_tune_with_modules_of_its_own(
    target: str, toys: dict[str, Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toys[SMALL], tmp_path / "tuned"))
    list_modules(folder)
    answer = cli(
        *("build", "--recipe", RECIPES[SMALL], "--model", folder, "--task", "retrieval"),
        *("--target", target, "--out", tmp_path / "out", "--validate-tokens", 64),
    )
    assert answer.code == 0, answer.err
    judge = reference_library_jina_v5.assemble(folder, "retrieval")
    usual = reference_library_jina_v5.assemble(toys[SMALL], "retrieval")
    assert judge.get_embedding_dimension() == 48
    assert usual.get_embedding_dimension() == 128
    with jexport.open_artifact(answer.path) as model:
        for use in ("encode", "encode_query"):
            wanted, found = (getattr(one, use)([*TEXTS, LONG]) for one in (judge, model))
            lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(found, axis=1)
            assert ((found * wanted).sum(axis=1) / lengths).min() > 0.999999, use
