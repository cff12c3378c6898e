"""config.json, the tokenizer and the model card: broken, missing, of another model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from jexport.checkpoints import transformer_files
from jexport.errors import CheckpointError, TokenizerError
from jexport.recipe import LoadSpec
from jexport.stages import load
from jexport.types import LoadedModel

Open = Callable[..., LoadedModel]
Edit = Callable[..., None]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", "null", "\xff", "[" * 100_000])
def test_a_config_that_cannot_be_read_is_a_checkpoint_error(
    text: str | None, small_copy: Path, opened: Open
) -> None:
    path = small_copy / "config.json"
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"cannot read config\.json"):
        opened(small_copy)


def test_no_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    for name in (str(tmp_path / "gone"), "./gone", "gone", "~/gone/x/y", "a/b/c", "x/", ""):
        with pytest.raises(CheckpointError, match="no checkpoint folder") as caught:
            load.run(LoadSpec(model=name), task="none")
        assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": {}}',
        '{"model": {"vocab": {}}}',
        '{"model": {"vocab": 3}}',
        '{"model": {"vocab": {"a": "b"}}}',
        "[" * 100_000,
        '{"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": "x"}]}',
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused(
    text: str, small_copy: Path, opened: Open
) -> None:
    (small_copy / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        opened(small_copy, "separation")


def test_a_slow_tokenizer_alone_is_refused(small_copy: Path, opened: Open) -> None:
    (small_copy / "tokenizer.json").unlink()
    (small_copy / "sentencepiece.bpe.model").write_bytes(b"\n")
    with pytest.raises(TokenizerError):
        opened(small_copy)


def test_a_tokenizer_too_large_for_the_table_is_refused(small_copy: Path, opened: Open) -> None:
    path = small_copy / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() == 331
    tokenizer.add_tokens(["harbourmaster"])
    tokenizer.save(str(path))
    with pytest.raises(TokenizerError, match="does not fit the embedding table") as caught:
        opened(small_copy, "separation")
    assert "largest id is 331; the table has 331 rows" in caught.value.evidence


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_every_kind_of_tokenizer_is_counted(kind: str, tmp_path: Path) -> None:
    from tokenizers import models

    pieces = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    made = {
        "BPE": lambda: models.BPE(vocab=pieces, merges=[]),
        "WordPiece": lambda: models.WordPiece(vocab=pieces, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel(vocab=pieces, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([(piece, 0.0) for piece in pieces], unk_id=0),
    }[kind]()
    tokenizer = Tokenizer(made)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert transformer_files.tokenizer_files(tmp_path, rows=5) == (tmp_path / "tokenizer.json",)
    with pytest.raises(TokenizerError, match="does not fit"):
        transformer_files.tokenizer_files(tmp_path, rows=4)


def test_the_tokenizers_files_are_those_that_are_there(small_copy: Path, opened: Open) -> None:
    (small_copy / "special_tokens_map.json").write_text("{}")
    names = [path.name for path in opened(small_copy).tokenizer_files]
    assert names == ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def test_ids_are_the_tokenizers_own(small_copy: Path, opened: Open, texts: list[str]) -> None:
    direct = Tokenizer.from_file(str(small_copy / "tokenizer.json"))
    prompt = "Represent the document for retrieval: "
    wanted = [direct.encode(prompt + text).ids for text in texts]
    assert opened(small_copy, "retrieval.passage").tokenize_reference(texts) == wanted
    (cut,) = opened(small_copy, max_tokens=9).tokenize_reference([texts[0]])
    assert cut == [*direct.encode(texts[0]).ids[:8], 2]


def test_a_tokenizer_of_an_unknown_class_is_an_error_not_a_question(
    small_copy: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(
        small_copy / "tokenizer_config.json",
        tokenizer_class="MyTokenizer",
        auto_map={"AutoTokenizer": ["my_code.MyTokenizer", None]},
    )
    (small_copy / "my_code.py").write_text("raise SystemExit('this code must not run')\n")
    with pytest.raises(TokenizerError, match="transformers cannot open"):
        opened(small_copy).tokenize_reference(["a"])


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: mit\n---\n# Model\n", "mit"),
        ("---\nlicense: 'apache-2.0'\n---\n", "apache-2.0"),
        ("---\nlanguage: en\n---\nlicense: mit\n", "CC-BY-NC-4.0"),
        ("# Model\nlicense: mit\n", "CC-BY-NC-4.0"),
        ("", "CC-BY-NC-4.0"),
    ],
)
def test_the_licence_is_the_cards(card: str, licence: str, small_copy: Path, opened: Open) -> None:
    (small_copy / "README.md").write_text(card)
    source = opened(small_copy).source
    assert source.licence == licence
    assert ("README.md" in [file.path for file in source.files]) == (licence != "CC-BY-NC-4.0")
    assert opened(small_copy, licence="mine").source.licence == "mine"


def test_counts(small_copy: Path) -> None:
    config: dict[str, Any] = json.loads((small_copy / "config.json").read_text())
    assert transformer_files.count(config, "hidden_size") == 64
    assert transformer_files.count(config, "no_such_key", 3) == 3
    with pytest.raises(CheckpointError, match="no usable 'no_such_key'"):
        transformer_files.count(config, "no_such_key")


def test_quiet_is_put_back() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with transformer_files.quiet_transformers():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (
            logging.ERROR,
            False,
        )
    with contextlib.suppress(ValueError), transformer_files.quiet_transformers():
        raise ValueError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
