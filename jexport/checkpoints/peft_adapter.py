"""A PEFT adapter at the root of a checkpoint: plain LoRA, as a delta of each weight it adapts.

sentence-transformers opens a folder with adapter_config.json as adapter and base together. The base
is in the same folder, in another one, or on a hub. Everything but plain LoRA is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.checkpoints import hub, keys, shards
from jexport.checkpoints.transformer_files import count, read_json
from jexport.errors import AdapterError, CheckpointError, UnsupportedCheckpointError
from jexport.types import LowRank

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter whose base was located.

    Args:
        config: adapter_config.json.
        base: folder of config.json and the base's weights.
        files: the adapter's own files.
        factors: by module name, its matrices by side, 'A' and 'B': name in the file, and entry.
    """

    config: Mapping[str, Any]
    base: Path
    files: tuple[Path, ...]
    factors: Mapping[str, Mapping[str, tuple[str, shards.Entry]]]


def find(home: Path) -> PeftAdapter | None:
    """The adapter in a folder, its base located: on a hub, it is downloaded.

    Args:
        home: that of the Transformer module, or the checkpoint's own.

    Returns:
        The adapter; None where there is no adapter_config.json.

    Raises:
        UnsupportedCheckpointError: it is more than plain LoRA.
        AdapterError: a matrix of it is missing.
        CheckpointError: a file of it, or its base, is missing or broken.
        HubError: its base is on a hub that cannot be reached.
    """
    path = home / CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    keys.check(keys.ADAPTER, config, where=CONFIG)
    weights = next((home / name for name in WEIGHTS if (home / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            "the adapter has no weights",
            evidence=f"{home} has {CONFIG}, and neither {' nor '.join(WEIGHTS)}",
            fix="download the checkpoint again",
        )
    return PeftAdapter(
        config=config,
        base=_base(home, config),
        files=(path, weights),
        factors=_factors(weights),
    )


def _base(home: Path, config: Mapping[str, Any]) -> Path:
    """Where the base's files are: beside the adapter, in a folder, or on a hub."""
    if (home / "config.json").is_file():
        return home
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        folder = Path(named).expanduser()
        if (folder / "config.json").is_file():
            return folder
        if named.count("/") == 1 and all(named.split("/")) and not named.startswith((".", "~")):
            # sentence-transformers takes the newest commit; the manifest has its files' digests.
            return hub.fetch(named, "", hub.WEIGHTS_AND_CONFIG)[0]
    raise CheckpointError(
        "the adapter's base model is not here",
        evidence=f"{CONFIG}: base_model_name_or_path = {named!r:.200}, which is no folder and no "
        "hub id; there is no config.json beside the adapter",
        fix="put the base's config.json and weights into the adapter's folder, or merge the "
        "adapter (merge_and_unload) and save the model whole",
    )


def _factors(weights: Path) -> dict[str, dict[str, tuple[str, shards.Entry]]]:
    factors: dict[str, dict[str, tuple[str, shards.Entry]]] = {}
    for name, entry in shards.entries([weights]).items():
        matched = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if matched is None:
            raise UnsupportedCheckpointError(
                "the adapter has more than LoRA's matrices",
                evidence=f"{weights.name}: {name}",
                fix="merge it with peft (merge_and_unload), and save the model whole",
            )
        factors.setdefault(matched["module"], {})[matched["side"]] = (name, entry)
    lacking = sorted(module for module, sides in factors.items() if len(sides) < 2)
    if lacking or not factors:
        raise AdapterError(
            "the adapter was not saved whole",
            evidence=f"one matrix of two: {shards.describe(lacking) or 'there is none at all'}",
            fix="give an adapter whose file has lora_A and lora_B of every module",
        )
    return factors


def matrices(adapter: PeftAdapter, names: Iterable[str]) -> dict[str, LowRank]:
    """The delta of each weight, under the weight's own name in the base's file.

    Args:
        adapter: as `find` gives it.
        names: of the base's weights; they may have a prefix (`bert.`) that the adapter has not.

    Returns:
        By weight name; a pooler's, which no embedding depends on, may be left out.

    Raises:
        AdapterError: a module without a base weight, or of another rank than the config says.
    """
    known = list(names)
    adapted: dict[str, LowRank] = {}
    strangers: list[str] = []
    for module, sides in adapter.factors.items():
        weight = f"{module}.weight"
        place = next((n for n in known if n == weight or n.endswith(f".{weight}")), None)
        if place is None:
            if not module.startswith("pooler."):  # no part of an embedding
                strangers.append(module)
            continue
        rank = int(_pattern(adapter.config, "rank_pattern", module) or count(adapter.config, "r"))
        alpha = _pattern(adapter.config, "alpha_pattern", module)
        alpha = adapter.config.get("lora_alpha", 8) if alpha is None else alpha
        (up, up_entry), (down, down_entry) = sides["B"], sides["A"]
        if up_entry.shape[-1:] != (rank,) or down_entry.shape[:1] != (rank,):
            raise AdapterError(
                f"adapter matrix of '{module}' has another rank than {CONFIG} says",
                evidence=f"lora_B {up_entry.shape}, lora_A {down_entry.shape}, r {rank}",
                fix="give the adapter_config.json that belongs to these weights",
            )
        divisor = math.sqrt(rank) if adapter.config.get("use_rslora") else rank
        adapted[place] = LowRank(
            up=shards.reader(up, up_entry),
            down=shards.reader(down, down_entry),
            scaling=float(alpha) / divisor,
        )
    if strangers:
        raise AdapterError(
            "the adapter does not belong to this model",
            evidence=f"modules without a base weight: {shards.describe(strangers)}",
            fix="give an adapter that was trained on this base model",
        )
    return adapted


def _pattern(config: Mapping[str, Any], key: str, module: str) -> Any:
    """What a pattern of adapter_config.json says of a module, None for nothing.

    Source: peft's `get_pattern_key`: a pattern is the module's name or the end of it.
    """
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None
