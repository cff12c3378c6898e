"""Which layers need more precision: measured on texts that calibration never saw.

All start as plain int8. While the goals are not met, the most sensitive layers fall back to a
higher precision (Int8Support.fallback), worst first, up to a cap on their share of the
multiply-adds.
One that meets the goals is validated as the artifact will be; where that refuses it, the next one
is tried. The search ends early where a goal does not move.
Knows no graph and no engine: it is given a function that measures a set of fallback layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jexport.errors import QuantizationError
from jexport.gates import GateFailure
from jexport.quantization.config import INT8, INT8_WEIGHTS
from jexport.quantization.layers import LinearLayer

METRICS = ("cosine_mean", "cosine_p1", "cosine_min", "top10_overlap")
STEPS = 8
"""Into how many steps of about the same share the way up to the cap is cut."""

STALL_TRIALS = 4
"""Trials in a row, of more and more layers at higher precision, that must bring a goal nearer."""

STALL_SHARE = 0.1
"""Of the distance to the goal: what they must bring. STEPS trials that bring so little end far."""

NAMED = 3
"""Layers, texts and gates that an error names."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A quantized graph against the float one.

    Args:
        metrics: METRICS over all held-out texts.
        failures: gates that they, or groups of them, failed.
        lowest: the texts of the lowest cosines, in words; of the groups that failed, if any did.
    """

    metrics: Mapping[str, float]
    failures: tuple[GateFailure, ...] = ()
    lowest: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One set of fallback layers and what was measured with it.

    Args:
        description: in words.
        fallback: names of the layers at higher precision.
        share: of the multiply-adds of all linear layers that they do, 0 to 1.
        metrics: METRICS over all held-out texts.
        passed: whether the goals are met, and it was not refused.
        failures: gates that groups of texts failed, and why it was refused.
        seconds: it took.
        gaps: how far each goal that it misses is from its bound.
        lowest: the texts of the lowest cosines, in words.
    """

    description: str
    fallback: tuple[str, ...]
    share: float
    metrics: Mapping[str, float]
    passed: bool
    failures: tuple[str, ...]
    seconds: float
    gaps: Mapping[str, float] = field(default_factory=dict)
    lowest: tuple[str, ...] = ()

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

