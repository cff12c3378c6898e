"""quantize: OnnxModel (fp32) -> OnnxModel (int8, Q/DQ in standard ONNX) and quantization.json.

Statistics from calibration texts, SmoothQuant, weights rounded by GPTQ, then a search over layers
that is validated on embeddings of held-out texts. The scheme is the target's; every scheme comes
from the same statistics. Knows no engine but through the Target that runs its graphs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jexport import recipe
from jexport.artifacts.manifest import write_json
from jexport.cache import stages
from jexport.errors import CalibrationError, PrecisionError, QuantizationError
from jexport.gates import GateFailure
from jexport.quantization import observers, quant_params, search
from jexport.quantization.config import (
    INT8,
    INT8_RESIDUAL,
    INT8_WEIGHTS,
    LAYER_PRECISIONS,
    QuantizationConfig,
    candidate_configs,
)
from jexport.quantization.evaluator import GRAPH, TEXT_GATES, WEIGHTS, CalibrationData, Evaluator
from jexport.quantization.layer_quantization import (
    LayerQuantization,
    QuantizedLayer,
    quantize_layers,
)
from jexport.quantization.layers import LinearLayer, find_linear_layers
from jexport.quantization.observers import ActivationStats
from jexport.quantization.trial_log import TrialLog
from jexport.recipe import QuantizeSpec
from jexport.targets import Target
from jexport.types import CompiledModel, OnnxModel, Signature, TensorSpec
from jexport.workspace.memory import available_bytes
from jexport.workspace.run import give_back_memory

if TYPE_CHECKING:
    from jexport.quantization.channel_shifting import ChannelShift
    from jexport.quantization.outlier_splitting import ChannelSplit

REPORT, PAGE = "quantization.json", "report.html"
NEEDS = ("scipy", "threadpoolctl")
GOALS = (*recipe.GOALS, "symmetric", "pair_top10_overlap", "effort", "allow_slower")
"""Keys of [quantize] that decide which trial is taken, and no trial's numbers."""

MEASURED_SENSITIVITY = 50_000_000
"""Weights up to which `fast`, too, measures each layer's sensitivity by embeddings."""

SENSITIVITY_TEXTS = 96
"""Held-out texts, spread evenly, that a layer's sensitivity is measured on: only the order counts,
and both sides of each difference are measured on the same ones."""

