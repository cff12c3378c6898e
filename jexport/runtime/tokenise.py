"""Text -> token ids -> padded batch, with the `tokenizers` library alone.

The padding and truncation that a tokenizer.json carries are switched off: they belong to whoever
saved it last (all-MiniLM-L6-v2 pads everything to 128). Truncation here gives the same ids as
transformers' `truncation=True`. Knows no graph and no pooling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jexport.errors import TextInputError, TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TEXTS_PER_CALL = 256
"""An Encoding keeps about 100 bytes a token until its ids are taken: 800 KiB for 8,192 tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenOffsets:
    """The tokens of one text and where each begins.

    Args:
        ids: token ids, special tokens included.
        starts: int64 [tokens], the character (not the byte) of the text where the token's own text
            begins.
        special: bool [tokens], True for a token that the tokenizer added and no character stands
            for; its start means nothing.
    """

    ids: list[int]
    starts: NDArray[np.int64]
    special: NDArray[np.bool_]


class TextTokenizer:
    """A checkpoint's tokenizer with a length limit: `max_tokens`, special tokens included.

    cut: the end that truncation shortens, 'right' or 'left'.
    """

    def __init__(self, backend: Tokenizer, *, max_tokens: int, pad_id: int, cut: str) -> None:
        """Take a `tokenizers.Tokenizer` without padding and truncation; `open` makes one.

        cut: the end that truncation shortens, 'right' or 'left'.
        Raises TokenizerError when the limit leaves no room beside the special tokens.
        """
        self.max_tokens = max_tokens
        self.pad_id = pad_id
        self._backend = backend
        self.cut = cut
        self._head, self._tail = _special_counts(backend)
        if max_tokens <= self._head + self._tail:
            raise TokenizerError(
                f"tokenizer: a limit of {max_tokens} tokens leaves no room for text",
                evidence=f"each text takes {self._head + self._tail} special tokens",
                fix="set max_tokens in the recipe to the model's own limit",
            )

    @classmethod
    def open(cls, folder: Path, *, max_tokens: int) -> TextTokenizer:
        """Open tokenizer.json; the pad token is named by the json files beside it.

        Args:
            folder: that has the files.
            max_tokens: of the model, special tokens included.

        Returns:
            The tokenizer; nothing that the file says of padding and length holds.

        Raises:
            TokenizerError: tokenizer.json is missing or broken, a json file beside it is broken,
                or no file names a pad token that the vocabulary has.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                "tokenizer: tokenizer.json is missing",
                evidence=f"{folder} has no such file",
                fix="save the checkpoint's fast tokenizer there, or build the artifact again",
            )
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception, whatever is wrong
            raise _broken(path, error) from error
        stored_padding, stored_truncation = backend.padding, backend.truncation
        backend.no_padding()
        backend.no_truncation()
        settings = _read_json(folder / "tokenizer_config.json")
        pad_id = _pad_id(backend, folder, settings, stored_padding)
        cut = settings.get("truncation_side") or (stored_truncation or {}).get("direction", "right")
        return cls(backend, max_tokens=max_tokens, pad_id=pad_id, cut=str(cut).lower())

    def token_ids(self, texts: Sequence[str], *, first_index: int = 0) -> list[list[int]]:
        """Token ids of each text, special tokens included, never truncated.

        Args:
            texts: each a str that has a UTF-8 form.
            first_index: the number that error messages give the first text.

        Returns:
            The ids of each text.

        Raises:
            TextInputError: a text is anything else; the text is named.
        """
        check_texts(texts, first_index=first_index)
        ids: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            part = list(texts[start : start + _TEXTS_PER_CALL])
            try:
                # Not `encode_batch`: no offsets are needed, and this one does not keep them.
                encodings = self._backend.encode_batch_fast(part)
            except TypeError as error:
                raise _unreadable(part, first_index + start) from error
            ids.extend(encoding.ids for encoding in encodings)
        return ids

    def model_ids(self, texts: Sequence[str], *, prefix: str = "") -> list[list[int]]:
        """Token ids of each text as a model is given them.

        Args:
            texts: as in `token_ids`.
            prefix: put before each text; what is too long together is truncated.

        Returns:
            The ids of each text, at most `max_tokens`.

        Raises:
            TextInputError: as `token_ids`.
        """
        check_texts(texts)
        return [self.truncate(ids) for ids in self.token_ids([prefix + text for text in texts])]

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt takes at the start of a text, the leading special ones included.

        Source: `_get_prompt_length` of sentence-transformers' Transformer: the tokens of the prompt
        alone, less one where the last of them is special.

        Args:
            prompt: the text that goes before others.

        Returns:
            The number of tokens.
        """
        ids = self.model_ids([prompt])[0]
        added = self._backend.get_added_tokens_decoder()
        closed = bool(ids) and ids[-1] in added and added[ids[-1]].special
        return len(ids) - closed

    def offsets(self, text: str) -> TokenOffsets:
        """Token ids of one text and where each token begins; not truncated.

        Offsets are characters of the text as given, before the tokenizer normalises it. Many
        tokenizers count the space before a word as part of its token; here such a token begins at
        the word.

        Args:
            text: as in `token_ids`.

        Returns:
            The tokens, special ones included.

        Raises:
            TextInputError: as `token_ids`.
        """
        check_texts([text])
        try:
            encoding = self._backend.encode(text)
        except TypeError as error:
            raise _unreadable([text], 0) from error
        starts = [_first_visible(text, start, end) for start, end in encoding.offsets]
        return TokenOffsets(
            ids=encoding.ids,
            starts=np.array(starts, dtype=np.int64),
            special=np.array(encoding.special_tokens_mask, dtype=np.bool_),
        )

    def truncate(self, ids: list[int]) -> list[int]:
        """Cut a text's ids: tokens of the text are dropped, the special tokens stay.

        Args:
            ids: of one text, special tokens included.

        Returns:
            At most `max_tokens` ids; `ids` itself where they are no more.
        """
        if len(ids) <= self.max_tokens:
            return ids
        end = len(ids) - self._tail
        space = self.max_tokens - self._head - self._tail
        kept = ids[end - space : end] if self.cut == "left" else ids[self._head :][:space]
        return ids[: self._head] + kept + ids[end:]

    def pad(
        self, batch: Sequence[Sequence[int] | NDArray[Any]], *, shape: tuple[int, int] = (0, 0)
    ) -> dict[str, NDArray[np.int64]]:
        """A batch of texts as a model takes it, padded on the right.

        Args:
            batch: token ids of each text.
            shape: at least so many rows and columns; rows too many are the last one again.

        Returns:
            `input_ids` and `attention_mask`, int64 [rows, longest]. There is always at least one
            column, since engines refuse an empty axis.
        """
        filled = list(batch)
        filled += filled[-1:] * (shape[0] - len(batch))
        lengths = np.array([len(ids) for ids in filled], dtype=np.int64)
        longest = max(1, shape[1], int(lengths.max(initial=0)))
        real = np.arange(longest) < lengths[:, None]
        input_ids = np.full(real.shape, self.pad_id, dtype=np.int64)
        if filled:
            input_ids[real] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in filled])
        return {"input_ids": input_ids, "attention_mask": real.astype(np.int64)}


