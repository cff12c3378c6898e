"""The search, with products and measures that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from jexport.errors import QuantizationError
from jexport.gates import GateFailure
from jexport.quantization import search
from jexport.quantization.layers import LinearLayer

GOAL = {"cosine_mean": 0.99, "top10_overlap": 0.9}


def linear_layers(shares: Sequence[float]) -> list[LinearLayer]:
    return [
        LinearLayer(
            name=f"p{n}",
            input=f"x{n}",
            weight=f"w{n}",
            in_features=64,
            out_features=64,
            share=share,
            block=n,
        )
        for n, share in enumerate(shares)
    ]


class FakeEvaluator:
    """Measures by how many products are fallback; remembers what was asked."""

    def __init__(self, good_from: int | Callable[[Sequence[str]], bool]) -> None:
        self.good_from, self.asked = good_from, list[tuple[str, ...]]()

    def __call__(self, fallback: Sequence[str]) -> search.Measurement:
        self.asked.append(tuple(fallback))
        good = (
            self.good_from(fallback)
            if callable(self.good_from)
            else len(fallback) >= self.good_from
        )
        cosine = 0.99 if good else 0.97 + 0.0001 * len(fallback)
        metrics = {
            "cosine_mean": cosine,
            "cosine_p1": cosine,
            "cosine_min": cosine,
            "top10_overlap": 0.9 if good else 0.8,
        }
        return search.Measurement(metrics=metrics)


def goals(max_share: float) -> search.Goals:
    return search.Goals(at_least=GOAL, max_share=max_share)


def failure(goal: str, gap: float) -> GateFailure:
    return GateFailure(goal=goal, gap=gap, words=f"{goal} is {gap:g} off")


TEN = linear_layers([0.1] * 10)
RISING = {item.name: float(item.block) for item in TEN}


def test_all_int8_is_taken_when_it_is_good_enough() -> None:
    evaluator = FakeEvaluator(0)
    chosen, trials = search.find_fallback_layers(TEN, evaluator, RISING, goals(0.5))
    assert evaluator.asked == [()]
    assert trials == [chosen]
    assert (chosen.fallback, chosen.share, chosen.passed) == ((), 0.0, True)


def test_stops_at_the_first_that_passes() -> None:
    evaluator = FakeEvaluator(3)
    chosen, trials = search.find_fallback_layers(TEN, evaluator, RISING, goals(0.8))
    assert evaluator.asked == [(), ("p9",), ("p9", "p8"), ("p9", "p8", "p7")]
    assert trials[-1] is chosen
    assert [trial.passed for trial in trials] == [False, False, False, True]
    assert chosen.share == pytest.approx(0.3)


def test_order_is_by_sensitivity_per_share() -> None:
    items = linear_layers([0.4, 0.1, 0.2, 0.3])
    sensitivity = {"p0": 4.4, "p1": 1.0, "p2": 4.0, "p3": 3.6}  # a share: 11, 10, 20, 12
    evaluator = FakeEvaluator(4)
    search.find_fallback_layers(items, evaluator, sensitivity, goals(1.0))
    assert evaluator.asked[-1] == ("p2", "p3", "p0", "p1")
    for fewer, more in zip(evaluator.asked, evaluator.asked[1:], strict=False):
        assert more[: len(fewer)] == fewer


@pytest.mark.parametrize("cap", [0.0, 0.25, 0.5, 1.0])
def test_the_most_sensitive_are_those_that_fall_back_first(cap: float) -> None:
    items = linear_layers([0.4, 0.1, 0.2, 0.3])
    sensitivity = {"p0": 4.4, "p1": 1.0, "p2": 4.0, "p3": 3.6}
    evaluator = FakeEvaluator(9)
    with pytest.raises(QuantizationError):
        search.find_fallback_layers(items, evaluator, sensitivity, goals(cap))
    first = search.most_sensitive(items, sensitivity, cap)
    assert tuple(layer.name for layer in first) == evaluator.asked[-1]


def test_equal_sensitivity_is_ordered_by_name() -> None:
    evaluator = FakeEvaluator(99)
    with pytest.raises(QuantizationError):
        search.find_fallback_layers(TEN[::-1], evaluator, dict.fromkeys(RISING, 1.0), goals(0.3))
    assert evaluator.asked[-1] == ("p0", "p1", "p2")


@pytest.mark.parametrize("cap", [0.0, 0.05, 0.1, 0.15, 0.35, 1.0])
@pytest.mark.parametrize("shares", [[0.1] * 10, [0.01] * 100, [0.5, 0.3, 0.15, 0.05]])
def test_never_beyond_the_cap(cap: float, shares: list[float]) -> None:
    items = linear_layers(shares)
    by_name = {item.name: item.share for item in items}
    evaluator = FakeEvaluator(len(items) + 1)
    with pytest.raises(QuantizationError):
        search.find_fallback_layers(
            items, evaluator, {item.name: item.share for item in items}, goals(cap)
        )
    spent = [sum(by_name[name] for name in fallback) for fallback in evaluator.asked]
    assert evaluator.asked[0] == ()
    assert max(spent) <= cap + 1e-9
    assert len(evaluator.asked) <= search.STEPS + 2
    assert len(set(evaluator.asked)) == len(evaluator.asked)


def test_the_bound_itself_passes() -> None:
    bound = {"cosine_mean": 0.99, "top10_overlap": 0.9}
    assert goals(0).met(search.Measurement(metrics=bound))
    assert not goals(0).met(search.Measurement(metrics={**bound, "top10_overlap": 0.8999}))


def test_a_group_that_fails_its_gate_is_worked_on_like_a_goal() -> None:
    good = FakeEvaluator(0)

    def measure(fallback: Sequence[str]) -> search.Measurement:
        failures = () if len(fallback) >= 2 else (failure("language 'th': cosine_p1", 0.01),)
        return search.Measurement(metrics=good(fallback).metrics, failures=failures)

    chosen, trials = search.find_fallback_layers(TEN, measure, RISING, goals(0.5))
    assert chosen.fallback == ("p9", "p8")
    assert trials[0].failures == ("language 'th': cosine_p1 is 0.01 off",)
    with pytest.raises(QuantizationError, match="language 'th'"):
        search.find_fallback_layers(TEN, measure, RISING, goals(0.1))


def test_one_too_large_for_the_cap_is_passed_over() -> None:
    items = linear_layers([0.5, 0.1, 0.1, 0.3])
    evaluator = FakeEvaluator(2)
    chosen, _ = search.find_fallback_layers(
        items, evaluator, {"p0": 9, "p1": 0.5, "p2": 0.4, "p3": 0.1}, goals(0.25)
    )
    assert chosen.fallback == ("p1", "p2")


def test_many_small_ones_fill_the_cap() -> None:
    items = linear_layers([0.01] * 100)
    evaluator = FakeEvaluator(15)
    chosen, _ = search.find_fallback_layers(
        items, evaluator, {item.name: 1.0 for item in items}, goals(0.15)
    )
    assert len(chosen.fallback) == 15
    assert chosen.share == pytest.approx(0.15)


def test_what_is_tried_is_told_before_it_is_measured() -> None:
    seen: list[tuple[int, int, str]] = []
    search.find_fallback_layers(
        TEN,
        FakeEvaluator(1),
        RISING,
        goals(0.3),
        options=search.SearchOptions(progress=lambda *now: seen.append(now)),
    )
    assert seen == [
        (0, 4, "trying all layers int8"),
        (1, 4, "trying 1 of 10 layers at higher precision; best top-10 so far 0.8000"),
    ]


def test_out_of_reach_says_how_far_it_got() -> None:
    with pytest.raises(QuantizationError) as caught:
        search.find_fallback_layers(TEN, FakeEvaluator(9), RISING, goals(0.3))
    message = str(caught.value)
    assert "3 of 10 layers at higher precision" in message
    assert "30% of the multiply-adds" in message
    assert "cosine_mean 0.97030 < 0.99" in message
    assert "top10_overlap 0.80000 < 0.9" in message
    assert "int8-weights" in message
    assert caught.value.exit_code == 25


def test_whoever_builds_int8_weights_is_not_told_to() -> None:
    options = search.SearchOptions(precision="int8-weights")
    with pytest.raises(QuantizationError) as caught:
        search.find_fallback_layers(TEN, FakeEvaluator(9), RISING, goals(0.0), options)
    assert "int8-weights does not reach the goals" in caught.value.what
    assert "int8-weights" not in caught.value.fix
    assert "max_share" not in caught.value.fix
    assert "--effort full" not in caught.value.fix
    assert "float precision" in caught.value.fix


def test_whoever_has_tried_the_full_effort_is_not_told_to() -> None:
    options = search.SearchOptions(whole_curve=True)
    with pytest.raises(QuantizationError) as caught:
        search.find_fallback_layers(TEN, FakeEvaluator(99), RISING, goals(0.3), options)
    assert "--effort full" not in caught.value.fix
    assert "raise quantize.max_share" in caught.value.fix


def test_the_whole_curve_goes_on_to_everything_wide() -> None:
    evaluator = FakeEvaluator(2)
    chosen, trials = search.find_fallback_layers(
        TEN, evaluator, RISING, goals(0.3), options=search.SearchOptions(whole_curve=True)
    )
    assert len(chosen.fallback) == 2
    assert len(trials) == len(evaluator.asked) == len(set(evaluator.asked))
    assert {len(fallback) for fallback in evaluator.asked} >= {0, 1, 2, 10}


def test_the_whole_curve_says_which_share_would_do() -> None:
    with pytest.raises(QuantizationError) as caught:
        search.find_fallback_layers(
            TEN,
            FakeEvaluator(10),
            RISING,
            goals(0.2),
            options=search.SearchOptions(whole_curve=True),
        )
    assert "with 100% of the multiply-adds at higher precision the goals are met" in str(
        caught.value
    )
    assert "allows 20%" in str(caught.value)


def test_a_trial_is_reported_with_all_its_numbers() -> None:
    messages: list[str] = []
    chosen, trials = search.find_fallback_layers(
        TEN,
        FakeEvaluator(1),
        RISING,
        goals(0.3),
        options=search.SearchOptions(message=messages.append),
    )
    assert len(messages) == len(trials) == 2
    report = chosen.report()
    assert report["wide"] == ["p9"]
    assert report["top10_overlap"] == 0.9
    assert all(report[name] == chosen.metrics[name] for name in search.METRICS)


# --- what validate refuses ----------------------------------------------------------------------


def test_a_candidate_that_validate_refuses_leads_to_the_next() -> None:
    evaluator, asked = FakeEvaluator(1), list[tuple[str, ...]]()

    def refuse(fallback: Sequence[str]) -> list[GateFailure]:
        asked.append(tuple(fallback))
        return [] if len(fallback) >= 3 else [failure("validate, overall: cosine_min", 0.1)]

    messages: list[str] = []
    options = search.SearchOptions(refuse=refuse, message=messages.append)
    chosen, trials = search.find_fallback_layers(TEN, evaluator, RISING, goals(0.8), options)
    assert chosen.fallback == ("p9", "p8", "p7")
    assert asked == [("p9",), ("p9", "p8"), ("p9", "p8", "p7")]  # not those that miss the goals
    assert [trial.passed for trial in trials] == [False, False, False, True]
    assert trials[1].failures == ("validate, overall: cosine_min is 0.1 off",)
    assert "validate, overall: cosine_min" in messages[1]


def test_all_refused_says_what_validate_said() -> None:
    options = search.SearchOptions(refuse=lambda fallback: [failure("validate, edge", 0.1)])
    with pytest.raises(QuantizationError, match=r"validate, edge is 0\.1 off"):
        search.find_fallback_layers(TEN, FakeEvaluator(0), RISING, goals(0.2), options)


# --- a goal that does not move ------------------------------------------------------------------

TWENTY = linear_layers([0.05] * 20)
WORST = {item.name: float(item.block) for item in TWENTY}


def with_gap(gap: Callable[[int], float]) -> Callable[[Sequence[str]], search.Measurement]:
    """All goals are met but a group's, which is so far off with so many fallback layers."""
    good = FakeEvaluator(0)

    def measure(fallback: Sequence[str]) -> search.Measurement:
        off = gap(len(fallback))
        failures = (failure("language 'bn': loss_low", off),) if off > 0 else ()
        texts = ("'some text' (bn, 12 tokens) 0.98000",)
        return search.Measurement(metrics=good(fallback).metrics, failures=failures, lowest=texts)

    return measure


