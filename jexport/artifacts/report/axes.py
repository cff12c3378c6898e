"""Round ticks, and where a value lies between two ends. Knows no drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

LETTER = 6.1
"""Width of a letter at the figures' 10 units of monospace (0.6 em; 0.602 in DejaVu)."""

FACTORS = (1, 2, 2.5, 5)
"""Steps that people count in, times a power of ten."""

LEAST_LOSS = 1e-5
"""What lies nearer to 1 than that is drawn there: rounding alone does as much."""


class Axis(NamedTuple):
    """One axis of a figure.

    Args:
        ticks: value and words of each.
        place: from a value to where it lies, in the figure's units.
        stretched: whether it stretches towards 1.
    """

    ticks: list[tuple[float, str]]
    place: Callable[[float], float]
    stretched: bool = False


def even(values: Sequence[float], start: float, end: float) -> Axis:
    """Equal differences take equal room.

    As many ticks as their words have room: across (start < end) they stand side by side, else
    above each other. Together no finer than 1e-4: the words stay short and noise does not look
    like a fall.

    Args:
        values: what the axis must show.
        start: where the lowest lies, in the figure's units.
        end: where the highest lies; below `start` where the axis goes up.

    Returns:
        The axis; from 0 to 1 where there are no values.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = max((high - low) * 1.1, 1e-4)
    low = (low + high - span) / 2
    lowest = math.floor(math.log10(span)) - 2
    steps = (factor * 10.0**power for power in range(lowest, lowest + 5) for factor in FACTORS)
    for step in steps:
        decimals = next(d for d in range(9) if abs(round(step, d) - step) < step / 100)
        needed = LETTER * (decimals + 3.5) if start < end else 24  # "0.", the digits and a gap
        if abs(end - start) * step / span >= needed:
            break
    first, last = math.ceil(low / step - 1e-9), math.floor((low + span) / step + 1e-9)
    ticks = [(n * step, f"{n * step:.{decimals}f}") for n in range(first, last + 1)]

    def place(value: float) -> float:
        return start + (end - start) * (value - low) / span

    return Axis(ticks, place)


def towards_one(values: Sequence[float], bottom: float, top: float) -> Axis:
    """Equal ratios of what is lacking to 1 take equal room: 0.9, 0.99 and 0.999 are as far apart.

    For values whose losses differ by less than 5 times the same as `even`.

    Args:
        values: what the axis must show.
        bottom: where the lowest lies, in the figure's units.
        top: where the highest lies.

    Returns:
        The axis.
    """
    losses = [max(1 - value, LEAST_LOSS) for value in values] or [1.0]
    largest, least = max(losses), min(losses)
    if largest < 5 * least:
        return even(values, bottom, top)
    low, high = math.log(largest * 1.15), math.log(least / 1.15)

    def place(value: float) -> float:
        return bottom + (top - bottom) * (math.log(max(1 - value, LEAST_LOSS)) - low) / (high - low)

    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(largest)) + 1)
    ticks = [
        (1 - loss, f"{1 - loss:.{max(0, -power)}f}")
        for power in decades
        for factor in (1, 2, 5)
        if least / 1.15 <= (loss := factor * 10.0**power) <= largest * 1.15
    ]
    return Axis(_apart(ticks, place), place, stretched=True)


def _apart(
    ticks: list[tuple[float, str]], place: Callable[[float], float]
) -> list[tuple[float, str]]:
    """All of the ticks, or so many of them that no two lie nearer than a line of words."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if all(abs(place(tick[0]) - place(other)) >= 14 for other, _ in kept):
            kept.append(tick)
    return kept
