"""What an int8 build has beside the stages: its texts, its comparison with float, its reports.

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
from jexport.quantization.evaluator import CalibrationData, embed
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
class TokenizedTexts:
    """Calibration and held-out texts of one task, with the model that tokenizes and embeds them."""

    parts: calibration.Parts
    model: LoadedModel
    tokenizer: TextTokenizer

    @classmethod
    def of(cls, source: str, model: LoadedModel) -> TokenizedTexts:
        """The calibration set's texts for a model's task. Raises CalibrationError."""
        return cls(
            parts=calibration.parts(source, model.embedding.task),
            model=model,
            tokenizer=TextTokenizer.open(
                model.tokenizer_files[0].parent, max_tokens=model.embedding.max_tokens
            ),
        )

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the runtime will make them: tokenizer.json, prompt, truncation."""
        return self.tokenizer.model_ids(texts, prefix=self.model.embedding.prompt)

    def held_out(self) -> list[list[int]]:
        """The held-out texts that have tokens."""
        return [
            ids for ids in self.tokens([one.text for one in self.parts.held_out.samples]) if ids
        ]

    def embed(self, runner: Runner, outputs: Sequence[TensorSpec]) -> Vectors:
        """The held-out texts through a runner: float32 [texts, dimension], normalised."""
        names = [spec.name for spec in outputs]
        return embed(
            runner,
            self.held_out(),
            pad=self.tokenizer.pad,
            embedding=self.model.embedding,
            output=TOKEN_VECTORS if TOKEN_VECTORS in names else TEXT_VECTORS,
        )


