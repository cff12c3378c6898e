"""Statistics of the inputs of linear layers over the calibration texts.

Every batch is folded in and forgotten, so memory does not grow with the number of texts. Padding
never enters: its rows are dropped before anything is counted. Inputs are independent: each is added
up on one thread, in the order of the batches, and several are at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport.errors import CalibrationError
from jexport.runtime.inference import Pad, plan_by_tokens, run_padded
from jexport.types import Runner
from jexport.workspace.threads import one_blas_thread

Array = NDArray[np.float32]

BATCH_TOKENS = 512
"""Tokens of one calibration batch: at 24 layers of 1,024, 0.35 GB of inputs of all layers."""

SAMPLE_ROWS = 256
"""Rows of each input that are kept to try out clipping and smoothing on."""


@dataclass(kw_only=True)
class ActivationStats:
    """Statistics of one activation over the calibration tokens.

    Args:
        minimum: float32 [channels].
        maximum: float32 [channels].
        gram: float32 [channels, channels], the sum of x^T x.
        samples: float32 [<= SAMPLE_ROWS, channels], spread evenly over all batches.
        total: float64 [channels], the sum of x.
        tokens: how many were seen.
    """

    minimum: Array
    maximum: Array
    gram: Array
    samples: Array
    total: NDArray[np.float64]
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int) -> ActivationStats:
        """Nothing seen yet.

        Args:
            channels: of the activation.

        Returns:
            Statistics of no token: the minimum is infinite, the maximum minus infinity.
        """
        return cls(
            minimum=np.full(channels, np.inf, np.float32),
            maximum=np.full(channels, -np.inf, np.float32),
            gram=np.zeros((channels, channels), np.float32),
            samples=np.empty((0, channels), np.float32),
            total=np.zeros(channels, np.float64),
        )

    def update(self, values: Array, keep: int) -> None:
        """Fold in the values of a batch.

        Args:
            values: float32 [tokens, channels], without padding.
            keep: how many rows of it become samples, evenly spread; 0 for none.
        """
        np.minimum(self.minimum, values.min(axis=0), out=self.minimum)
        np.maximum(self.maximum, values.max(axis=0), out=self.maximum)
        self.gram += values.T @ values
        self.total += values.sum(axis=0, dtype=np.float64)
        self.tokens += len(values)
        if keep:
            chosen = np.linspace(0, len(values) - 1, num=min(keep, len(values)), dtype=np.int64)
            self.samples = np.concatenate([self.samples, values[chosen]])

    def shifted(self, offsets: Array) -> ActivationStats:
        """Those of the activation less an offset a channel.

        Args:
            offsets: float32 [channels].

        Returns:
            New ones.
        """
        exact = offsets.astype(np.float64)
        # sum (x - z)^T (x - z), in float64: most of a channel that lies far from 0 cancels out.
        half = np.outer(self.total - self.tokens * exact / 2, exact)
        return replace(
            self,
            minimum=self.minimum - offsets,
            maximum=self.maximum - offsets,
            gram=(self.gram - (half + half.T)).astype(np.float32),
            samples=self.samples - offsets,
            total=self.total - self.tokens * exact,
        )


def collect_stats(
    runner: Runner,
    widths: Mapping[str, int],
    ids: Sequence[Sequence[int]],
    *,
    pad: Pad,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ActivationStats]:
    """Run texts through a graph whose outputs are the activations to observe.

    Args:
        runner: runs the graph.
        widths: channels of each activation by name.
        ids: token ids of each text.
        pad: makes a padded batch.
        progress: told batches done and in all.

    Returns:
        Statistics by activation's name.

    Raises:
        CalibrationError: an activation is not finite.
    """
    stats = {name: ActivationStats.empty(width) for name, width in widths.items()}
    batches = plan_by_tokens(ids, BATCH_TOKENS)
    # An even spread of SAMPLE_ROWS over the batches, whatever their number.
    keep = np.diff(np.linspace(0, SAMPLE_ROWS, num=len(batches) + 1).round().astype(int))
    with one_blas_thread() as threads, ThreadPoolExecutor(threads) as pool:
        for number, (_, mask, values) in enumerate(run_padded(runner, batches, pad=pad)):
            real = mask.astype(bool).reshape(-1)
            updates = [
                pool.submit(_update, one, name, values[name], real, int(keep[number]))
                for name, one in stats.items()
            ]
            for update in updates:
                update.result()
            progress(number + 1, len(batches))
    return stats


def _update(
    stats: ActivationStats, name: str, values: NDArray[Any], real: NDArray[np.bool_], keep: int
) -> None:
    """Fold one batch into an activation's statistics.

    Args:
        stats: what is known so far.
        name: the activation's name, for errors.
        values: [batch, sequence, channels], padding included.
        real: bool [batch * sequence], false for padding.
        keep: rows of it to keep.

    Raises:
        CalibrationError: a real token's activation is not finite.
    """
    tokens = np.asarray(values, np.float32).reshape(len(real), -1)[real]
    if not np.isfinite(tokens).all():
        raise CalibrationError(
            f"an activation is not finite: {name}",
            evidence=f"in a batch of {len(values)} calibration texts",
            fix="look at the checkpoint, or leave out the text that does it",
        )
    stats.update(tokens, keep)
