"""quantize: OnnxModel (fp32) -> OnnxModel (int8, Q/DQ in standard ONNX) and quantization.json.

Statistics from calibration texts, SmoothQuant, weights rounded by GPTQ, then a search that is
judged by embeddings of held-out texts. The scheme is the target's; every scheme comes from the same
statistics. Knows no engine but through the Target that runs its graphs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport import parity
from jexport.errors import CalibrationError, PrecisionError, QuantizationError
from jexport.flow import CompiledModel, Embedding, OnnxModel, Runner, Signature, TensorSpec
from jexport.int8 import numbers, prepare, products, search, statistics
from jexport.int8.treatment import TWICE, Treatment
from jexport.int8.treatment import WEIGHTS as FLOAT_INPUTS
from jexport.manifest import file_digest, sha256_of, write_json
from jexport.recipe import CompileSpec, QuantizeSpec
from jexport.run import give_back_memory
from jexport.runtime.embedder import plan_batches
from jexport.runtime.pool import finish, pool
from jexport.targets import Target

REPORT, PAGE = "quantization.json", "report.html"
GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
INT8, INT8_WEIGHTS = "int8", "int8-weights"
HIDDEN = "last_hidden_state"
MEASURED_DAMAGE = 50_000_000
"""Weights up to which `fast`, too, measures each product's damage by embeddings."""

FULL_SETTINGS = ((0.8, 1.0), (0.85, 1.0), (0.9, 1.0), (0.85, 0.9))
"""Smoothing strength and clip that `full` tries, the recipe's own first."""

Pad = Callable[[Sequence[Sequence[int]]], Mapping[str, NDArray[np.int64]]]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The texts, tokenised as users will (prompt, truncation).

    calibration, held_out: token ids. languages: of the held-out texts. pad: a padded batch.
    about: what quantization.json says of the texts (names, digests, counts).
    """

    calibration: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    languages: Sequence[str]
    pad: Pad
    embedding: Embedding
    about: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ways:
    """What the stage tells while it works."""

    progress: Callable[[int, int], None] = lambda done, total: None
    tell: Callable[[str], None] = lambda text: None


def run(
    model: OnnxModel,
    material: Material,
    spec: QuantizeSpec,
    *,
    scheme: str,
    precision: str,
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

    if scheme not in numbers.SCHEMES:
        raise PrecisionError(
            f"no quantization scheme '{scheme}'",
            evidence=f"there are: {', '.join(numbers.SCHEMES)}",
            fix="this target takes no int8; use fp32 or fp16",
        )
    if not material.calibration or not material.held_out:
        raise CalibrationError(
            "quantize has no texts",
            evidence=f"{len(material.calibration)} to calibrate on, {len(material.held_out)} held",
            fix="give --calibration a set with texts that this tokenizer takes",
        )
    ways = ways or Ways()
    source = ir.load(model.path)
    items = products.find(source)
    _check_memory(model, items)
    sites = _statistics(model, items, material, judge, out_dir / "statistics", ways)
    give_back_memory()

    def weights(name: str) -> NDArray[np.float32]:
        tensor = source.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    bench = _Bench(model=model, material=material, judge=judge, room=out_dir / "trials")
    kind = FLOAT_INPUTS if precision == INT8_WEIGHTS else INT8
    setting = prepare.Setting(scheme=scheme, smoothing=spec.smoothing, clip=spec.clip, kind=kind)
    truth = bench.vectors(model)
    judged = _Judged(bench=bench, truth=truth)
    prepared = prepare.run(
        items, weights, sites, setting, out_dir=out_dir / "weights", progress=ways.progress
    )
    before: list[search.Trial] = []
    if spec.effort == "full" and kind == INT8:
        prepared, before = _best_setting(
            prepared, items, weights, sites, judged, spec, out_dir, ways
        )
    del sites
    give_back_memory()
    goals = search.Goals(
        at_least={
            "cosine_mean": spec.cosine_mean,
            "cosine_p1": spec.cosine_p1,
            "top10_overlap": spec.top10_overlap,
        },
        max_share=spec.max_share if kind == INT8 else 0.0,
    )
    damage: Mapping[str, float] = {name: one.error for name, one in prepared.items()}
    total = sum(item.rows * item.columns for item in items)
    if kind == INT8 and (spec.effort == "full" or total <= MEASURED_DAMAGE):
        damage = _measured_damage(items, prepared, judged, goals, damage, ways)
    chosen, trials = search.run(
        items,
        lambda wide: judged.metrics(_treatments(prepared, wide)),
        damage,
        goals,
        whole_curve=spec.effort == "full" and kind == INT8,
        tell=ways.tell,
    )
    made = bench.write(_treatments(prepared, chosen.wide), out_dir, precision)
    write_json(
        out_dir / REPORT,
        _report(prepared, chosen, [*before, *trials], goals, spec, material, model, made),
    )
    for scratch in ("trials", "weights"):
        shutil.rmtree(out_dir / scratch, ignore_errors=True)
    return made


def _check_memory(model: OnnxModel, items: Sequence[products.Product]) -> None:
    """Refuse before it happens: weights twice (file and packed), Gram matrices, one batch."""
    wide = {item.source: item.rows for item in items}.values()
    needed = 2 * model.path.with_name(WEIGHTS).stat().st_size + sum(
        4 * rows * rows + 4 * rows * statistics.BATCH_TOKENS for rows in wide
    )
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known = dict(line.split(":", 1) for line in lines)
        free = int(known["MemAvailable"].split()[0]) * 1024
        if needed > free:
            raise QuantizationError(
                "quantize would run out of memory",
                evidence=f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
                fix="free memory, use a larger machine, or --precision fp16",
            )


def _statistics(
    model: OnnxModel,
    items: Sequence[products.Product],
    material: Material,
    judge: Target,
    room: Path,
    ways: Ways,
) -> dict[str, statistics.Site]:
    """Run the calibration texts through the float graph with every product's input as an output."""
    import onnx_ir as ir

    room.mkdir(parents=True, exist_ok=True)
    graph = ir.load(model.path)
    widths = {item.source: item.rows for item in items}
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs[:] = [values[name] for name in widths]
    ir.save(graph, room / GRAPH)  # its weights stay where they are, in a file linked here
    _link(model.path.with_name(WEIGHTS), room / WEIGHTS)
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
        sites = statistics.collect(
            runner, widths, material.calibration, pad=material.pad, progress=ways.progress
        )
    del runner
    shutil.rmtree(room)  # onnx_ir refuses to read weights that have two names
    return sites


