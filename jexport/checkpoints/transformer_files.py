"""The files around the weights that every layout shares: config, pooling, prompts, tokenizer.

Source of the file layout: sentence-transformers 6.2 (modules.json, 1_Pooling/config.json, ...).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jexport.errors import CheckpointError, TokenizerError, UnsupportedCheckpointError

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
POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_lasttoken": "last",
}
NEW_POOLING_NAMES = {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and loading tables from transformers: jexport checks and reports itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path.name} of the checkpoint",
            evidence=f"{path.parent}: {error}",
            fix="give a folder that holds a whole checkpoint",
        ) from error
    return content


def optional_json(path: Path) -> dict[str, Any]:
    """The same, empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


def pooling(folder: Path) -> tuple[str, bool] | None:
    """Pooling mode and whether a Normalize module follows; None without modules.json.

    Raises UnsupportedCheckpointError for modules that jexport would otherwise leave out.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "cannot read modules.json", evidence=repr(error), fix="download the checkpoint again"
        ) from error
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UnsupportedCheckpointError(
            "this sentence-transformers model has modules that jexport does not export",
            evidence=f"modules.json lists: {', '.join(kinds)}",
            fix="supported: Transformer, Pooling and, last, Normalize",
        )
    settings = read_json(folder / paths[1] / "config.json")
    return _pooling_mode(settings), kinds[2:] == ["Normalize"]


def _pooling_mode(settings: Mapping[str, Any]) -> str:
    named = settings.get("pooling_mode")
    modes = [mode for key, mode in POOLING_MODES.items() if settings.get(key)]
    if isinstance(named, str):
        modes = [NEW_POOLING_NAMES.get(named, named)]
    if len(modes) != 1 or modes[0] not in POOLING_MODES.values():
        raise UnsupportedCheckpointError(
            "jexport does not have this pooling",
            evidence=f"1_Pooling/config.json asks for: {named or ', '.join(modes) or 'none'}",
            fix=f"supported, one at a time: {', '.join(POOLING_MODES.values())}",
        )
    if settings.get("include_prompt") is False:
        raise UnsupportedCheckpointError(
            "this model leaves its prompt out of the pooling, which jexport cannot do",
            evidence="1_Pooling/config.json: include_prompt = false",
            fix="use the model without a prompt",
        )
    return modes[0]


def tokenizer_files(folder: Path, *, rows: int) -> tuple[Path, ...]:
    """The tokenizer's files, tokenizer.json first, checked against the embedding table's rows.

    Raises TokenizerError when tokenizer.json is missing, broken or gives ids the table lacks.
    """
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
        top = max([*ids, *(token["id"] for token in content.get("added_tokens", []))])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(
            "the checkpoint's tokenizer.json cannot be read",
            evidence=f"{folder}: {error!r}",
            fix="save the tokenizer with transformers (tokenizer.save_pretrained) and add it",
        ) from error
    if top >= rows:
        raise TokenizerError(
            "the tokenizer does not fit the embedding table",
            evidence=f"its largest id is {top}; the table has {rows} rows (ids 0 to {rows - 1})",
            fix="give the tokenizer.json that belongs to these weights",
        )
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def reference_tokenizer(
    folder: Path, *, prompt: str, max_tokens: int, trust_remote_code: bool = False
) -> Callable[[list[str]], list[list[int]]]:
    """Token ids as transformers' AutoTokenizer makes them, prompt included, cut to max_tokens."""
    loaded: list[Any] = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        if not loaded:
            from transformers import AutoTokenizer

            loaded.append(
                AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            )
        ids: list[list[int]] = loaded[0](
            [prompt + text for text in texts], truncation=True, max_length=max_tokens
        )["input_ids"]
        return ids

    return tokenize


def length_limit(folder: Path, config: Mapping[str, Any]) -> int:
    """Tokens a text may have: what sentence-transformers would take, within what the table holds.

    Models of the RoBERTa family with learned positions use up pad_token_id + 1 of them.
    """
    limits = [int(config.get("max_position_embeddings") or 512)]
    rotary = config.get("position_embedding_type") == "rotary" or "rope_parameters" in config
    roberta = config.get("model_type") in ("xlm-roberta", "roberta", "camembert", "mpnet")
    if config.get("model_type") == "jina_embeddings_v3" or rotary or roberta:
        # jina-embeddings-v3 counts 8194 positions too, and its usable window is 8192.
        limits[0] -= int(config.get("pad_token_id") or 0) + 1
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        value = optional_json(folder / name).get(key)
        if isinstance(value, (int, float)) and 0 < value < 1e9:
            limits.append(int(value))
    return min(limits)


def default_prompt(folder: Path) -> str:
    """The prompt that sentence-transformers puts before every text by default, else ''."""
    settings = optional_json(folder / "config_sentence_transformers.json")
    name = settings.get("default_prompt_name")
    return str((settings.get("prompts") or {}).get(name, "")) if name else ""


def licence(folder: Path) -> str:
    """The `license:` line of README.md's front matter, else ''."""
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
