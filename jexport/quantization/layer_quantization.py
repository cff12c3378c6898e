"""Statistics and float weights -> how each linear layer is quantized, its weight rounded.

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
from jexport.quantization.config import (
    INT8_RESIDUAL,
    INT8_WEIGHTS,
    LAYER_PRECISIONS,
    QuantizationConfig,
)
from jexport.quantization.gptq import gptq
from jexport.quantization.layers import LinearLayer
from jexport.quantization.observers import ActivationStats
from jexport.quantization.quant_params import RESIDUAL_STEPS, STEPS, QuantParams
from jexport.quantization.smoothquant import InputRange, balance_factors, smoothing_factors
from jexport.workspace.threads import one_blas_thread

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LayerQuantization:
    """What one linear layer becomes: plain numbers, free of any framework.

    Args:
        precision: one of config.LAYER_PRECISIONS.
        smoothing_factors: float32 [in_features], what activations are divided by before rounding
            (the weight carries them); None for nothing.
        input_params: of the activations.
        qweight: reads the weight, int8 [in_features, out_features], when it is written.
        scales: of the weight, float32 [out_features].
    """

    precision: str
    smoothing_factors: Array | None
    input_params: QuantParams
    qweight: Callable[[], NDArray[np.int8]]
    scales: Array


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """A layer with its quantization, and what each precision would lose of its output.

    Args:
        layer: the layer.
        quantization: what it becomes.
        config: what that was made with.
        error_naive: share of an output row's energy that is lost, mean over the sample rows (every
            token counts the same, as after LayerNormalization), by rounding to nearest over the
            full range without smoothing.
        errors: the same by each of config.LAYER_PRECISIONS.
    """

    layer: LinearLayer
    quantization: LayerQuantization
    config: QuantizationConfig
    error_naive: float
    errors: Mapping[str, float]

    def error(self, precision: str = "") -> float:
        """What a precision would lose of the layer's output.

        Args:
            precision: one of config.LAYER_PRECISIONS; '' for the layer's own.

        Returns:
            As `errors` has it.
        """
        return self.errors[precision or self.quantization.precision]


@one_blas_thread()
def quantize_layers(
    layers: Sequence[LinearLayer],
    weights: Callable[[str], Array],
    stats: Mapping[str, ActivationStats],
    config: QuantizationConfig,
    *,
    out_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, QuantizedLayer]:
    """Quantize every layer.

    Args:
        layers: those to quantize.
        weights: reads a weight by name, float32 [in_features, out_features].
        stats: statistics by the name of a layer's input.
        config: what is chosen for all layers.
        out_dir: for the rounded weights.
        progress: told weights done and in all.

    Returns:
        By layer's name.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    quantized: dict[str, QuantizedLayer] = {}
    groups: dict[str, list[LinearLayer]] = {}
    for layer in layers:  # layers that share a weight are rounded together
        groups.setdefault(layer.weight, []).append(layer)
    for number, (name, group) in enumerate(groups.items()):
        weight = np.asarray(weights(name), np.float32)
        inputs = [stats[layer.input] for layer in group]
        factors = _factors(inputs, weight, config)
        smoothed = weight * factors[:, None]
        scales = quant_params.weight_scales(smoothed)
        qweight = _round(smoothed, inputs, factors, scales, config)
        path = out_dir / f"{number}.npy"
        np.save(path, qweight)
        shared = _SharedWeight(
            weight=weight,
            fake_quantized=qweight.astype(np.float32) * scales,
            naive=quant_params.fake_quantize_weight(weight),
            factors=factors,
            scales=scales,
            path=path,
        )
        for layer, observed in zip(group, inputs, strict=True):
            quantized[layer.name] = _quantized(layer, observed, shared, config)
        progress(number + 1, len(groups))
    return quantized


@dataclass(frozen=True, kw_only=True)
class _SharedWeight:
    """One weight in float, rounded by the config, and rounded to nearest; where its int8 lies."""

    weight: Array
    fake_quantized: Array
    naive: Array
    factors: Array
    scales: Array
    path: Path


