"""Graph steps that only make sense on CUDA: `compile.cuda` names them, none is the default.

Each step is one rewrite of a fused graph (ort_fusion.py) with operators that ONNX Runtime's CUDA
provider has kernels for; any subset of them may be chosen. Which of them pays is decided on a GPU
(benchmarks/gpu.py has a row for each name of `names()`); DECISIONS.md has what is known of each
kernel. A graph that went through any of them is for CUDA alone: its artifact says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from jexport.graph import cuda_attention, cuda_half, cuda_packing, edit, ort_fusion
from jexport.graph.ort_attention import MS
from jexport.recipe import CUDA_STEPS

Rewrite = Callable[[edit.Edit], int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rewrite.

    Args:
        rewrite: changes a graph in place and returns how many places it changed.
        summary: one line.
        provider_options: what the CUDA provider needs for it, by its own option names.
    """

    rewrite: Rewrite
    summary: str
    provider_options: Mapping[str, str]


def fuse_fast_gelu(work: edit.Edit) -> int:
    """BiasGelu and exact Gelu -> FastGelu, the tanh formula.

    The two differ by up to 4.7e-4 (at x = 2.3), so a recipe's gates decide about it.

    Args:
        work: an edit of a fused graph.

    Returns:
        How many.
    """
    count = 0
    for gelu in list(work.graph):
        exact = gelu.op_type == "BiasGelu" and gelu.domain == MS
        mode = gelu.attributes.get("approximate")
        exact |= (
            gelu.op_type == "Gelu"
            and not gelu.domain
            and (mode is None or mode.as_string() == "none")
        )
        if not exact:
            continue
        node = work.insert(
            gelu,
            "FastGelu",
            list(gelu.inputs),
            {},
            name=f"{gelu.name}/fast",
            like=gelu.outputs[0],
            domain=MS,
        )
        work.take_over(gelu, node)
        count += 1
    return count


STEPS: Mapping[str, Step] = {
    "half_rotary": Step(
        rewrite=cuda_half.rotary,
        summary="float16 graphs: RotaryEmbedding in float16, tables too",
        provider_options={},
    ),
    "half_residual": Step(
        rewrite=cuda_half.residual,
        summary="float16 graphs: residual sums and LayerNormalization in float16",
        provider_options={},
    ),
    "skip_layer_norm": Step(
        rewrite=ort_fusion.fuse_skip_layer_norm,
        summary="bias, residual sum and norm in one SkipLayerNormalization",
        # Without it the float16 kernel sums squares in float16.
        provider_options={"enable_skip_layer_norm_strict_mode": "1"},
    ),
    "fast_gelu": Step(
        rewrite=fuse_fast_gelu,
        summary="Gelu by the tanh formula (FastGelu)",
        provider_options={},
    ),
    "split_projection": Step(
        rewrite=cuda_attention.split_projection,
        summary="a product each of query, key and value, in the place of one that is split",
        provider_options={},
    ),
    "packed_attention": Step(
        rewrite=cuda_packing.pack,
        summary="padding removed before the first layer, PackedMultiHeadAttention in each",
        provider_options={},
    ),
    "efficient_attention": Step(
        rewrite=cuda_attention.efficient,
        summary="one MultiHeadAttention that is given lengths: no If, no tokens x tokens matrix",
        provider_options={},
    ),
}
"""In the order in which they are applied, whatever order a recipe lists them in."""

ALTERNATIVE = "packed_attention"
"""Not in 'all': a graph with it cannot be captured as a CUDA graph."""


def names() -> tuple[str, ...]:
    """The steps there are, in the order in which they are applied."""
    return tuple(STEPS)


def provider_options(chosen: Sequence[str]) -> dict[str, str]:
    """What the CUDA provider has to be told for a graph with these steps.

    Args:
        chosen: names of steps.

    Returns:
        Values by the provider's own option names.
    """
    options: dict[str, str] = {}
    for name in expand(chosen):
        options.update(STEPS[name].provider_options)
    return options


def expand(chosen: Sequence[str]) -> tuple[str, ...]:
    """The steps that `compile.cuda` means, in the order in which they are applied.

    Args:
        chosen: names of steps; 'all' among them stands for every one but `packed_attention`, which
            takes the place of `efficient_attention` when it is listed as well.

    Returns:
        Their names, each once.
    """
    every = set(STEPS) - {ALTERNATIVE} if "all" in chosen else set()
    return tuple(name for name in STEPS if name in chosen or name in every)


def apply(model: ir.Model, chosen: Sequence[str]) -> dict[str, int]:
    """Apply steps to a fused graph, in place.

    Args:
        model: a graph that ort_fusion.fuse has been over.
        chosen: names of steps, or 'all' among them.

    Returns:
        By step, how many places it changed; 0 where it found nothing.
    """
    assert set(STEPS) == set(CUDA_STEPS), "recipe.CUDA_STEPS and STEPS name the same steps"
    counts: dict[str, int] = {}
    for name in expand(chosen):
        work = edit.Edit(model.graph)
        counts[name] = STEPS[name].rewrite(work)
        work.drop_dead()
        model.graph.sort()
    if any(counts.values()):
        model.opset_imports[MS] = 1
        model.graph.opset_imports[MS] = 1
    return counts
