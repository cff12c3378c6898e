"""quantize: OnnxModel (fp32) -> OnnxModel (int8, Q/DQ in standard ONNX) and quantization.json.

Statistics from calibration texts, SmoothQuant, weights rounded by GPTQ, then a search that is
judged by embeddings of held-out texts. The scheme is the target's; every scheme comes from the same
statistics. Knows no engine but through the Target that runs its graphs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport import recipe
from jexport.artifacts.manifest import write_json
from jexport.cache import stages
from jexport.errors import CalibrationError, PrecisionError, QuantizationError
from jexport.quantization import (
    config,
    layers,
    observers,
    quant_params,
    search,
)
from jexport.quantization import (
    layer_quantization as prepare,
)
from jexport.quantization.config import Setting
from jexport.quantization.evaluator import GRAPH, TEXT_GATES, WEIGHTS, Bench, Material
from jexport.quantization.layer_quantization import Prepared
from jexport.quantization.layers import Product
from jexport.quantization.observers import Site
from jexport.quantization.treatment import INT8, TREATMENTS, Treatment
from jexport.quantization.treatment import WEIGHTS as FLOAT_INPUTS
from jexport.quantization.trial_log import Journal
from jexport.recipe import QuantizeSpec
from jexport.targets import Target
from jexport.types import CompiledModel, OnnxModel, Signature, TensorSpec
from jexport.workspace.memory import available_bytes
from jexport.workspace.run import give_back_memory

REPORT, PAGE = "quantization.json", "report.html"
INT8_WEIGHTS = "int8-weights"
NEEDS = ("scipy", "threadpoolctl")
GOALS = (*recipe.GOALS, "symmetric", "pair_top10_overlap", "effort", "allow_slower")
"""Keys of [quantize] that decide which trial is taken, and no trial's numbers."""

MEASURED_DAMAGE = 50_000_000
"""Weights up to which `fast`, too, measures each product's damage by embeddings."""

