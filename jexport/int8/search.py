"""Which treatment each product gets: measured on texts that calibration never saw.

All start as plain int8. While the goals are not met, the products that do the most damage are run
wider (int8x2), worst first, up to a cap on their share of the work. Knows no graph and no engine:
it is given a function that measures a set of wide products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jexport.errors import QuantizationError
from jexport.int8.products import Product

METRICS = ("cosine_mean", "cosine_p1", "cosine_min", "top10_overlap")
STEPS = 8
"""Into how many steps of about the same share the way up to the cap is cut."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One set of wide products and what the held-out texts say of it.

    share: of the work of all products that is not plain int8.
    """

    what: str
    wide: tuple[str, ...]
    share: float
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    top10_overlap: float
    passed: bool
    seconds: float

    def report(self) -> dict[str, Any]:
        """JSON-ready, as quantization.json has it."""
        return {**asdict(self), "wide": list(self.wide), "overlap": self.top10_overlap}


Measure = Callable[[Sequence[str]], Mapping[str, float]]
"""Wide products -> the metrics."""


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What the held-out texts must reach, and how much of the work may be wide for it."""

    at_least: Mapping[str, float]
    max_share: float

    def met(self, metrics: Mapping[str, float]) -> bool:
        """Whether every bound holds; the bound itself does."""
        return all(metrics[name] >= bound for name, bound in self.at_least.items())

    def missing(self, trial: Trial) -> str:
        """What a trial lacks, in words."""
        lacks = [
            f"{name} {getattr(trial, name):.5f} < {bound}"
            for name, bound in self.at_least.items()
            if getattr(trial, name) < bound
        ]
        return ", ".join(lacks) or "nothing"


def run(
    items: Sequence[Product],
    measure: Measure,
    damage: Mapping[str, float],
    goals: Goals,
    *,
    whole_curve: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Trial, list[Trial]]:
    """The first trial that meets the goals, and all trials in the order they were made.

    damage: how much each product hurts, the more the worse; wide ones are chosen by damage per
    share of the work. whole_curve: also measure beyond, to everything wide. Raises
    QuantizationError when the cap is reached first: how far it got and what would have to give.
    """
    order = sorted(items, key=lambda item: (-damage[item.name] / item.share, item.name))
    trials: list[Trial] = []
    chosen: Trial | None = None

    def attempt(what: str, wide: Sequence[Product]) -> Trial:
        begin = time.perf_counter()
        names = tuple(item.name for item in wide)
        metrics = measure(names)
        trial = Trial(
            what=what,
            wide=names,
            share=sum(item.share for item in wide),
            passed=goals.met(metrics),
            seconds=time.perf_counter() - begin,
            **{name: float(metrics[name]) for name in METRICS},
        )
        trials.append(trial)
        best = max(trials, key=lambda t: t.top10_overlap)
        tell(
            f"{what}: cosine {trial.cosine_mean:.5f}, top-10 {trial.top10_overlap:.4f}; "
            f"best top-10 so far {best.top10_overlap:.4f}"
        )
        return trial

    for count in _counts(order, goals.max_share):
        what = "all int8" if not count else f"{count} of {len(order)} wide"
        trial = attempt(what, order[:count])
        if trial.passed:
            chosen = trial
            break
    if whole_curve:
        measured = {len(trial.wide) for trial in trials}
        for count in _counts(order, 1.0):
            if count not in measured:
                attempt(f"{count} of {len(order)} wide", order[:count])
    if chosen is None:
        raise _out_of_reach(trials, goals)
    return chosen, trials


def _counts(order: Sequence[Product], cap: float) -> list[int]:
    """How many of the order to widen in turn: none, then steps of about the same share."""
    counts, spent, step = [0], 0.0, cap / STEPS
    last = 0.0
    for number, item in enumerate(order, 1):
        spent += item.share
        if spent > cap + 1e-9:
            break
        if spent - last >= step - 1e-9 or number == len(order):
            counts.append(number)
            last = spent
    return counts


def _out_of_reach(trials: Sequence[Trial], goals: Goals) -> QuantizationError:
    within = [trial for trial in trials if trial.share <= goals.max_share + 1e-9]
    best = max(within, key=lambda trial: (trial.cosine_mean, trial.top10_overlap))
    beyond = next((trial for trial in trials if trial.passed), None)
    would = (
        f"with {beyond.share:.0%} of the work wide they hold: set quantize.max_share to that"
        if beyond
        else "give more calibration texts like your own, try --effort full, raise "
        "quantize.max_share, or lower the goals in [quantize]"
    )
    return QuantizationError(
        "quantize: int8 does not reach the goals on the held-out texts",
        evidence=f"best of {len(within)} trials ({best.what}, {best.share:.0%} of the work wide, "
        f"at most {goals.max_share:.0%}): {goals.missing(best)}",
        fix=f"{would}; or use --precision int8-weights",
    )
