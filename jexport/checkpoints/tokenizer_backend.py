"""The tokenizer that AutoTokenizer makes of a checkpoint, as the files that an artifact carries.

transformers does not always run tokenizer.json as it is: the class that model_type or
tokenizer_class names may rebuild normaliser, pre-tokenizer or post-processor, and a checkpoint may
have a slow tokenizer's files only. What counts is the backend that comes out.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.artifacts.manifest import sha256_of, write_json
from jexport.checkpoints import keys
from jexport.checkpoints.transformer_files import (
    TOKENIZER_FILES,
    check_rows,
    optional_json,
    quiet_transformers,
    tokenizer_files,
)
from jexport.errors import TokenizerError, UnsupportedCheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
CONVERTED = (SETTINGS, "special_tokens_map.json")
"""Files beside a converted tokenizer.json; a vocabulary beside it might say something else."""

VOCABULARIES = (FILE, "*.model", "vocab*", "merges*", "*.spm", "*.bpe", "*.codes", "*.tiktoken")
"""What a tokenizer is made of. Without any transformers makes one of special tokens only."""

PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
"""What token ids depend on; padding and truncation belong to who saved the file last."""

CLASS_SETTINGS = (
    "auto_map",
    "backend",
    "is_local",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "add_bos_token",
    "add_eos_token",
    "do_lower_case",
    "add_prefix_space",
    "strip_accents",
    "tokenize_chinese_chars",
    "sp_model_kwargs",
    "legacy",
    "name_or_path",
    "special_tokens_map_file",
)
"""Settings that a class builds its backend from; the converted backend has them in itself."""

NO_LIMIT = 10**9
"""transformers writes 1e30 where a tokenizer has no limit."""


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """A checkpoint's tokenizer.

    Args:
        files: what goes into an artifact, tokenizer.json first, all in one folder.
        read: the checkpoint's own files that it was made of.
        open: the tokenizer of transformers that they were taken from.
        max_length: its own limit, 0 for none.
        chat_template: whether it has one.
        pads_left: whether it pads on the left.
    """

    files: tuple[Path, ...]
    read: tuple[Path, ...]
    open: Callable[[], Any]
    max_length: int
    chat_template: bool
    pads_left: bool


def take(
    home: Path,
    opening: Callable[[], Any],
    *,
    rows: int,
    do_lower_case: bool = False,
    as_stored: bool = True,
) -> Tokenizing:
    """Open a checkpoint's tokenizer and check it against the embedding table.

    Args:
        home: the folder of tokenizer.json or of what it is made of.
        opening: opens the tokenizer of transformers.
        rows: of the embedding table.
        do_lower_case: put Lowercase before its normaliser, as sentence-transformers does.
        as_stored: False where it is opened with arguments that its files do not have.

    Returns:
        Its `files` are the checkpoint's own where transformers runs them as they are, else new.

    Raises:
        TokenizerError: it cannot be opened, has no backend, or gives ids that the table lacks.
        UnsupportedCheckpointError: a setting of it that would change ids and is not honoured.
    """
    keys.check(keys.TOKENIZER, optional_json(home / SETTINGS), where=SETTINGS)
    path = home / FILE
    if path.is_file():  # first: a broken file is named better here than by transformers
        tokenizer_files(home, rows=rows)
    vocabularies = {path for name in VOCABULARIES for path in home.glob(name) if path.is_file()}
    if not vocabularies:
        raise TokenizerError(
            "the checkpoint has no tokenizer",
            evidence=f"{home}: no {FILE}, and no vocabulary that one could be made of",
            fix="save the tokenizer with transformers (tokenizer.save_pretrained) and add it",
        )
    stored = _stored(path)
    tokenizer, backend = _with_backend(opening, home)
    if do_lower_case:
        lower_first(backend)
    _check_segments(tokenizer, home)
    read = tuple(home / name for name in TOKENIZER_FILES if (home / name).is_file())
    parts = _parts(backend)
    check_rows(parts, rows)
    same = as_stored and stored == parts
    files = read if same else _written(home, tokenizer, backend)
    limit = tokenizer.model_max_length
    return Tokenizing(
        files=files,
        read=tuple(sorted({*read, *vocabularies})),
        open=lambda: tokenizer,
        max_length=int(limit) if 0 < limit < NO_LIMIT else 0,
        chat_template=getattr(tokenizer, "chat_template", None) is not None,
        pads_left=tokenizer.padding_side == "left",
    )


def _with_backend(opening: Callable[[], Any], home: Path) -> tuple[Any, Tokenizer]:
    """The tokenizer of transformers, opened, and its backend. Raises as `take`."""
    with quiet_transformers():
        tokenizer = opening()
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            "the checkpoint's tokenizer has no backend of the tokenizers library",
            evidence=f"{home}: transformers opens it as {type(tokenizer).__name__}",
            fix="save it with a class that has one (tokenizer.save_pretrained), and add its "
            "tokenizer.json",
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise UnsupportedCheckpointError(
            f"{SETTINGS}: 'split_special_tokens' is not supported",
            evidence="split_special_tokens = true",
            fix="remove the key, if special tokens in a text are to stay whole",
        )
    return tokenizer, backend


def lower_first(backend: Tokenizer) -> None:
    """Put Lowercase before a backend's normaliser, unless there is one in it.

    Source: sentence-transformers' Transformer with do_lower_case.

    Args:
        backend: changed in place.
    """
    from tokenizers import normalizers

    stored = backend.normalizer
    steps: list[Any] = [] if stored is None else [stored]
    if isinstance(stored, normalizers.Sequence):
        steps = [stored[place] for place in range(len(stored))]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _stored(path: Path) -> dict[str, Any] | None:
    """The parts of tokenizer.json, None without the file. Raises TokenizerError."""
    from tokenizers import Tokenizer

    if not path.is_file():
        return None
    try:
        return _parts(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises a bare Exception, whatever is wrong
        raise TokenizerError(
            "the checkpoint's tokenizer.json cannot be read",
            evidence=f"{path.parent}: {error!r}",
            fix="save the tokenizer with transformers (tokenizer.save_pretrained) and add it",
        ) from error


def _parts(backend: Tokenizer) -> dict[str, Any]:
    content = json.loads(backend.to_str())
    return {name: content.get(name) for name in PARTS}


def _check_segments(tokenizer: Any, home: Path) -> None:
    """Refuse a tokenizer that gives a text alone another segment than 0."""
    if "token_type_ids" not in tokenizer.model_input_names:
        return
    segments = tokenizer("a text")["token_type_ids"]
    if any(segments):
        raise UnsupportedCheckpointError(
            "the tokenizer puts parts of one text into different segments",
            evidence=f"{home}: token_type_ids of 'a text' are {segments}",
            fix="none: jexport exports graphs whose texts are all of segment 0",
        )


def _written(home: Path, tokenizer: Any, backend: Tokenizer) -> tuple[Path, ...]:
    """The backend as files in a folder of this process's own."""
    backend.no_padding()
    backend.no_truncation()
    content = json.loads(backend.to_str())
    settings = {
        key: value
        for key, value in optional_json(home / SETTINGS).items()
        if key not in CLASS_SETTINGS
    }
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "truncation_side": tokenizer.truncation_side,
        "padding_side": tokenizer.padding_side,
        "model_input_names": list(tokenizer.model_input_names),
    }
    if tokenizer.pad_token is not None:
        settings["pad_token"] = str(tokenizer.pad_token)
    return kept(content, settings, optional_json(home / CONVERTED[1]))


def kept(
    content: Mapping[str, Any],
    settings: Mapping[str, Any],
    special: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """A tokenizer's files in a folder of this process's own, gone when it ends.

    Args:
        content: of tokenizer.json.
        settings: of tokenizer_config.json.
        special: of special_tokens_map.json, which is not written without.

    Returns:
        The files, tokenizer.json first; the same for the same content.
    """
    folder = work_dir() / sha256_of([content, settings, special or {}])[:32]
    if not folder.is_dir():
        making = Path(tempfile.mkdtemp(dir=folder.parent))
        (making / FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        write_json(making / SETTINGS, settings)
        if special:
            write_json(making / CONVERTED[1], special)
        making.rename(folder)
    names = (FILE, SETTINGS, *(CONVERTED[1:] if special else ()))
    return tuple(folder / name for name in names)


def work_dir() -> Path:
    """A folder of this process for files that a checkpoint should have had, gone when it ends."""
    return _work_dir(os.getpid())


@functools.cache
def _work_dir(process: int) -> Path:
    """A folder for converted tokenizers, gone when this process ends; not when a fork of it does.

    process: the id of this process, so that a fork makes its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="jexport-tokenizers-"))

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
