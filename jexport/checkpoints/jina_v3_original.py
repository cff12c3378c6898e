"""The original jina-embeddings-v3 layout: one safetensors file with stacked `parametrizations`.

A merged checkpoint of this layout has plain weights and only the task `none`. Reads names and
shapes; runs in transformers' native class (see native_class.py), because the authors' own code does
not import under transformers 5. Formula: modeling_lora.py `lora_forward`, revision 845308d0 of
jinaai/xlm-roberta-flash-implementation; scaling = lora_alpha / lora_rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.checkpoints import native_class, native_config, shards
from jexport.checkpoints.jina_v3 import JinaV3
from jexport.checkpoints.layout import Parts
from jexport.checkpoints.transformer_files import count
from jexport.types import LowRank

STACK = ".parametrizations.weight"
LORA_A, LORA_B, BASE = f"{STACK}.0.lora_A", f"{STACK}.0.lora_B", f"{STACK}.original"


class JinaV3Original(JinaV3):
    """All tasks stacked in the weight file; merged, plain weights."""

    name = "jina_v3_original"

    def matches(self, folder: Path, config: Mapping[str, Any], *, trust_code: bool) -> bool:
        """RoPE or `lora_adaptations` tell it from a plain XLM-RoBERTa, also when it is merged."""
        rotary = config.get("position_embedding_type") == "rotary"
        return (rotary or "lora_adaptations" in config) and config.get("model_type") in (
            None,
            "xlm-roberta",
        )

    def known_tasks(self, folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Those stacked in the weight file, by their index; none when they are merged already."""
        return _listed(config) if _adapted(shards.tensors(folder)) else ()

    def read(self, folder: Path, config: Mapping[str, Any], task: str) -> Parts:
        """Weights under native names, out of the stacks.

        The adapters have to be whole for any task, `none` too; but only the chosen one's numbers
        are read later, so a NaN in another goes unseen.

        Raises:
            UnsupportedCheckpointError: an option that the native class does not have.
            StateDictError: the base's weights are not those that config.json asks for.
            AdapterError: the stacked adapters are not whole, or of another shape.
        """
        native_config.check_config(config)
        entries = shards.tensors(folder)
        adapted = _adapted(entries)
        base = {name: entry for name, entry in entries.items() if name not in adapted}
        plain = [
            (name.removesuffix(BASE) + ".weight" if name.endswith(BASE) else name, name)
            for name in base
        ]
        pooler = any(name.removeprefix("roberta.").startswith("pooler.") for name in entries)
        weights = native_class.native_weights(plain, base, config, pooler=pooler)
        adapter = _adapter(entries, config, task, pooler=pooler) if adapted else {}
        return weights, adapter, shards.files(folder, entries)


def _listed(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the adapters by their index; early forks leave them out and have the usual ones."""
    return native_class.listed_tasks(config) or tuple(tasks.JINA_V3_PROMPTS)


def _adapted(entries: Mapping[str, shards.Entry]) -> set[str]:
    return {name for name in entries if name.endswith((LORA_A, LORA_B))}


def _adapter(
    entries: Mapping[str, shards.Entry], config: Mapping[str, Any], task: str, *, pooler: bool
) -> dict[str, LowRank]:
    """The task's deltas (none for `none`), once every adapter is known to be whole."""
    listed, rank = _listed(config), count(config, "lora_rank")
    scaling = native_class.scaling(config.get("lora_alpha"), rank, where="config.json")
    matrices = native_class.adapted_matrices(config, pooler=pooler)
    factors = native_class.one_each(
        [(name.removeprefix("roberta."), name) for name in _adapted(entries)],
        [matrix.original + suffix for matrix in matrices for suffix in (LORA_A, LORA_B)],
        what="the stacked adapters",
    )
    adapter: dict[str, LowRank] = {}
    for matrix in matrices:
        a_name, b_name = factors[matrix.original + LORA_A], factors[matrix.original + LORA_B]
        rows, columns = matrix.shape
        a_shape, b_shape = (len(listed), rank, columns), (len(listed), rows, rank)
        if matrix.embedding:
            a_shape, b_shape = (len(listed), rows, rank), (len(listed), rank, columns)
        for name, shape in ((a_name, a_shape), (b_name, b_shape)):
            what = "config.json (lora_adaptations, lora_rank)"
            native_class.check_factor(name, entries[name].shape, shape, what=what)
        if task == tasks.NONE:
            continue
        index = listed.index(task)
        up, down = (a_name, b_name) if matrix.embedding else (b_name, a_name)
        for native, part in matrix.parts:
            adapter[native] = LowRank(
                up=shards.reader(up, entries[up], index=index, rows=part),
                down=shards.reader(down, entries[down], index=index),
                scaling=scaling,
            )
    return adapter