WeightReader = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class QuantizationTarget:
    """What to make, as an engine wants it.

    Args:
        scheme: of the activations, one of quant_params.SCHEMES.
        precision: 'int8' or 'int8-weights'.
        fallback: the precision of layers that plain int8 hurts, one of config.LAYER_PRECISIONS.
        gates: by key, held on the held-out texts.
        tables: whether embedding tables become int8, too.
        refusals: the gates for which validate would refuse a quantized graph.
        refused: what validate said already of candidates, by their layers at higher precision.
    """

    scheme: str
    precision: str
    fallback: str
    gates: Mapping[str, float]
    tables: bool = True
    refusals: Callable[[OnnxModel], Sequence[GateFailure]] = lambda model: ()
    refused: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the stage reports while it works, and where it keeps what it measured.

    Args:
        progress: told steps done, steps in all, and what is done now.
        message: told a line worth reading.
        trial_log: measurements, also those of a run that was killed.
    """

    progress: Callable[[int, int, str], None] = lambda done, total, text: None
    message: Callable[[str], None] = lambda text: None
    trial_log: TrialLog = field(default_factory=TrialLog)

    def step(self, text: str) -> Callable[[int, int], None]:
        """Progress of one step.

        Args:
            text: what is done in it.

        Returns:
            To call with what is done and what there is in all.
        """
        return lambda done, total: self.progress(done, total, text)


# Seven parameters: the stages' common shape (input, spec, out_dir), and who runs graphs here.
def run(
    model: OnnxModel,
    data: CalibrationData,
    spec: QuantizeSpec,
    target: QuantizationTarget,
    *,
    runtime: Target,
    out_dir: Path,
    callbacks: Callbacks | None = None,
) -> OnnxModel:
    """Write out_dir/model.onnx, model.onnx_data and quantization.json.

    Args:
        model: the float graph.
        data: the texts.
        spec: [quantize] of the recipe.
        target: what to make.
        runtime: the target that runs graphs here (statistics and held-out texts).
        out_dir: an existing folder.
        callbacks: for progress, messages and the trial log.

    Returns:
        The int8 graph.

    Raises:
        PrecisionError: quantized already, or an unknown scheme.
        CalibrationError: no texts, or an activation that is not finite.
        UnsupportedGraphError: no linear layer.
        QuantizationError: goals out of reach, or not enough memory.
    """
    callbacks = callbacks or Callbacks()
    _check(target, data)
    cut = data.metadata["calibration"]["cut"]
    if cut:
        callbacks.message(
            f"{cut} calibration texts are longer than {spec.max_tokens} tokens and were cut"
        )
    job, stats = _observe(model, data, spec, target, _Place(runtime, out_dir), callbacks)
    give_back_memory()
    own = job.quantize_layers(stats, job.own_config)
    quantized, techniques = _best_config(job, stats, own) if job.full else (own, [])
    job = replace(job, fallbacks=_fallbacks(job, stats, quantized))
    del stats, own
    give_back_memory()
    goals = _goals(spec, target)
    chosen, trials = search.find_fallback_layers(
        job.layers,
        lambda fallback: job.measure(quantized, fallback),
        _sensitivity(job, quantized, goals),
        goals,
        search.SearchOptions(
            whole_curve=job.full,
            precision=target.precision,
            refuse=lambda fallback: job.refusals(quantized, fallback),
            progress=callbacks.progress,
            message=callbacks.message,
        ),
    )
    outcome = _Outcome(chosen=chosen, trials=trials, goals=goals, techniques=techniques)
    return _write(job, quantized, outcome, out_dir)


def _check(target: QuantizationTarget, data: CalibrationData) -> None:
    if target.scheme not in quant_params.SCHEMES or target.fallback not in LAYER_PRECISIONS:
        raise PrecisionError(
            f"no quantization scheme '{target.scheme}' with '{target.fallback}'",
            evidence=f"there are: {', '.join(quant_params.SCHEMES)}; {', '.join(LAYER_PRECISIONS)}",
            fix="this target takes no int8; use fp32 or fp16",
        )
    if not data.calibration or not data.held_out:
        raise CalibrationError(
            "quantize has no texts",
            evidence=f"{len(data.calibration)} calibration texts, {len(data.held_out)} held-out",
            fix="give --calibration a set with texts that this tokenizer takes",
        )


def _check_memory(model: OnnxModel, layers: Sequence[LinearLayer]) -> None:
    """Refuse before it happens: weights twice (file and packed), Gram matrices, one batch."""
    widths = {layer.input: layer.in_features for layer in layers}.values()
    needed = 2 * model.path.with_name(WEIGHTS).stat().st_size + sum(
        4 * width * width + 4 * width * observers.BATCH_TOKENS for width in widths
    )
    free = available_bytes()
    if free is not None and needed > free:
        raise QuantizationError(
            "quantize would run out of memory",
            evidence=f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
            fix="free memory, use a larger machine, or --precision fp16",
        )


def _goals(spec: QuantizeSpec, target: QuantizationTarget) -> search.Goals:
    metrics = ("cosine_mean", "cosine_p1", "top10_overlap")
    return search.Goals(
        at_least={name: spec.goal(name, target.scheme) for name in metrics},
        max_share=spec.goal("max_share", target.scheme) if target.precision == INT8 else 0.0,
    )


@dataclass(frozen=True)
class _Place:
    """Who runs graphs here, and where the stage writes."""

    runtime: Target
    out_dir: Path


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One run: what all its steps share.

    reference: the held-out texts by the float graph. fallbacks: layers that have another weight at
    the fallback precision, by name. sample: how many held-out texts, '' for all, in the trial log.
    """

    layers: Sequence[LinearLayer]
    weight: WeightReader
    evaluator: Evaluator
    reference: NDArray[np.float32]
    spec: QuantizeSpec
    target: QuantizationTarget
    callbacks: Callbacks
    work_dir: Path
    fallbacks: Mapping[str, QuantizedLayer] = field(default_factory=dict)
    sample: str = ""

    @property
    def full(self) -> bool:
        """Whether to try more than the recipe's own config."""
        return self.spec.effort == "full" and self.target.precision == INT8

    @property
    def measures_sensitivity(self) -> bool:
        """Whether each layer's sensitivity is measured by embeddings."""
        weights = sum(layer.in_features * layer.out_features for layer in self.layers)
        return self.target.precision == INT8 and (self.full or weights <= MEASURED_SENSITIVITY)

    @property
    def own_config(self) -> QuantizationConfig:
        """The recipe's."""
        return QuantizationConfig(
            scheme=self.target.scheme,
            smoothing=self.spec.smoothing,
            clip=self.spec.clip,
            precision=INT8_WEIGHTS if self.target.precision == INT8_WEIGHTS else INT8,
        )

    def quantize_layers(
        self,
        stats: Mapping[str, ActivationStats],
        config: QuantizationConfig,
        layers: Sequence[LinearLayer] = (),
    ) -> dict[str, QuantizedLayer]:
        """Every layer under one config, or some of them, by name."""
        return quantize_layers(
            layers or self.layers,
            self.weight,
            stats,
            config,
            out_dir=self.work_dir / config.key(()),
            progress=self.callbacks.step("rounding weights"),
        )

    def with_fallback(
        self, quantized: Mapping[str, QuantizedLayer], fallback: Sequence[str]
    ) -> dict[str, LayerQuantization]:
        """Every layer's quantization, some of them at the fallback precision."""
        return {
            name: replace(self.layer(name, one).quantization, precision=self.target.fallback)
            if name in fallback
            else one.quantization
            for name, one in quantized.items()
        }

    def layer(self, name: str, int8: QuantizedLayer) -> QuantizedLayer:
        """A layer as it is rounded for the fallback precision; as for int8 where that is it."""
        return self.fallbacks.get(name, int8)

    def measure(
        self, quantized: Mapping[str, QuantizedLayer], fallback: Sequence[str]
    ) -> search.Measurement:
        """The graph with some layers at the fallback precision against the float graph."""
        config = next(iter(quantized.values())).config
        return self.evaluator.measure(
            f"{self.target.fallback} {config.key(fallback)}{self.sample}",
            self.with_fallback(quantized, fallback),
            self.reference,
        )

    def on_sample(self, count: int) -> _Job:
        """The same with fewer held-out texts."""
        data = self.evaluator.data
        texts = len(data.held_out)
        rows = np.linspace(0, texts - 1, num=min(count, texts), dtype=np.int64)
        sampled = replace(
            data,
            held_out=[data.held_out[row] for row in rows],
            languages=[data.languages[row] for row in rows],
            texts=[data.texts[row] for row in rows] if data.texts else (),
            kinds=[data.kinds[row] for row in rows] if data.kinds else (),
        )
        return replace(
            self,
            evaluator=replace(self.evaluator, data=sampled, gates={}),
            reference=np.concatenate([self.reference[rows], self.reference[texts:]]),
            sample=f" on {len(rows)} texts",
        )

    def refusals(
        self, quantized: Mapping[str, QuantizedLayer], fallback: Sequence[str]
    ) -> tuple[GateFailure, ...]:
        """What validate would say of the graph with some layers at the fallback precision."""
        known = self.target.refused.get(tuple(fallback))
        if known is not None:
            return tuple(GateFailure(goal=one, gap=math.inf, words=one) for one in known)
        folder = self.work_dir / "candidate"
        quantizations = self.with_fallback(quantized, fallback)
        model = self.evaluator.write(quantizations, folder, self.target.precision)
        failures = tuple(one.of("validate") for one in self.target.refusals(model))
        shutil.rmtree(folder)
        return failures


