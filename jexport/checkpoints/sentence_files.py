"""The files that sentence-transformers adds: modules, pooling, prompts, length limit.

As versions 2 to 6.2 write them. An option that would change a vector and that jexport does not have
is refused, never left out. Knows no weight.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.checkpoints.transformer_files import count, is_there, optional_json
from jexport.errors import CheckpointError, UnsupportedCheckpointError

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
TRANSFORMER = tuple(f"sentence_{kind}_config.json" for kind in KINDS)
"""Names that the Transformer module's own file has had; the first that is there is read."""

MODULE_KINDS = ["Transformer", "Pooling", "Normalize"]
POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
NEW_POOLING_NAMES = {"lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}
"""Version 6 writes `pooling_mode` with these names instead of the flags above."""

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len", "last")
ROBERTA = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "roberta-prelayernorm",
           "xmod", "longformer", "luke", "ibert", "data2vec-text", "markuplm", "lilt")  # fmt: skip
"""Architectures whose learned positions begin at pad_token_id + 1 (transformers 5.23)."""


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """What follows the transformer. width: of its vectors, 0 where the file does not say.

    include_prompt: False leaves the prompt's tokens out of the pooling. files: what was read.
    """

    mode: str
    normalize: bool
    width: int = 0
    include_prompt: bool = True
    files: tuple[Path, ...] = ()


def pooling(folder: Path, *, own_transformer: bool = False) -> Pooling | None:
    """What modules.json and its modules' files say; None without modules.json.

    own_transformer: takes a Transformer class that is the checkpoint's own. Raises CheckpointError,
    and UnsupportedCheckpointError for a module that jexport would have to leave out.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    try:
        listed = [(str(m["type"]), str(m["path"])) for m in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {MODULES}", evidence=repr(error), fix="download the checkpoint again"
        ) from error
    kinds = [kind.rsplit(".", 1)[-1] for kind, _ in listed]
    strange = [kind for kind, _ in listed[own_transformer:]
               if not kind.startswith("sentence_transformers.")]  # fmt: skip
    if strange or kinds not in (MODULE_KINDS, MODULE_KINDS[:2]):
        raise _unsupported(
            "has modules that jexport does not export",
            evidence=f"{MODULES} lists: {', '.join(kind for kind, _ in listed) or 'none'}",
            fix="supported: Transformer, Pooling and, last, Normalize",
        )
    homes = [home for _, home in listed]
    if homes[0] not in ("", "."):
        raise _unsupported(
            "keeps its transformer in a folder of its own",
            evidence=f"{MODULES}: the Transformer is in '{homes[0]}'",
            fix="save it again with sentence-transformers 3 or newer",
        )
    if any(Path(home).is_absolute() or ".." in Path(home).parts for home in homes):
        raise CheckpointError(
            f"{MODULES} names a folder outside the checkpoint",
            evidence=", ".join(homes),
            fix="use a checkpoint from a source that you trust",
        )
    found = _pooling(folder, homes[1])
    if len(homes) == 2:
        return found
    last = folder / homes[2] / "config.json"
    _check_normalize(last)
    files = (*found.files, last) if is_there(last) else found.files
    return dataclasses.replace(found, normalize=True, files=files)


def _check_normalize(path: Path) -> None:
    """Raise UnsupportedCheckpointError unless it works on the sentence's vector.

    Version 6 can name another; a folder of an older one has no file.
    """
    settings = optional_json(path)
    names = {settings.get(f"module_{side}_name") for side in ("input", "output")}
    if names - {None, "sentence_embedding"}:
        raise _unsupported(
            "normalises something else than the sentence's vector",
            evidence=f"{path.parent.name}/{path.name}: {settings}",
            fix="use a Normalize module with its default names",
        )


def _pooling(folder: Path, home: str) -> Pooling:
    path = folder / home / "config.json"
    if not is_there(path):
        raise CheckpointError(
            "the Pooling module has no config.json",
            evidence=f"{path} is missing",
            fix="download the checkpoint again",
        )
    settings = optional_json(path)
    named = settings.get("pooling_mode")
    if named is None:
        # Without any flag sentence-transformers takes the mean, too.
        modes = [mode for key, mode in POOLING_MODES.items() if settings.get(key)] or ["mean"]
    else:
        modes = [NEW_POOLING_NAMES.get(str(mode), str(mode))
                 for mode in (named if isinstance(named, list) else [named])]  # fmt: skip
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise _unsupported(
            "pools in a way that jexport does not have",
            evidence=f"{home}/{path.name} asks for: {', '.join(modes) or 'nothing'}",
            fix=f"supported, one at a time: {', '.join(POOLINGS)}",
        )
    widths = [key for key in ("word_embedding_dimension", "embedding_dimension") if key in settings]
    return Pooling(
        mode=modes[0],
        normalize=False,
        width=count(settings, widths[0]) if widths else 0,
        include_prompt=settings.get("include_prompt") is not False,
        files=(folder / MODULES, path),
    )


def check_transformer(folder: Path) -> None:
    """Raise UnsupportedCheckpointError for a Transformer module that does more than run a model."""
    settings = _transformer_settings(folder)
    text = _table(_table(settings, "modality_config"), "text")
    plain = {
        "transformer_task": (settings.get("transformer_task"), "feature-extraction"),
        "module_output_name": (settings.get("module_output_name"), "token_embeddings"),
        "modality_config.text.method": (text.get("method"), "forward"),
        "modality_config.text.method_output_name": (
            text.get("method_output_name"),
            "last_hidden_state",
        ),
        "processing_kwargs": (settings.get("processing_kwargs") or None, None),
        "query_expansion": (settings.get("query_expansion"), None),
    }
    odd = [f"{key} = {said!r}" for key, (said, usual) in plain.items() if said not in (None, usual)]
    if settings.get("do_lower_case") and not _lowercases(folder):
        odd.append("do_lower_case = true, which tokenizer.json does not do by itself")
    if odd:
        raise _unsupported(
            "prepares its texts or states in a way that jexport does not have",
            evidence=f"{transformer_file(folder)}: {', '.join(odd)}",
            fix="save the model without these options",
        )


def transformer_file(folder: Path) -> str:
    """The name of the Transformer module's own file in this folder."""
    return next((name for name in TRANSFORMER if (folder / name).is_file()), TRANSFORMER[0])


