"""StaticEmbedding against SentenceTransformer(folder): text to vector, without a build."""

from __future__ import annotations

import contextlib
import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from jexport.checkpoints import known_tasks, static_embedding
from jexport.errors import (
    CheckpointError,
    DeviceError,
    JexportError,
    TokenizerError,
    UnsupportedCheckpointError,
)
from jexport.runtime import Embedder, TextTokenizer
from jexport.types import WINDOW_TOKENS, LoadedModel

Open = Callable[..., LoadedModel]
Edit = Callable[..., None]
models = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("static_models.py"))))
TEXTS = ["the harbour at night", "SHIPS and Boats, 1923!", "", " ", "x <mask> y </s>", "é" * 40]


@contextlib.contextmanager
def embedder(model: LoadedModel) -> Iterator[Embedder]:
    with model.reference() as run:
        yield Embedder(
            tokenizer=TextTokenizer.open(
                model.tokenizer_files[0].parent, max_tokens=model.embedding.max_tokens
            ),
            runner=run,
            embedding=model.embedding,
            outputs=["last_hidden_state"],
        )


def compared(folder: Path, model: LoadedModel, texts: list[str] = TEXTS) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu").float()
    with embedder(model) as ours:
        for name in ("encode", "encode_query", "encode_document"):
            wanted = getattr(theirs, name)(texts)
            found = getattr(ours, name)(texts)
            assert found.shape == wanted.shape, name
            assert np.abs(found - wanted).max() <= 2e-6, name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return models.save_static(tmp_path / "saved", prompts=models.PROMPTS)


def test_as_sentence_transformers_saves_it(saved: Path, opened: Open) -> None:
    model = opened(saved)
    assert model.source.layout == "static_embedding"
    assert known_tasks(saved) == ("none",)
    assert model.embedding.dimension == models.WIDTH
    assert not model.embedding.contextual
    compared(saved, model)
    with embedder(model) as ours:
        assert not ours.encode([""]).any(), "ST gives zeros for a text without tokens"


def test_in_a_folder_of_its_own(saved: Path, opened: Open, edit_json: Edit) -> None:
    home = saved / "0_StaticEmbedding"
    home.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (saved / name).rename(home / name)
    modules = json.loads((saved / "modules.json").read_text())
    modules[0] |= {"path": home.name, "type": "sentence_transformers.models.StaticEmbedding"}
    (saved / "modules.json").write_text(json.dumps(modules))
    edit_json(saved / "config_sentence_transformers.json", truncate_dim=16)
    compared(saved, opened(saved))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("mapped", [False, True])
def test_as_model2vec_saves_it(
    dtype: torch.dtype, mapped: bool, tmp_path: Path, opened: Open
) -> None:
    folder = models.save_potion(tmp_path / "potion", dtype=dtype, mapped=mapped)
    compared(folder, opened(folder))


def test_a_text_has_no_limit_and_memory_has(saved: Path, opened: Open) -> None:
    text = "the harbour at night and ships " * 4000
    shapes: list[tuple[int, ...]] = []
    model = opened(saved)
    with embedder(model) as ours:
        inner = ours._run

        def noted(runner: Any, feeds: Any, output: str) -> Any:
            shapes.append(feeds["input_ids"].shape)
            return inner(runner, feeds, output)

        ours._run = noted  # type: ignore[method-assign]
        found = ours.encode([text, "boats"])
        assert ours.truncated == 0
    # In double precision: torch adds 50,000 rows up in float32, and is 5e-5 off.
    wanted = SentenceTransformer(str(saved), device="cpu").double().encode([text, "boats"])
    assert np.abs(found - wanted).max() <= 2e-6
    assert max(columns for _, columns in shapes) == WINDOW_TOKENS
    assert sum(columns for _, columns in shapes) > 2 * WINDOW_TOKENS


def test_a_limit_that_the_tokenizer_states(saved: Path, opened: Open) -> None:
    tokenizer = models.tokenizer()
    tokenizer.enable_truncation(7, direction="left")
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(saved / "tokenizer.json"))
    model = opened(saved)
    assert model.embedding.max_tokens == 7
    compared(saved, model, [*TEXTS, "one two three four five six seven eight nine"])


def test_matryoshka_where_it_is_stated(saved: Path, opened: Open, edit_json: Edit) -> None:
    (saved / "config.json").write_text('{"matryoshka_dimensions": [8, 16]}')
    assert opened(saved).embedding.matryoshka == (8, 16)


def _without_table(folder: Path) -> None:
    save_file({"other": torch.ones(3, 3)}, folder / "model.safetensors")


def _short_table(folder: Path) -> None:
    table = load_file(folder / "model.safetensors")["embedding.weight"]
    save_file({"embedding.weight": table[:40].contiguous()}, folder / "model.safetensors")


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_without_table, CheckpointError, "no table of vectors"),
        (_short_table, TokenizerError, "does not fit the embedding table"),
        (_no_tokenizer, TokenizerError, "tokenizer.json cannot be read"),
    ],
)
def test_what_is_broken_is_named(
    damage: Callable[[Path], None],
    error: type[JexportError],
    words: str,
    saved: Path,
    opened: Open,
) -> None:
    damage(saved)
    with pytest.raises(error, match=words):
        opened(saved)


def test_a_mapping_to_rows_that_are_not_there(tmp_path: Path, opened: Open) -> None:
    folder = models.save_potion(tmp_path / "potion")
    tensors = load_file(folder / "model.safetensors")
    tensors["mapping"][3] = 100
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="rows that the table does not have"):
        opened(folder).weights["embedding.weight"]()


def test_the_hf_runner_looks_up_on_the_cpu(saved: Path) -> None:
    with (
        pytest.raises(DeviceError, match="not looked up on 'cuda'"),
        static_embedding.runner(saved, "cuda"),
    ):
        pass


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("WordEmbeddings", "whole words by a Python word tokenizer"),
        ("BoW", "counts the words of a vocabulary"),
        ("SparseStaticEmbedding", "sparse vectors"),
        ("CLIPModel", "images and texts"),
    ],
)
def test_other_first_modules_are_refused_by_name(
    kind: str, words: str, saved: Path, opened: Open
) -> None:
    modules = json.loads((saved / "modules.json").read_text())
    modules[0]["type"] = f"sentence_transformers.models.{kind}"
    (saved / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedCheckpointError) as caught:
        opened(saved)
    assert kind in str(caught.value)
    assert words in str(caught.value)