def _link(source: Path, place: Path) -> None:
    """The same file in two folders: engines refuse weights outside the graph's own."""
    try:
        os.link(source, place)
    except OSError:  # another file system
        shutil.copyfile(source, place)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Writes graphs and embeds the held-out texts with them."""

    model: OnnxModel
    material: Material
    judge: Target
    room: Path

    def write(
        self, treatments: Mapping[str, Treatment], folder: Path, precision: str = INT8
    ) -> OnnxModel:
        """The float model with these treatments, written to `folder`."""
        import onnx_ir as ir

        from jexport.graph import storage
        from jexport.int8.graph import rewrite

        folder.mkdir(parents=True, exist_ok=True)
        graph = ir.load(self.model.path)
        rewrite(graph, treatments)
        storage.save(graph, folder / GRAPH)
        digests = {
            name: file_digest(folder / name, root=folder).sha256 for name in (GRAPH, WEIGHTS)
        }
        return replace(
            self.model, path=folder / GRAPH, precision=precision, sha256=sha256_of(digests)
        )

    @contextlib.contextmanager
    def opened(self, model: OnnxModel) -> Iterator[Runner]:
        """Run a graph as its users will: with the engine's own operators."""
        folder = self.room / "compiled"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        compiled = self.judge.build(model, CompileSpec(), folder)
        with self.judge.runner(compiled, "cpu", 0) as runner:
            yield runner
        shutil.rmtree(folder, ignore_errors=True)

    def vectors(self, model: OnnxModel) -> NDArray[np.float32]:
        """The held-out texts: float32 [texts, dimension]."""
        ids, embedding = self.material.held_out, self.material.embedding
        result = np.empty((len(ids), embedding.dimension), np.float32)
        output = HIDDEN if model.signature.output(HIDDEN) else model.signature.outputs[0].name
        with self.opened(model) as runner:
            for rows in plan_batches([len(one) for one in ids], statistics.BATCH_TOKENS):
                feeds = self.material.pad([ids[row] for row in rows])
                given = np.asarray(runner(feeds)[output], np.float32)
                if output == HIDDEN:
                    given = pool(given, feeds["attention_mask"], embedding.pooling)
                    given = finish(given, dimensions=None, normalize=True)
                result[rows] = given
            del runner
        give_back_memory()
        return result


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A bench and what the float model gives on it."""

    bench: _Bench
    truth: NDArray[np.float32]

    def metrics(self, treatments: Mapping[str, Treatment]) -> Mapping[str, float]:
        """Parity's overall numbers of the held-out texts."""
        room = self.bench.room / "trial"
        vectors = self.bench.vectors(self.bench.write(treatments, room))
        shutil.rmtree(room, ignore_errors=True)
        labels = parity.Labels(
            languages=tuple(self.bench.material.languages),
            lengths=tuple(len(one) for one in self.bench.material.held_out),
            dimensions=(vectors.shape[1],),
        )
        outcome = parity.compare(
            parity.Outputs(embeddings=self.truth), parity.Outputs(embeddings=vectors), labels
        )
        overall: Mapping[str, float] = outcome["overall"]
        return overall


