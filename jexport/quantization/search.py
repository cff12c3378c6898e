"""Which layers need more precision: measured on texts that calibration never saw.

All start as plain int8. While the goals are not met, the most sensitive layers fall back to a
higher precision (Int8Support.fallback), worst first, up to a cap on their share of the
multiply-adds.
Knows no graph and no engine: it is given a function that measures a set of fallback layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jexport.errors import QuantizationError
from jexport.quantization.layers import LinearLayer

METRICS = ("cosine_mean", "cosine_p1", "cosine_min", "top10_overlap")
STEPS = 8
"""Into how many steps of about the same share the way up to the cap is cut."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A quantized graph against the float one.

    Args:
        metrics: METRICS over all held-out texts.
        failures: gates that groups of them failed, in words.
    """

    metrics: Mapping[str, float]
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One set of fallback layers and what was measured with it.

    Args:
        description: in words.
        fallback: names of the layers at higher precision.
        share: of the multiply-adds of all linear layers that they do, 0 to 1.
        metrics: METRICS over all held-out texts.
        passed: whether the goals are met.
        failures: gates that groups of texts failed.
        seconds: it took.
    """

    description: str
    fallback: tuple[str, ...]
    share: float
    metrics: Mapping[str, float]
    passed: bool
    failures: tuple[str, ...]
    seconds: float

    def report(self) -> dict[str, Any]:
        """JSON-ready, as quantization.json has it: without seconds, which are never the same."""
        return {
            "what": self.description,
            "wide": list(self.fallback),
            "share": self.share,
            **self.metrics,
            "passed": self.passed,
            "failures": list(self.failures),
        }


Measure = Callable[[Sequence[str]], Measurement]
"""Of a set of fallback layers, by name."""

Progress = Callable[[int, int, str], None]
"""Trials done, trials in all at most, what is tried now and the best so far."""


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What the held-out texts must reach.

    Args:
        at_least: lowest value by metric.
        max_share: of the multiply-adds that may be at higher precision for it, 0 to 1.
    """

    at_least: Mapping[str, float]
    max_share: float

    def met(self, measurement: Measurement) -> bool:
        """Whether every bound holds (the bound itself does) and no group failed a gate."""
        bounds = all(measurement.metrics[name] >= bound for name, bound in self.at_least.items())
        return bounds and not measurement.failures

    def missing(self, trial: Trial) -> str:
        """Which goals a trial misses, in words."""
        below = [
            f"{name} {trial.metrics[name]:.5f} < {bound}"
            for name, bound in self.at_least.items()
            if trial.metrics[name] < bound
        ]
        groups = [*trial.failures[:3]]
        if len(trial.failures) > len(groups):
            groups.append(f"and {len(trial.failures) - len(groups)} more")
        return ", ".join([*below, *groups]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a search goes, beside its goals.

    Args:
        whole_curve: also measure beyond the cap, to every layer at higher precision.
        progress: told before each trial.
        message: told a line for each trial that misses a goal, or meets all.
    """

    whole_curve: bool = False
    progress: Progress = lambda done, total, text: None
    message: Callable[[str], None] = lambda text: None


@dataclass(kw_only=True)
class _Search:
    """The trials so far, in the order they were made."""

    measure: Measure
    goals: Goals
    progress: Progress
    total: int
    trials: list[Trial] = field(default_factory=list)

    def attempt(self, description: str, fallback: Sequence[LinearLayer]) -> Trial:
        best = max((trial.metrics["top10_overlap"] for trial in self.trials), default=None)
        so_far = "" if best is None else f"; best top-10 so far {best:.4f}"
        self.progress(len(self.trials), self.total, f"trying {description}{so_far}")
        begin = time.perf_counter()
        names = tuple(layer.name for layer in fallback)
        measurement = self.measure(names)
        trial = Trial(
            description=description,
            fallback=names,
            share=sum(layer.share for layer in fallback),
            metrics={name: float(measurement.metrics[name]) for name in METRICS},
            passed=self.goals.met(measurement),
            failures=measurement.failures,
            seconds=time.perf_counter() - begin,
        )
        self.trials.append(trial)
        return trial


