"""Which treatment each product gets: measured on texts that calibration never saw.

All start as plain int8. While the goals are not met, the products that do the most damage are run
wider (see Target.wide), worst first, up to a cap on their share of the work. Knows no graph and no
engine: it is given a function that measures a set of wide products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jexport.errors import QuantizationError
from jexport.quantization.layers import Product

METRICS = ("cosine_mean", "cosine_p1", "cosine_min", "top10_overlap")
STEPS = 8
"""Into how many steps of about the same share the way up to the cap is cut."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """metrics: METRICS over all held-out texts. failures: gates that groups of them failed."""

    metrics: Mapping[str, float]
    failures: tuple[str, ...] = ()


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
    failures: tuple[str, ...]
    seconds: float

    def report(self) -> dict[str, Any]:
        """JSON-ready, as quantization.json has it: without seconds, which are never the same."""
        said = {**asdict(self), "wide": list(self.wide), "failures": list(self.failures)}
        del said["seconds"]
        return said


Measure = Callable[[Sequence[str]], Measured]
"""Of a set of wide products, by name."""

Watch = Callable[[int, int, str], None]
"""Trials done, trials in all at most, what is tried now and the best so far."""


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What the held-out texts must reach, and how much of the work may be wide for it."""

    at_least: Mapping[str, float]
    max_share: float

    def met(self, found: Measured) -> bool:
        """Whether every bound holds (the bound itself does) and no group failed a gate."""
        bounds = all(found.metrics[name] >= bound for name, bound in self.at_least.items())
        return bounds and not found.failures

    def missing(self, trial: Trial) -> str:
        """What a trial lacks, in words."""
        lacks = [
            f"{name} {getattr(trial, name):.5f} < {bound}"
            for name, bound in self.at_least.items()
            if getattr(trial, name) < bound
        ]
        groups = [*trial.failures[:3]]
        if len(trial.failures) > len(groups):
            groups.append(f"and {len(trial.failures) - len(groups)} more")
        return ", ".join([*lacks, *groups]) or "nothing"


@dataclass(kw_only=True)
class _Search:
    """The trials so far, in the order they were made."""

    measure: Measure
    goals: Goals
    watch: Watch
    total: int
    trials: list[Trial]

    def attempt(self, what: str, wide: Sequence[Product]) -> Trial:
        best = max((trial.top10_overlap for trial in self.trials), default=None)
        so_far = "" if best is None else f"; best top-10 so far {best:.4f}"
        self.watch(len(self.trials), self.total, f"trying {what}{so_far}")
        begin = time.perf_counter()
        names = tuple(item.name for item in wide)
        found = self.measure(names)
        trial = Trial(
            what=what,
            wide=names,
            share=sum(item.share for item in wide),
            passed=self.goals.met(found),
            failures=found.failures,
            seconds=time.perf_counter() - begin,
            **{name: float(found.metrics[name]) for name in METRICS},
        )
        self.trials.append(trial)
        return trial


def run(
    items: Sequence[Product],
    measure: Measure,
    damage: Mapping[str, float],
    goals: Goals,
    *,
    whole_curve: bool = False,
    watch: Watch = lambda done, total, text: None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Trial, list[Trial]]:
    """The first trial that meets the goals, and all trials in the order they were made.

    damage: how much each product hurts, the more the worse; wide ones are chosen by damage per
    share of the work. whole_curve: also measure beyond, to everything wide. tell: a line for each
    trial. Raises QuantizationError when the cap is reached first: how far it got, what it cost and
    what would have to give.
    """
    order = sorted(items, key=lambda item: (-damage[item.name] / item.share, item.name))
    plans = _prefixes(_fitting(order, goals.max_share), goals.max_share)
    beyond = [wide for wide in _prefixes(order, 1.0) if wide not in plans] if whole_curve else []
    search = _Search(
        measure=measure, goals=goals, watch=watch, total=len(plans) + len(beyond), trials=[]
    )
    chosen: Trial | None = None
    for wide in plans:
        trial = search.attempt(_named(wide, order), wide)
        tell(
            f"{trial.what}: cosine {trial.cosine_mean:.5f}, top-10 {trial.top10_overlap:.4f}; "
            f"lacks {goals.missing(trial)}"
        )
        if trial.passed:
            chosen = trial
            break
    if whole_curve:
        for wide in [*plans[len(search.trials) :], *beyond]:
            search.attempt(_named(wide, order), wide)
    if chosen is None:
        raise _out_of_reach(search.trials, goals)
    return chosen, search.trials


def _named(wide: Sequence[Product], order: Sequence[Product]) -> str:
    return f"{len(wide)} of {len(order)} wide" if wide else "all int8"


def _fitting(order: Sequence[Product], cap: float) -> list[Product]:
    """In order, those that fit under the cap together; one too large for it is passed over."""
    found: list[Product] = []
    spent = 0.0
    for item in order:
        if spent + item.share <= cap + 1e-9:
            found.append(item)
            spent += item.share
    return found


def _prefixes(order: Sequence[Product], cap: float) -> list[list[Product]]:
    """What to widen in turn: nothing, then steps of about the same share, at last all of it."""
    counts, spent, last = [0], 0.0, 0.0
    for number, item in enumerate(order, 1):
        spent += item.share
        if spent - last >= cap / STEPS - 1e-9 or number == len(order):
            counts.append(number)
            last = spent
    return [list(order[:count]) for count in counts]


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
    seconds = sum(trial.seconds for trial in trials)
    return QuantizationError(
        "quantize: int8 does not reach the goals on the held-out texts",
        evidence=f"best of {len(within)} trials in {seconds:.0f} s ({best.what}, {best.share:.0%} "
        f"of the work wide, at most {goals.max_share:.0%}): {goals.missing(best)}",
        fix=f"{would}; or use --precision int8-weights",
    )
