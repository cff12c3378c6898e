"""What a quantized build needs beside the stages: texts, timings, its counterpart, its reports.

Knows no engine but through its Target, and no search: stages/quantize.py decides what is int8.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport import recipe
from jexport.artifacts import manifest, store
from jexport.artifacts.report import page as report_page
from jexport.datasets import calibration, sampling
from jexport.errors import QuantizationError
from jexport.evaluation import ranking, speed
from jexport.quantization.evaluator import Material, vectors
from jexport.recipe import ExportSpec, QuantizeSpec, Recipe
from jexport.runtime.embedder import TEXT_VECTORS, TOKEN_VECTORS
from jexport.runtime.open import compiled_model
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import export, quantize
from jexport.targets import Target
from jexport.types import Artifact, CompiledModel, LoadedModel, OnnxModel, Runner, TensorSpec
from jexport.workspace.threads import one_blas_thread

INT8, INT8_WEIGHTS = "int8", "int8-weights"
FLOATS = ("fp32", "fp16", "bf16")
NEIGHBOURS = 10

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of one task with the model that embeds them: what tokens they are."""

    parts: calibration.Parts
    loaded: LoadedModel
    tokenizer: TextTokenizer

    @classmethod
    def of(cls, source: str, loaded: LoadedModel) -> Texts:
        """The calibration set's texts for a loaded model's task. Raises CalibrationError."""
        return cls(
            parts=calibration.parts(source, loaded.embedding.task),
            loaded=loaded,
            tokenizer=TextTokenizer.open(
                loaded.tokenizer_files[0].parent, max_tokens=loaded.embedding.max_tokens
            ),
        )

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the runtime will make them: tokenizer.json, prompt, truncation."""
        return self.tokenizer.model_ids(texts, prefix=self.loaded.embedding.prompt)

    def held_out(self) -> list[list[int]]:
        """The held-out texts that have tokens."""
        return [
            ids for ids in self.tokens([one.text for one in self.parts.held_out.samples]) if ids
        ]

    def embed(self, runner: Runner, outputs: Sequence[TensorSpec]) -> Vectors:
        """The held-out texts through a runner: float32 [texts, dimension], normalised."""
        names = [spec.name for spec in outputs]
        return vectors(
            runner,
            self.held_out(),
            pad=self.tokenizer.pad,
            embedding=self.loaded.embedding,
            output=TOKEN_VECTORS if TOKEN_VECTORS in names else TEXT_VECTORS,
        )


def material(texts: Texts, spec: QuantizeSpec) -> Material:
    """Texts of both parts as token ids, prompt included, cut to the recipe's length."""
    limit = min(spec.max_tokens, texts.loaded.embedding.max_tokens)
    parts = texts.parts
    calibrated, cut = sampling.sample(
        parts.calibration, texts.tokens, count=spec.samples, max_tokens=limit
    )
    odd = [ids for ids in texts.tokens([""]) if ids]  # users send empty texts too
    calibrated += odd
    held = [
        (ids, sample.language)
        for sample, ids in zip(
            parts.held_out.samples,
            texts.tokens([sample.text for sample in parts.held_out.samples]),
            strict=True,
        )
        if ids
    ]
    held_ids = [sampling.cut_ids(ids, limit) for ids, _ in held]
    about = {
        "calibration": {
            "name": parts.calibration.name,
            "sha256": parts.calibration.sha256,
            "texts": len(calibrated),
            "tokens": sum(map(len, calibrated)),
            "cut": cut,
        },
        "held_out": {
            "name": parts.held_out.name,
            "sha256": parts.held_out.sha256,
            "texts": len(held_ids),
            "tokens": sum(map(len, held_ids)),
        },
    }
    return Material(
        calibration=calibrated,
        held_out=held_ids,
        languages=[language for _, language in held],
        pad=texts.tokenizer.pad,
        embedding=texts.loaded.embedding,
        about=about,
        odd=odd,
    )


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The quantized artifact beside its float ones, on this machine.

    speeds: texts a second by precision, empty where that says nothing. sizes: bytes of graph and
    weights by precision. plain, quantized: the held-out texts by either.
    """

    speeds: Mapping[str, float]
    sizes: Mapping[str, int]
    plain: Vectors
    quantized: Vectors


def listed(speeds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Speeds as manifest and report have them."""
    return [{"precision": name, "texts_per_second": rate} for name, rate in speeds.items()]


