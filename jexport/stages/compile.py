"""compile: OnnxModel or MergedModel -> CompiledModel (what one target's engine opens).

The work is the target's own; this stage checks first what the engine cannot take.
"""

from __future__ import annotations

from pathlib import Path

from jexport.recipe import CompileSpec
from jexport.targets import Target
from jexport.types import CompiledModel, MergedModel, OnnxModel


def run(
    model: OnnxModel | MergedModel, target: Target, spec: CompileSpec, *, out_dir: Path
) -> CompiledModel:
    """Check what the engine cannot take, then build what it opens.

    Args:
        model: an OnnxModel for a target that takes a graph, else a MergedModel.
        target: the engine.
        spec: [compile] of the recipe.
        out_dir: takes the engine's files.

    Returns:
        The compiled model; every file that it names is there.

    Raises:
        UnsupportedGraphError: names the operator and the way out.
        UnsupportedCheckpointError: names the architecture, for a target that takes no graph.
    """
    assert isinstance(model, OnnxModel) == target.needs_onnx, f"{target.name} takes another model"
    target.check(model)
    compiled = target.build(model, spec, out_dir)
    missing = [name for name in compiled.files if not (compiled.folder / name).is_file()]
    assert not missing, f"{target.name} did not write {missing}"
    return compiled
