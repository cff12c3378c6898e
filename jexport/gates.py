"""Gates: the numbers of a comparison held against bounds.

Knows where in parity's metrics a number stands, not how it was measured, nor what a recipe wants.
It never passes on nothing: no gate, or a gate without its value, is a ParityError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jexport.errors import ParityError, nearest


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a gate reads.

    Args:
        metric: name of the value.
        places: groups of the metrics that have it.
        at_least: whether large values are good, else small ones.
    """

    metric: str
    places: tuple[str, ...]
    at_least: bool


_EVERY_GROUP = ("overall", "by_language", "by_length", "by_dimension")
_WHOLE_SET = ("overall", "by_dimension")  # ranks and neighbours are too coarse in small groups

GATES: Mapping[str, Gate] = MappingProxyType(
    {
        "cosine_min": Gate(metric="cosine_min", places=_EVERY_GROUP, at_least=True),
        "cosine_mean": Gate(metric="cosine_mean", places=_EVERY_GROUP, at_least=True),
        "cosine_p1": Gate(metric="cosine_p1", places=_EVERY_GROUP, at_least=True),
        "spearman": Gate(metric="spearman", places=_WHOLE_SET, at_least=True),
        "top10_overlap": Gate(metric="top10_overlap", places=_WHOLE_SET, at_least=True),
        "largest_difference": Gate(
            metric="largest_difference", places=_EVERY_GROUP, at_least=False
        ),
        "batch_cosine_min": Gate(metric="cosine_min", places=("batch",), at_least=True),
        "norm_error": Gate(metric="largest_error", places=("norms",), at_least=False),
        "language_loss": Gate(metric="largest_loss", places=("languages",), at_least=False),
        "token_cosine_min": Gate(metric="cosine_min", places=("tokens",), at_least=True),
    }
)
"""The gates that a recipe may set; each one's bound itself passes."""


def gate(metrics: Mapping[str, Any], gates: Mapping[str, float]) -> tuple[str, ...]:
    """Hold metrics against bounds.

    Args:
        metrics: what `parity.compare` returned; with "batch" from `invariance` when a batch gate is
            set and "norms" from `norms` when norm_error is.
        gates: bound by gate key (see GATES); a value equal to its bound passes, a NaN or an
            infinity never does.

    Returns:
        The failures in words, one per gate and group; empty when every gate passed.

    Raises:
        ParityError: `gates` is empty, has an unknown key or a bound that is not finite, or the
            value that a gate reads is not there.
    """
    if not gates:
        raise ParityError(
            "parity has no gate to hold",
            evidence="the gates are empty: any candidate would pass",
            fix=f"set at least one of: {', '.join(GATES)}",
        )
    failures = []
    for key, bound in gates.items():
        if key not in GATES:
            raise ParityError(
                f"unknown gate '{key}'",
                evidence=f"known gates: {', '.join(GATES)}",
                fix=nearest(key, GATES),
            )
        if not math.isfinite(bound):
            raise ParityError(
                f"gate '{key}' has no usable bound",
                evidence=f"its bound is {bound}: nothing can be held against it",
                fix="give the gate a finite number",
            )
        for group, value in _gated_values(metrics, key):
            if not math.isfinite(value):
                failures.append(f"{group}: {GATES[key].metric} is {value} (bound {bound})")
            elif GATES[key].at_least and not value >= bound:
                failures.append(f"{group}: {GATES[key].metric} {value} is below {bound}")
            elif not GATES[key].at_least and not value <= bound:
                failures.append(f"{group}: {GATES[key].metric} {value} is above {bound}")
    return tuple(failures)


def _gated_values(metrics: Mapping[str, Any], key: str) -> Iterator[tuple[str, float]]:
    """Each group's name in words and its value, for every place that the gate reads."""
    words = {
        "by_language": "language '{}'",
        "by_length": "length {}",
        "by_dimension": "dimension {}",
    }
    metric = GATES[key].metric
    for place in GATES[key].places:
        groups = {place: metrics.get(place)}
        if place in words and groups[place]:
            groups = {words[place].format(name): m for name, m in metrics[place].items()}
        for name, group in groups.items():
            value = group.get(metric) if isinstance(group, Mapping) else None
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ParityError(
                    f"gate '{key}' has nothing to hold",
                    evidence=f"{name}: {metric} is {value!r} in the metrics",
                    fix=f"measure '{place}' before gating, or leave '{key}' out of the gates",
                )
            yield name, float(value)
