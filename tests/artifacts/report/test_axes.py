"""axes: ticks that lie where their words say, and room for each."""

from __future__ import annotations

import itertools

import pytest

from jexport.artifacts.report import axes


@pytest.mark.parametrize(
    "values", [(0.38, 0.9999), (0.9, 0.99, 0.999), (-1.0, 1.0), (0.0, 0.98), (0.99, 1.0)]
)
def test_towards_one(values: tuple[float, ...]) -> None:
    axis = axes.towards_one(values, 200.0, 20.0)
    assert axis.stretched
    assert len(axis.ticks) >= 2
    for value in (*values, *(tick for tick, _ in axis.ticks)):
        assert 20 <= axis.place(value) <= 200
    for value, words in axis.ticks:
        assert float(words) == pytest.approx(value, abs=1e-12)
    heights = sorted(axis.place(value) for value, _ in axis.ticks)
    assert all(b - a >= 12 for a, b in itertools.pairwise(heights))
    ordered = [axis.place(value) for value in sorted(values)]
    assert ordered == sorted(ordered, reverse=True)  # better is higher


def test_nines_are_equally_far_apart() -> None:
    place = axes.towards_one((0.9, 0.99, 0.999), 200.0, 20.0).place
    assert place(0.9) - place(0.99) == pytest.approx(place(0.99) - place(0.999))


@pytest.mark.parametrize("values", [(0.99, 0.992), (1.0, 1.0), (), (0.5,)])
def test_values_that_lie_together_are_not_stretched(values: tuple[float, ...]) -> None:
    axis = axes.towards_one(values, 200.0, 20.0)
    assert not axis.stretched
    assert [axis.place(v) for v in values] == [
        axes.even(values, 200.0, 20.0).place(v) for v in values
    ]
