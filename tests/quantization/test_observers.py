"""Statistics against numpy over the real rows; a fake graph, whose padding is poisoned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from jexport.errors import CalibrationError
from jexport.quantization import observers

WIDTHS = {"first": 6, "second": 11}
TABLES = {
    name: np.random.default_rng(width).normal(size=(500, width)).astype(np.float32)
    for name, width in WIDTHS.items()
}


def texts(count: int, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(1, 500, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def right(ids: Sequence[Sequence[int]]) -> Mapping[str, np.ndarray]:
    return padded(ids, left=False)


def left(ids: Sequence[Sequence[int]]) -> Mapping[str, np.ndarray]:
    return padded(ids, left=True)


def padded(ids: Sequence[Sequence[int]], *, left: bool) -> Mapping[str, np.ndarray]:
    width = max(map(len, ids)) + 3  # so that every row has padding
    made, mask = np.zeros((len(ids), width), np.int64), np.zeros((len(ids), width), np.int64)
    for row, one in enumerate(ids):
        place = slice(width - len(one), None) if left else slice(0, len(one))
        made[row, place], mask[row, place] = one, 1
    return {"input_ids": made, "attention_mask": mask}


class Graph:
    """Looks ids up in TABLES; padded rows are `poison`."""

    def __init__(self, poison: float = 1e30) -> None:
        self.poison, self.largest = poison, 0

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        self.largest = max(self.largest, feeds["input_ids"].size)
        real = feeds["attention_mask"].astype(bool)[..., None]
        return {
            name: np.where(real, table[feeds["input_ids"]], np.float32(self.poison))
            for name, table in TABLES.items()
        }


@pytest.mark.parametrize("pad", [right, left])
@pytest.mark.parametrize("poison", [1e30, -1e30, np.nan, np.inf])
def test_equal_to_numpy_and_padding_never_enters(pad: Any, poison: float) -> None:
    ids = texts(70)
    stats = observers.collect_stats(Graph(poison), WIDTHS, ids, pad=pad)
    assert set(stats) == set(WIDTHS)
    for name, one_stats in stats.items():
        rows = TABLES[name][np.concatenate(ids)].astype(np.float64)
        assert one_stats.tokens == len(rows)
        np.testing.assert_array_equal(one_stats.minimum, rows.min(axis=0))
        np.testing.assert_array_equal(one_stats.maximum, rows.max(axis=0))
        np.testing.assert_allclose(one_stats.gram, rows.T @ rows, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(one_stats.total, rows.sum(axis=0), rtol=1e-12)
        assert {
            one.dtype
            for one in (one_stats.minimum, one_stats.maximum, one_stats.gram, one_stats.samples)
        } == {np.dtype(np.float32)}


@pytest.mark.parametrize("count", [1, 20, 400, 1500])
def test_as_many_samples_are_kept_whatever_the_number_of_texts(count: int) -> None:
    ids = texts(count)
    stats = observers.collect_stats(Graph(), WIDTHS, ids, pad=right)
    tokens = sum(map(len, ids))
    for name, one_stats in stats.items():
        assert 0 < len(one_stats.samples) <= observers.SAMPLE_ROWS
        assert one_stats.samples.shape[1] == WIDTHS[name]
        seen = {row.tobytes() for row in TABLES[name][np.unique(np.concatenate(ids))]}
        assert all(row.tobytes() in seen for row in one_stats.samples)
        if tokens > 20 * observers.SAMPLE_ROWS:
            assert len(one_stats.samples) == observers.SAMPLE_ROWS


def test_samples_come_from_short_and_long_texts() -> None:
    ids = [[7] * 100] * 30 + [[9] * 2] * 500  # batches are made of texts of one length
    one_stats = observers.collect_stats(Graph(), WIDTHS, ids, pad=right)["first"]
    for number in (7, 9):
        assert (one_stats.samples == TABLES["first"][number]).all(axis=1).any()


def test_batches_stay_small() -> None:
    graph = Graph()
    done: list[tuple[int, int]] = []
    observers.collect_stats(
        graph, WIDTHS, texts(300), pad=right, progress=lambda *both: done.append(both)
    )
    assert graph.largest <= 4 * observers.BATCH_TOKENS  # `padded` adds three columns
    assert [one for one, _ in done] == list(range(1, done[-1][1] + 1))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_is_refused(odd: float) -> None:
    def graph(feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        given = Graph()(feeds)
        given["second"][feeds["input_ids"] == 13, 4] = odd
        return given

    observers.collect_stats(graph, WIDTHS, [[1, 2], [12]], pad=right)
    with pytest.raises(CalibrationError) as caught:
        observers.collect_stats(graph, WIDTHS, [[1, 2], [12, 13]], pad=right)
    assert "second" in str(caught.value)
    assert caught.value.exit_code == 24