def find_fallback_layers(
    layers: Sequence[LinearLayer],
    measure: Measure,
    sensitivity: Mapping[str, float],
    goals: Goals,
    options: SearchOptions | None = None,
) -> tuple[Trial, list[Trial]]:
    """The fewest layers at higher precision with which the goals are met.

    Args:
        layers: all linear layers.
        measure: measures a set of fallback layers.
        sensitivity: by layer's name, how much int8 hurts it, the more the worse; layers fall back
            in the order of sensitivity per share of the multiply-adds.
        goals: to be met.
        options: how the search goes.

    Returns:
        The first trial that meets the goals, and all trials in the order they were made.

    Raises:
        QuantizationError: the cap is reached first: how far it got, what it cost and what would
            have to give.
    """
    options = options or SearchOptions()
    order = sorted(layers, key=lambda layer: (-sensitivity[layer.name] / layer.share, layer.name))
    plans = _prefixes(_within_cap(order, goals.max_share), goals.max_share)
    beyond = [p for p in _prefixes(order, 1.0) if p not in plans] if options.whole_curve else []
    search = _Search(
        measure=measure,
        goals=goals,
        progress=options.progress,
        total=len(plans) + len(beyond),
    )
    chosen: Trial | None = None
    for fallback in plans:
        trial = search.attempt(_describe(fallback, order), fallback)
        metrics = trial.metrics
        options.message(
            f"{trial.description}: cosine {metrics['cosine_mean']:.5f}, top-10 overlap "
            f"{metrics['top10_overlap']:.4f}; goals missed: {goals.missing(trial)}"
        )
        if trial.passed:
            chosen = trial
            break
    if options.whole_curve:
        for fallback in [*plans[len(search.trials) :], *beyond]:
            search.attempt(_describe(fallback, order), fallback)
    if chosen is None:
        raise _out_of_reach(search.trials, goals)
    return chosen, search.trials


def _describe(fallback: Sequence[LinearLayer], layers: Sequence[LinearLayer]) -> str:
    if not fallback:
        return "all layers int8"
    return f"{len(fallback)} of {len(layers)} layers at higher precision"


def _within_cap(order: Sequence[LinearLayer], cap: float) -> list[LinearLayer]:
    """In order, those that fit under the cap together; one too large for it is passed over."""
    fitting: list[LinearLayer] = []
    spent = 0.0
    for layer in order:
        if spent + layer.share <= cap + 1e-9:
            fitting.append(layer)
            spent += layer.share
    return fitting


def _prefixes(order: Sequence[LinearLayer], cap: float) -> list[list[LinearLayer]]:
    """Fallback layers to try in turn: none, then steps of about the same share, at last all."""
    counts, spent, last = [0], 0.0, 0.0
    for number, layer in enumerate(order, 1):
        spent += layer.share
        if spent - last >= cap / STEPS - 1e-9 or number == len(order):
            counts.append(number)
            last = spent
    return [list(order[:count]) for count in counts]


def _out_of_reach(trials: Sequence[Trial], goals: Goals) -> QuantizationError:
    within = [trial for trial in trials if trial.share <= goals.max_share + 1e-9]
    best = max(within, key=lambda t: (t.metrics["cosine_mean"], t.metrics["top10_overlap"]))
    beyond = next((trial for trial in trials if trial.passed), None)
    fix = (
        f"with {beyond.share:.0%} of the multiply-adds at higher precision the goals are met: set "
        "quantize.max_share to that"
        if beyond
        else "give more calibration texts like your own, try --effort full, raise "
        "quantize.max_share, or lower the goals in [quantize]"
    )
    seconds = sum(trial.seconds for trial in trials)
    return QuantizationError(
        "quantize: int8 does not reach the goals on the held-out texts",
        evidence=f"best of {len(within)} trials in {seconds:.0f} s: {best.description}, "
        f"{best.share:.0%} of the multiply-adds (quantize.max_share allows "
        f"{goals.max_share:.0%}): {goals.missing(best)}",
        fix=f"{fix}; or use --precision int8-weights",
    )
