"""gates: what passes at its border and what fails, and every way to pass on nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jexport.errors import ParityError
from jexport.gates import GATES, gate

WHOLE_SET = {"spearman", "top10_overlap"}
GROUPS = (
    ("overall", ("overall",)),
    ("language 'th'", ("by_language", "th")),
    ("length 5-8", ("by_length", "5-8")),
    ("dimension 64", ("by_dimension", "64")),
)


def perfect() -> dict[str, Any]:
    def group() -> dict[str, float]:
        return {
            "texts": 2,
            "cosine_mean": 1.0,
            "cosine_p1": 1.0,
            "cosine_min": 1.0,
            "largest_difference": 0.0,
            "spearman": 1.0,
            "top10_overlap": 1.0,
        }

    return {
        "texts": 2,
        "overall": group(),
        "by_language": {"en": group(), "th": group()},
        "by_length": {"1-2": group(), "5-8": group()},
        "by_dimension": {"64": group(), "128": group()},
        "tokens": {"texts": 2, "cosine_min": 1.0, "largest_difference": 0.0},
        "batch": {"texts": 2, "cosine_min": 1.0, "largest_difference": 0.0},
        "languages": {"largest_loss": 0.0},
        "norms": {"texts": 2, "largest_error": 0.0},
    }


def metrics_with(value: object, path: tuple[str, ...], metric: str) -> dict[str, Any]:
    metrics = perfect()
    group = metrics
    for step in path:
        group = group[step]
    group[metric] = value
    return metrics


def assert_refused(metrics: dict[str, Any], gates: dict[str, float], *words: str) -> None:
    """There is an error of three parts that says the words."""
    with pytest.raises(ParityError) as caught:
        gate(metrics, gates)
    error = caught.value
    assert all((error.what, error.evidence, error.fix))
    assert error.exit_code == 6
    for word in words:
        assert word in str(error)


def test_gate_keys() -> None:
    assert set(GATES) == {
        "cosine_min",
        "cosine_mean",
        "cosine_p1",
        "spearman",
        "top10_overlap",
        "largest_difference",
        "batch_cosine_min",
        "norm_error",
        "language_loss",
        "token_cosine_min",
    }
    upper = [key for key in GATES if not GATES[key].at_least]
    assert upper == ["largest_difference", "norm_error", "language_loss"]


@pytest.mark.parametrize(("name", "path"), GROUPS)
@pytest.mark.parametrize("key", ["cosine_min", "cosine_mean", "cosine_p1", *sorted(WHOLE_SET)])
def test_lower_bound_at_its_border(key: str, name: str, path: tuple[str, ...]) -> None:
    bound = 0.99999
    below = math.nextafter(bound, 0)
    assert gate(metrics_with(bound, path, key), {key: bound}) == ()
    failures = gate(metrics_with(below, path, key), {key: bound})
    if key in WHOLE_SET and path[0] in ("by_language", "by_length"):
        assert failures == ()
    else:
        assert failures == (f"{name}: {key} {below!r} is below 0.99999",)


@pytest.mark.parametrize(("name", "path"), GROUPS)
def test_upper_bound_at_its_border(name: str, path: tuple[str, ...]) -> None:
    above = math.nextafter(1e-5, 1)
    gates = {"largest_difference": 1e-5}
    assert gate(metrics_with(1e-5, path, "largest_difference"), gates) == ()
    assert gate(metrics_with(above, path, "largest_difference"), gates) == (
        f"{name}: largest_difference {above!r} is above 1e-05",
    )


@pytest.mark.parametrize(
    ("key", "place"), [("batch_cosine_min", "batch"), ("token_cosine_min", "tokens")]
)
def test_batch_and_token_gates(key: str, place: str) -> None:
    assert gate(metrics_with(0.999, (place,), "cosine_min"), {key: 0.999}) == ()
    assert gate(metrics_with(0.99, (place,), "cosine_min"), {key: 0.999}) == (
        f"{place}: cosine_min 0.99 is below 0.999",
    )
    # the gate of the one is not the gate of the other, nor of the embeddings
    others = set(GATES) - {key, "largest_difference", "norm_error", "language_loss"}
    assert gate(metrics_with(0.99, (place,), "cosine_min"), dict.fromkeys(others, 0.999)) == ()


def test_norm_gate_at_its_border() -> None:
    above = math.nextafter(1e-4, 1)
    assert gate(metrics_with(1e-4, ("norms",), "largest_error"), {"norm_error": 1e-4}) == ()
    assert gate(metrics_with(above, ("norms",), "largest_error"), {"norm_error": 1e-4}) == (
        f"norms: largest_error {above!r} is above 0.0001",
    )


def test_failure_text_names_everything() -> None:
    metrics = metrics_with(0.99871, ("by_language", "th"), "cosine_min")
    assert gate(metrics, {"cosine_min": 0.99999}) == (
        "language 'th': cosine_min 0.99871 is below 0.99999",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", sorted(GATES))
def test_a_value_that_is_not_finite_never_passes(key: str, value: float) -> None:
    places = {
        "batch_cosine_min": "batch",
        "token_cosine_min": "tokens",
        "norm_error": "norms",
        "language_loss": "languages",
    }
    path = (places.get(key, "overall"),)
    metric = GATES[key].metric
    bound = -2.0 if GATES[key].at_least else 3.0
    failures = gate(metrics_with(value, path, metric), {key: bound})
    assert failures == (f"{path[0]}: {metric} is {value} (bound {bound})",)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("batch_cosine_min", "batch"),
        ("token_cosine_min", "tokens"),
        ("norm_error", "norms"),
        ("cosine_min", "overall"),
        ("cosine_min", "by_language"),
        ("cosine_p1", "by_length"),
        ("top10_overlap", "by_dimension"),
    ],
)
def test_a_gate_without_its_value_is_an_error(key: str, place: str) -> None:
    absent, none, empty = perfect(), perfect(), perfect()
    del absent[place]
    none[place] = None
    empty[place] = {}
    for metrics in (absent, none, empty):
        assert_refused(metrics, {key: 0.5}, key, place)


@pytest.mark.parametrize("value", [None, "1.0", True])
def test_a_value_that_is_no_number_is_an_error(value: object) -> None:
    assert_refused(
        metrics_with(value, ("by_language", "th"), "cosine_min"),
        {"cosine_min": 0.5},
        "language 'th'",
        repr(value),
    )


def test_empty_gates_are_an_error() -> None:
    assert_refused(perfect(), {}, "cosine_min")


def test_unknown_gate_is_an_error_with_the_nearest_key() -> None:
    assert_refused(
        perfect(),
        {"cosine_min": 0.9, "cosine_minn": 0.9},
        "'cosine_minn'",
        "did you mean 'cosine_min'?",
    )


@pytest.mark.parametrize("bound", [math.nan, math.inf, -math.inf])
def test_a_bound_that_is_not_finite_is_an_error(bound: float) -> None:
    assert_refused(perfect(), {"cosine_min": bound}, "cosine_min", str(bound))
