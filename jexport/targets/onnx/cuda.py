"""An onnx artifact that is made for CUDA alone: `compile.cuda` lists graph steps.

The graph has operators without a CPU kernel, or such as only pay on a GPU. So it is validated on
the device that it is made for, and opened nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jexport.errors import DependencyError, UnsupportedGraphError
from jexport.recipe import CompileSpec
from jexport.targets.onnx.devices import CUDA, why_not
from jexport.targets.onnx.session import preload

if TYPE_CHECKING:
    import onnx_ir as ir

PRECISIONS = ("fp32", "fp16", "tf32")
"""int8's operators have CPU kernels only."""

PORTABLE = (
    "build it on a machine with an NVIDIA GPU, or leave compile.cuda out of the recipe: that "
    "artifact runs on CUDA as well"
)


def ready() -> None:
    """Refuse a machine where such an artifact cannot be validated.

    Raises:
        DependencyError: onnxruntime has no CUDA provider here, or one that does not start.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if CUDA not in available:
        raise DependencyError(
            "an artifact that is made for CUDA is validated on CUDA, which this machine lacks",
            evidence=f"onnxruntime {onnxruntime.__version__} has: {', '.join(available)}",
            fix=PORTABLE,
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said below
    preload(onnxruntime)
    try:
        session = onnxruntime.InferenceSession(
            _smallest_graph(), options, providers=[CUDA], enable_fallback=0
        )
    except Exception as error:
        raise _does_not_start(next(iter(str(error).strip().splitlines()), "")) from error
    if CUDA not in session.get_providers():
        raise _does_not_start(f"it runs on: {', '.join(session.get_providers())}")


def _does_not_start(reason: str) -> DependencyError:
    return DependencyError(
        "an artifact that is made for CUDA is validated on CUDA, which does not start here",
        evidence=f"{why_not(0)}\n{reason[-300:]}".strip(),
        fix=PORTABLE,
    )


def _smallest_graph() -> bytes:
    """One node, serialized."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["y"])], "smallest", ends[:1], ends[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def rewrite(graph: ir.Model, spec: CompileSpec, max_tokens: int) -> dict[str, Any]:
    """Fuse a standard graph and apply the steps, in place.

    Args:
        graph: what export writes.
        spec: with `cuda`.
        max_tokens: the longest text to come.

    Returns:
        Facts for the manifest: `fused`, how many of each operator; `cuda`, the steps with how many
        places each changed, and what the CUDA provider has to be told.

    Raises:
        UnsupportedGraphError: no step finds anything: the artifact would not be for CUDA alone.
    """
    from jexport.graph import cuda_steps, ort_attention, ort_fusion

    steps = (*spec.cuda, "skip_layer_norm") if spec.skip_layer_norm else spec.cuda
    # Attention with its projection is an operator for the CPU: on CUDA it takes no lengths.
    longest = max(max_tokens, ort_attention.SHORT + 1)
    fused = ort_fusion.fuse(graph, skip_layer_norm=False, max_tokens=longest)
    counts = cuda_steps.apply(graph, steps)
    if not any(counts.values()):
        raise UnsupportedGraphError(
            f"nothing in this graph is changed by compile.cuda = {', '.join(spec.cuda)}",
            evidence=", ".join(f"{name}: {count}" for name, count in counts.items()),
            fix="leave compile.cuda out of the recipe, or list other steps",
        )
    options = cuda_steps.provider_options(steps)
    return {"fused": fused, "cuda": {"steps": counts, "provider_options": options}}