def check_texts(texts: Sequence[Any], *, first_index: int = 0) -> None:
    """Refuse what is no text: `tokenizers` takes a tuple for a pair, and a list for split words.

    Args:
        texts: to be looked at.
        first_index: the number that error messages give the first text.

    Raises:
        TextInputError: a text is not a str; its number is named.
    """
    for index, text in enumerate(texts, first_index):
        if not isinstance(text, str):
            raise TextInputError(
                f"text {index} is not a str",
                evidence=f"text {index} is {type(text).__name__}: {text!r:.80}",
                fix="pass each text as a str (decode bytes, drop missing values)",
            )


def _unreadable(texts: Sequence[str], first_index: int) -> TextInputError:
    """The error for the first text that cannot be UTF-8: a lone surrogate."""
    for index, text in enumerate(texts, first_index):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            near = text[max(0, error.start - 20) : error.start + 20]
            return TextInputError(
                f"text {index} cannot be encoded as UTF-8",
                evidence=f"character {error.start} is a lone surrogate, in {near!a}",
                fix="decode the source with its true encoding, or with errors='replace'",
            )
    return TextInputError(
        "the tokenizer cannot take these texts",
        evidence=f"texts {first_index} to {first_index + len(texts) - 1}",
        fix="report this as a bug, with the texts",
    )


def _first_visible(text: str, start: int, end: int) -> int:
    """Where a token's own text begins: past leading white space, unless it is nothing else."""
    piece = text[start:end]
    leading = len(piece) - len(piece.lstrip())
    return start if leading == len(piece) else start + leading


def _special_counts(backend: Tokenizer) -> tuple[int, int]:
    """How many special tokens stand before and after a text."""
    special = backend.encode("a").special_tokens_mask
    if all(special):
        raise TokenizerError(
            "tokenizer: a letter gives no token",
            evidence="the text 'a' encodes to special tokens only",
            fix="add an unknown token to tokenizer.json's model",
        )
    return special.index(0), special[::-1].index(0)


def _pad_id(
    backend: Tokenizer,
    folder: Path,
    settings: Mapping[str, Any],
    stored_padding: Mapping[str, Any] | None,
) -> int:
    """The pad token: tokenizer_config.json's, else config.json's, else tokenizer.json's own.

    Which id stands in a padded place matters: RoBERTa counts positions from it.
    """
    token = settings.get("pad_token")
    if isinstance(token, Mapping):  # older files keep an AddedToken here
        token = token.get("content")
    if isinstance(token, str):
        pad_id = backend.token_to_id(token)
        evidence = f"tokenizer_config.json names {token!r}, which the vocabulary does not have"
    else:
        pad_id = _read_json(folder / "config.json").get("pad_token_id")
        if pad_id is None and stored_padding is not None:
            pad_id = stored_padding["pad_id"]
        evidence = (
            f"no pad_token in {folder / 'tokenizer_config.json'}, no pad_token_id in config.json"
        )
    if isinstance(pad_id, int) and pad_id >= 0:
        return pad_id
    raise TokenizerError(
        "tokenizer: no pad token",
        evidence=evidence,
        fix="name a token of the vocabulary as pad_token in tokenizer_config.json",
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _broken(path, error) from error
    if not isinstance(content, dict):
        raise _broken(path, TypeError(f"expected an object, found {type(content).__name__}"))
    return content


def _broken(path: Path, error: Exception) -> TokenizerError:
    return TokenizerError(
        f"tokenizer: {path.name} cannot be read",
        evidence=f"{path}: {error}",
        fix="fetch the file again, or build the artifact again",
    )
