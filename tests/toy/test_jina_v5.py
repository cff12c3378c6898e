"""Toys of jina-embeddings-v5-text: the same every time, and of the real ones' names and sizes."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from jexport.errors import TokenizerError
from jexport.toy import checkpoint, jina_v5

KINDS = jina_v5.LAYOUTS


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    first = checkpoint.write(tmp_path / "a", layout=kind)
    again = checkpoint.write(tmp_path / "b", layout=kind)
    other = checkpoint.write(tmp_path / "c", layout=kind, seed=1)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    differ = [name for name in names if (first / name).read_bytes() != (other / name).read_bytes()]
    assert {name.name for name in differ} == {"model.safetensors", "adapter_model.safetensors"}
    assert [one.name for one in sorted((first / "adapters").iterdir())] == [
        "classification",
        "clustering",
        "retrieval",
        "text-matching",
    ]


@pytest.mark.parametrize(
    ("kind", "parameters", "adapter"),
    [("jina-v5-small", 596_049_920, 20_185_088), ("jina-v5-nano", 211_766_016, 6_782_976)],
)
def test_full_size_is_the_real_ones(kind: str, parameters: int, adapter: int) -> None:
    """Qwen3-0.6B-Base and EuroBERT-210m, and adapters of 40.37 MB and 6.7 M, by the model cards."""
    model = jina_v5.size(kind, full_size=True)
    assert model.vocabulary is not None
    shapes = {"embed_tokens": (model.vocabulary, model.hidden), **jina_v5._matrices(model)}
    base = jina_v5._base(model, shapes, 0)
    assert sum(math.prod(shape) for shape, _ in base.values()) == parameters
    factors = jina_v5._adapter(model, "0")
    assert sum(math.prod(shape) for shape, _ in factors.values()) == adapter


@pytest.mark.rare
def test_full_size_is_written_without_filling_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        folder = checkpoint.write(tmp_path / "full", layout="jina-v5-nano", full_size=True)
        assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    finally:
        tracemalloc.stop()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_slice("embed_tokens.weight").get_shape() == [128_256, 768]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_put_around_a_text(kind: str, tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path / "toy", layout=kind)
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    opened = AutoTokenizer.from_pretrained(folder)
    for text in ("Query: a harbour, 12 ships!\n", "灯台", ""):
        ids = opened(text)["input_ids"]
        assert opened.decode(ids) == text
        assert not set(ids) & set(opened.all_special_ids)
        assert stored.decode(stored.encode(text).ids) == text
    assert opened.padding_side == "right"
    assert opened.pad_token_id == json.loads((folder / "config.json").read_text())["pad_token_id"]


def test_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    other = checkpoint.write(tmp_path / "v3") / "tokenizer.json"
    with pytest.raises(TokenizerError, match="does not fit"):
        checkpoint.write(tmp_path / "v5", layout="jina-v5-small", tokenizer=other)
    assert not (tmp_path / "v5").exists()
