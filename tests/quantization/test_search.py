"""The search, with products and measures that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from jexport.errors import QuantizationError
from jexport.quantization import search
from jexport.quantization.layers import Product

GOAL = {"cosine_mean": 0.99, "top10_overlap": 0.9}


def products(shares: Sequence[float]) -> list[Product]:
    return [
        Product(
            name=f"p{n}", source=f"x{n}", weight=f"w{n}", rows=64, columns=64, share=share, layer=n
        )
        for n, share in enumerate(shares)
    ]


class Bench:
    """Measures by how many products are wide; remembers what was asked."""

    def __init__(self, good_from: int | Callable[[Sequence[str]], bool]) -> None:
        self.good_from, self.asked = good_from, list[tuple[str, ...]]()

    def __call__(self, wide: Sequence[str]) -> search.Measured:
        self.asked.append(tuple(wide))
        good = self.good_from(wide) if callable(self.good_from) else len(wide) >= self.good_from
        cosine = 0.99 if good else 0.97 + 0.0001 * len(wide)
        metrics = {
            "cosine_mean": cosine,
            "cosine_p1": cosine,
            "cosine_min": cosine,
            "top10_overlap": 0.9 if good else 0.8,
        }
        return search.Measured(metrics=metrics)


def goals(max_share: float) -> search.Goals:
    return search.Goals(at_least=GOAL, max_share=max_share)


TEN = products([0.1] * 10)
RISING = {item.name: float(item.layer) for item in TEN}


def test_all_int8_is_taken_when_it_is_good_enough() -> None:
    bench = Bench(0)
    chosen, trials = search.run(TEN, bench, RISING, goals(0.5))
    assert bench.asked == [()]
    assert trials == [chosen]
    assert (chosen.wide, chosen.share, chosen.passed) == ((), 0.0, True)


def test_stops_at_the_first_that_passes() -> None:
    bench = Bench(3)
    chosen, trials = search.run(TEN, bench, RISING, goals(0.8))
    assert bench.asked == [(), ("p9",), ("p9", "p8"), ("p9", "p8", "p7")]
    assert trials[-1] is chosen
    assert [trial.passed for trial in trials] == [False, False, False, True]
    assert chosen.share == pytest.approx(0.3)


def test_order_is_by_damage_per_share() -> None:
    items = products([0.4, 0.1, 0.2, 0.3])
    damage = {"p0": 4.4, "p1": 1.0, "p2": 4.0, "p3": 3.6}  # a share: 11, 10, 20, 12
    bench = Bench(4)
    search.run(items, bench, damage, goals(1.0))
    assert bench.asked[-1] == ("p2", "p3", "p0", "p1")
    for fewer, more in zip(bench.asked, bench.asked[1:], strict=False):
        assert more[: len(fewer)] == fewer


def test_equal_damage_is_ordered_by_name() -> None:
    bench = Bench(99)
    with pytest.raises(QuantizationError):
        search.run(TEN[::-1], bench, dict.fromkeys(RISING, 1.0), goals(0.3))
    assert bench.asked[-1] == ("p0", "p1", "p2")


@pytest.mark.parametrize("cap", [0.0, 0.05, 0.1, 0.15, 0.35, 1.0])
@pytest.mark.parametrize("shares", [[0.1] * 10, [0.01] * 100, [0.5, 0.3, 0.15, 0.05]])
def test_never_beyond_the_cap(cap: float, shares: list[float]) -> None:
    items = products(shares)
    by_name = {item.name: item.share for item in items}
    bench = Bench(len(items) + 1)
    with pytest.raises(QuantizationError):
        search.run(items, bench, {item.name: item.share for item in items}, goals(cap))
    spent = [sum(by_name[name] for name in wide) for wide in bench.asked]
    assert bench.asked[0] == ()
    assert max(spent) <= cap + 1e-9
    assert len(bench.asked) <= search.STEPS + 2
    assert len(set(bench.asked)) == len(bench.asked)


def test_the_bound_itself_passes() -> None:
    bound = {"cosine_mean": 0.99, "top10_overlap": 0.9}
    assert goals(0).met(search.Measured(metrics=bound))
    assert not goals(0).met(search.Measured(metrics={**bound, "top10_overlap": 0.8999}))


def test_a_group_that_fails_its_gate_is_worked_on_like_a_goal() -> None:
    good = Bench(0)

    def measure(wide: Sequence[str]) -> search.Measured:
        failures = () if len(wide) >= 2 else ("language 'th': cosine_p1 0.98 is below 0.99",)
        return search.Measured(metrics=good(wide).metrics, failures=failures)

    chosen, trials = search.run(TEN, measure, RISING, goals(0.5))
    assert chosen.wide == ("p9", "p8")
    assert trials[0].failures == ("language 'th': cosine_p1 0.98 is below 0.99",)
    with pytest.raises(QuantizationError, match="language 'th'"):
        search.run(TEN, measure, RISING, goals(0.1))


def test_one_too_large_for_the_cap_is_passed_over() -> None:
    items = products([0.5, 0.1, 0.1, 0.3])
    bench = Bench(2)
    chosen, _ = search.run(items, bench, {"p0": 9, "p1": 0.5, "p2": 0.4, "p3": 0.1}, goals(0.25))
    assert chosen.wide == ("p1", "p2")


def test_many_small_ones_fill_the_cap() -> None:
    items = products([0.01] * 100)
    bench = Bench(15)
    chosen, _ = search.run(items, bench, {item.name: 1.0 for item in items}, goals(0.15))
    assert len(chosen.wide) == 15
    assert chosen.share == pytest.approx(0.15)


def test_what_is_tried_is_told_before_it_is_measured() -> None:
    seen: list[tuple[int, int, str]] = []
    search.run(TEN, Bench(1), RISING, goals(0.3), watch=lambda *now: seen.append(now))
    assert seen == [
        (0, 4, "trying all int8"),
        (1, 4, "trying 1 of 10 wide; best top-10 so far 0.8000"),
    ]


def test_out_of_reach_says_how_far_it_got() -> None:
    with pytest.raises(QuantizationError) as caught:
        search.run(TEN, Bench(9), RISING, goals(0.3))
    said = str(caught.value)
    assert "3 of 10 wide" in said
    assert "30%" in said
    assert "cosine_mean 0.97030 < 0.99" in said
    assert "top10_overlap 0.80000 < 0.9" in said
    assert "int8-weights" in said
    assert caught.value.exit_code == 25


def test_the_whole_curve_goes_on_to_everything_wide() -> None:
    bench = Bench(2)
    chosen, trials = search.run(TEN, bench, RISING, goals(0.3), whole_curve=True)
    assert len(chosen.wide) == 2
    assert len(trials) == len(bench.asked) == len(set(bench.asked))
    assert {len(wide) for wide in bench.asked} >= {0, 1, 2, 10}


def test_the_whole_curve_says_which_share_would_do() -> None:
    with pytest.raises(QuantizationError) as caught:
        search.run(TEN, Bench(10), RISING, goals(0.2), whole_curve=True)
    assert "with 100% of the work wide they hold" in str(caught.value)
    assert "at most 20%" in str(caught.value)


def test_a_trial_is_reported_with_all_its_numbers() -> None:
    said: list[str] = []
    chosen, trials = search.run(TEN, Bench(1), RISING, goals(0.3), tell=said.append)
    assert len(said) == len(trials) == 2
    report = chosen.report()
    assert report["wide"] == ["p9"]
    assert report["top10_overlap"] == 0.9
    assert all(report[name] == getattr(chosen, name) for name in search.METRICS)