def _observe(
    model: OnnxModel,
    data: CalibrationData,
    spec: QuantizeSpec,
    target: QuantizationTarget,
    place: _Place,
    callbacks: Callbacks,
) -> tuple[_Job, dict[str, ActivationStats]]:
    """Reference vectors and statistics by the float graph, channels shifted, outliers split."""
    import onnx_ir as ir

    from jexport.quantization import channel_shifting, outlier_splitting

    source = ir.load(model.path)
    layers = find_linear_layers(source)
    _check_memory(model, layers)

    def weight(name: str) -> NDArray[np.float32]:
        tensor = source.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    evaluator = Evaluator(
        model=model,
        data=data,
        runtime=place.runtime,
        work_dir=place.out_dir / "trials",
        trial_log=callbacks.trial_log,
        gates={key: bound for key, bound in target.gates.items() if key in TEXT_GATES},
        tables=target.tables,
    )
    reference = evaluator.reference_vectors(callbacks.step("held-out texts in float"))
    work_dir = place.out_dir / "statistics"
    stats = _collect_stats(model, layers, data, _Place(place.runtime, work_dir), callbacks)
    splits: tuple[ChannelSplit, ...] = ()
    shifts: tuple[ChannelShift, ...] = ()
    if target.precision == INT8:
        shifts = channel_shifting.find_shifts(source, stats)
        channel_shifting.shift_channels(source, shifts, stats)
        splits = outlier_splitting.find_outlier_channels(source, stats, weight)
        outlier_splitting.split_channels(source, splits, stats)
        layers = find_linear_layers(source)
    job = _Job(
        layers=layers,
        weight=weight,
        evaluator=replace(evaluator, splits=splits, shifts=shifts),
        spec=spec,
        target=target,
        callbacks=callbacks,
        reference=reference,
        work_dir=place.out_dir / "weights",
    )
    return job, stats