def _quantized(
    layer: LinearLayer, stats: ActivationStats, shared: _SharedWeight, config: QuantizationConfig
) -> QuantizedLayer:
    """One layer's input range, and what each precision loses on the sample rows."""
    clip = config.clip if layer.in_features > layer.out_features else 1.0
    params = quant_params.activation_params(
        float((stats.minimum / shared.factors).min()) * clip,
        float((stats.maximum / shared.factors).max()) * clip,
        config.scheme,
    )
    smooth = bool(config.smoothing) and config.precision != INT8_WEIGHTS
    reference = stats.samples @ shared.weight
    inputs = stats.samples / shared.factors
    naive = quant_params.activation_params(
        float(stats.minimum.min()), float(stats.maximum.max()), config.scheme
    )
    return QuantizedLayer(
        layer=layer,
        quantization=LayerQuantization(
            precision=config.precision,
            smoothing_factors=shared.factors if smooth else None,
            input_params=params,
            qweight=_reader(shared.path),
            scales=shared.scales,
        ),
        config=config,
        error_naive=_lost_energy(naive.fake_quantize(stats.samples) @ shared.naive, reference),
        errors={
            precision: _lost_energy(
                fake_quantize_input(precision, params, inputs) @ shared.fake_quantized, reference
            )
            for precision in LAYER_PRECISIONS
        },
    )


def fake_quantize_input(precision: str, params: QuantParams, inputs: Array) -> Array:
    """A layer's smoothed inputs as its MatMul reads them at a precision.

    Args:
        precision: one of config.LAYER_PRECISIONS.
        params: of the inputs.
        inputs: float32 [rows, in_features].

    Returns:
        float32 [rows, in_features].
    """
    if precision == INT8_WEIGHTS:
        return inputs
    first = params.fake_quantize(inputs)
    if precision != INT8_RESIDUAL:
        return first
    residual: Array = params.residual().fake_quantize(inputs - first)
    return first + residual


def _round(
    weight: Array,
    inputs: Sequence[ActivationStats],
    factors: Array,
    scales: Array,
    config: QuantizationConfig,
) -> NDArray[np.int8]:
    if not config.gptq:
        return quant_params.round_to_nearest(weight, scales)
    grams = [stats.gram for stats in inputs]
    gram: Array = np.add.reduce(grams) if grams[1:] else grams[0]
    return gptq(weight, gram / np.outer(factors, factors), scales)


def _factors(inputs: Sequence[ActivationStats], weight: Array, config: QuantizationConfig) -> Array:
    if config.precision == INT8_WEIGHTS:
        return np.ones(len(weight), np.float32)
    minimum = np.minimum.reduce([stats.minimum for stats in inputs])
    maximum = np.maximum.reduce([stats.maximum for stats in inputs])
    factors = smoothing_factors(minimum, maximum, weight, config.smoothing)
    if not config.smoothing or not config.balance:
        return factors
    energy = sum(np.diag(stats.gram).astype(np.float64) / max(stats.tokens, 1) for stats in inputs)
    observed = InputRange(
        minimum=minimum,
        maximum=maximum,
        energy=np.asarray(energy) / len(inputs),
        scheme=config.scheme,
        steps=RESIDUAL_STEPS if config.precision == INT8_RESIDUAL else STEPS,
    )
    return balance_factors(factors, observed, weight)


def _reader(path: Path) -> Callable[[], NDArray[np.int8]]:
    def read() -> NDArray[np.int8]:
        qweight: NDArray[np.int8] = np.load(path)
        return qweight

    return read


def _lost_energy(outputs: Array, reference: Array) -> float:
    energy = np.square(reference.astype(np.float64)).sum(axis=1)
    lost = np.square(outputs.astype(np.float64) - reference).sum(axis=1)
    return float((lost[energy > 0] / energy[energy > 0]).mean()) if (energy > 0).any() else 0.0
