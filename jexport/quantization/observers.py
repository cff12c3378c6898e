"""What goes into each product: range per channel, Gram matrix, and a few rows, over real tokens.

Every batch is folded in and forgotten, so memory does not grow with the number of texts. Padding
never enters: its rows are dropped before anything is counted. Sites are independent: each is added
up on one thread, in the order of the batches, and several are at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport.errors import CalibrationError
from jexport.runtime.batches import plan_batches
from jexport.types import Runner
from jexport.workspace.threads import one_blas_thread

Array = NDArray[np.float32]

BATCH_TOKENS = 512
"""Tokens of one calibration batch: at 24 layers of 1,024, 0.35 GB of inputs of all products."""

KEPT_ROWS = 256
"""Rows of each input that are kept to try out clipping and smoothing on."""


@dataclass(kw_only=True)
class Site:
    """An input of products over the calibration tokens.

    low, high: float32 [channels]. gram: float32 [channels, channels], the sum of x^T x.
    rows: float32 [<= KEPT_ROWS, channels], spread evenly over all batches. tokens: how many.
    """

    low: Array
    high: Array
    gram: Array
    rows: Array
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int) -> Site:
        """Nothing seen yet."""
        return cls(
            low=np.full(channels, np.inf, np.float32),
            high=np.full(channels, -np.inf, np.float32),
            gram=np.zeros((channels, channels), np.float32),
            rows=np.empty((0, channels), np.float32),
        )

    def add(self, values: Array, keep: int) -> None:
        """Fold in float32 [tokens, channels] and keep `keep` rows of it."""
        np.minimum(self.low, values.min(axis=0), out=self.low)
        np.maximum(self.high, values.max(axis=0), out=self.high)
        self.gram += values.T @ values
        self.tokens += len(values)
        if keep:
            chosen = np.linspace(0, len(values) - 1, num=min(keep, len(values)), dtype=np.int64)
            self.rows = np.concatenate([self.rows, values[chosen]])


def collect(
    runner: Runner,
    widths: Mapping[str, int],
    ids: Sequence[Sequence[int]],
    *,
    pad: Callable[[Sequence[Sequence[int]]], Mapping[str, NDArray[np.int64]]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Site]:
    """Run the texts through a graph whose outputs are the sites.

    widths: channels of each site by name. ids: token ids of each text. pad: a padded batch.
    Raises CalibrationError for an activation that is not finite.
    """
    sites = {name: Site.empty(width) for name, width in widths.items()}
    batches = plan_batches([len(one) for one in ids], BATCH_TOKENS)
    # An even spread of KEPT_ROWS over the batches, whatever their number.
    kept = np.diff(np.linspace(0, KEPT_ROWS, num=len(batches) + 1).round().astype(int))
    with one_blas_thread() as threads, ThreadPoolExecutor(threads) as pool:
        for number, rows in enumerate(batches):
            feeds = pad([ids[row] for row in rows])
            real = feeds["attention_mask"].astype(bool).reshape(-1)
            values = runner(feeds)
            adding = [
                pool.submit(_add, site, name, values[name], real, int(kept[number]))
                for name, site in sites.items()
            ]
            for one in adding:
                one.result()
            progress(number + 1, len(batches))
    return sites


def _add(site: Site, name: str, values: NDArray[Any], real: NDArray[np.bool_], keep: int) -> None:
    """Fold one batch into a site.

    Args:
        site: what is known so far.
        name: its name, for errors.
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
    site.add(tokens, keep)
