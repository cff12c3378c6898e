"""Token vectors -> one vector per text, in torch: what is traced, and what merged checkpoints run.

The same numbers as runtime/pool.py gives: padding on either side, zeros for a row without a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from jexport.errors import UnsupportedCheckpointError
from jexport.types import HeadModule


def pooled(hidden: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """Pool token vectors over the tokens whose mask is 1.

    Source: sentence-transformers' `Pooling`.

    Args:
        hidden: float32 [batch, sequence, hidden].
        mask: float32 [batch, sequence] of 0 and 1.
        mode: as in Embedding.

    Returns:
        float32 [batch, hidden].

    Raises:
        UnsupportedCheckpointError: on another mode.
    """
    weights = mask[:, :, None]
    if mode in ("cls", "last"):
        count = mask.cumsum(1)
        weight = 1.0 if mode == "cls" else mask.sum(1, keepdim=True)
        chosen = mask * (count == weight).to(torch.float32)
        return (hidden * chosen[:, :, None]).sum(1)
    if mode == "mean":
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    if mode == "mean_sqrt_len":
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()
    if mode == "weightedmean":
        weights = (mask * mask.cumsum(1))[:, :, None]  # 1, 2, 3 ... from the first real token
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    if mode == "max":
        return (hidden + (1.0 - weights) * -1e9).amax(1) * weights.amax(1)
    raise UnsupportedCheckpointError(
        f"pooling '{mode}' is not exported into a graph",
        evidence="export.outputs asks for sentence_embedding",
        fix="export last_hidden_state: every runtime pools it outside of the graph",
    )


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors brought to length 1.

    Args:
        vectors: float32 [batch, dimension].

    Returns:
        The same shape; norms are clamped at 1e-12, as torch.nn.functional.normalize does.
    """
    scaled: torch.Tensor = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return scaled


class _Pooling(torch.nn.Module):
    """Several poolings, joined in their order."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = [pooled(hidden, mask, mode) for mode in self.modes]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Dense(torch.nn.Module):
    """activation(linear(x)), and x again where it is residual.

    Source: sentence-transformers' `Dense`, whose names of weights these are.
    """

    def __init__(self, module: HeadModule) -> None:
        super().__init__()
        config = module.config
        columns, rows = config["in_features"], config["out_features"]
        path, _, name = config["activation_function"].rpartition(".")
        self.linear = torch.nn.Linear(columns, rows, bias=config["bias"])
        self.activation_function = getattr(importlib.import_module(path), name)()
        self.use_residual = config["use_residual"]
        if self.use_residual and columns != rows:
            self.residual = torch.nn.Linear(columns, rows, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.activation_function(self.linear(vectors))
        if not self.use_residual:
            return result
        return result + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class _LayerNorm(torch.nn.Module):
    """Source: sentence-transformers' `LayerNorm`, whose names of weights these are."""

    def __init__(self, module: HeadModule) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(module.config["dimension"])

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(vectors)
        return result


class _Normalize(torch.nn.Module):
    def __init__(self, module: HeadModule) -> None:
        super().__init__()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return unit(vectors)


KINDS = {"Dense": _Dense, "LayerNorm": _LayerNorm, "Normalize": _Normalize}
"""By the name of the module in sentence-transformers; a Pooling comes first and once."""


class Head(torch.nn.Module):
    """All modules after the transformer, one after another, in float32 and eval mode."""

    def __init__(self, modules: Sequence[HeadModule]) -> None:
        """Read the weights.

        modules: the first is the Pooling.
        """
        super().__init__()
        self.pooling = _Pooling(modules[0].config["pooling_mode"])
        self.modules_after = torch.nn.ModuleList(KINDS[one.kind](one) for one in modules[1:])
        for layer, one in zip(self.modules_after, modules[1:], strict=True):
            layer.load_state_dict({name: read() for name, read in one.weights.items()})
        self.eval().requires_grad_(False)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token vectors to text vectors.

        Args:
            hidden: float32 [batch, sequence, hidden].
            mask: float32 [batch, sequence], 1 for a token and 0 for padding.

        Returns:
            float32 [batch, dimension].
        """
        vectors: torch.Tensor = self.pooling(hidden, mask)
        for layer in self.modules_after:
            vectors = layer(vectors)
        return vectors