def test_a_goal_that_does_not_move_ends_the_search_and_is_named() -> None:
    asked: list[int] = []

    def gap(count: int) -> float:
        asked.append(count)
        return 0.002 - 0.00001 * count

    with pytest.raises(QuantizationError) as caught:
        search.find_fallback_layers(TWENTY, with_gap(gap), WORST, goals(0.8))
    # STALL_TRIALS of them, and the widest for certainty; all would be nine
    assert asked == [0, 2, 4, 6, 16]
    message = str(caught.value)
    assert "a goal does not move, the search stopped" in message
    assert "'language 'bn': loss_low' does not move" in message
    assert "0%: 0.002" in message
    assert "80%: 0.00184" in message
    assert "'some text' (bn, 12 tokens) 0.98000" in message
    assert "p3 (5.0%), p2 (5.0%), p1 (5.0%)" in message  # the most sensitive that are still int8
    assert "more layers at higher precision do not help" in message
    assert caught.value.exit_code == 25


def test_a_goal_that_moves_late_is_still_reached() -> None:
    """Nothing is concluded from the trend alone."""
    chosen, trials = search.find_fallback_layers(
        TWENTY, with_gap(lambda count: 0.002 if count < 10 else 0.0), WORST, goals(0.8)
    )
    assert len(chosen.fallback) == 10  # the first in order, not the widest that was looked at
    assert len({trial.fallback for trial in trials}) == len(trials)


