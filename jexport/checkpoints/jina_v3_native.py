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
from jexport.checkpoints import native_class, native_config, peft_adapter, shards
from jexport.checkpoints.jina_v3 import JinaV3
from jexport.checkpoints.layout import Opened, Parts
from jexport.errors import AdapterError, RemoteCodeError
from jexport.types import LowRank

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"
HARMLESS = {
    "r",
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "inference_mode",
    "task_type",
    "revision",
    "base_model_name_or_path",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
}
"""Keys of PEFT's LoraConfig (0.21.2) that do not change what a saved adapter adds."""

PLAIN_STARTS = (True, "gaussian", "orthogonal", "eva")
"""Ways to begin training that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it."""

PREFIXES = ("base_model.model.", "roberta.", "model.")


class JinaV3Native(JinaV3):
    """transformers' own layout: a base and one PEFT folder per task."""

    name = "jina_v3_native"

    def matches(self, folder: Path, config: Mapping[str, Any], *, trust_code: bool) -> bool:
        """By config.json's model_type; a merged checkpoint, too, which has no adapter folders."""
        return config.get("model_type") == "jina_embeddings_v3"

    def known_tasks(self, folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of the list, or of the usual five, that have an adapter folder."""
        listed = native_class.listed_tasks(config) or tuple(tasks.JINA_V3_PROMPTS)
        return tuple(task for task in listed if (folder / folder_name(task)).is_dir())

    def check(self, opened: Opened, task: str) -> None:
        """Refuse a task with the code beside the weights as reference.

        Raises:
            RemoteCodeError: that code does not know the adapters.
        """
        if opened.spec.trust_remote_code and task in self.known_tasks(opened.base, opened.stated):
            raise RemoteCodeError(
                "the code beside this checkpoint does not know its PEFT adapters",
                evidence=f"the layout is {self.name}, the task '{task}'",
                fix="build without --trust-remote-code",
            )

    def read(self, folder: Path, config: Mapping[str, Any], task: str) -> Parts:
        """Weights under native names. Other tasks' adapter files are not opened.

        Raises:
            UnsupportedCheckpointError: an option that the native class does not have.
            StateDictError: the base's weights are not those that config.json asks for.
            AdapterError: the adapter is not whole, of another shape, or not plain LoRA.
        """
        native_config.check_config(config)
        base = shards.tensors(folder)
        pooler = any(name.removeprefix("roberta.").startswith("pooler.") for name in base)
        weights = native_class.native_weights(((n, n) for n in base), base, config, pooler=pooler)
        paths = shards.files(folder, base)
        if task == tasks.NONE:
            return weights, {}, paths
        home = folder / folder_name(task)
        return weights, _adapter(home, config), [*paths, home / CONFIG, home / FILE]


def folder_name(task: str) -> str:
    """Where a task's adapter is.

    Args:
        task: as `lora_adaptations` lists it.

    Returns:
        The name of a folder beside the base's weights: the task's, `.` and `-` as `_`.
    """
    return task.replace(".", "_").replace("-", "_")


def _adapter(home: Path, config: Mapping[str, Any]) -> dict[str, LowRank]:
    settings = _settings(home)
    rank = settings["r"]
    scaling = native_class.scaling(settings.get("lora_alpha"), rank, where=f"{home.name}/{CONFIG}")
    entries = shards.entries([home / FILE])
    targets = peft_adapter.targets(settings)
    chosen = [
        (matrix, native, part)
        for matrix in native_class.adapted_matrices(config, pooler=True)
        for native, part in matrix.parts
        if targets(native.removesuffix(".weight"))
    ]
    factors = native_class.one_each(
        [(_native_factor(name), name) for name in entries],
        [f"{native.removesuffix('.weight')}.{side}" for _, native, _ in chosen for side in "AB"],
        what=f"the factors in {home.name}",
    )
    adapter: dict[str, LowRank] = {}
    for matrix, native, part in chosen:
        a, b = (factors[f"{native.removesuffix('.weight')}.{side}"] for side in "AB")
        rows = matrix.shape[0] if part is None else part[1] - part[0]
        note = f"r in {home.name}/{CONFIG}"
        native_class.check_factor(a, entries[a].shape, (rank, _columns(matrix)), what=note)
        native_class.check_factor(b, entries[b].shape, (_rows(matrix, rows), rank), what=note)
        up, down = (a, b) if matrix.embedding else (b, a)
        adapter[native] = LowRank(
            up=shards.reader(up, entries[up], transpose=matrix.embedding),
            down=shards.reader(down, entries[down], transpose=matrix.embedding),
            scaling=scaling,
        )
    return adapter


def _rows(matrix: native_class.Adapted, rows: int) -> int:
    # PEFT stores an embedding's factors transposed: A [rank, rows], B [columns, rank].
    return matrix.shape[1] if matrix.embedding else rows


def _columns(matrix: native_class.Adapted) -> int:
    return matrix.shape[0] if matrix.embedding else matrix.shape[1]


def _settings(home: Path) -> dict[str, Any]:
    """adapter_config.json, known to be of plain LoRA. Raises AdapterError.

    A variant whose delta is another formula would merge to wrong weights; PEFT adds one in most
    releases, so that every key that is not known to be harmless has to be off.
    """
    try:
        settings = json.loads((home / CONFIG).read_text(encoding="utf-8"))
        rank = settings["r"]
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"r = {rank!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"adapter {home.name} has no usable {CONFIG}",
            evidence=repr(error),
            fix="give a checkpoint whose adapters were saved whole",
        ) from error
    plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": PLAIN_STARTS}
    odd = [
        f"{key} = {value!r}"
        for key, value in settings.items()
        if key not in HARMLESS and value and value not in plain.get(key, ())
    ]
    if odd:
        raise AdapterError(
            f"adapter {home.name} is not plain LoRA",
            evidence=", ".join(odd),
            fix="merge this adapter with PEFT first and build the merged checkpoint",
        )
    return dict(settings)


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