def _collect_stats(
    model: OnnxModel,
    layers: Sequence[LinearLayer],
    data: CalibrationData,
    place: _Place,
    callbacks: Callbacks,
) -> dict[str, ActivationStats]:
    """Run the calibration texts through the float graph with every layer's input as an output."""
    import onnx_ir as ir

    runtime, folder = place.runtime, place.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    graph = ir.load(model.path)
    widths = {layer.input: layer.in_features for layer in layers}
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs[:] = [values[name] for name in widths]
    ir.save(graph, folder / GRAPH)
    # Copied: engines refuse weights outside the graph's folder, and weights that have two names,
    # also in the folder that they were linked from, where another build may be reading them.
    stages.copy(model.path.with_name(WEIGHTS), folder / WEIGHTS)
    outputs = tuple(
        TensorSpec(name=name, dtype="float32", shape=("batch", "sequence", width))
        for name, width in widths.items()
    )
    observed = CompiledModel(
        target=runtime.name,
        precision=model.precision,
        folder=folder,
        files=(GRAPH, WEIGHTS),
        signature=Signature(inputs=model.signature.inputs, outputs=outputs),
        facts={},
    )
    with runtime.runner(observed, "cpu", 0) as runner:
        stats = observers.collect_stats(
            runner,
            widths,
            data.calibration,
            pad=data.pad,
            progress=callbacks.step("calibration texts"),
        )
    del runner
    shutil.rmtree(folder)
    return stats


def _best_config(
    job: _Job, stats: Mapping[str, ActivationStats], own: dict[str, QuantizedLayer]
) -> tuple[dict[str, QuantizedLayer], list[dict[str, Any]]]:
    """The config whose groups fail least, by mean cosine; and what each technique gave.

    All layers are int8.
    """
    best, highest, techniques = own, (-math.inf, 0.0), []
    for description, config in candidate_configs(job.own_config):
        quantized = own if config == job.own_config else job.quantize_layers(stats, config)
        measurement = job.measure(quantized, ())
        metrics = measurement.metrics
        job.callbacks.message(f"{description}: cosine {metrics['cosine_mean']:.5f}")
        techniques.append({"what": description, "share": 0.0, **metrics})
        # Not by neighbours: on 450 texts they move by 0.003 from one build of the same to the next.
        rank = (-float(len(measurement.failures)), metrics["cosine_mean"])
        if rank > highest:
            highest, best = rank, quantized
        if quantized is not best:
            shutil.rmtree(job.work_dir / config.key(()), ignore_errors=True)
    return best, techniques


def _fallbacks(
    job: _Job, stats: Mapping[str, ActivationStats], quantized: Mapping[str, QuantizedLayer]
) -> dict[str, QuantizedLayer]:
    """Layers that may fall back to two int8 terms, with factors that leave the weight finer steps.

    Two terms take whatever range the activations have, massive ones too, so the weight need not.
    A weight that several layers share is stored once and stays as it is.
    """
    config = job.own_config
    if job.target.fallback != INT8_RESIDUAL or job.target.precision != INT8 or not config.smoothing:
        return {}
    shared = Counter(layer.weight for layer in job.layers)
    layers = [layer for layer in job.layers if shared[layer.weight] == 1]
    if not job.measures_sensitivity:  # then these are the ones that the search will come to
        local = {name: one.error() for name, one in quantized.items()}
        cap = job.spec.goal("max_share", job.target.scheme)
        layers = search.most_sensitive(layers, local, cap)
    if not layers:
        return {}
    return job.quantize_layers(stats, replace(config, precision=INT8_RESIDUAL), layers)


