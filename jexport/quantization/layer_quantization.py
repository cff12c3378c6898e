"""Statistics of the inputs + float weights -> every product's treatment, weights rounded.

Rounded weights go to files, one at a time: at full size they are 300 MB, and the Gram matrices that
they are made with 2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jexport.quantization import quant_params
from jexport.quantization.config import Setting
from jexport.quantization.layers import Product
from jexport.quantization.observers import Site
from jexport.quantization.treatment import TREATMENTS, TWICE, WEIGHTS, Treatment
from jexport.workspace.threads import one_blas_thread

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A product ready to be quantized.

    error_naive: share of an output row's energy that is lost, mean over the kept rows (every
    token counts the same, as after LayerNormalization), by rounding to nearest over the full range
    without smoothing. errors: the same by each kind of treatment.
    """

    product: Product
    treatment: Treatment
    setting: Setting
    error_naive: float
    errors: Mapping[str, float]

    def error(self, kind: str = "") -> float:
        """Of one kind of treatment, its own by default."""
        return self.errors[kind or self.treatment.kind]


@one_blas_thread()
def run(
    items: Sequence[Product],
    weights: Callable[[str], Array],
    sites: Mapping[str, Site],
    setting: Setting,
    *,
    out_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Prepared]:
    """Treat every product. weights(name): float32 [rows, columns] of one weight."""
    out_dir.mkdir(parents=True, exist_ok=True)
    made: dict[str, Prepared] = {}
    groups: dict[str, list[Product]] = {}
    for item in items:
        groups.setdefault(item.weight, []).append(item)
    for number, (name, group) in enumerate(groups.items()):
        weight = np.asarray(weights(name), np.float32)
        seen = [sites[item.source] for item in group]
        divisors = _divisors(seen, weight, setting)
        smoothed = weight * divisors[:, None]
        scales = quant_params.weight_scales(smoothed)
        steps = _rounded(smoothed, seen, divisors, scales, setting)
        path = out_dir / f"{number}.npy"
        np.save(path, steps)
        restored = steps.astype(np.float32) * scales
        naive = weight_there_and_back(weight)
        for item, site in zip(group, seen, strict=True):
            clip = setting.clip if item.rows > item.columns else 1.0
            grid = quant_params.affine(
                float((site.low / divisors).min()) * clip,
                float((site.high / divisors).max()) * clip,
                setting.scheme,
            )
            treatment = Treatment(
                kind=setting.kind,
                divisors=divisors if setting.smoothing and setting.kind != WEIGHTS else None,
                grid=grid,
                steps=_reader(path),
                scales=scales,
            )
            truth = site.rows @ weight
            inputs = site.rows / divisors
            plain = quant_params.affine(
                float(site.low.min()), float(site.high.max()), setting.scheme
            )
            made[item.name] = Prepared(
                product=item,
                treatment=treatment,
                setting=setting,
                error_naive=_lost(plain.there_and_back(site.rows) @ naive, truth),
                errors={
                    kind: _lost(as_read(kind, grid, inputs) @ restored, truth)
                    for kind in TREATMENTS
                },
            )
        progress(number + 1, len(groups))
    return made


def weight_there_and_back(weight: Array) -> Array:
    """A weight rounded to nearest, as float again."""
    scales = quant_params.weight_scales(weight)
    restored: Array = quant_params.nearest(weight, scales).astype(np.float32) * scales
    return restored


def _rounded(
    weight: Array, seen: Sequence[Site], divisors: Array, scales: Array, setting: Setting
) -> NDArray[np.int8]:
    if not setting.compensate:
        return quant_params.nearest(weight, scales)
    gram: Array = np.add.reduce([site.gram for site in seen]) if seen[1:] else seen[0].gram
    return quant_params.compensated(weight, gram / np.outer(divisors, divisors), scales)


def _divisors(seen: Sequence[Site], weight: Array, setting: Setting) -> Array:
    if setting.kind == WEIGHTS:
        return np.ones(len(weight), np.float32)
    low = np.minimum.reduce([site.low for site in seen])
    high = np.maximum.reduce([site.high for site in seen])
    return quant_params.smoothing(low, high, weight, setting.smoothing)


def _reader(path: Path) -> Callable[[], NDArray[np.int8]]:
    def read() -> NDArray[np.int8]:
        steps: NDArray[np.int8] = np.load(path)
        return steps

    return read


def as_read(kind: str, grid: quant_params.Affine, inputs: Array) -> Array:
    """A product's smoothed inputs as a treatment of that kind hands them to it."""
    if kind == WEIGHTS:
        return inputs
    first = grid.there_and_back(inputs)
    if kind != TWICE:
        return first
    rest: Array = grid.rest().there_and_back(inputs - first)
    return first + rest


def _lost(made: Array, truth: Array) -> float:
    energy = np.square(truth.astype(np.float64)).sum(axis=1)
    lost = np.square(made.astype(np.float64) - truth).sum(axis=1)
    return float((lost[energy > 0] / energy[energy > 0]).mean()) if (energy > 0).any() else 0.0