def beside_float(
    engine: Target,
    plain: OnnxModel,
    compiled: CompiledModel,
    texts: Texts,
    recipe: Recipe,
    room: Path,
) -> Beside:
    """Run each float graph of the same target beside the quantized one, in turn.

    One float graph is open at a time: two of full size do not fit a small machine. Speeds of
    different pairs are brought to the first pair's by the quantized graph that is in each.
    """
    names = [
        name
        for name in FLOATS
        if name in engine.precisions and name in (*recipe.precisions, "fp32")
        if engine.timed or name == "fp32"
    ]
    batch = speed.feeds(texts.held_out(), plain.max_tokens)
    outputs, own_name = plain.signature.outputs, compiled.precision
    speeds: dict[str, float] = {}
    sizes = {own_name: _bytes(compiled.folder, compiled)}
    with engine.runner(compiled, engine.devices[0], 0) as own:
        made = texts.embed(own, outputs)
        for name in names:
            with _float(engine, plain, name, recipe, room) as (runner, size):
                sizes[name] = size
                if name == "fp32":
                    truth = texts.embed(runner, outputs)
                if engine.timed:
                    pair = speed.compare({name: runner, own_name: own}, batch)
                    first = speeds.setdefault(own_name, pair[own_name])
                    speeds[name] = pair[name] * first / pair[own_name]
                del runner
        del own
    order = [name for name in (*names, own_name) if name in speeds]
    return Beside(
        speeds={name: speeds[name] for name in order}, sizes=sizes, plain=truth, quantized=made
    )


def _bytes(folder: Path, compiled: CompiledModel) -> int:
    return sum((folder / name).stat().st_size for name in compiled.files)


@contextlib.contextmanager
def _float(
    engine: Target, plain: OnnxModel, precision: str, recipe: Recipe, room: Path
) -> Iterator[tuple[Runner, int]]:
    """A float graph of the target, opened, and its bytes on disk."""
    folder = room / precision
    folder.mkdir()
    half = engine.graphs.get(precision, precision) == "fp16"
    model = _half(plain, recipe.export, folder) if half else plain
    compiled = engine.build(replace(model, precision=precision), recipe.compile, folder)
    with engine.runner(compiled, engine.devices[0], 0) as runner:
        size = _bytes(folder, compiled)
        for name in compiled.files:
            (folder / name).unlink()
        yield runner, size
        del runner


def _half(plain: OnnxModel, spec: ExportSpec, folder: Path) -> OnnxModel:
    place = folder / "graph"
    place.mkdir()
    return replace(export.in_half(plain, spec, place), precision="fp16")


def faster(speeds: Mapping[str, float], precision: str, *, allowed: bool) -> str:
    """How much faster int8 is. Raises QuantizationError when it is not and may not be slower."""
    floats = {name: rate for name, rate in speeds.items() if name in FLOATS}
    best = max(floats, key=floats.__getitem__)
    fast, slow = speeds[precision], floats[best]
    if precision == INT8 and fast <= slow and not allowed:
        raise QuantizationError(
            f"int8 is not faster than {best} on this machine",
            evidence=f"{fast:.1f} texts a second against {slow:.1f}, one batch of {speed.TEXTS}",
            fix=f"build where the processor has int8 instructions (VNNI, AMX), use {best}, or add "
            "--allow-slower",
        )
    return f"{fast / slow:.2f} times the speed of {best}"


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """The other half of a retrieval pair: its held-out texts in float, and in int8 once built."""

    task: str
    plain: Vectors
    quantized: Vectors | None


def counterpart(texts: Texts, engine: Target, built: Artifact | None) -> Counterpart:
    """Embed the other task's texts with the checkpoint itself, and with its artifact if there is.

    engine: the target as it is built here, which runs what it built (a portable artifact too).
    """
    loaded = texts.loaded
    hidden = TensorSpec(name=TOKEN_VECTORS, dtype="float32", shape=("batch", "sequence", 0))
    with loaded.reference() as forward:
        plain = texts.embed(forward, (hidden,))
    del forward
    made = None
    if built is not None:
        compiled = compiled_model(built.path, built.manifest.content)
        with engine.runner(compiled, engine.devices[0], 0) as runner:
            made = texts.embed(runner, compiled.signature.outputs)
            del runner
    return Counterpart(task=loaded.embedding.task, plain=plain, quantized=made)


