"""gates: what passes at its border and what fails, and every way to pass on nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jexport.errors import ParityError
from jexport.gates import GATES, GROUP_TEXTS, complete, failures, gate, least_texts

WHOLE_SET = {"spearman", "top10_overlap", "cosine_mean"}
GROUPS = (
    ("overall", ("overall",)),
    ("language 'th'", ("by_language", "th")),
    ("length 5-8", ("by_length", "5-8")),
    ("dimension 64", ("by_dimension", "64")),
)


UPPER = {"largest_difference", "norm_error", "language_loss", "group_loss"}


def perfect() -> dict[str, Any]:
    def group() -> dict[str, float]:
        return {
            "texts": 500,
            "cosine_mean": 1.0,
            "loss": 0.0,
            "loss_low": 0.0,
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
        "group_loss",
        "edge_cosine_min",
        "token_cosine_min",
    }
    upper = [key for key in GATES if not GATES[key].at_least]
    assert set(upper) == UPPER


@pytest.mark.parametrize(("name", "path"), GROUPS)
@pytest.mark.parametrize("key", ["cosine_min", "cosine_p1", *sorted(WHOLE_SET)])
def test_lower_bound_at_its_border(key: str, name: str, path: tuple[str, ...]) -> None:
    bound = 0.99999
    below = math.nextafter(bound, 0)
    gates = {key: bound, "group_loss": 1.0}
    assert gate(metrics_with(bound, path, key), gates) == ()
    failures = gate(metrics_with(below, path, key), gates)
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
    others = set(GATES) - {key, *UPPER}
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
@pytest.mark.parametrize("key", sorted(set(GATES) - {"edge_cosine_min"}))
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
    gates = {"group_loss": 9.0, key: bound}
    failures = gate(metrics_with(value, path, metric), gates)
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


@pytest.mark.parametrize(("quantile", "count"), [(0.5, 7), (0.01, 459), (0.1, 44)])
def test_least_texts_is_the_first_count_that_tells(quantile: float, count: int) -> None:
    """Exactly: the chance that none of them is below the quantile."""
    assert least_texts(quantile) == count
    assert (1 - quantile) ** count <= 0.01 < (1 - quantile) ** (count - 1)


@pytest.mark.parametrize("place", ["by_language", "by_length"])
@pytest.mark.parametrize(
    ("key", "metric", "bad", "bound", "least"),
    [
        ("group_loss", "loss_low", 0.5, 0.004, GROUP_TEXTS),
        ("cosine_p1", "cosine_p1", 0.5, 0.99, 459),
    ],
)
def test_a_group_counts_from_so_many_texts_on(
    place: str, key: str, metric: str, bad: float, bound: float, least: int
) -> None:
    metrics = perfect()
    metrics[place]["few"] = metrics["overall"] | {"texts": least - 1, metric: bad}
    assert gate(metrics, {key: bound}) == ()
    metrics[place]["few"]["texts"] = least
    [failure] = gate(metrics, {key: bound})
    assert "few" in failure


def test_a_single_text_counts_in_the_lowest_cosine_of_all() -> None:
    metrics = perfect()
    metrics["by_length"]["1-2"] = metrics["overall"] | {"texts": 1, "cosine_min": 0.9}
    metrics["overall"] = metrics["overall"] | {"cosine_min": 0.9}
    assert gate(metrics, {"cosine_mean": 0.996, "cosine_p1": 0.99, "group_loss": 0.004}) == ()
    assert "overall: cosine_min 0.9 is below 0.95" in gate(metrics, {"cosine_min": 0.95})


def test_a_group_that_does_not_say_how_many_texts_it_has_is_held() -> None:
    metrics = metrics_with(0.5, ("by_language", "th"), "loss_low")
    del metrics["by_language"]["th"]["texts"], metrics["by_language"]["en"]["loss_low"]
    metrics["by_language"]["th"]["texts"] = 9
    assert_refused(metrics, {"group_loss": 0.004}, "group_loss", "language 'en'")


def test_a_groups_loss_is_told_with_its_interval() -> None:
    metrics = perfect()
    metrics["by_language"]["th"] |= {"texts": 9, "loss": 0.0061, "loss_low": 0.0052}
    [failure] = failures(metrics, {"group_loss": 0.004})
    assert failure.goal == "language 'th': loss_low"
    assert failure.gap == pytest.approx(0.0012)
    for word in ("language 'th'", "0.00610", "of 9 texts", "0.00520", "99%", "0.004"):
        assert word in failure.words


def test_a_kind_of_text_is_held_to_its_loss() -> None:
    metrics = metrics_with(0.0, ("by_language", "th"), "loss_low")
    assert gate(metrics, {"group_loss": 0.004}) == ()
    verse = {**metrics["by_language"]["th"], "texts": 8, "loss": 0.0061, "loss_low": 0.0052}
    metrics["by_kind"] = {"verse": verse, "code": {**verse, "texts": 6}}
    (failure,) = failures(metrics, {"group_loss": 0.004})  # six texts are no group
    assert failure.goal == "kind 'verse': loss_low"
    assert "0.00610 of 8 texts" in failure.words


def test_a_mean_over_all_is_asked_of_groups_where_nothing_else_is() -> None:
    assert complete({"cosine_mean": 0.996})["group_loss"] == 0.004
    assert complete({"cosine_mean": 0.996, "group_loss": 0.01})["group_loss"] == 0.01
    assert complete({"cosine_min": 0.9}) == {"cosine_min": 0.9}
    metrics = metrics_with(0.005, ("by_language", "th"), "loss_low")
    assert len(gate(metrics, {"cosine_mean": 0.996})) == 1
    assert gate(metrics, {"cosine_mean": 0.99}) == ()
