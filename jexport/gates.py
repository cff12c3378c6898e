"""Gates: the numbers of a comparison held against bounds.

Knows where in parity's metrics a number stands, not how it was measured, nor what a recipe wants.
It never passes on nothing: no gate, or a gate without its value, is a ParityError.

A text counts in the gates over all texts. A group of texts (a language, length or kind) counts
where its texts are enough to say something of it, see `least_texts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from jexport.errors import ParityError, nearest

CONFIDENCE = 0.99
"""Of what is said of a group from its texts. Not 0.95: of forty groups, two would be wrong."""


def least_texts(quantile: float) -> int:
    """The fewest texts whose lowest value is below a quantile of their group with CONFIDENCE.

    n with 1 - (1 - quantile)^n >= CONFIDENCE, whatever the distribution (Wilks 1941, Determination
    of sample sizes for setting tolerance limits). Of fewer, even all may lie on one side by chance.

    Args:
        quantile: 0 to 1, both excluded; 0.5 for the median.

    Returns:
        The number of texts.
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - quantile))


GROUP_TEXTS = least_texts(0.5)
"""Fewer texts (than 7) are no group: they are reported, and count in the gates over all texts."""

LEAST_EDGE_COSINE = 0.8
"""Where no gate says more: a text that has a lower cosine is another text."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a gate reads.

    Args:
        metric: its name in a group of the metrics.
        places: where in the metrics.
        at_least: whether the bound is the lowest good value, else the highest.
        group_texts: a language, length or kind of fewer texts is not held to it.
    """

    metric: str
    places: tuple[str, ...]
    at_least: bool
    group_texts: int = 1


@dataclass(frozen=True, kw_only=True)
class GateFailure:
    """A bound that does not hold.

    Args:
        goal: what was to hold, in words; the same in each candidate of a search.
        gap: how far the value is from its bound, above 0; infinite for one that is not finite.
        words: goal, value and bound.
    """

    goal: str
    gap: float
    words: str

    def of(self, where: str) -> GateFailure:
        """The same failure, with where it was.

        Args:
            where: an output's name, or a stage's.

        Returns:
            The failure, `where` before its goal and words.
        """
        return replace(self, goal=f"{where}, {self.goal}", words=f"{where}, {self.words}")


_EVERY_GROUP = ("overall", "by_language", "by_length", "by_dimension")
_WHOLE_SET = ("overall", "by_dimension")  # ranks and neighbours are too coarse in small groups

GATES: Mapping[str, Gate] = MappingProxyType(
    {
        "cosine_min": Gate(metric="cosine_min", places=_EVERY_GROUP, at_least=True),
        "cosine_mean": Gate(metric="cosine_mean", places=_WHOLE_SET, at_least=True),
        "cosine_p1": Gate(
            metric="cosine_p1",
            places=_EVERY_GROUP,
            at_least=True,
            group_texts=least_texts(0.01),
        ),
        "group_loss": Gate(
            metric="loss_low",
            places=("overall", "by_language", "by_length", "by_kind"),
            at_least=False,
            group_texts=GROUP_TEXTS,
        ),
        "spearman": Gate(metric="spearman", places=_WHOLE_SET, at_least=True),
        "top10_overlap": Gate(metric="top10_overlap", places=_WHOLE_SET, at_least=True),
        "edge_cosine_min": Gate(metric="cosine_min", places=(), at_least=True),
        "largest_difference": Gate(
            metric="largest_difference", places=_EVERY_GROUP, at_least=False
        ),
        "batch_cosine_min": Gate(metric="cosine_min", places=("batch",), at_least=True),
        "norm_error": Gate(metric="largest_error", places=("norms",), at_least=False),
        "language_loss": Gate(metric="largest_loss", places=("languages",), at_least=False),
        "token_cosine_min": Gate(metric="cosine_min", places=("tokens",), at_least=True),
    }
)
"""The gates that a recipe may set; each one's bound itself passes. edge_cosine_min is held by
validate, of the texts that tokenizers get wrong; without it cosine_min is."""


