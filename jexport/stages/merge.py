"""merge: LoadedModel (base + adapter) -> LoadedModel (merged, no adapter).

Streaming: a weight is merged when it is read, so never more than one matrix is in memory twice.
Knows no checkpoint layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jexport.checkpoints.eager import torch_threads
from jexport.checkpoints.shards import is_finite
from jexport.errors import AdapterError, NotFiniteError
from jexport.types import LoadedModel, LowRank, WeightReader

if TYPE_CHECKING:
    import torch

ROW_BLOCK = 16_384
"""Rows of a delta computed at once: a whole vocabulary at 1,024 columns would be 1 GB more."""

POOLER = "pooler."
"""The pooler has an adapter in every checkpoint and is part of no embedding."""


def run(model: LoadedModel) -> LoadedModel:
    """Merge the adapter into the weights, in float32: W + up @ down * scaling.

    Formula: modeling_lora.py `lora_forward` of the original code (Linear: B @ A; Embedding: A @ B)
    and PEFT's Linear.get_delta_weight.

    Args:
        model: with an adapter: for each weight [rows, columns] up [rows, rank] and down
            [rank, columns], float32.

    Returns:
        The same model without an adapter; its weights are merged when they are read.

    Raises:
        AdapterError: the adapter names a weight that the model does not have.
        NotFiniteError: a sum overflows; raised when the weight is read.
    """
    without_base = [n for n in model.adapter if n not in model.weights and not n.startswith(POOLER)]
    if not model.adapter or without_base:
        names = ", ".join(without_base) or "not one matrix"
        raise AdapterError(
            "the adapter does not belong to this model",
            evidence=f"matrices without a base weight: {names}",
            fix="give an adapter that was trained on this base model",
        )
    merged: Mapping[str, WeightReader] = {
        name: _merged(name, read, model.adapter[name]) if name in model.adapter else read
        for name, read in model.weights.items()
    }
    return dataclasses.replace(model, weights=merged, adapter={})


def _merged(name: str, base: WeightReader, delta: LowRank) -> WeightReader:
    def read() -> torch.Tensor:
        weight: torch.Tensor = base()
        up, down = delta.up(), delta.down()
        for start in range(0, weight.shape[0], ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            with torch_threads(1):  # with two, last bits of a rank of 16 are others on AVX2
                weight[rows] += (up[rows] @ down) * delta.scaling
        if not is_finite(weight):
            raise NotFiniteError(
                f"merging the adapter into '{name}' gives a NaN or an infinity",
                evidence=f"largest factors: {float(up.abs().max()):.3g} and "
                f"{float(down.abs().max()):.3g}, scaling {delta.scaling:g}",
                fix="download the checkpoint again, or train the adapter again",
            )
        return weight

    return read
