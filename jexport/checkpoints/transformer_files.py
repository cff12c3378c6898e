"""The files around the weights as transformers writes them: config, tokenizer, model card.

Knows no layout; what sentence-transformers adds is in sentence_files.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jexport.errors import (
    CheckpointError,
    JexportError,
    TokenizerError,
    UnsupportedCheckpointError,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)


OLD_NAMES = {"nomic_bert": {"hidden_size": "n_embd"}}
"""Keys of config.json from before transformers had the architecture, by model_type."""

PROJECTED = {"embedding_gemma2_text": "embedding_dim"}
"""Key of the width that a model's last layer projects its hidden states to, by model_type."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, tables and warnings from transformers: jexport checks what it loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint file.

    Args:
        path: of the file; its name is in the error.

    Returns:
        The object, its values unchecked.

    Raises:
        CheckpointError: in place of OSError and ValueError: it is missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {path.name} of the checkpoint",
            evidence=f"{path.parent}: {error}",
            fix="give a folder that holds a whole checkpoint",
        ) from error
    return content


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that a checkpoint may lack.

    Args:
        path: of the file.

    Returns:
        The object, its values unchecked; empty when there is no such file.

    Raises:
        CheckpointError: the file is unreadable or no JSON object.
    """
    return read_json(path) if is_there(path) else {}


def is_there(path: Path) -> bool:
    """Whether a file is there that a checkpoint names.

    Args:
        path: whatever a file of the checkpoint says; it may be longer than any path can be.

    Returns:
        False for a folder, too, and for a name that no file can have.
    """
    return os.path.isfile(path)  # Path.is_file raises for one that is too long


def count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least 1 from config.json.

    Args:
        config: its content.
        key: under which it stands.
        default: where the key is missing; None for a key that has to be there.

    Returns:
        The number.

    Raises:
        CheckpointError: it is missing, below 1 or no whole number.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json has no usable '{key}'",
            evidence=f"it says {key} = {value!r}" if key in config else f"it has no key '{key}'",
            fix="give the config.json that belongs to these weights",
        )
    return value


def width_and_rows(config: Mapping[str, Any]) -> tuple[int, int]:
    """Width of the hidden states and rows of the embedding table.

    Some architectures write them under names of their own (DistilBERT's `dim`), which transformers
    knows.

    Args:
        config: of the model.

    Returns:
        Width, rows.

    Raises:
        CheckpointError: one of them is missing or no whole number of at least 1.
        UnsupportedCheckpointError: the config is of a model of several modalities.
    """
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    names = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    if isinstance(config.get("text_config"), Mapping) and "hidden_size" not in {**names, **config}:
        raise _of_several_modalities(config)
    names = {**names, **OLD_NAMES.get(kind, {})}
    hidden, rows = (
        key if key in config else names.get(key, key) for key in ("hidden_size", "vocab_size")
    )
    return count(config, PROJECTED.get(kind, hidden)), count(config, rows)


def _of_several_modalities(config: Mapping[str, Any]) -> UnsupportedCheckpointError:
    """The error for a model that takes images or sound beside texts: its text part is a model."""
    parts = sorted(key for key in config if key.endswith("_config"))
    stated = config["text_config"].get("model_type", "its text_config's")
    return UnsupportedCheckpointError(
        f"this is a model of several modalities, '{config.get('model_type')}'",
        evidence=f"config.json has {', '.join(parts)}, and no sizes of its own",
        fix=f"save its text model alone (model_type {stated!r}): model.language_model."
        "save_pretrained(FOLDER), with its tokenizer and the modules of sentence-transformers",
    )


def check_rows(parts: Mapping[str, Any], rows: int) -> None:
    """Refuse a tokenizer with an id that has no row in the embedding table.

    Args:
        parts: `model` and `added_tokens` (none when it lacks) as in tokenizer.json.
        rows: of the table.

    Raises:
        TokenizerError: the largest id has no row.
    """
    vocabulary = parts["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
    top = int(max([*ids, *(token["id"] for token in parts.get("added_tokens") or ())]))
    if top >= rows:
        raise TokenizerError(
            "the tokenizer does not fit the embedding table",
            evidence=f"its largest id is {top}; the table has {rows} rows (ids 0 to {rows - 1})",
            fix="give the tokenizer.json that belongs to these weights",
        )


def tokenizer_files(folder: Path, *, rows: int) -> tuple[Path, ...]:
    """The tokenizer's files, checked against the embedding table's rows.

    Args:
        folder: of tokenizer.json.
        rows: of the table.

    Returns:
        Those of TOKENIZER_FILES that are there, tokenizer.json first.

    Raises:
        TokenizerError: tokenizer.json is missing, broken or gives ids that the table lacks.
    """
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_rows(content, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(
            "the checkpoint's tokenizer.json cannot be read",
            evidence=f"{folder}: {error!r}",
            fix="save the tokenizer with transformers (tokenizer.save_pretrained) and add it",
        ) from error
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def reference_tokenizer(
    open_tokenizer: Callable[[], Any], *, prompt: str, max_tokens: int
) -> Callable[[list[str]], list[list[int]]]:
    """Token ids as transformers makes them, prompt included.

    Args:
        open_tokenizer: opens it; called once, when the first text is asked for.
        prompt: put before each text.
        max_tokens: longer texts are cut to it, special tokens included.

    Returns:
        Texts -> token ids, a list each, without padding.
    """
    loaded: list[Any] = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        with quiet_transformers():
            if not loaded:
                loaded.append(open_tokenizer())
            encoded = loaded[0](
                [prompt + text for text in texts], truncation=True, max_length=max_tokens
            )
        return [list(ids) for ids in encoded["input_ids"]]

    return tokenize


def auto_tokenizer(
    folder: Path, *, trust_remote_code: bool = False, arguments: Mapping[str, Any] | None = None
) -> Any:
    """What AutoTokenizer makes of a folder.

    Args:
        folder: of the tokenizer's files.
        trust_remote_code: whether code that auto_map names may run.
        arguments: of AutoTokenizer's own, such as `add_prefix_space`.

    Returns:
        A tokenizer of transformers.

    Raises:
        TokenizerError: it cannot be opened.
    """
    from transformers import AutoTokenizer

    try:
        # Never left to its default: that asks on the terminal whether to run the code it found.
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **(arguments or {})
        )
    except JexportError:
        raise
    except Exception as error:  # tokenizers and transformers share no error of their own
        raise TokenizerError(
            "transformers cannot open the checkpoint's tokenizer",
            evidence=f"{folder}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            fix="save the tokenizer with transformers (tokenizer.save_pretrained) and add it",
        ) from error


def licence(folder: Path) -> str:
    """What a model card states as its licence.

    Args:
        folder: of README.md.

    Returns:
        The `license:` line of its front matter, without quotes; '' without one.
    """
    path = folder / "README.md"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip().strip("'\"")
    return ""
