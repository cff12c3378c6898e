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
    """Check, then build.

    Raises UnsupportedGraphError naming the operator and the way out, for a target without a graph
    UnsupportedCheckpointError naming the architecture.
    """
    assert isinstance(model, OnnxModel) == target.needs_onnx, f"{target.name} takes another model"
    target.check(model)
    compiled = target.build(model, spec, out_dir)
    missing = [name for name in compiled.files if not (compiled.folder / name).is_file()]
    assert not missing, f"{target.name} did not write {missing}"
    return compiled
