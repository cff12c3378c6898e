"""An int8 model run beside float ones: speeds, sizes, and vectors of the held-out texts.

Knows no engine but through its Target. What the numbers must be is evaluation/int8_checks.py's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jexport.building.calibration_texts import TokenizedTexts
from jexport.evaluation import speed
from jexport.evaluation.int8_checks import FLOATS, CounterpartVectors, FloatComparison
from jexport.recipe import ExportSpec, Recipe
from jexport.runtime.embedder import TOKEN_VECTORS
from jexport.runtime.open import compiled_model
from jexport.stages import export
from jexport.targets import Target
from jexport.types import Artifact, CompiledModel, OnnxModel, Runner, TensorSpec


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

    Returns:
        Speeds, sizes, and vectors of the held-out texts.
    """
    names = [
        name
        for name in FLOATS
        if name in target.precisions and name in (*recipe.precisions, "fp32")
        if target.runtime.timed or name == "fp32"
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
                if target.runtime.timed:
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
    half = target.compiling.graph_precisions.get(precision, precision) == "fp16"
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


def counterpart_vectors(
    texts: TokenizedTexts, target: Target, built: Artifact | None
) -> CounterpartVectors:
    """Embed the other task's texts with the checkpoint itself, and with its artifact if there is.

    Args:
        texts: of the other task.
        target: as it is built here, which runs what it built (a portable artifact too).
        built: the other task's int8 artifact.

    Returns:
        The held-out texts of the other task, in float and in int8.
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