def _sensitivity(
    job: _Job, quantized: Mapping[str, QuantizedLayer], goals: search.Goals
) -> Mapping[str, float]:
    """How much mean cosine comes back when one layer alone is at the fallback precision.

    Where measuring that costs too much (`fast`, a large model), or no layer needs to fall back: the
    share of its own output's energy that each layer loses.
    """
    local = {name: one.error() for name, one in quantized.items()}
    if not job.measures_sensitivity:
        return local
    if goals.met(job.measure(quantized, ())) and not job.full:
        return local
    sample = job.on_sample(SENSITIVITY_TEXTS)
    base = sample.measure(quantized, ())
    sensitivity: dict[str, float] = {}
    for number, layer in enumerate(job.layers):
        job.callbacks.progress(number, len(job.layers), f"sensitivity of {layer.name}")
        alone = sample.measure(quantized, (layer.name,))
        sensitivity[layer.name] = alone.metrics["cosine_mean"] - base.metrics["cosine_mean"]
    return sensitivity


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What the search came to. techniques: what each gave, where they were tried."""

    chosen: search.Trial
    trials: Sequence[search.Trial]
    goals: search.Goals
    techniques: Sequence[Mapping[str, Any]]


def _write(
    job: _Job, quantized: Mapping[str, QuantizedLayer], outcome: _Outcome, out_dir: Path
) -> OnnxModel:
    """Write the chosen graph and its report, and remove what trials left."""
    evaluator, precision = job.evaluator, job.target.precision
    quantizations = job.with_fallback(quantized, outcome.chosen.fallback)
    result = evaluator.write(quantizations, out_dir, precision)
    config = next(iter(quantized.values())).config
    written = {
        name: job.layer(name, one) if name in outcome.chosen.fallback else one
        for name, one in quantized.items()
    }
    write_json(
        out_dir / REPORT,
        {
            **_report(written, quantizations, outcome, config),
            "effort": job.spec.effort,
            **evaluator.data.metadata,
            "copied": [split.report() for split in evaluator.splits],
            "shifted": [shift.normalization for shift in evaluator.shifts],
            "techniques": outcome.techniques,
            "held_out_quality": evaluator.compare(quantizations, job.reference),
            "bytes": {"fp32": _bytes(evaluator.model.path.parent), precision: _bytes(out_dir)},
        },
    )
    for folder in ("trials", "weights"):
        shutil.rmtree(out_dir / folder, ignore_errors=True)
    return result


def chosen_fallback(report: Path) -> tuple[str, ...]:
    """The layers at higher precision of the trial that a quantization.json calls chosen.

    Args:
        report: quantization.json.

    Returns:
        Their names; empty where there is none.
    """
    chosen = json.loads(report.read_text(encoding="utf-8"))["chosen"]
    return tuple(chosen["wide"])


def _report(
    quantized: Mapping[str, QuantizedLayer],
    quantizations: Mapping[str, LayerQuantization],
    outcome: _Outcome,
    config: QuantizationConfig,
) -> dict[str, Any]:
    """quantization.json, but for texts, groups and sizes."""
    matrices = [
        {
            "name": name,
            "shape": [one.layer.in_features, one.layer.out_features],
            "share": one.layer.share,
            "treatment": quantizations[name].precision,
            "smoothing": config.smoothing
            if one.quantization.smoothing_factors is not None
            else 0.0,
            "clip": config.clip if one.layer.in_features > one.layer.out_features else 1.0,
            "error_naive": one.error_naive,
            "error": one.error(quantizations[name].precision),
        }
        for name, one in quantized.items()
    ]
    return {
        "format": 1,
        "scheme": config.scheme,
        "precision": config.precision,
        "reached": outcome.chosen.passed,
        "gates": dict(outcome.goals.at_least),
        "max_share": outcome.goals.max_share,
        "chosen": outcome.chosen.report(),
        "tried": [trial.report() for trial in outcome.trials],
        "curve": [trial.report() for trial in sorted(outcome.trials, key=lambda t: t.share)],
        "matrices": matrices,
    }


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (GRAPH, WEIGHTS))