def calibration_data(texts: TokenizedTexts, spec: QuantizeSpec) -> CalibrationData:
    """Texts of both parts as token ids, prompt included, cut to the recipe's length."""
    limit = min(spec.max_tokens, texts.model.embedding.max_tokens)
    parts = texts.parts
    calibrated, cut = sampling.sample(
        parts.calibration, texts.tokens, count=spec.samples, max_tokens=limit
    )
    edge_cases = [ids for ids in texts.tokens([""]) if ids]  # users send empty texts too
    calibrated += edge_cases
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
    metadata = {
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
    return CalibrationData(
        calibration=calibrated,
        held_out=held_ids,
        languages=[language for _, language in held],
        pad=texts.tokenizer.pad,
        embedding=texts.model.embedding,
        metadata=metadata,
        edge_cases=edge_cases,
    )


@dataclass(frozen=True, kw_only=True)
class FloatComparison:
    """The quantized model compared with float ones of its target, on this machine.

    speeds: texts a second by precision, empty where that says nothing. sizes: bytes of graph and
    weights by precision. float_vectors, quantized_vectors: of the held-out texts, float32
    [texts, dimension].
    """

    speeds: Mapping[str, float]
    sizes: Mapping[str, int]
    float_vectors: Vectors
    quantized_vectors: Vectors


def speed_rows(speeds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Speeds as manifest and report have them."""
    return [{"precision": name, "texts_per_second": rate} for name, rate in speeds.items()]


def compare_with_float(
    target: Target,
    float_graph: OnnxModel,
    compiled: CompiledModel,
    texts: TokenizedTexts,
    recipe: Recipe,
    work_dir: Path,
) -> FloatComparison:
    """Run each float graph of the same target beside the quantized one, in turn.

    One float graph is open at a time: two of full size do not fit a small machine. Speeds of
    different pairs are brought to the first pair's by the quantized graph that is in each.

    Args:
        target: builds and runs the float graphs.
        float_graph: fp32; the other precisions are made of it.
        compiled: the quantized model.
        texts: whose held-out texts are embedded and timed.
        recipe: which precisions it ships, and how they are compiled.
        work_dir: an empty folder for the float models.
    """
    names = [
        name
        for name in FLOATS
        if name in target.precisions and name in (*recipe.precisions, "fp32")
        if target.timed or name == "fp32"
    ]
    batch = speed.feeds(texts.held_out(), float_graph.max_tokens)
    outputs, own_name = float_graph.signature.outputs, compiled.precision
    speeds: dict[str, float] = {}
    sizes = {own_name: _bytes(compiled.folder, compiled)}
    with target.runner(compiled, target.devices[0], 0) as own:
        quantized_vectors = texts.embed(own, outputs)
        for name in names:
            with _open_float(target, float_graph, name, recipe, work_dir) as (runner, size):
                sizes[name] = size
                if name == "fp32":
                    float_vectors = texts.embed(runner, outputs)
                if target.timed:
                    pair = speed.compare({name: runner, own_name: own}, batch)
                    first = speeds.setdefault(own_name, pair[own_name])
                    speeds[name] = pair[name] * first / pair[own_name]
                del runner
        del own
    order = [name for name in (*names, own_name) if name in speeds]
    return FloatComparison(
        speeds={name: speeds[name] for name in order},
        sizes=sizes,
        float_vectors=float_vectors,
        quantized_vectors=quantized_vectors,
    )


def _bytes(folder: Path, compiled: CompiledModel) -> int:
    return sum((folder / name).stat().st_size for name in compiled.files)


@contextlib.contextmanager
def _open_float(
    target: Target, float_graph: OnnxModel, precision: str, recipe: Recipe, work_dir: Path
) -> Iterator[tuple[Runner, int]]:
    """A float graph of the target, opened, and its bytes on disk."""
    folder = work_dir / precision
    folder.mkdir()
    half = target.graphs.get(precision, precision) == "fp16"
    model = _half(float_graph, recipe.export, folder) if half else float_graph
    compiled = target.build(replace(model, precision=precision), recipe.compile, folder)
    with target.runner(compiled, target.devices[0], 0) as runner:
        size = _bytes(folder, compiled)
        for name in compiled.files:
            (folder / name).unlink()
        yield runner, size
        del runner


def _half(float_graph: OnnxModel, spec: ExportSpec, folder: Path) -> OnnxModel:
    place = folder / "graph"
    place.mkdir()
    return replace(export.in_half(float_graph, spec, place), precision="fp16")


def check_speed(speeds: Mapping[str, float], precision: str, *, allow_slower: bool) -> str:
    """How much faster int8 is than the fastest float, in words.

    Args:
        speeds: texts a second by precision.
        precision: of the quantized model.
        allow_slower: int8 need not be faster.

    Raises:
        QuantizationError: int8 is not faster and has to be.
    """
    floats = {name: rate for name, rate in speeds.items() if name in FLOATS}
    best = max(floats, key=floats.__getitem__)
    fast, slow = speeds[precision], floats[best]
    if precision == INT8 and fast <= slow and not allow_slower:
        raise QuantizationError(
            f"int8 is not faster than {best} on this machine",
            evidence=f"{fast:.1f} texts a second against {slow:.1f}, one batch of {speed.TEXTS}",
            fix=f"build where the processor has int8 instructions (VNNI, AMX), use {best}, or add "
            "--allow-slower",
        )
    return f"{fast / slow:.2f} times the speed of {best}"


@dataclass(frozen=True, kw_only=True)
class CounterpartVectors:
    """The held-out texts of a retrieval pair's other half, in float, and in int8 once built."""

    task: str
    float_vectors: Vectors
    quantized_vectors: Vectors | None


def counterpart_vectors(
    texts: TokenizedTexts, target: Target, built: Artifact | None
) -> CounterpartVectors:
    """Embed the other task's texts with the checkpoint itself, and with its artifact if there is.

    Args:
        texts: of the other task.
        target: as it is built here, which runs what it built (a portable artifact too).
        built: the other task's int8 artifact.
    """
    model = texts.model
    hidden = TensorSpec(name=TOKEN_VECTORS, dtype="float32", shape=("batch", "sequence", 0))
    with model.reference() as forward:
        float_vectors = texts.embed(forward, (hidden,))
    del forward
    quantized_vectors = None
    if built is not None:
        compiled = compiled_model(built.path, built.manifest.content)
        with target.runner(compiled, target.devices[0], 0) as runner:
            quantized_vectors = texts.embed(runner, compiled.signature.outputs)
            del runner
    return CounterpartVectors(
        task=model.embedding.task,
        float_vectors=float_vectors,
        quantized_vectors=quantized_vectors,
    )


def pair_ranking(
    own: FloatComparison, other: CounterpartVectors, *, own_are_queries: bool
) -> dict[str, Any]:
    """How much of float queries' nearest float passages is found where one or both are int8.

    Args:
        own: vectors of this build's held-out texts.
        other: vectors of the other task's held-out texts.
        own_are_queries: whether this build embeds queries, else passages.

    Returns:
        For each combination top10_overlap and top1 (share of queries whose first passage stays),
        0 to 1; None for one that needs an artifact not built yet.
    """
    queries, passages = (own, other) if own_are_queries else (other, own)
    reference = _similarities(queries.float_vectors, passages.float_vectors)
    ranking_by_pair: dict[str, Any] = {
        "with": other.task,
        "queries": len(queries.float_vectors),
        "passages": len(passages.float_vectors),
    }
    for name, first, second in (
        ("queries_int8_passages_fp32", queries.quantized_vectors, passages.float_vectors),
        ("queries_fp32_passages_int8", queries.float_vectors, passages.quantized_vectors),
        ("queries_int8_passages_int8", queries.quantized_vectors, passages.quantized_vectors),
    ):
        ranking_by_pair[name] = None
        if first is not None and second is not None:
            candidate = _similarities(first, second)
            count = _count(reference)
            ranking_by_pair[name] = {
                "top10_overlap": float(ranking.shared(reference, candidate, count).mean()),
                "top1": float(ranking.shared(reference, candidate, 1).mean()),
            }
    return ranking_by_pair


def _similarities(queries: Vectors, passages: Vectors) -> NDArray[np.float64]:
    with one_blas_thread():
        similarities: NDArray[np.float64] = (
            queries.astype(np.float64) @ passages.astype(np.float64).T
        )
    return similarities


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


def quantization_summary(model: OnnxModel) -> str:
    """How many MatMul layers were quantized how, in words."""
    report = _read(model.path.with_name(quantize.REPORT))
    kinds = [matrix["treatment"] for matrix in report["matrices"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{counts}; held-out top-10 {report['chosen']['top10_overlap']:.3f}"


def write_reports(
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
