"""like: a tiny seeded checkpoint with exactly the files of a known embedder.

Which files, keys, modules, tokenizer and dtype each has stands in models/*.toml; nothing here knows
a model by name. Sizes are scaled down, numbers are drawn (`like_weights.py`): its vectors mean
nothing, but they behave.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.errors import UnsupportedCheckpointError, nearest
from jexport.toy import checkpoint, like_weights, tokenizer_kinds
from jexport.toy.tokenizer_kinds import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODELS = Path(__file__).parent / "models"
TOKENIZERS = "tokenizers.toml"
TYPES = "sentence_transformers.models."
"""What the hub's modules.json put before a module's class, before version 5.4."""

FLAGS = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)
"""Poolings in the order in which sentence-transformers wrote its flags: 4, later 6 of them."""

SPECIAL = ("bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token")
LAYOUTS = {
    "jina-embeddings-v3": "original",
    "jina-embeddings-v5-text-small": "jina-v5-small",
    "jina-embeddings-v5-text-nano": "jina-v5-nano",
}
"""Recipes whose model has a layout of its own in `checkpoint.py`."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of models/*.toml.

    Args:
        config: of its config.json; none for a table without a network.
        modules: classes of modules.json, in their order.
        tokenizer: how its tokenizer is made.
        tokenizer_config: content of tokenizer_config.json.
        table: the whole entry.
    """

    config: Mapping[str, Any]
    modules: tuple[str, ...]
    tokenizer: TokenizerSpec
    tokenizer_config: Mapping[str, Any]
    table: Mapping[str, Any]

    @property
    def width(self) -> int:
        """Of a token's vector."""
        sizes = (self.config.get(key) for key in ("hidden_size", "d_model", "dim"))
        return int(next((size for size in sizes if size), self.table.get("table", {}).get("width")))


def names() -> list[str]:
    """Models that there is a description of.

    Returns:
        Sorted; `write` takes each.
    """
    return sorted([*_entries(), *LAYOUTS])


