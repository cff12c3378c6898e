"""Which values of a module would not fit float16, found by running texts before any conversion.

Watches what half.py turns into float16: matrix products, Gelu and table lookups, with what goes
into them. Softmax, LayerNormalization, RoPE and residual sums stay float32 and are not watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from jexport.errors import OverflowRangeError
from jexport.graph.half import FP16_MAX

RANGE_TOKENS = 512
"""How much of a text is run: attention's scores grow with the square of its length, and at 8,192
tokens one layer of the full-size model would take 4 GiB for them."""

_aten = torch.ops.aten
WATCHED: Mapping[Any, str] = {
    _aten.mm: "MatMul",
    _aten.addmm: "MatMul",
    _aten.linear: "MatMul",
    _aten.bmm: "MatMul",
    _aten.baddbmm: "MatMul",
    _aten.matmul: "MatMul",
    _aten.gelu: "Gelu",
    _aten.embedding: "Gather",
}
"""Torch operator and the ONNX operator it becomes; every float that goes in or out is float16."""


def check_texts(
    encoder: Any, samples: Sequence[Sequence[int]], keep: Callable[[str], bool]
) -> dict[str, float]:
    """`check` of a traceable.Encoder on token ids.

    Args:
        encoder: whose model is watched.
        samples: token ids of each text, which is run alone and cut to RANGE_TOKENS.
        keep: names that stay float32.

    Returns:
        As `check`.

    Raises:
        OverflowRangeError: as `check`.
    """

    def run() -> None:
        for ids in samples:
            row = torch.tensor([ids[:RANGE_TOKENS]])
            encoder(input_ids=row, attention_mask=torch.ones_like(row))

    return check(encoder.model, run, keep)


def check(model: Any, run: Callable[[], None], keep: Callable[[str], bool]) -> dict[str, float]:
    """Watch the values of a model while texts run through it; weights count as well.

    Args:
        model: a torch module.
        run: called once; it runs texts through `model`.
        keep: names that stay float32, as export.keep_fp32 takes them.

    Returns:
        The largest |value| by name: a module's ('layers.3.mlp.fc1') or, where a module computes
        beside its parts, that and the operator ('layers.3.self_attn.MatMul').

    Raises:
        OverflowRangeError: one that does not stay float32 exceeds float16's range; each is named.
    """
    peaks: dict[str, float] = {}
    inside: list[tuple[str, bool]] = []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: set[tuple[str, int]] = set()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            operator = WATCHED.get(func.overloadpacket)
            if operator is None or not inside:
                return result
            module, has_parts = inside[-1]
            name = f"{module}.{operator}".lstrip(".") if has_parts else module
            for tensor in (result, *(a for a in args if isinstance(a, torch.Tensor))):
                place = (name, tensor.untyped_storage().data_ptr())
                if place[1] in weights:  # does not change from text to text
                    if place in seen:
                        continue
                    seen.add(place)
                peaks[name] = max(peaks.get(name, 0.0), _peak(tensor))
            return result

    hooks = []
    for name, module in model.named_modules():
        entry = (name, any(True for _ in module.children()))
        hooks.append(module.register_forward_pre_hook(lambda m, i, e=entry: inside.append(e)))
        hooks.append(module.register_forward_hook(lambda m, i, o: inside.pop() and None))
    try:
        # Not inference_mode, in which a linear layer and sdpa arrive whole; sdpa in plain products,
        # because its scores are in the graph.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Watch():  # type: ignore[no-untyped-call]
            run()
    finally:
        for hook in hooks:
            hook.remove()
    _refuse({name: peak for name, peak in peaks.items() if peak > FP16_MAX and not keep(name)})
    return peaks


def _peak(tensor: torch.Tensor) -> float:
    """The largest |value|; infinity for a NaN, so that it compares."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor)  # unlike abs().max(), no copy of a large table
    peak = max(-float(low), float(high))
    return peak if math.isfinite(float(low)) and math.isfinite(float(high)) else math.inf


def _refuse(over: Mapping[str, float]) -> None:
    if not over:
        return
    named = sorted(over, key=lambda name: -over[name])
    listed = ", ".join(f'"{name}"' for name in sorted(over))
    raise OverflowRangeError(
        "float16 cannot hold the values of this model",
        evidence="\n".join(
            f"{name} reaches {over[name]:.4g} (largest float16: {FP16_MAX:.0f})"
            for name in named[:10]
        ),
        fix=f"set export.keep_fp32 = [{listed}] in the recipe, or build --precision fp32",
    )