def test_a_goal_that_moves_is_worked_on_to_the_end() -> None:
    asked: list[int] = []

    def gap(count: int) -> float:
        asked.append(count)
        return 0.02 * 0.9**count

    with pytest.raises(QuantizationError, match="does not reach the goals"):
        search.find_fallback_layers(TWENTY, with_gap(gap), WORST, goals(0.8))
    assert asked == [0, 2, 4, 6, 8, 10, 12, 14, 16]


def test_a_metric_that_does_not_move_is_named_too() -> None:
    def measure(fallback: Sequence[str]) -> search.Measurement:
        metrics = dict.fromkeys(search.METRICS, 0.99) | {"top10_overlap": 0.85}
        return search.Measurement(metrics=metrics)

    with pytest.raises(QuantizationError, match="'top10_overlap' does not move"):
        search.find_fallback_layers(TWENTY, measure, WORST, goals(0.8))


def test_the_whole_curve_is_drawn_whether_a_goal_moves_or_not() -> None:
    asked: list[int] = []

    def gap(count: int) -> float:
        asked.append(count)
        return 0.002

    options = search.SearchOptions(whole_curve=True)
    with pytest.raises(QuantizationError, match="does not reach the goals"):
        search.find_fallback_layers(TWENTY, with_gap(gap), WORST, goals(0.4), options)
    assert asked[-1] == 20