def write(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a checkpoint; its folder appears whole or not at all.

    Args:
        folder: new or empty.
        name: one of `names`.
        seed: of every number.

    Returns:
        `folder`.

    Raises:
        UnsupportedCheckpointError: there is no description of that name.
        DiskFullError, OutputPathError: the folder cannot be written, or is not empty.
    """
    if name in LAYOUTS:
        return checkpoint.write(folder, layout=LAYOUTS[name], seed=seed)
    model = read(name)
    with checkpoint.whole_folder(folder) as work:
        tokenizer = tokenizer_kinds.make(model.tokenizer)
        config = _config(model, tokenizer)
        home = work / model.table.get("home", "")
        home.mkdir(exist_ok=True)
        _write_tokenizer(home, model, tokenizer)
        _write_modules(work, model)
        if config:
            _write_json(work / "config.json", config)
        like_weights.write(work, home, _weights(model, tokenizer), seed)
    return folder


def read(name: str) -> Model:
    """The description of one model.

    Args:
        name: one of `names`, without those of LAYOUTS.

    Returns:
        The description.

    Raises:
        UnsupportedCheckpointError: there is none of that name.
    """
    entries = _entries()
    if name not in entries:
        raise UnsupportedCheckpointError(
            f"toy: there is no model '{name:.80}' to be like",
            evidence=f"{len(names())} models are described; `jexport recipe list` shows them",
            fix=nearest(name, names()),
        )
    entry = _merged(entries, name)
    tokenizer = _merged(_tables(MODELS / TOKENIZERS), entry["tokenizer"])
    spec: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in tokenizer["spec"].items()
    }
    return Model(
        config=entry.get("config", {}),
        modules=tuple(entry["modules"]),
        tokenizer=TokenizerSpec(**spec),
        tokenizer_config={**tokenizer["config"], **entry.get("tokenizer_config", {})},
        table=entry,
    )


@cache
def _entries() -> dict[str, dict[str, Any]]:
    """Every model's own table by its name."""
    files = sorted(path for path in MODELS.glob("*.toml") if path.name != TOKENIZERS)
    return {name: entry for path in files for name, entry in _tables(path).items()}


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _merged(entries: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """An entry over the one that it is based on, table by table; an empty one takes all away."""
    own = dict(entries[name])
    base = own.pop("base", None)
    return own if base is None else _over(_merged(entries, base), own)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        result[key] = _over(below[key], value) if both and value else value
    return result


def _config(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json, with what the tokenizer decides: rows, and the ids of special tokens."""
    if not model.config:
        return {}
    ids = {
        key: tokenizer.token_to_id(token) for key, token in model.table.get("token_ids", {}).items()
    }
    rows = {"vocab_size": _rows(tokenizer)} if "StaticEmbedding" not in model.modules else {}
    return {"_name_or_path": model.table["hub"], **model.config, **ids, **rows}


def _rows(tokenizer: Tokenizer) -> int:
    """Rows of the embedding table: a multiple of 8, as tables are padded."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    return -(-(1 + max(ids)) // 8) * 8


def _weights(model: Model, tokenizer: Tokenizer) -> like_weights.Weights:
    table = model.table
    return like_weights.Weights(
        file=table.get("weights", "model.safetensors"),
        dtype=table.get("dtype", "float32"),
        architecture=table.get("class", "AutoModel"),
        shards=table.get("shards", 1),
        position_ids=table.get("position_ids", False),
        heads=table.get("heads", {}),
        table=table.get("table", {}).get("name", ""),
        rows=_rows(tokenizer),
        width=model.width,
        dense=tuple(
            like_weights.Projection(folder=folder, **sizes)
            for folder, sizes in _projections(model).items()
        ),
    )


def _projections(model: Model) -> dict[str, dict[str, Any]]:
    """Of each Dense module, by its folder: sizes in and out, and whether it has a bias."""
    width, sizes = model.width, {}
    folders = [path for kind, path in _homes(model) if kind == "Dense"]
    for folder, settings in zip(folders, model.table.get("dense", ()), strict=True):
        sizes[folder] = {"inputs": width, "outputs": settings["out"], "bias": settings["bias"]}
        width = settings["out"]
    return sizes


def _homes(model: Model) -> list[tuple[str, str]]:
    """Class and folder of each module."""
    first, *rest = model.modules
    return [(first, model.table.get("home", "")), *((k, f"{n}_{k}") for n, k in enumerate(rest, 1))]


def _write_modules(folder: Path, model: Model) -> None:
    """modules.json, the modules' own files, and what sentence-transformers keeps beside it."""
    table = model.table
    homes = _homes(model)
    listed = [
        {"idx": number, "name": str(number), "path": home, "type": TYPES + kind}
        for number, (kind, home) in enumerate(homes)
    ]
    _write_json(folder / "modules.json", listed)
    dense = iter(table.get("dense", ()))
    for kind, home in homes[1:]:
        (folder / home).mkdir()
        if kind == "Pooling":
            _write_json(folder / home / "config.json", _pooling(model))
        elif kind == "Dense":
            sizes, settings = _projections(model)[home], next(dense)
            content = {"in_features": sizes["inputs"], "out_features": sizes["outputs"]}
            content |= {"bias": sizes["bias"], "activation_function": settings["activation"]}
            _write_json(folder / home / "config.json", content)
    settings = dict(table.get("settings", {}))
    if "prompts" in settings:
        settings["default_prompt_name"] = None
    if settings:
        _write_json(folder / "config_sentence_transformers.json", settings)
    if "transformer" in table:
        name = table.get("transformer_file", "sentence_bert_config.json")
        _write_json(folder / name, table["transformer"])


def _pooling(model: Model) -> dict[str, Any]:
    """1_Pooling/config.json: 4 flags, 6 of them, or 6 and what becomes of the prompt (7)."""
    mode, number = model.table["pooling"]["mode"], model.table["pooling"]["flags"]
    name = {"cls": "cls_token", "mean": "mean_tokens"}.get(mode, mode)
    flags = {f"pooling_mode_{flag}": flag == name for flag in FLAGS[:number]}
    prompt = {"include_prompt": True} if number > len(FLAGS) else {}
    return {"word_embedding_dimension": model.width, **flags, **prompt}


def _write_tokenizer(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """tokenizer.json, its settings, and the files of a slow tokenizer that are text."""
    length = model.table.get("truncation", 0)
    if length:  # whoever saved it last: every reader has to set its own
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
    content = f"{tokenizer.to_str(pretty=True)}\n"
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    config = dict(model.tokenizer_config)
    config["added_tokens_decoder"] = {
        str(number): token.__getstate__()
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    special = {key: config[key] for key in (*SPECIAL, "unk_token") if key in config}
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    stored = json.loads(content)["model"]
    if stored["type"] == "WordPiece":
        vocabulary = sorted(stored["vocab"], key=stored["vocab"].get)
        (folder / "vocab.txt").write_text("\n".join([*vocabulary, ""]), encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