Weight = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What to make. scheme: of the activations. precision: 'int8' or 'int8-weights'.

    wide: what a product becomes that plain int8 hurts. gates: by key, held on the held-out texts.
    tables: whether tables that ids look up become int8, too.
    """

    scheme: str
    precision: str
    wide: str
    gates: Mapping[str, float]
    tables: bool = True


@dataclass(frozen=True, kw_only=True)
class Ways:
    """What the stage tells while it works, and what it remembers from a run that was killed."""

    progress: Callable[[int, int, str], None] = lambda done, total, text: None
    tell: Callable[[str], None] = lambda text: None
    journal: Journal = field(default_factory=Journal)

    def step(self, text: str) -> Callable[[int, int], None]:
        """Progress of one step."""
        return lambda done, total: self.progress(done, total, text)


def run(
    model: OnnxModel,
    material: Material,
    spec: QuantizeSpec,
    aim: Aim,
    *,
    judge: Target,
    out_dir: Path,
    ways: Ways | None = None,
) -> OnnxModel:
    """Write out_dir/model.onnx, model.onnx_data and quantization.json.

    judge: the target that runs graphs here (statistics and held-out texts). Raises PrecisionError
    (quantized already, unknown scheme), CalibrationError, UnsupportedGraphError, QuantizationError
    (goals out of reach, not enough memory).
    """
    import onnx_ir as ir

    from jexport.quantization import outlier_splitting

    _check(aim, material)
    ways = ways or Ways()
    cut = material.about["calibration"]["cut"]
    if cut:
        ways.tell(f"{cut} calibration texts are longer than {spec.max_tokens} tokens and were cut")
    source = ir.load(model.path)
    items = layers.find(source)
    _check_memory(model, items)

    def weight(name: str) -> NDArray[np.float32]:
        tensor = source.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    bench = Bench(
        model=model,
        material=material,
        judge=judge,
        room=out_dir / "trials",
        journal=ways.journal,
        gates={key: bound for key, bound in aim.gates.items() if key in TEXT_GATES},
        tables=aim.tables,
    )
    truth = bench.truth(ways.step("held-out texts in float"))
    sites = _statistics(model, items, material, judge, out_dir / "statistics", ways)
    copied: tuple[outlier_splitting.Copied, ...] = ()
    if aim.precision == INT8:
        copied = outlier_splitting.find(source, sites, weight)
        outlier_splitting.copy(source, copied, sites)
        bench, items = replace(bench, copied=copied), layers.find(source)
    job = _Job(
        items=items,
        weight=weight,
        bench=bench,
        spec=spec,
        aim=aim,
        ways=ways,
        truth=truth,
        room=out_dir / "weights",
    )
    give_back_memory()
    own = job.prepare(sites, job.own_setting)
    prepared, techniques = _best_setting(job, sites, own) if job.full else (own, [])
    del sites, own
    give_back_memory()
    goals = search.Goals(
        at_least={
            name: spec.goal(name, aim.scheme)
            for name in ("cosine_mean", "cosine_p1", "top10_overlap")
        },
        max_share=spec.goal("max_share", aim.scheme) if aim.precision == INT8 else 0.0,
    )
    chosen, trials = search.run(
        items,
        lambda wide: job.measure(prepared, wide),
        _damage(job, prepared, goals),
        goals,
        whole_curve=job.full,
        watch=ways.progress,
        tell=ways.tell,
    )
    treatments = job.treatments(prepared, chosen.wide)
    made = bench.write(treatments, out_dir, aim.precision)
    write_json(
        out_dir / REPORT,
        {
            **_report(prepared, treatments, chosen, trials, goals, spec),
            **material.about,
            "copied": [one.report() for one in copied],
            "techniques": techniques,
            "held_out_quality": bench.outcome(treatments, job.truth),
            "bytes": {"fp32": _bytes(model.path.parent), aim.precision: _bytes(out_dir)},
        },
    )
    for scratch in ("trials", "weights"):
        shutil.rmtree(out_dir / scratch, ignore_errors=True)
    return made


def _check(aim: Aim, material: Material) -> None:
    if aim.scheme not in quant_params.SCHEMES or aim.wide not in TREATMENTS:
        raise PrecisionError(
            f"no quantization scheme '{aim.scheme}' with '{aim.wide}'",
            evidence=f"there are: {', '.join(quant_params.SCHEMES)}; {', '.join(TREATMENTS)}",
            fix="this target takes no int8; use fp32 or fp16",
        )
    if not material.calibration or not material.held_out:
        raise CalibrationError(
            "quantize has no texts",
            evidence=f"{len(material.calibration)} to calibrate on, {len(material.held_out)} held",
            fix="give --calibration a set with texts that this tokenizer takes",
        )


def _check_memory(model: OnnxModel, items: Sequence[Product]) -> None:
    """Refuse before it happens: weights twice (file and packed), Gram matrices, one batch."""
    wide = {item.source: item.rows for item in items}.values()
    needed = 2 * model.path.with_name(WEIGHTS).stat().st_size + sum(
        4 * rows * rows + 4 * rows * observers.BATCH_TOKENS for rows in wide
    )
    free = available_bytes()
    if free is not None and needed > free:
        raise QuantizationError(
            "quantize would run out of memory",
            evidence=f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
            fix="free memory, use a larger machine, or --precision fp16",
        )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One run: what all its steps share. truth: the held-out texts by the float graph."""

    items: Sequence[Product]
    weight: Weight
    bench: Bench
    truth: NDArray[np.float32]
    spec: QuantizeSpec
    aim: Aim
    ways: Ways
    room: Path

    @property
    def full(self) -> bool:
        """Whether to try more than the recipe's own setting."""
        return self.spec.effort == "full" and self.aim.precision == INT8

    @property
    def own_setting(self) -> Setting:
        """The recipe's."""
        kind = FLOAT_INPUTS if self.aim.precision == INT8_WEIGHTS else INT8
        return Setting(
            scheme=self.aim.scheme, smoothing=self.spec.smoothing, clip=self.spec.clip, kind=kind
        )

    def prepare(self, sites: Mapping[str, Site], setting: Setting) -> dict[str, Prepared]:
        """Every product's treatment under one setting."""
        return prepare.run(
            self.items,
            self.weight,
            sites,
            setting,
            out_dir=self.room / setting.key(()),
            progress=self.ways.step("rounding weights"),
        )

    def treatments(
        self, prepared: Mapping[str, Prepared], wide: Sequence[str]
    ) -> dict[str, Treatment]:
        """Those of `prepared`, with some products wide."""
        return {
            name: replace(one.treatment, kind=self.aim.wide) if name in wide else one.treatment
            for name, one in prepared.items()
        }

    def measure(self, prepared: Mapping[str, Prepared], wide: Sequence[str]) -> search.Measured:
        """What the held-out texts say of some products being wide."""
        setting = next(iter(prepared.values())).setting
        return self.bench.trial(
            f"{self.aim.wide} {setting.key(wide)}", self.treatments(prepared, wide), self.truth
        )


