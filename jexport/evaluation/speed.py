"""How fast two runners are, side by side: whether int8 was worth it on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from jexport.types import Runner

TEXTS, TOKENS, ROUNDS = 8, 128, 5
HOPELESS, TRIED = 3.0, 2
"""A runner that is so many times slower than the fastest after so many rounds is left at that."""


def feeds(ids: Sequence[Sequence[int]], max_tokens: int) -> dict[str, NDArray[np.int64]]:
    """One batch of real token ids, nothing padded.

    Args:
        ids: token ids of texts, put one behind another and repeated as needed.
        max_tokens: of the model.

    Returns:
        `input_ids` and `attention_mask`, int64 [TEXTS, TOKENS or max_tokens].
    """
    length = min(TOKENS, max_tokens)
    stream = np.concatenate([np.asarray(one, np.int64) for one in ids])
    batch = np.resize(stream, (TEXTS, length))
    return {"input_ids": batch, "attention_mask": np.ones_like(batch)}


def compare(
    runners: Mapping[str, Runner], batch: Mapping[str, NDArray[np.int64]]
) -> dict[str, float]:
    """How fast each runner is, in turn, after one round to warm up.

    Args:
        runners: by name.
        batch: what each is given.

    Returns:
        Texts a second by name, from the fastest of ROUNDS. One that is HOPELESS times slower than
        the fastest after TRIED rounds is not run again.
    """
    best = dict.fromkeys(runners, float("inf"))
    for number in range(ROUNDS + 1):
        limit = HOPELESS * min(best.values())
        for name, runner in runners.items():
            if number > TRIED and best[name] > limit:
                continue
            begin = time.perf_counter()
            runner(batch)
            if number:
                best[name] = min(best[name], time.perf_counter() - begin)
    return {name: len(batch["input_ids"]) / seconds for name, seconds in best.items()}
