"""The search, with products and measures that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from jexport.errors import QuantizationError
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
        failures = () if len(fallback) >= 2 else ("language 'th': cosine_p1 0.98 is below 0.99",)
        return search.Measurement(metrics=good(fallback).metrics, failures=failures)

    chosen, trials = search.find_fallback_layers(TEN, measure, RISING, goals(0.5))
    assert chosen.fallback == ("p9", "p8")
    assert trials[0].failures == ("language 'th': cosine_p1 0.98 is below 0.99",)
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
