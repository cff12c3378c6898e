"""The race of two runners, by a clock that is made up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jexport.evaluation import speed


def test_batch_is_real_ids_without_padding() -> None:
    made = speed.feeds([[5, 6, 7], [8, 9]], 8192)
    assert made["input_ids"].shape == (speed.TEXTS, speed.TOKENS)
    assert made["input_ids"].dtype == made["attention_mask"].dtype == np.int64
    assert made["attention_mask"].all()
    assert made["input_ids"].reshape(-1)[:7].tolist() == [5, 6, 7, 8, 9, 5, 6]


def test_batch_is_no_longer_than_the_model_takes() -> None:
    assert speed.feeds([[1, 2, 3]], 64)["input_ids"].shape == (speed.TEXTS, 64)


def test_the_fastest_round_counts_and_the_first_is_for_warming_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, order = [0.0], list[str]()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def runner(name: str, seconds: list[float]) -> Callable[..., Any]:
        left = iter(seconds)

        def run(batch: Any) -> dict[str, Any]:
            order.append(name)
            now[0] += next(left)
            return {}

        return run

    rates = speed.compare(
        {
            "fp32": runner("fp32", [0.001, 4.0, 2.0, 5.0, 3.0, 9.0]),
            "int8": runner("int8", [70.0, 1.0, 1.5, 0.75, 3.0, 9.0]),
        },
        speed.feeds([[1, 2]], 64),
    )
    assert rates == {"fp32": speed.TEXTS / 2.0, "int8": speed.TEXTS / 0.75}
    assert order == ["fp32", "int8"] * (speed.ROUNDS + 1)  # in turn: noise hits both


def test_one_that_is_hopeless_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], list[str]()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def runner(name: str, seconds: float) -> Callable[..., Any]:
        def run(batch: Any) -> dict[str, Any]:
            order.append(name)
            now[0] += seconds
            return {}

        return run

    rates = speed.compare(
        {"fp16": runner("fp16", 3.5), "fp32": runner("fp32", 2.9), "int8": runner("int8", 1.0)},
        speed.feeds([[1, 2]], 64),
    )
    assert rates == {
        name: pytest.approx(speed.TEXTS / t)
        for name, t in (("fp16", 3.5), ("fp32", 2.9), ("int8", 1.0))
    }
    assert order.count("fp16") == 1 + speed.TRIED
    assert order.count("fp32") == order.count("int8") == 1 + speed.ROUNDS
