"""A few token ids that show whether a module gives one vector a text, and always the same.

The module as transformers made it is run on them, alone and padded, before anything is changed
for the trace; what `traceable` makes of it must then give the same. Knows no checkpoint by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from jexport.errors import UnsupportedGraphError
from jexport.graph import trace_errors

WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "local_attention",
    "attention_window",
    "window_size",
    "local_attn_chunk_length",
    "attention_chunk_size",
)
"""Config keys of attention that does not see the whole text: a probe must be longer than that."""

SHORTEST, LONGEST = 24, 1_056
FIRST_ID = 4
"""The special tokens of most vocabularies come before."""

SAME = 1e-3
"""Largest difference of hidden states, as a share of their largest value: far above float32's
noise, far below what another mask or another position does."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Three texts: a long one, one of a third of its tokens, and one of three tokens.

    Args:
        ids: int64 [3, tokens], padded on the right.
        mask: int64 [3, tokens].
        lengths: of each text in tokens, longest first.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: tuple[int, ...]


def of(model: Any, *, max_tokens: int) -> Probe:
    """The probe for a transformers model: longer than its windows, no longer than its limit.

    Args:
        model: whose config and vocabulary are read.
        max_tokens: the model's limit.

    Returns:
        The same random ids each time.
    """
    text = _text_config(model)
    rows = _rows(model, text)
    length = max(SHORTEST, 2 * max(windows(model), default=0) + 8)
    length = max(3, min(length, LONGEST, max_tokens))
    lengths = (length, max(3, length // 3), 3)
    pad = getattr(text, "pad_token_id", None) or 0
    ids = torch.full((len(lengths), length), pad if 0 <= pad < rows else 0)
    mask = torch.zeros_like(ids)
    generator = torch.Generator().manual_seed(0)
    for row, count in enumerate(lengths):
        ids[row, :count] = torch.randint(
            min(FIRST_ID, rows - 1), rows, (count,), generator=generator
        )
        mask[row, :count] = 1
    return Probe(ids=ids, mask=mask, lengths=lengths)


def windows(model: Any) -> list[int]:
    """Sizes of attention that does not see the whole text.

    Args:
        model: of transformers; None for another kind.

    Returns:
        Tokens, as its config says them; empty where every layer sees all.
    """
    text = _text_config(model)
    return [size for key in WINDOWS for size in _sizes(getattr(text, key, None))]


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    try:
        return config.get_text_config()  # type: ignore[union-attr]
    except Exception:  # transformers raises what it likes where a config has several parts
        return config


def _rows(model: Any, text: Any) -> int:
    """How many token ids there are, by the model's own table or by its config."""
    try:
        table = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        table = None
    if isinstance(table, torch.Tensor) and table.ndim == 2:
        return table.shape[0]
    rows = getattr(text, "vocab_size", None)
    if isinstance(rows, int) and rows > 0:
        return rows
    raise UnsupportedGraphError(
        f"{type(model).__name__} has no table of token embeddings",
        evidence=f"model_type {getattr(model.config, 'model_type', None)!r}; no vocab_size either",
        fix=trace_errors.TEXT_ENCODER,
    )


def _sizes(value: object) -> Iterator[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    yield from (one for one in values if isinstance(one, int) and not isinstance(one, bool))


def own_states(model: Any, probe: Probe) -> torch.Tensor:
    """The model's own hidden states of the probe.

    Args:
        model: as transformers made it.
        probe: made for it by `of`.

    Returns:
        float32 [3, tokens, hidden].

    Raises:
        UnsupportedGraphError: the model does not take text alone, gives no hidden state a token, or
            gives a text other states beside other texts or when it is asked again.
    """
    states = _states(model, probe.ids, probe.mask)
    shortest = probe.lengths[-1]
    alone = _states(model, probe.ids[-1:, :shortest], probe.mask[-1:, :shortest])
    if not is_same(states[-1:, :shortest], alone, probe.mask[-1:, :shortest]):
        again = _states(model, probe.ids, probe.mask)
        is_random = not is_same(again, states, probe.mask)
        raise UnsupportedGraphError(
            f"{type(model).__name__} gives the same text other vectors "
            + ("each time" if is_random else "beside longer texts"),
            evidence=f"a text of {shortest} tokens, alone and padded to {probe.lengths[0]}:"
            f" {difference(states[-1:, :shortest], alone):.3g} between the largest hidden states"
            + ("; it draws random numbers" if is_random else ", so it reads its padding"),
            fix="use a model whose attention mask keeps padding out; no artifact of this one could"
            " be compared with what users get",
        )
    return states


def _states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    name = type(model).__name__
    try:
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=mask)
        hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    except Exception as error:
        if trace_errors.is_the_machines(error):
            raise
        raise trace_errors.unsupported(
            error, model, what=f"{name} cannot embed text alone"
        ) from error
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
        got = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else list(out)
        raise UnsupportedGraphError(
            f"{name} gives no hidden state for each token",
            evidence=f"for input_ids of shape {tuple(ids.shape)} it gives {got}",
            fix=trace_errors.TEXT_ENCODER,
        )
    return hidden.float().clone()


def agrees(encoder: Any, probe: Probe, own: torch.Tensor) -> bool:
    """Whether a traceable.Encoder gives the model's own hidden states of the probe.

    Args:
        encoder: what is to be traced.
        probe: what `own` was computed on.
        own: from `own_states`.

    Returns:
        False also where the encoder fails, unless memory or the disk did.
    """
    try:
        with torch.inference_mode():
            states = encoder.hidden(probe.ids, probe.mask)
    except Exception as error:  # a mask or an argument of another form than the model takes
        if trace_errors.is_the_machines(error):
            raise
        return False
    return tuple(states.shape) == tuple(own.shape) and is_same(states.float(), own, probe.mask)


def not_itself(encoder: Any, probe: Probe, own: torch.Tensor) -> UnsupportedGraphError:
    """The error for a model whose traceable form is another model.

    Args:
        encoder: for which `agrees` is False.
        probe: what `own` was computed on.
        own: from `own_states`.

    Returns:
        The error, to be raised: with the difference, or with what the encoder raised.
    """
    name = type(encoder.model).__name__
    try:
        with torch.inference_mode():
            states = encoder.hidden(probe.ids, probe.mask)
    except Exception as error:
        return trace_errors.unsupported(error, encoder)
    kept = probe.mask.bool()
    return UnsupportedGraphError(
        f"{name} cannot be exported as a graph",
        evidence=f"with attention as matrix products its hidden states differ by"
        f" {difference(states[kept].float(), own[kept]):.3g} of the largest",
        fix=trace_errors.FIX,
    )


def is_same(states: torch.Tensor, others: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether hidden states agree wherever there is a token.

    Args:
        states: [texts, tokens, width].
        others: of the same shape.
        mask: [texts, tokens], 1 where there is a token.

    Returns:
        True up to a difference of SAME.
    """
    kept = mask.bool()
    return difference(states[kept], others[kept]) <= SAME


def difference(states: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference of hidden states, as a share of the largest value.

    Args:
        states: of any shape.
        others: of the same shape; the largest value is theirs.

    Returns:
        The share; infinity where one is not finite.
    """
    largest = float(others.abs().max())
    share = float((states - others).abs().max()) / max(largest, 1e-12)
    return share if share == share else float("inf")
