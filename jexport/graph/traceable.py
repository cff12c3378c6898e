"""The module that is traced: a transformer with a ready mask, plain attention and RoPE tables.

What is changed on the way in is what would be noise in the graph: mask construction, position and
token-type lookups of constants, safe-softmax branches. Knows nothing of ONNX.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from jexport.graph import head
from jexport.types import Embedding

MASKED = -10_000.0
"""Added to the scores of padding, as the authors' code does: finite in float16 as well."""

ATTENTION = "jexport"

ROTARY = ("jina_embeddings_v3", "nomic_bert")
"""Model types with one `rotary_emb(x, position_ids)` and positions 0, 1, 2 ..."""

WINDOWED = ("modernbert",)
"""Model types that take a mask per kind of layer, by name."""


def plain_attention(  # the parameters with which transformers calls an attention
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling + mask) v, with a finite mask: no branch for empty rows.

    Args:
        module: not used.
        query: [batch, heads, sequence, head size].
        key: the same with as many heads, or fewer that are shared (grouped-query attention).
        value: the same as `key`.
        attention_mask: added to the scores, broadcast to [batch, heads, sequence, sequence].
        scaling: of the scores, None for 1 / sqrt(head size).
        dropout: not used: nothing is trained.
        unused: what else transformers gives an attention.

    Returns:
        [batch, sequence, heads, head size], and None for the weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = query.shape[-3] // key.shape[-3]
    if shared > 1:
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores + attention_mask
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
    return mixed.transpose(-3, -2).contiguous(), None


def plain_sdpa(  # the parameters of torch's scaled_dot_product_attention
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stand in for torch's scaled_dot_product_attention, without its branches for empty rows.

    Args:
        query: [..., heads, sequence, head size].
        key: the same with as many heads, or fewer that are shared.
        value: the same as `key`.
        attn_mask: added to the scores; a bool mask (True: look at it) becomes a finite one.
        dropout_p: not used: nothing is trained.
        is_causal: each token looks at those before it and at itself; replaces `attn_mask`.
        scale: of the scores, None for 1 / sqrt(head size).
        enable_gqa: not used: shared heads are seen from the shapes.

    Returns:
        The shape of `query`.
    """
    if is_causal:
        places = torch.arange(query.shape[-2])
        attn_mask = places[:, None] >= places[None, :]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = (1.0 - attn_mask.to(query.dtype)) * MASKED
    mixed, _ = plain_attention(None, query, key, value, attn_mask, scale)
    return mixed.transpose(-3, -2)


@contextlib.contextmanager
def plain_matmuls() -> Iterator[None]:
    """Let torch.nn.functional.scaled_dot_product_attention be `plain_sdpa` meanwhile."""
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = plain_sdpa
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


class FirstRow(torch.nn.Module):
    """A token-type table where every token is of type 0: its first row, without a lookup."""

    def __init__(self, table: torch.nn.Embedding) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(table.weight[0].detach().clone(), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The one row, broadcast by the addition that follows.

        Args:
            ids: not read.

        Returns:
            [hidden].
        """
        return self.weight


class LeadingRows(torch.nn.Module):
    """A position table where positions are 0, 1, 2 ...: a slice instead of a lookup."""

    def __init__(self, table: torch.nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As many rows as there are tokens.

        Args:
            ids: [batch, sequence], of which only the length is read.

        Returns:
            [sequence, hidden].
        """
        return self.weight[: ids.shape[-1]]


class RopeTables(torch.nn.Module):
    """cos and sin of every position, computed once in float32 (RoFormer, arXiv 2104.09864)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, rotary: torch.nn.Module, positions: int) -> None:
        super().__init__()
        steps = torch.arange(positions)[None, :]
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), steps)
        self.register_buffer("cos", cos.contiguous())
        self.register_buffer("sin", sin.contiguous())

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As much of both tables as there are tokens.

        Args:
            x: [batch, sequence, hidden], of which only the length is read.
            position_ids: not read: positions are 0, 1, 2 ...

        Returns:
            cos and sin, float32 [1, sequence, head size].
        """
        length = x.shape[1]
        return self.cos[:, :length], self.sin[:, :length]


class Encoder(torch.nn.Module):
    """input_ids, attention_mask (int64 [batch, sequence]) -> the outputs that were asked for."""

    def __init__(
        self,
        model: Any,
        embedding: Embedding,
        outputs: Sequence[str],
        dimension: int,
        *,
        after: torch.nn.Module | None = None,
        simplified: bool = True,
    ) -> None:
        """Make a model ready for the trace; it is changed.

        after: makes text vectors of token vectors and mask, where pooling and normalising does not.
        simplified: False leaves its masks and lookups as they are, where another form of them does
        not give the model's own hidden states.
        """
        super().__init__()
        self.model = model
        self.head = after
        self.embedding = embedding
        self.outputs = tuple(outputs)
        self.dimension = dimension
        self.additive_mask = simplified and _take_additive_mask(model)
        self.leading_positions = simplified and _simplify(model, embedding.max_tokens)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Everything that was asked for.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, sequence], 1 for a token and 0 for padding.

        Returns:
            Outputs in the order of `self.outputs`.
        """
        mask = attention_mask.to(torch.float32)
        hidden = self.hidden(input_ids, attention_mask)
        outputs = []
        for name in self.outputs:
            if name == "last_hidden_state":
                outputs.append(hidden)
            else:
                outputs.append(self._sentence(hidden, mask))
        return tuple(outputs)

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The model's last hidden states.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, sequence], 1 for a token and 0 for padding.

        Returns:
            float32 [batch, sequence, hidden].
        """
        mask = attention_mask.to(torch.float32)
        given = self._additive(mask) if self.additive_mask else attention_mask
        extra = {}
        if self.leading_positions:
            # LeadingRows reads only how many there are, FirstRow nothing at all.
            extra = {"position_ids": input_ids, "token_type_ids": input_ids}
        with plain_matmuls():
            out = self.model(input_ids=input_ids, attention_mask=given, **extra)
        hidden: torch.Tensor = (
            out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
        )
        return hidden

    def _sentence(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool in float32, cut to `dimension`, L2-normalise: the order of the authors' encode().

        The last where the checkpoint normalises; a head has done that, unless it is cut.
        """
        if self.head is not None:
            vectors = self.head(hidden, mask)
        else:
            vectors = head.pooled(hidden, mask, self.embedding.pooling)
        if self.dimension:
            vectors = vectors[:, : self.dimension]
        done = self.head is not None and not self.dimension
        return head.unit(vectors) if self.embedding.normalize and not done else vectors

    def _additive(self, mask: torch.Tensor) -> Any:
        """What is added to attention's scores: [batch, 1, 1, sequence], or one for each layer kind.

        In a windowed layer a token sees those at most `sliding_window` away on either side
        (transformers' masking_utils.sliding_window_bidirectional_overlay).
        """
        padding = (1.0 - mask[:, None, None, :]) * MASKED
        if self.model.config.model_type not in WINDOWED:
            return padding
        steps = torch.arange(mask.shape[1])
        far = (steps[:, None] - steps[None, :]).abs() > self.model.config.sliding_window
        windowed = padding + far.to(torch.float32) * MASKED
        return {"full_attention": padding, "sliding_attention": windowed}