def _transformer_settings(folder: Path) -> dict[str, Any]:
    return optional_json(folder / transformer_file(folder))


def _lowercases(folder: Path) -> bool:
    """Whether tokenizer.json lowers every text, so that asking for it once more changes nothing."""
    normalizer = _table(optional_json(folder / "tokenizer.json"), "normalizer")
    steps = normalizer.get("normalizers") or [normalizer]
    return any(
        step.get("type") == "Lowercase" or step.get("lowercase") is True
        for step in steps
        if isinstance(step, dict)
    )


def _table(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(
            f"'{key}' in a file of the checkpoint is no table",
            evidence=f"{key} = {value!r}",
            fix="download the checkpoint again",
        )
    return value or {}


def length_limit(folder: Path, config: Mapping[str, Any], *, jina: bool) -> int:
    """Tokens a text may have: what sentence-transformers would take, within what the table holds.

    Models of the RoBERTa family with learned positions use up pad_token_id + 1 of them.
    jina: jina-embeddings-v3 counts 8194 positions in the same way, and its usable window is 8192.
    """
    positions = config.get("max_position_embeddings")
    table = positions if isinstance(positions, int) and positions > 0 else 512
    if jina or config.get("model_type") in ROBERTA:
        pad = config.get("pad_token_id")
        table -= (pad if isinstance(pad, int) else 1) + 1
    stated = (
        _transformer_settings(folder).get("max_seq_length"),
        optional_json(folder / "tokenizer_config.json").get("model_max_length"),
    )
    for limit in stated:
        if isinstance(limit, (int, float)) and 0 < limit < 1e9:
            return min(table, int(limit))
    return table


def default_prompt(folder: Path) -> str:
    """The prompt that sentence-transformers puts before every text by default, else ''."""
    settings = optional_json(folder / PROMPTS)
    name = settings.get("default_prompt_name")
    if name is None:
        return ""
    known = {"query": "", "document": "", **_table(settings, "prompts")}
    if name not in known:
        raise CheckpointError(
            f"the checkpoint's default prompt '{name}' is not among its prompts",
            evidence=f"{PROMPTS} has: {', '.join(known) or 'none'}",
            fix="add it there, or set default_prompt_name to null",
        )
    return str(known[name])


def _unsupported(what: str, *, evidence: str, fix: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"this sentence-transformers model {what}", evidence=evidence, fix=fix
    )
