"""The module that is traced: a transformer with a ready mask, plain attention and RoPE tables.

What is changed on the way in is what would be noise in the graph: mask construction, position and
token-type lookups of constants, safe-softmax branches. Knows nothing of ONNX.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jexport.errors import OverflowRangeError, UnsupportedCheckpointError
from jexport.flow import Embedding

MASKED = -10_000.0
"""Added to the scores of padding, as the authors' code does: finite in float16 as well."""

ATTENTION = "jexport"
FP16_MAX = 65_504.0


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling + mask) v; query [batch, heads, sequence, head size].

    Returns [batch, sequence, heads, head size]. No branch for fully masked rows: the mask is finite.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores + attention_mask
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
    return mixed.transpose(1, 2).contiguous(), None


class FirstRow(torch.nn.Module):
    """A token-type table where every token is of type 0: its first row, without a lookup."""

    def __init__(self, table: torch.nn.Embedding) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(table.weight[0].detach().clone(), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Any ids -> [hidden], broadcast by the addition that follows."""
        return self.weight


class LeadingRows(torch.nn.Module):
    """A position table where positions are 0, 1, 2 ...: a slice instead of a lookup."""

    def __init__(self, table: torch.nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, sequence], of which only the length is read -> [1, sequence, hidden]."""
        return self.weight[None, : ids.shape[-1]]


class RopeTables(torch.nn.Module):
    """cos and sin of every position, computed once in float32 (RoFormer, arXiv 2104.09864)."""

    def __init__(self, rotary: torch.nn.Module, positions: int) -> None:
        super().__init__()
        steps = torch.arange(positions)[None, :]
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), steps)
        self.register_buffer("cos", cos.contiguous())
        self.register_buffer("sin", sin.contiguous())

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [batch, sequence, hidden] -> two tables [1, sequence, head size]."""
        length = x.shape[1]
        return self.cos[:, :length], self.sin[:, :length]


class Encoder(torch.nn.Module):
    """input_ids, attention_mask (int64 [batch, sequence]) -> the outputs that were asked for."""

    def __init__(
        self, model: Any, embedding: Embedding, outputs: Sequence[str], dimension: int
    ) -> None:
        super().__init__()
        self.model = model
        self.embedding = embedding
        self.outputs = tuple(outputs)
        self.dimension = dimension
        self.additive_mask = _takes_additive_mask(model)
        if self.additive_mask:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            ALL_ATTENTION_FUNCTIONS.register(ATTENTION, plain_attention)
            model.config._attn_implementation = ATTENTION
        self.leading_positions = _simplify(model)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Outputs in the order of `self.outputs`."""
        mask = attention_mask.to(torch.float32)
        given = (1.0 - mask[:, None, None, :]) * MASKED if self.additive_mask else attention_mask
        extra = {}
        if self.leading_positions:
            # LeadingRows reads only how many there are, FirstRow nothing at all.
            extra = {"position_ids": input_ids, "token_type_ids": input_ids}
        out = self.model(input_ids=input_ids, attention_mask=given, **extra)
        hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
        made = []
        for name in self.outputs:
            if name == "last_hidden_state":
                made.append(hidden)
            else:
                made.append(_sentence(hidden, mask, self.embedding.pooling, self.dimension))
        return tuple(made)


def _sentence(
    hidden: torch.Tensor, mask: torch.Tensor, pooling: str, dimension: int
) -> torch.Tensor:
    """Pool in float32, cut to `dimension`, L2-normalise: the order of the authors' encode()."""
    weights = mask[:, :, None]
    if pooling == "cls":
        pooled = hidden[:, 0]
    elif pooling == "mean":
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    elif pooling == "mean_sqrt_len":
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()
    elif pooling == "max":
        pooled = (hidden + (1.0 - weights) * -1e9).amax(1)
    else:
        raise UnsupportedCheckpointError(
            f"pooling '{pooling}' is not exported into a graph",
            evidence="export.outputs asks for sentence_embedding",
            fix="export last_hidden_state: every runtime pools it outside of the graph",
        )
    if dimension:
        pooled = pooled[:, :dimension]
    return pooled / pooled.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _takes_additive_mask(model: Any) -> bool:
    """Whether transformers' shared mask and attention interfaces are what this class calls."""
    code = sys.modules[type(model).__module__]
    return hasattr(code, "ALL_ATTENTION_FUNCTIONS") and hasattr(code, "create_bidirectional_mask")


def _simplify(model: Any) -> bool:
    """Replace lookups of constants; returns whether LeadingRows was put in."""
    leading = False
    for module in list(model.modules()):
        if isinstance(getattr(module, "token_type_embeddings", None), torch.nn.Embedding):
            module.token_type_embeddings = FirstRow(module.token_type_embeddings)
    if model.config.model_type == "bert":
        # Only here are positions known to be 0, 1, 2 ...; RoBERTa's depend on the padding.
        embeddings = model.embeddings
        if isinstance(getattr(embeddings, "position_embeddings", None), torch.nn.Embedding):
            embeddings.position_embeddings = LeadingRows(embeddings.position_embeddings)
            leading = True
    if model.config.model_type == "jina_embeddings_v3":
        model.rotary_emb = RopeTables(model.rotary_emb, model.config.max_position_embeddings)
    return leading


def check_float16_range(
    encoder: Encoder, batches: Sequence[dict[str, torch.Tensor]], keep: Callable[[str], bool]
) -> dict[str, float]:
    """Run texts and return the largest |value| of each operation that float16 would hold.

    Raises OverflowRangeError, naming the operation, before any conversion: softmax, LayerNorm, RoPE
    and residual sums are left out because they stay float32. keep: names that stay float32 too.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    watched = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.gelu, aten.embedding}
    peaks: dict[str, float] = {}
    place: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in watched and result.is_floating_point():
                name = f"{place[-1]}.{func.overloadpacket.__name__}"
                peaks[name] = max(peaks.get(name, 0.0), float(result.abs().max()))
            return result

    def leave(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        place.pop()

    hooks = []
    for name, module in encoder.model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, i, n=name: place.append(n)))
        hooks.append(module.register_forward_hook(leave))
    try:
        with torch.inference_mode(), Watch():
            for batch in batches:
                encoder(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    over = {n: v for n, v in peaks.items() if not v <= FP16_MAX and not keep(n)}
    if over:
        raise OverflowRangeError(
            "float16 cannot hold the values of this model",
            evidence="\n".join(
                f"{name} reaches {value:.4g} (largest float16: {FP16_MAX:.0f})"
                for name, value in sorted(over.items(), key=lambda entry: -entry[1])[:5]
            ),
            fix="list these names in export.keep_fp32 of the recipe, or build --precision fp32",
        )
    return peaks
