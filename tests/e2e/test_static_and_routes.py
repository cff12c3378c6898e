"""Static embeddings, uses and a Router's pair, built by the command line, beside the library."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import jexport
from jexport.artifacts import manifest
from jexport.errors import PairError
from jexport.serving.integrations.pair import Pair

HELPERS = Path(__file__).parents[1] / "checkpoints" / "static_models.py"
models = SimpleNamespace(**runpy.run_path(str(HELPERS)))
TEXTS = ["the harbour at night", "SHIPS and Boats, 1923!", "", "x <mask> y </s>"]
LONG = "ab cd " * 15_000


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = models.save_static(
        tmp_path_factory.mktemp("static") / "saved", prompts=models.PROMPTS
    )
    return folder


@pytest.mark.parametrize(
    ("target", "use"),
    [
        ("hf", ""),
        ("onnx", "query"),
        pytest.param("openvino", "document", marks=pytest.mark.rare),
    ],
)
def test_a_static_embedding(
    target: str, use: str, static: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    words = ["--use", use] if use else []
    built = cli(
        "build", "--model", static, "--task", "none", "--target", target, *words, "--out", tmp_path
    )
    assert built.code == 0, built.err
    theirs = SentenceTransformer(str(static), device="cpu")
    content = manifest.verify(built.path).content
    assert content["task"] == (f"none.{use}" if use else "none")
    assert built.path.parents[1].name == content["task"]
    assert content["embedding"].get("use", "") == use
    assert content["embedding"]["contextual"] is False
    with jexport.open_artifact(built.path) as ours:
        default = f"encode_{use}" if use else "encode"
        for mine, name in (
            ("encode", default),
            ("encode_query", "encode_query"),
            ("encode_document", "encode_document"),
        ):
            wanted = getattr(theirs, name)(TEXTS)
            assert np.abs(getattr(ours, mine)(TEXTS) - wanted).max() <= 2e-6
        wanted = getattr(theirs.double(), default)([LONG])
        assert np.abs(ours.encode([LONG]) - wanted).max() <= 2e-6
        assert ours.truncated == 0
    if target == "hf":
        opened = SentenceTransformer(str(built.path), device="cpu").double()
        assert np.abs(opened.encode(TEXTS) - theirs.encode(TEXTS)).max() <= 1e-12


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--target", "onnx", "--precision", "int8"], 17, "nothing to quantize"),
        (["--target", "vllm"], 22, "static embedding"),
        (["--target", "hf", "--use", "qery"], 41, "query, document, other"),
    ],
)
def test_what_is_refused(
    words: list[str], code: int, said: str, static: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    answer = cli("build", "--model", static, "--task", "none", *words, "--out", tmp_path)
    assert said in answer.err
    assert answer.code == code


def test_the_routes_of_a_router_are_a_pair(tmp_path: Path, cli: Callable[..., Any]) -> None:
    saved = models.save_router(tmp_path / "saved")
    theirs = SentenceTransformer(str(saved), device="cpu")
    words = ["build", "--model", saved, "--task", "none", "--target", "hf", "--out", tmp_path / "o"]
    queries, documents = (cli(*words, "--use", use).path for use in ("query", "document"))
    with Pair(queries, documents, options={}) as pair:
        assert np.abs(pair.embed_queries(TEXTS) - theirs.encode_query(TEXTS)).max() <= 2e-6
        assert np.abs(pair.embed_documents(TEXTS) - theirs.encode_document(TEXTS)).max() <= 2e-6
    with pytest.raises(PairError, match="swapped"):
        Pair(documents, queries, options={})
    with pytest.raises(PairError, match="not of the two routes"):
        Pair(documents, options={})