def ranking_kept(own: Beside, other: Counterpart, *, own_are_queries: bool) -> dict[str, Any]:
    """How much of float queries' nearest float passages is found where one or both are int8.

    Each combination has top10_overlap and top1 (share of queries whose first passage stays), over
    the held-out queries and passages; None for one that needs an artifact not built yet.
    """
    queries = (own.plain, own.quantized) if own_are_queries else (other.plain, other.quantized)
    passages = (other.plain, other.quantized) if own_are_queries else (own.plain, own.quantized)
    truth = _similarities(queries[0], passages[0])
    found: dict[str, Any] = {
        "with": other.task,
        "queries": len(queries[0]),
        "passages": len(passages[0]),
    }
    for name, first, second in (
        ("queries_int8_passages_fp32", queries[1], passages[0]),
        ("queries_fp32_passages_int8", queries[0], passages[1]),
        ("queries_int8_passages_int8", queries[1], passages[1]),
    ):
        made = None if first is None or second is None else _similarities(first, second)
        found[name] = (
            made
            if made is None
            else {
                "top10_overlap": float(ranking.shared(truth, made, _count(truth)).mean()),
                "top1": float(ranking.shared(truth, made, 1).mean()),
            }
        )
    return found


def _similarities(queries: Vectors, passages: Vectors) -> NDArray[np.float64]:
    with one_blas_thread():
        made: NDArray[np.float64] = queries.astype(np.float64) @ passages.astype(np.float64).T
    return made


def _count(similarities: NDArray[np.float64]) -> int:
    return min(NEIGHBOURS, int(similarities.shape[1]))


def check_ranking(pair: Mapping[str, Any], goal: float) -> str:
    """The lowest overlap in words. Raises QuantizationError when one is below the goal."""
    overlaps = {
        name: group["top10_overlap"] for name, group in pair.items() if isinstance(group, Mapping)
    }
    worst = min(overlaps, key=overlaps.__getitem__)
    if overlaps[worst] < goal:
        raise QuantizationError(
            f"int8 does not keep the ranking of passages (together with {pair['with']})",
            evidence=f"{worst.replace('_', ' ')}: top-10 overlap {overlaps[worst]:.4f} < {goal}, "
            f"{pair['queries']} queries, {pair['passages']} passages",
            fix="build the other of the two anew, raise the goals of both, or lower "
            "quantize.pair_top10_overlap",
        )
    missing = "" if len(overlaps) == 3 else f"; {pair['with']} in int8 is not built yet"
    return f"with {pair['with']}: top-10 {overlaps[worst]:.3f}{missing}"


def treated(model: OnnxModel) -> str:
    """Which treatment how many products got."""
    report = _read(model.path.with_name(quantize.REPORT))
    kinds = [matrix["treatment"] for matrix in report["matrices"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{counts}; held-out top-10 {report['chosen']['top10_overlap']:.3f}"


def reports(
    model: OnnxModel,
    parity_path: Path,
    more: Mapping[str, Any],
    slot: store.Slot,
    out_dir: Path,
) -> tuple[Path, Path]:
    """quantization.json with what only the pipeline knows (`more`), and report.html made of it."""
    path = out_dir / quantize.REPORT
    content = _read(model.path.with_name(quantize.REPORT)) | dict(more)
    content["bytes"] = dict(content.pop("sizes"))
    manifest.write_json(path, content)
    facts = {
        "name": slot.model,
        "task": slot.task,
        "target": slot.target,
        "precision": slot.precision,
        "version": slot.version,
    }
    page = path.with_name(quantize.PAGE)
    page.write_text(report_page.render(content, _read(parity_path), facts), encoding="utf-8")
    return path, page


def command(chosen: Recipe, slot: store.Slot, name: str, until: str = "") -> str:
    """What to type to build it again, from the checkpoint's own name: a path is this machine's.

    until: the stage that a portable artifact's build ended after, '' for none. Other changes to the
    recipe than the command line offers are in the manifest's recipe.
    """
    words = ["jexport", "build"]
    shipped = chosen.name in recipe.names()
    if shipped:
        words += ["--recipe", chosen.name]
    if not shipped or recipe.read(chosen.name).load.model != chosen.load.model:
        words += ["--model", name]
        if not shipped and recipe.for_model(name).name != chosen.name:
            words += ["--name", chosen.name]
    words += ["--task", slot.task, "--target", slot.target, "--precision", slot.precision]
    words += ["--effort", chosen.quantize.effort, "--calibration", chosen.quantize.calibration]
    if chosen.quantize.allow_slower:
        words.append("--allow-slower")
    if until:
        words += ["--until", until]
    return shlex.join(words)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
