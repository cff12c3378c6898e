"""The transformers-native jina-embeddings-v3 layout: a base model and one PEFT folder per task.

The base file carries original names (fused Wqkv, with or without `roberta.`) or native ones;
adapter tensors carry the hub's mixed names or what PEFT writes today. Formula: PEFT's LoRA,
scaling = lora_alpha / r. Knows nothing of merging.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.checkpoints import native_class, shards
from jexport.errors import AdapterError
from jexport.flow import LowRank, WeightReader

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"
PREFIXES = ("base_model.model.", "roberta.", "model.")


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds this layout."""
    return config.get("model_type") == "jina_embeddings_v3"


def folder_name(task: str) -> str:
    """A task's adapter folder: `.` and `-` become `_`."""
    return task.replace(".", "_").replace("-", "_")


def known_tasks(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks that have an adapter folder; none for a merged checkpoint."""
    listed = tuple(config.get("lora_adaptations") or tasks.JINA_V3_PROMPTS)
    return tuple(task for task in listed if (folder / folder_name(task)).is_dir())


def read(
    folder: Path, config: Mapping[str, Any], task: str
) -> tuple[dict[str, WeightReader], dict[str, LowRank], list[Path]]:
    """Weights under native names, the task's adapter, and the files that hold them.

    Raises CheckpointError, StateDictError, AdapterError.
    """
    paths = shards.find(folder)
    base = shards.entries(paths)
    weights = native_class.native_weights({name: name for name in base}, base, config)
    if task == tasks.NONE:
        return weights, {}, paths
    home = folder / folder_name(task)
    adapter = _adapter(home, config)
    return weights, adapter, [*paths, home / CONFIG, home / FILE]


def _adapter(home: Path, config: Mapping[str, Any]) -> dict[str, LowRank]:
    try:
        settings = json.loads((home / CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"adapter {home.name} has no usable {CONFIG}",
            evidence=repr(error),
            fix="give a checkpoint whose adapters were saved whole",
        ) from error
    _refuse_variants(home, settings)
    found = shards.entries([home / FILE])
    factors = {_native_factor(name): name for name in found}
    pooler = "dense" in (settings.get("target_modules") or ["dense"])
    matrices = native_class.adapted_matrices(config, pooler=pooler)
    adapter: dict[str, LowRank] = {}
    wanted: set[str] = set()
    for matrix in matrices:
        for native, part in matrix.parts:
            module = native.removesuffix(".weight")
            a_key, b_key = f"{module}.A", f"{module}.B"
            wanted |= {a_key, b_key}
            if a_key not in factors or b_key not in factors:
                continue
            a, b = factors[a_key], factors[b_key]
            rows = matrix.shape[0] if part is None else part[1] - part[0]
            note = f"r in {home.name}/{CONFIG}"
            native_class.check_factor(a, found[a].shape, (rank, _columns(matrix)), what=note)
            native_class.check_factor(b, found[b].shape, (_rows(matrix, rows), rank), what=note)
            up, down = (a, b) if matrix.embedding else (b, a)
            adapter[native] = LowRank(
                up=shards.reader(up, found[up], transpose=matrix.embedding),
                down=shards.reader(down, found[down], transpose=matrix.embedding),
                scaling=alpha / rank,
            )
    if wanted != set(factors):
        raise AdapterError(
            f"adapter {home.name} does not cover the model's matrices",
            evidence=f"missing: {shards.describe(wanted - set(factors)) or 'none'}\n"
            f"not expected: {shards.describe(set(factors) - wanted) or 'none'}",
            fix="give a checkpoint whose adapters were saved whole",
        )
    return adapter


def _rows(matrix: native_class.Adapted, rows: int) -> int:
    # PEFT stores an embedding's factors transposed: A [rank, rows], B [columns, rank].
    return matrix.shape[1] if matrix.embedding else rows


def _columns(matrix: native_class.Adapted) -> int:
    return matrix.shape[0] if matrix.embedding else matrix.shape[1]


def _refuse_variants(home: Path, settings: Mapping[str, Any]) -> None:
    """LoRA variants whose delta is another formula would merge to wrong weights."""
    odd = [key for key in ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern",
                           "alpha_pattern", "modules_to_save", "lora_bias") if settings.get(key)]  # fmt: skip
    if settings.get("bias", "none") != "none":
        odd.append("bias")
    if settings.get("peft_type", "LORA") != "LORA":
        odd.append("peft_type")
    if odd:
        raise AdapterError(
            f"adapter {home.name} is not plain LoRA",
            evidence=", ".join(f"{key} = {settings[key]!r}" for key in odd),
            fix="merge this adapter with PEFT first and build the merged checkpoint",
        )


def _native_factor(name: str) -> str:
    """`roberta.encoder.layers.0.mixer.out_proj.lora_A.weight` -> `layers.0.self_attn.o_proj.A`."""
    stem = name
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    for side in ("A", "B"):
        for ending in (f".lora_{side}.weight", f".lora_embedding_{side}"):
            if stem.endswith(ending):
                return f"{native_class.native_module(stem.removesuffix(ending))}.{side}"
    return stem