def _statistics(
    model: OnnxModel,
    items: Sequence[Product],
    material: Material,
    judge: Target,
    room: Path,
    ways: Ways,
) -> dict[str, Site]:
    """Run the calibration texts through the float graph with every product's input as an output."""
    import onnx_ir as ir

    room.mkdir(parents=True, exist_ok=True)
    graph = ir.load(model.path)
    widths = {item.source: item.rows for item in items}
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs[:] = [values[name] for name in widths]
    ir.save(graph, room / GRAPH)
    # Copied: engines refuse weights outside the graph's folder, and weights that have two names,
    # also in the folder that they were linked from, where another build may be reading them.
    stages.copy(model.path.with_name(WEIGHTS), room / WEIGHTS)
    outputs = tuple(
        TensorSpec(name=name, dtype="float32", shape=("batch", "sequence", width))
        for name, width in widths.items()
    )
    probe = CompiledModel(
        target=judge.name,
        precision=model.precision,
        folder=room,
        files=(GRAPH, WEIGHTS),
        signature=Signature(inputs=model.signature.inputs, outputs=outputs),
        facts={},
    )
    with judge.runner(probe, "cpu", 0) as runner:
        sites = observers.collect(
            runner,
            widths,
            material.calibration,
            pad=material.pad,
            progress=ways.step("calibration texts"),
        )
    del runner
    shutil.rmtree(room)
    return sites


def _best_setting(
    job: _Job, sites: Mapping[str, Site], own: dict[str, Prepared]
) -> tuple[dict[str, Prepared], list[dict[str, Any]]]:
    """The setting whose groups fail least, by mean cosine; and what each technique gave.

    All products are int8.
    """
    best, highest, techniques = own, (-math.inf, 0.0), []
    for what, setting in config.tried(job.own_setting):
        made = own if setting == job.own_setting else job.prepare(sites, setting)
        found = job.measure(made, ())
        job.ways.tell(f"{what}: cosine {found.metrics['cosine_mean']:.5f}")
        techniques.append({"what": what, "share": 0.0, **found.metrics})
        # Not by neighbours: on 450 texts they move by 0.003 from one build of the same to the next.
        rank = (-float(len(found.failures)), found.metrics["cosine_mean"])
        if rank > highest:
            highest, best = rank, made
        if made is not best:
            shutil.rmtree(job.room / setting.key(()), ignore_errors=True)
    return best, techniques


def _damage(
    job: _Job, prepared: Mapping[str, Prepared], goals: search.Goals
) -> Mapping[str, float]:
    """How much cosine comes back when one product alone is wide.

    Where measuring that costs too much (`fast`, a large model), or no product will be widened: what
    each product loses of its own output.
    """
    local = {name: one.error() for name, one in prepared.items()}
    weights = sum(item.rows * item.columns for item in job.items)
    if job.aim.precision != INT8 or not (job.full or weights <= MEASURED_DAMAGE):
        return local
    base = job.measure(prepared, ())
    if goals.met(base) and not job.full:
        return local
    damage: dict[str, float] = {}
    for number, item in enumerate(job.items):
        job.ways.progress(number, len(job.items), f"damage of {item.name}")
        alone = job.measure(prepared, (item.name,))
        damage[item.name] = alone.metrics["cosine_mean"] - base.metrics["cosine_mean"]
    return damage


def _report(
    prepared: Mapping[str, Prepared],
    treatments: Mapping[str, Treatment],
    chosen: search.Trial,
    trials: Sequence[search.Trial],
    goals: search.Goals,
    spec: QuantizeSpec,
) -> dict[str, Any]:
    """quantization.json, but for texts, groups and sizes."""
    first = next(iter(prepared.values()))
    matrices = [
        {
            "name": name,
            "shape": [one.product.rows, one.product.columns],
            "share": one.product.share,
            "treatment": treatments[name].kind,
            "smoothing": one.setting.smoothing if one.treatment.divisors is not None else 0.0,
            "clip": one.setting.clip if one.product.rows > one.product.columns else 1.0,
            "error_naive": one.error_naive,
            "error": one.error(treatments[name].kind),
        }
        for name, one in prepared.items()
    ]
    return {
        "format": 1,
        "scheme": first.setting.scheme,
        "precision": INT8 if first.setting.kind == INT8 else INT8_WEIGHTS,
        "effort": spec.effort,
        "reached": chosen.passed,
        "gates": dict(goals.at_least),
        "max_share": goals.max_share,
        "chosen": chosen.report(),
        "tried": [trial.report() for trial in trials],
        "curve": [trial.report() for trial in sorted(trials, key=lambda t: t.share)],
        "matrices": matrices,
    }


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (GRAPH, WEIGHTS))