Refuse = Callable[[Sequence[str]], Sequence[GateFailure]]
"""Of a set of fallback layers that met the goals: the gates of [validate] that it fails."""

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
        """Whether every bound holds (the bound itself does) and no group failed a gate.

        Args:
            measurement: with a value of each metric in `at_least`.

        Returns:
            True where nothing is missed.
        """
        bounds = all(measurement.metrics[name] >= bound for name, bound in self.at_least.items())
        return bounds and not measurement.failures

    def gaps(self, measurement: Measurement) -> dict[str, float]:
        """How far each goal that is missed is from its bound.

        Args:
            measurement: with a value of each metric in `at_least`.

        Returns:
            Gaps above 0, by metric and by the goal of each gate that failed.
        """
        below = {
            name: bound - measurement.metrics[name]
            for name, bound in self.at_least.items()
            if measurement.metrics[name] < bound
        }
        return {**below, **{one.goal: one.gap for one in measurement.failures}}

    def missing(self, trial: Trial) -> str:
        """Which goals a trial misses, in words.

        Args:
            trial: with a value of each metric in `at_least`.

        Returns:
            One line, at most NAMED failed gates in it; 'nothing' where all are met.
        """
        below = [
            f"{name} {trial.metrics[name]:.5f} < {bound}"
            for name, bound in self.at_least.items()
            if trial.metrics[name] < bound
        ]
        groups = [*trial.failures[:NAMED]]
        if len(trial.failures) > len(groups):
            groups.append(f"and {len(trial.failures) - len(groups)} more")
        return ", ".join([*below, *groups]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a search goes, beside its goals.

    Args:
        whole_curve: also measure beyond the cap, to every layer at higher precision; then no
            goal that does not move ends the search.
        refuse: asked about each trial that meets the goals.
        precision: what is built, config.INT8 or config.INT8_WEIGHTS; an error offers another one.
        progress: told before each trial.
        message: told a line for each trial that misses a goal, or meets all.
    """

    whole_curve: bool = False
    precision: str = INT8
    refuse: Refuse = lambda fallback: ()
    progress: Progress = lambda done, total, text: None
    message: Callable[[str], None] = lambda text: None


@dataclass(kw_only=True)
class _Search:
    """The trials so far, in the order they were made."""

    measure: Measure
    goals: Goals
    options: SearchOptions
    total: int
    trials: list[Trial] = field(default_factory=list)

    def attempt(self, description: str, fallback: Sequence[LinearLayer]) -> Trial:
        names = tuple(layer.name for layer in fallback)
        for trial in self.trials:
            if trial.fallback == names:
                return trial
        best = max((trial.metrics["top10_overlap"] for trial in self.trials), default=None)
        so_far = "" if best is None else f"; best top-10 so far {best:.4f}"
        self.options.progress(len(self.trials), self.total, f"trying {description}{so_far}")
        begin = time.perf_counter()
        measurement = self.measure(names)
        met = self.goals.met(measurement)
        refused = tuple(self.options.refuse(names)) if met else ()
        gaps = {**self.goals.gaps(measurement), **{one.goal: one.gap for one in refused}}
        trial = Trial(
            description=description,
            fallback=names,
            share=sum(layer.share for layer in fallback),
            metrics={name: float(measurement.metrics[name]) for name in METRICS},
            passed=met and not refused,
            failures=tuple(one.words for one in (*measurement.failures, *refused)),
            seconds=time.perf_counter() - begin,
            gaps=gaps,
            lowest=measurement.lowest,
        )
        self.trials.append(trial)
        self.options.message(
            f"{trial.description}: cosine {trial.metrics['cosine_mean']:.5f}, top-10 overlap "
            f"{trial.metrics['top10_overlap']:.4f}; goals missed: {self.goals.missing(trial)}"
        )
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
        The first trial that meets the goals and is not refused, and all trials in the order they
        were made.

    Raises:
        QuantizationError: the cap is reached first, or a goal does not move: how far it got, what
            it cost, and the layers and texts that are in the way.
    """
    options = options or SearchOptions()
    order = _by_sensitivity(layers, sensitivity)
    plans = _prefixes(_within_cap(order, goals.max_share), goals.max_share)
    beyond = [p for p in _prefixes(order, 1.0) if p not in plans] if options.whole_curve else []
    search = _Search(measure=measure, goals=goals, options=options, total=len(plans) + len(beyond))
    stalled = ""
    chosen = None
    for number, fallback in enumerate(plans, 1):
        trial = search.attempt(_describe(fallback, order), fallback)
        if trial.passed:
            chosen = trial
            break
        goal = "" if options.whole_curve else _stalled_goal(search.trials[:number])
        if goal and not stalled and number < len(plans):
            # Nothing is concluded from a trend: the most that is allowed has the last word.
            widest = search.attempt(_describe(plans[-1], order), plans[-1])
            stalled = goal
            if goal in widest.gaps:
                raise _out_of_reach(search, order, goal)
    if options.whole_curve:
        for fallback in [*plans[len(search.trials) :], *beyond]:
            search.attempt(_describe(fallback, order), fallback)
    if chosen is None:
        raise _out_of_reach(search, order)
    return chosen, search.trials


def most_sensitive(
    layers: Sequence[LinearLayer], sensitivity: Mapping[str, float], cap: float
) -> list[LinearLayer]:
    """The layers that fall back first, up to a cap.

    Args:
        layers: to choose from.
        sensitivity: as for find_fallback_layers.
        cap: on their share of the multiply-adds.

    Returns:
        In the order in which they fall back.
    """
    return _within_cap(_by_sensitivity(layers, sensitivity), cap)


def _by_sensitivity(
    layers: Sequence[LinearLayer], sensitivity: Mapping[str, float]
) -> list[LinearLayer]:
    """The most sensitive first, per share of the multiply-adds."""
    return sorted(layers, key=lambda layer: (-sensitivity[layer.name] / layer.share, layer.name))


def _stalled_goal(trials: Sequence[Trial]) -> str:
    """A goal that the last STALL_TRIALS trials all miss and do not come nearer; '' for none."""
    first, *later = trials[-STALL_TRIALS:]
    if len(later) < STALL_TRIALS - 1:
        return ""
    for goal, gap in first.gaps.items():
        gaps = [trial.gaps.get(goal, 0.0) for trial in later]
        if min(gaps) > (1 - STALL_SHARE) * gap:
            return goal
    return ""


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


def _out_of_reach(
    search: _Search, order: Sequence[LinearLayer], stalled: str = ""
) -> QuantizationError:
    """What was tried, what is missed, and what is in the way.

    Args:
        search: that came to its end.
        order: all layers, the most sensitive first.
        stalled: the goal that did not move, '' where the cap was reached.
    """
    trials, goals = search.trials, search.goals
    within = [trial for trial in trials if trial.share <= goals.max_share + 1e-9]
    best = max(within, key=lambda t: (t.metrics["cosine_mean"], t.metrics["top10_overlap"]))
    seconds = sum(trial.seconds for trial in trials)
    evidence = [
        f"best of {len(within)} trials in {seconds:.0f} s: {best.description}, "
        f"{best.share:.0%} of the multiply-adds (quantize.max_share allows "
        f"{goals.max_share:.0%}): {goals.missing(best)}"
    ]
    if stalled:
        gaps = ", ".join(f"{one.share:.0%}: {one.gaps.get(stalled, 0.0):.3g}" for one in trials)
        evidence.append(
            f"'{stalled}' does not move; its distance from the bound, by the share of the "
            f"multiply-adds at higher precision: {gaps}"
        )
    evidence += _in_the_way(max(within, key=lambda trial: trial.share), order)
    return QuantizationError(
        "quantize: a goal does not move, the search stopped"
        if stalled
        else f"quantize: {search.options.precision} does not reach the goals on the held-out texts",
        evidence="\n".join(evidence),
        fix=_way_out(search, stalled=bool(stalled)),
    )


def _way_out(search: _Search, *, stalled: bool) -> str:
    """What to do about a search that found nothing: only what is not done already."""
    if search.options.precision == INT8_WEIGHTS:
        return (
            "give more calibration texts like your own, or lower the goals in [quantize]; "
            "or use a float precision"
        )
    beyond = next((trial for trial in search.trials if trial.passed), None)
    fix = "give more calibration texts like your own, "
    if not search.options.whole_curve:
        fix += "try --effort full, "
    fix += "raise quantize.max_share, or lower the goals in [quantize]"
    if beyond:
        fix = (
            f"with {beyond.share:.0%} of the multiply-adds at higher precision the goals are met: "
            "set quantize.max_share to that"
        )
    if stalled:
        fix = (
            "more layers at higher precision do not help: give calibration texts like those that "
            "are named, or allow the loss ([quantize]; [validate.gates.int8] for a group of texts)"
        )
    return f"{fix}; or use --precision {INT8_WEIGHTS}"


def _in_the_way(trial: Trial, order: Sequence[LinearLayer]) -> list[str]:
    """The texts that lose most, and the most sensitive layers that are int8: a line for each."""
    lines = [f"texts in the way: {'; '.join(trial.lowest)}"] if trial.lowest else []
    left = [layer for layer in order if layer.name not in trial.fallback][:NAMED]
    if left:
        layers = ", ".join(f"{layer.name} ({layer.share:.1%})" for layer in left)
        lines.append(
            f"layers in the way, the most sensitive of those in int8, and the share of the "
            f"multiply-adds that each would cost: {layers}"
        )
    return lines
