"""Every shipped recipe, on a seeded checkpoint with its model's files, from text to vector.

A build's own validation compares with sentence-transformers; here its numbers are read, and a
SentenceTransformer that this test opens itself embeds texts beside the artifact. With
JEXPORT_RECIPES=FOLDER each row is kept there, of which docs/models.py makes docs/models.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import jexport
from jexport import recipe
from jexport.artifacts import manifest
from jexport.toy import like

TEXTS = [
    "Who repairs the clock in the tower when it stops during the winter?",
    "The market opens early and closes when there is no more fish. " * 12,
    "Старый мост через реку открыли после долгого ремонта.",
    "图书馆每天早上八点开门，晚上九点关门。",
    "a",
]
OFTEN = ("bge-m3", "Qwen3-Embedding-0.6B")
"""Of two kinds: the pickled file of an encoder, a decoder's last token and its prompts."""

INT8 = ("Qwen3-Embedding-0.6B", "LaBSE", "gte-modernbert-base")
"""Of three kinds: a decoder, a Dense layer, a window."""

LEAST = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.998, "int8": 0.95}
"""Cosine with the library: what validate asks by default."""

NAMES = [name for name in recipe.names() if name in like.names() and name not in like.LAYOUTS]
JOBS = [
    (name, target, precision)
    for name in NAMES
    for target, precision in (
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("openvino", "fp32"),
        ("hf", "fp32"),
        ("vllm", "fp32"),
        *((("onnx", "int8"), ("openvino", "int8")) if name in INT8 else ()),
    )
    if precision in recipe.read(name).precisions and target in recipe.read(name).targets
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`stand_in("bge-m3")`: its seeded checkpoint, which no test may change."""
    home = tmp_path_factory.mktemp("like")

    def folder(name: str) -> Path:
        return home / name if (home / name).is_dir() else like.write(home / name, name)

    return folder


def check(job: tuple[str, str, str], folder: Path, cli: Any, out: Path, *, tokens: int) -> None:
    """Build by the recipe's name, and compare with the library's own vectors."""
    name, target, precision = job
    words = ("--recipe", name, "--model", folder, "--target", target, "--precision", precision)
    answer = cli("build", *words, "--validate-tokens", tokens, "--allow-slower", "--out", out)
    assert answer.code == 0, answer.err
    built = manifest.verify(answer.path).content
    assert (built["name"], built["task"]) == (name, "none")
    report = json.loads((answer.path / "parity.json").read_text(encoding="utf-8"))
    assert report["metrics"]["overall"]["cosine_min"] >= LEAST[precision]
    chosen = recipe.read(name)
    library = SentenceTransformer(str(folder), device="cpu", local_files_only=True).float()
    library.prompts |= chosen.load.prompts
    with jexport.open_artifact(answer.path) as artifact:
        lowest = 1.0
        for use in ("encode", "encode_query", "encode_document"):
            own, theirs = getattr(artifact, use)(TEXTS), getattr(library, use)(TEXTS)
            assert own.shape == theirs.shape
            lowest = min(lowest, float(_cosines(own, theirs).min()))
    assert lowest >= LEAST[precision]
    if "JEXPORT_RECIPES" in os.environ and tokens == 256:
        row = {"name": name, "target": target, "precision": precision}
        row |= {"kind": _kind(folder), "cosine_min": report["metrics"]["overall"]["cosine_min"]}
        row["direct"] = lowest
        path = Path(os.environ["JEXPORT_RECIPES"]) / f"{name}.{target}.{precision}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row), encoding="utf-8")


def _cosines(one: Any, other: Any) -> Any:
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / norms


def _kind(folder: Path) -> str:
    """model_type, and the modules behind the first one."""
    config = folder / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8"))["model_type"] if config.is_file() else ""
    listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return ", ".join([kind or "static", *(one["type"].rsplit(".", 1)[-1] for one in listed[1:])])


@pytest.mark.parametrize("name", OFTEN)
def test_a_recipe_of_each_kind_builds(
    name: str, stand_in: Callable[[str], Path], cli: Any, tmp_path: Path
) -> None:
    check((name, "onnx", "fp32"), stand_in(name), cli, tmp_path, tokens=64)


@pytest.mark.rare
@pytest.mark.parametrize(("name", "target", "precision"), JOBS)
def test_every_recipe_builds(
    name: str,
    target: str,
    precision: str,
    stand_in: Callable[[str], Path],
    cli: Any,
    tmp_path: Path,
) -> None:
    check((name, target, precision), stand_in(name), cli, tmp_path, tokens=256)