def _take_additive_mask(model: Any) -> bool:
    """Let a class that uses transformers' shared mask take a ready one; returns whether it does.

    Such a class passes a mask of four dimensions on as it is, to the attention function that its
    config names or, where it has none to choose from, to its own eager one.
    """
    code = sys.modules[type(model).__module__]
    windowed = hasattr(code, "create_bidirectional_sliding_window_mask")
    if not hasattr(code, "create_bidirectional_mask"):
        return False
    if windowed and model.config.model_type not in WINDOWED:
        return False
    if not hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
        return bool(model.config._attn_implementation == "eager")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, plain_attention)
    model.config._attn_implementation = ATTENTION
    return True


def _simplify(model: Any, max_tokens: int) -> bool:
    """Drop the pooler, replace lookups of constants; returns whether LeadingRows was put in."""
    leading = False
    if type(model).__module__.startswith("transformers.") and hasattr(model, "pooler"):
        model.pooler = None  # of no output; these classes ask before they call it
    for module in list(model.modules()):
        if isinstance(getattr(module, "token_type_embeddings", None), torch.nn.Embedding):
            module.token_type_embeddings = FirstRow(module.token_type_embeddings)
    if model.config.model_type == "bert":
        # Only here are positions known to be 0, 1, 2 ...; RoBERTa's depend on the padding.
        embeddings = model.embeddings
        if isinstance(getattr(embeddings, "position_embeddings", None), torch.nn.Embedding):
            embeddings.position_embeddings = LeadingRows(embeddings.position_embeddings)
            leading = True
    if model.config.model_type in ROTARY:
        # sentence-transformers takes a stated limit beyond them, as the model itself does.
        positions = max(model.config.max_position_embeddings, max_tokens)
        model.rotary_emb = RopeTables(model.rotary_emb, positions)
    return leading
