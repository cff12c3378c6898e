"""A PEFT adapter at the root of a checkpoint: plain LoRA, as a delta of each weight it adapts.

sentence-transformers opens a folder with adapter_config.json as adapter and base together. The base
is in the same folder, in another one, or on a hub. Everything but plain LoRA is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
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
    if not (home / CONFIG).is_file():
        return None
    return read(home, base=_base(home, read_json(home / CONFIG)))


def read(home: Path, *, base: Path) -> PeftAdapter:
    """The adapter in a folder.

    Args:
        home: of adapter_config.json and the adapter's weights.
        base: of config.json and the base's weights.

    Returns:
        The adapter; its matrices are still on the disk.

    Raises:
        UnsupportedCheckpointError: it is more than plain LoRA.
        AdapterError: a matrix of it is missing.
        CheckpointError: a file of it is missing or broken.
    """
    path = home / CONFIG
    config = read_json(path)
    keys.check(keys.ADAPTER, config, where=CONFIG)
    weights = next((home / name for name in WEIGHTS if (home / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            "the adapter has no weights",
            evidence=f"{home} has {CONFIG}, and neither {' nor '.join(WEIGHTS)}",
            fix="download the checkpoint again",
        )
    return PeftAdapter(config=config, base=base, files=(path, weights), factors=_factors(weights))


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


def matrices(adapter: PeftAdapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
    """The delta of each weight, under the weight's own name in the base's file.

    Args:
        adapter: as `find` gives it.
        shapes: of the base's weights by name, which may have a prefix (`bert.`) that the adapter
            has not.

    Returns:
        By weight name; a pooler's, which no embedding depends on, may be left out.

    Raises:
        AdapterError: a module without a base weight, of another rank than the config says, or of
            another shape than the weight.
    """
    known = list(shapes)
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
        if (*up_entry.shape[:1], *down_entry.shape[1:]) != tuple(shapes[place]):
            raise AdapterError(
                f"adapter matrix of '{module}' does not fit the base's weight",
                evidence=f"lora_B {up_entry.shape}, lora_A {down_entry.shape}; the weight is "
                f"{tuple(shapes[place])}",
                fix="give the adapter that was trained on this base model",
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


def check_whole(adapter: PeftAdapter, names: Iterable[str], adapted: Mapping[str, LowRank]) -> None:
    """Refuse an adapter whose file lacks matrices of modules that its config says it adapts.

    PEFT would fill them with zeros, and warn.

    Args:
        adapter: as `read` gives it.
        names: of the base's weights.
        adapted: as `matrices` gives it.

    Raises:
        AdapterError: names what is missing.
    """
    if not adapter.config.get("target_modules"):
        return
    is_target = targets(adapter.config)
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    asked = [module for module in modules if is_target(module)]
    lacking = [module for module in asked if f"{module}.weight" not in adapted]
    if lacking or not asked:
        raise AdapterError(
            "the adapter does not have a matrix for each module that it says it adapts",
            evidence=f"missing: {shards.describe(lacking) or 'the base has none of the modules'}\n"
            f"{CONFIG}: target_modules = {adapter.config['target_modules']!r:.200}",
            fix="download the adapter again, or give one that was trained on this base model",
        )


def targets(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which modules an adapter says it adapts, by PEFT's rule; all when it does not say.

    PEFT: a str is a regular expression for the whole name, a list holds names or their ends;
    layers_to_transform and exclude_modules take modules out again.

    Args:
        config: adapter_config.json.

    Returns:
        Whether a module of that name is adapted.

    Raises:
        AdapterError: target_modules is no expression that can be read.
    """
    named = _matching(config.get("target_modules") or None)
    left_out = _matching(config.get("exclude_modules") or [])
    chosen = config.get("layers_to_transform")
    layers = (
        None
        if chosen is None
        else {str(n) for n in ([chosen] if isinstance(chosen, int) else chosen)}
    )

    def is_adapted(module: str) -> bool:
        layer = re.search(r"\.(\d+)\.", f".{module}")
        outside = layers is not None and layer is not None and layer[1] not in layers
        return named(module) and not left_out(module) and not outside

    return is_adapted


def _matching(stated: Any) -> Callable[[str], bool]:
    if stated is None:
        return lambda module: True
    if isinstance(stated, str):
        try:
            pattern = re.compile(stated)
        except re.error as error:
            raise AdapterError(
                "the adapter does not say which matrices it adapts",
                evidence=f"target_modules = {stated!r}: {error}",
                fix="give a checkpoint whose adapters were saved whole",
            ) from error
        return lambda module: pattern.fullmatch(module) is not None
    ends = tuple(str(name) for name in stated)
    return lambda module: module in ends or module.endswith(tuple(f".{end}" for end in ends))


def _pattern(config: Mapping[str, Any], key: str, module: str) -> Any:
    """What a pattern of adapter_config.json says of a module, None for nothing.

    Source: peft's `get_pattern_key`: a pattern is the module's name or the end of it.
    """
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None
