"""Intervals, judged by scipy and by drawing samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jexport.evaluation.intervals import mean_at_least, student_t


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 6, 8, 14, 100, 5000])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_student_t_is_scipys(degrees: int, confidence: float) -> None:
    assert student_t(confidence, degrees) == pytest.approx(
        stats.t.ppf(confidence, degrees), rel=0.01 if degrees < 6 else 2e-4
    )


def test_bound_is_scipys_interval() -> None:
    values = np.random.default_rng(0).exponential(0.004, 9)
    # two-sided at 98 %: one per cent on each side
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.98).low
    assert mean_at_least(values) == pytest.approx(wanted, rel=1e-3)


def test_one_text_that_lost_much_proves_nothing_of_its_group() -> None:
    values = np.full(9, 0.0005)
    values[3] = 0.3
    assert values.mean() > 0.03
    assert mean_at_least(values) == 0


def test_what_most_of_the_texts_lost_is_proven() -> None:
    values = np.random.default_rng(1).normal(0.006, 0.001, 9)
    assert 0.004 < mean_at_least(values) < values.mean()


def test_a_single_value_and_equal_values() -> None:
    assert mean_at_least(np.array([0.3])) == 0
    assert mean_at_least(np.full(7, 0.25)) == 0.25


@pytest.mark.parametrize("count", [7, 15, 60])
def test_a_group_at_its_bound_is_seldom_refused(count: int) -> None:
    """Skewed as losses are; at most about one group in a hundred is wrongly above its own mean."""
    rng = np.random.default_rng(count)
    drawn = rng.gamma(2.0, 0.002, (4000, count))
    wrong = np.mean([mean_at_least(one) > 0.004 for one in drawn])
    assert wrong <= 0.015