def _treatments(
    prepared: Mapping[str, prepare.Prepared], wide: Sequence[str]
) -> dict[str, Treatment]:
    return {
        name: replace(one.treatment, kind=TWICE) if name in wide else one.treatment
        for name, one in prepared.items()
    }


def _best_setting(
    first: dict[str, prepare.Prepared],
    items: Sequence[products.Product],
    weights: Callable[[str], NDArray[np.float32]],
    sites: Mapping[str, statistics.Site],
    judged: _Judged,
    spec: QuantizeSpec,
    out_dir: Path,
    ways: Ways,
) -> tuple[dict[str, prepare.Prepared], list[search.Trial]]:
    """Try smoothing strengths and clips on all products; the one with the best mean cosine."""
    best, trials = first, []
    own = next(iter(first.values())).setting
    settings = [(own.smoothing, own.clip)]
    settings += [pair for pair in FULL_SETTINGS if pair not in settings]
    highest = -1.0
    for number, (strength, clip) in enumerate(settings):
        made = first
        if number:
            made = prepare.run(
                items, weights, sites, replace(own, smoothing=strength, clip=clip),
                out_dir=out_dir / "weights" / f"{number}", progress=ways.progress,
            )  # fmt: skip
        metrics = judged.metrics(_treatments(made, ()))
        what = f"all int8, smoothing {strength:g}, clip {clip:g}"
        ways.tell(f"{what}: top-10 {metrics['top10_overlap']:.4f}")
        trials.append(
            search.Trial(
                what=what, wide=(), share=0.0, passed=False, seconds=0.0,
                **{name: float(metrics[name]) for name in search.METRICS},
            )
        )  # fmt: skip
        # Not by neighbours: on 450 texts they move by 0.003 from one build of the same to the next.
        if metrics["cosine_mean"] > highest:
            highest, best = metrics["cosine_mean"], made
    return best, trials


def _measured_damage(
    items: Sequence[products.Product],
    prepared: Mapping[str, prepare.Prepared],
    judged: _Judged,
    goals: search.Goals,
    local: Mapping[str, float],
    ways: Ways,
) -> Mapping[str, float]:
    """How much cosine comes back when one product alone is wide; its own error when none meets."""
    base = judged.metrics(_treatments(prepared, ()))
    if goals.met(base):
        return local  # nothing will be widened for the goals
    damage: dict[str, float] = {}
    for number, item in enumerate(items):
        alone = judged.metrics(_treatments(prepared, (item.name,)))
        damage[item.name] = alone["cosine_mean"] - base["cosine_mean"]
        ways.progress(number + 1, len(items))
    return damage


def _report(
    prepared: Mapping[str, prepare.Prepared],
    chosen: search.Trial,
    trials: Sequence[search.Trial],
    goals: search.Goals,
    spec: QuantizeSpec,
    material: Material,
    model: OnnxModel,
    made: OnnxModel,
) -> dict[str, Any]:
    """quantization.json."""
    first = next(iter(prepared.values()))
    matrices = []
    for name, one in prepared.items():
        wide = name in chosen.wide
        matrices.append(
            {
                "name": name,
                "shape": [one.product.rows, one.product.columns],
                "share": one.product.share,
                "treatment": TWICE if wide else one.treatment.kind,
                "smoothing": one.setting.smoothing if one.treatment.divisors is not None else 0.0,
                "clip": one.setting.clip if one.product.rows > one.product.columns else 1.0,
                "error_naive": one.error_naive,
                "error": one.error,
            }
        )
    return {
        "format": 1,
        "scheme": first.setting.scheme,
        "precision": made.precision,
        "effort": spec.effort,
        "reached": chosen.passed,
        **material.about,
        "gates": dict(goals.at_least),
        "max_share": goals.max_share,
        "chosen": chosen.report(),
        "tried": [trial.report() for trial in trials],
        "curve": [trial.report() for trial in sorted(trials, key=lambda t: t.share)],
        "matrices": matrices,
        "bytes": {
            "fp32": _bytes(model.path.parent),
            made.precision: _bytes(made.path.parent),
        },
    }


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (GRAPH, WEIGHTS))