def complete(gates: Mapping[str, float]) -> dict[str, float]:
    """The gates, with group_loss from cosine_mean where it is not among them.

    What is asked of the mean over all texts is asked of each group, as far as its texts can tell.

    Args:
        gates: bound by gate key.

    Returns:
        All that is held.
    """
    held = dict(gates)
    if "cosine_mean" in held and "group_loss" not in held:
        held["group_loss"] = round(1 - held["cosine_mean"], 12)
    return held


def gate(metrics: Mapping[str, Any], gates: Mapping[str, float]) -> tuple[str, ...]:
    """What `failures` gives, in words.

    Args:
        metrics: as `failures` takes them.
        gates: as `failures` takes them.

    Returns:
        The failures, one per gate and group; empty when every gate passed.

    Raises:
        ParityError: as `failures`.
    """
    return tuple(one.words for one in failures(metrics, gates))


def failures(metrics: Mapping[str, Any], gates: Mapping[str, float]) -> tuple[GateFailure, ...]:
    """Hold metrics against bounds.

    Args:
        metrics: what `compare` returned; with "batch" from `invariance` when a batch gate is set
            and "norms" from `norms` when norm_error is.
        gates: bound by gate key (see GATES), completed by `complete`; a value equal to its bound
            passes, a NaN or an infinity never does.

    Returns:
        The gates that do not hold, one per gate and group; empty when every gate passed.

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
    failed = []
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
    for key, bound in complete(gates).items():
        at_least = GATES[key].at_least
        for name, group in _gated_groups(metrics, key):
            value = float(group[GATES[key].metric])
            goal = f"{name}: {GATES[key].metric}"
            if not math.isfinite(value):
                words = f"{goal} is {value} (bound {bound})"
                failed.append(GateFailure(goal=goal, gap=math.inf, words=words))
            elif not (value >= bound if at_least else value <= bound):
                words = f"{goal} {value} is {'below' if at_least else 'above'} {bound}"
                if key == "group_loss":
                    words = _loss_in_words(name, group, bound)
                failed.append(GateFailure(goal=goal, gap=abs(bound - value), words=words))
    return tuple(failed)


def _loss_in_words(name: str, group: Mapping[str, Any], bound: float) -> str:
    """A group's loss that is too high, with its interval."""
    return (
        f"{name}: mean loss (1 - cosine) {group['loss']:.5f} of {group['texts']} texts, above "
        f"{group['loss_low']:.5f} at {CONFIDENCE:.0%} confidence, group_loss allows {bound:g}"
    )


def _gated_groups(metrics: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each group that the gate reads: its name in words and its metrics."""
    words = {
        "by_language": "language '{}'",
        "by_length": "length {}",
        "by_dimension": "dimension {}",
        "by_kind": "kind '{}'",
    }
    metric, least = GATES[key].metric, GATES[key].group_texts
    for place in GATES[key].places:
        if place == "by_kind" and place not in metrics:
            continue  # not every text set has kinds
        groups = {place: metrics.get(place)}
        if place in words and groups[place]:
            groups = {words[place].format(name): m for name, m in metrics[place].items()}
        for name, group in groups.items():
            if place in ("by_language", "by_length", "by_kind") and _texts(group) < least:
                continue
            value = group.get(metric) if isinstance(group, Mapping) else None
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ParityError(
                    f"gate '{key}' has nothing to hold",
                    evidence=f"{name}: {metric} is {value!r} in the metrics",
                    fix=f"measure '{place}' before gating, or leave '{key}' out of the gates",
                )
            assert isinstance(group, Mapping)
            yield name, group


def _texts(group: object) -> float:
    """How many texts a group has; without bound where it does not say, so that it is held."""
    texts = group.get("texts") if isinstance(group, Mapping) else None
    return texts if isinstance(texts, int) else math.inf
