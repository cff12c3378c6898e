"""parity: the numbers against other people's formulas, and every way to pass on nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from jexport.errors import ParityError
from jexport.evaluation.parity import Labels, Outputs, compare, invariance, norms
from jexport.gates import GATES, gate

LANGUAGES = ("de", "th", "en")
LENGTHS = (1, 2, 3, 5, 9, 17, 1025, 2049, 8192, 8193)


def vectors(texts: int = 24, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(texts, width)).astype(np.float32)


def near(embeddings: np.ndarray, noise: float = 0.2, seed: int = 1) -> np.ndarray:
    shape = embeddings.shape
    return (embeddings + noise * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def labels_for(embeddings: np.ndarray, dimensions: tuple[int, ...] = ()) -> Labels:
    texts, width = embeddings.shape
    return Labels(
        languages=tuple(LANGUAGES[index % 3] for index in range(texts)),
        lengths=tuple(LENGTHS[index % len(LENGTHS)] for index in range(texts)),
        dimensions=(*dimensions, width),
    )


def compared(
    reference: np.ndarray, candidate: np.ndarray, dimensions: tuple[int, ...] = ()
) -> dict[str, Any]:
    return compare(
        Outputs(embeddings=reference),
        Outputs(embeddings=candidate),
        labels_for(reference, dimensions),
    )


def cosine_oracle(first: Sequence[float], second: Sequence[float]) -> float:
    dot = math.fsum(float(a) * float(b) for a, b in zip(first, second, strict=True))
    return dot / (math.hypot(*map(float, first)) * math.hypot(*map(float, second)))


def similarity_oracle(embeddings: np.ndarray, one: int, other: int) -> float:
    return cosine_oracle(embeddings[one], embeddings[other])


def spearman_oracle(reference: np.ndarray, candidate: np.ndarray, group: set[int]) -> float:
    pairs = [
        (one, other)
        for one in range(len(reference))
        for other in range(one)
        if one in group or other in group
    ]
    sides = [[similarity_oracle(side, *pair) for pair in pairs] for side in (reference, candidate)]
    return float(spearmanr(*sides).statistic)


def overlap_oracle(reference: np.ndarray, candidate: np.ndarray, group: set[int]) -> float:
    """Sets of neighbours by plain sorting: right only where nothing is tied."""
    shares = []
    for text in group:
        others = [other for other in range(len(reference)) if other != text]
        count = min(10, len(others))
        ours, theirs = (
            set(sorted(others, key=lambda o: -similarity_oracle(side, text, o))[:count])
            for side in (reference, candidate)
        )
        shares.append(len(ours & theirs) / count)
    return sum(shares) / len(shares)


def assert_parts(caught: pytest.ExceptionInfo[ParityError], *words: str) -> None:
    error = caught.value
    assert all((error.what, error.evidence, error.fix))
    assert error.exit_code == 6
    for word in words:
        assert word in str(error)


# --- the numbers --------------------------------------------------------------------------------


def test_hand_computed() -> None:
    """Two texts: one kept, one turned by 60 degrees; lengths 3 and 7 must not matter."""
    reference = np.array([[3, 0], [0, 7]], dtype=np.float32)
    candidate = np.array([[1, 0], [math.sqrt(3) / 2, 0.5]], dtype=np.float32)
    overall = compared(reference, candidate)["overall"]
    assert overall["texts"] == 2
    assert overall["cosine_min"] == pytest.approx(0.5, abs=1e-7)
    assert overall["cosine_mean"] == pytest.approx(0.75, abs=1e-7)
    assert overall["cosine_p1"] == pytest.approx(0.505, abs=1e-7)  # 1 % of the way from 0.5 to 1
    assert overall["largest_difference"] == pytest.approx(math.sqrt(3) / 2, abs=1e-7)
    assert overall["top10_overlap"] == 1  # the only neighbour there is
    assert overall["spearman"] == 1


def test_opposite_vectors_have_cosine_minus_one() -> None:
    overall = compared(vectors(), -vectors())["overall"]
    assert overall["cosine_min"] == pytest.approx(-1, abs=1e-15)
    assert overall["cosine_min"] >= -1
    assert overall["spearman"] == 1  # every pair keeps its similarity
    assert overall["top10_overlap"] == 1


def test_overall_against_oracles() -> None:
    reference = vectors(40)
    candidate = near(reference)
    overall = compared(reference, candidate)["overall"]
    cosines = [cosine_oracle(a, b) for a, b in zip(reference, candidate, strict=True)]
    assert overall["cosine_min"] == pytest.approx(min(cosines), abs=1e-14)
    assert overall["cosine_mean"] == pytest.approx(math.fsum(cosines) / 40, abs=1e-14)
    lowest, second = sorted(cosines)[:2]
    assert overall["cosine_p1"] == pytest.approx(lowest + 0.39 * (second - lowest), abs=1e-14)
    everyone = set(range(40))
    expected = spearman_oracle(reference, candidate, everyone)
    assert overall["spearman"] == pytest.approx(expected, abs=1e-12)
    expected = overlap_oracle(reference, candidate, everyone)
    assert 0.3 < expected < 0.99
    assert overall["top10_overlap"] == pytest.approx(expected, abs=1e-12)


def test_groups_against_oracles() -> None:
    reference = vectors(30)
    candidate = near(reference)
    metrics = compared(reference, candidate)
    for offset, language in enumerate(LANGUAGES):
        group = set(range(offset, 30, 3))
        found = metrics["by_language"][language]
        rows = [cosine_oracle(reference[i], candidate[i]) for i in group]
        assert found["texts"] == 10
        assert found["cosine_min"] == pytest.approx(min(rows), abs=1e-14)
        expected = spearman_oracle(reference, candidate, group)
        assert found["spearman"] == pytest.approx(expected, abs=1e-12)
        expected = overlap_oracle(reference, candidate, group)
        assert found["top10_overlap"] == pytest.approx(expected, abs=1e-12)


def test_dimension_is_cut_then_normalised() -> None:
    """The first two values point elsewhere although the whole vectors are nearly equal."""
    reference = np.array([[1, 0, 100, 0], [0, 1, 0, 100], [1, 1, 50, 0]], dtype=np.float32)
    candidate = reference.copy()
    candidate[0, :2] = (0, 1)
    metrics = compared(reference, candidate, dimensions=(2,))
    assert list(metrics["by_dimension"]) == ["2", "4"]
    assert metrics["by_dimension"]["2"]["cosine_min"] == pytest.approx(0, abs=1e-15)
    assert metrics["by_dimension"]["2"]["largest_difference"] == pytest.approx(1)
    assert metrics["by_dimension"]["4"]["cosine_min"] > 0.999
    assert metrics["by_dimension"]["4"] == metrics["overall"]


def test_dimension_equals_the_same_comparison_of_cut_vectors() -> None:
    reference = vectors(20, 16)
    candidate = near(reference)
    metrics = compared(reference, candidate, dimensions=(4, 9))
    for size in (4, 9):
        cut = compared(reference[:, :size], candidate[:, :size])["overall"]
        assert metrics["by_dimension"][str(size)] == pytest.approx(cut, abs=1e-12)


@pytest.mark.parametrize(
    ("length", "bucket"),
    [
        (1, "1-2"),
        (2, "1-2"),
        (3, "3-4"),
        (4, "3-4"),
        (5, "5-8"),
        (8, "5-8"),
        (9, "9-16"),
        (1024, "513-1024"),
        (1025, "1025-2048"),
        (2048, "1025-2048"),
        (2049, "2049-4096"),
        (8192, "4097-8192"),
        (8193, "8193+"),
        (100_000, "8193+"),
    ],
)
def test_length_bucket(length: int, bucket: str) -> None:
    side = Outputs(embeddings=vectors(2))
    labels = Labels(languages=("en", "en"), lengths=(length, length), dimensions=(8,))
    assert list(compare(side, side, labels)["by_length"]) == [bucket]


def test_length_buckets_are_ordered_and_complete() -> None:
    metrics = compared(vectors(20), vectors(20))
    assert list(metrics["by_length"]) == [
        "1-2",
        "3-4",
        "5-8",
        "9-16",
        "17-32",
        "1025-2048",
        "2049-4096",
        "4097-8192",
        "8193+",
    ]
    assert sum(group["texts"] for group in metrics["by_length"].values()) == 20
    assert metrics["by_length"]["1-2"]["texts"] == 4


def test_json_keeps_every_bit() -> None:
    reference = vectors(12)
    tokens = tuple(vectors(5, 8, seed) for seed in range(12))
    metrics = compare(
        Outputs(embeddings=reference, tokens=tokens),
        Outputs(embeddings=near(reference), tokens=tuple(near(token) for token in tokens)),
        labels_for(reference, (4,)),
    )
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_inputs_are_left_as_they_were() -> None:
    reference, candidate = vectors(), near(vectors())
    before = reference.copy(), candidate.copy()
    compared(reference, candidate, (4,))
    assert np.array_equal(reference, before[0])
    assert np.array_equal(candidate, before[1])


# --- what must drag a number down ---------------------------------------------------------------


def test_one_changed_row_drags_its_groups_only() -> None:
    reference = vectors(30)
    candidate = reference.copy()
    candidate[4] = vectors(1, seed=9)[0]  # text 4: 'th', 9 tokens
    metrics = compared(reference, candidate)
    expected = cosine_oracle(reference[4], candidate[4])
    for group in (metrics["overall"], metrics["by_language"]["th"], metrics["by_length"]["9-16"]):
        assert group["cosine_min"] == pytest.approx(expected, abs=1e-14)
    for group in (metrics["by_language"]["de"], metrics["by_length"]["3-4"]):
        assert group["cosine_min"] == 1
        assert group["largest_difference"] == 0
    # its neighbours' lists change too, wherever they are
    assert metrics["overall"]["top10_overlap"] < 1
    failures = gate(metrics, {"cosine_min": 0.99999})
    assert [failure.split(":")[0] for failure in failures] == [
        "overall",
        "language 'th'",
        "length 9-16",
        "dimension 8",
    ]


def test_swapped_rows() -> None:
    reference = vectors(30)
    candidate = reference.copy()
    candidate[[3, 7]] = reference[[7, 3]]
    metrics = compared(reference, candidate)
    expected = cosine_oracle(reference[3], reference[7])
    assert metrics["overall"]["cosine_min"] == pytest.approx(expected, abs=1e-14)
    assert metrics["by_language"]["de"]["cosine_min"] == pytest.approx(expected, abs=1e-14)
    assert metrics["by_language"]["th"]["cosine_min"] == pytest.approx(expected, abs=1e-14)
    assert metrics["by_language"]["en"]["cosine_min"] == 1
    assert metrics["overall"]["spearman"] < 1


def test_float32_noise_at_the_gate_is_resolved() -> None:
    """1 - 1e-9 is not 1: float32 arithmetic would have called it 1."""
    reference = np.array([[1, 0], [0, 1]], dtype=np.float32)
    candidate = np.array([[1, math.sqrt(2e-9)], [0, 1]], dtype=np.float32)
    metrics = compared(reference, candidate)
    assert metrics["overall"]["cosine_min"] == pytest.approx(1 - 1e-9, abs=1e-15)
    assert gate(metrics, {"cosine_min": 1 - 0.9e-9})


# --- ties and duplicates ------------------------------------------------------------------------


def test_duplicate_texts_of_an_identical_candidate() -> None:
    """Five texts, twelve times each: every tenth place is tied."""
    reference = np.tile(vectors(5), (12, 1))
    for candidate in (reference.copy(), reference * np.float32(3.7)):
        overall = compared(reference, candidate)["overall"]
        assert overall["top10_overlap"] == 1
        assert overall["spearman"] == pytest.approx(1, abs=1e-15)


def test_duplicates_that_come_back_with_float32_noise() -> None:
    """The same text in another batch is 1e-7 away: which duplicate is nearer says nothing."""
    reference = np.tile(vectors(5, 32), (12, 1))
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    overall = compared(reference, near(reference, 2e-8))["overall"]
    assert overall["top10_overlap"] == pytest.approx(1, abs=1e-12)


def test_order_of_duplicates_does_not_matter() -> None:
    reference = np.concatenate([np.tile(vectors(1), (11, 1)), vectors(9, seed=3)])
    candidate = np.concatenate([np.tile(near(vectors(1)), (11, 1)), near(vectors(9, seed=3))])
    order = np.random.default_rng(5).permutation(20)
    found = compared(reference, candidate)["overall"]
    shuffled = compared(reference[order], candidate[order])["overall"]
    assert found == pytest.approx(shuffled, abs=1e-12)


def test_collapsed_candidate_gains_nothing_from_ties() -> None:
    """All vectors alike: every choice of 10 neighbours among 39 is chance."""
    reference = vectors(40)
    candidate = np.ones_like(reference)
    overall = compared(reference, candidate)["overall"]
    assert overall["top10_overlap"] == pytest.approx(10 / 39)
    assert overall["spearman"] == 0


def test_tied_ranks_against_scipy() -> None:
    """Small integers: many similarities are equal, so averaged ranks decide."""
    rng = np.random.default_rng(2)
    reference = rng.integers(1, 3, size=(14, 3)).astype(np.float32)
    candidate = rng.integers(1, 3, size=(14, 3)).astype(np.float32)
    pairs = [(one, other) for one in range(14) for other in range(one)]
    # rounded: the oracle must see equal similarities as equal
    sides = [
        [round(similarity_oracle(side, *pair), 9) for pair in pairs]
        for side in (reference, candidate)
    ]
    assert len(set(sides[0])) < len(pairs) / 3
    expected = spearmanr(*sides).statistic
    overall = compared(reference, candidate)["overall"]
    assert overall["spearman"] == pytest.approx(expected, abs=1e-12)


def test_kinds_of_texts_are_groups_of_their_own() -> None:
    angles = [0.0, 0.4, 0.9, 1.3]
    reference = np.array([[math.cos(a), math.sin(a)] for a in angles], dtype=np.float32)
    candidate = reference.copy()
    candidate[1] = (math.cos(0.5), math.sin(0.5))
    names = {"languages": ("x",) * 4, "lengths": (3,) * 4, "dimensions": (2,)}
    sides = Outputs(embeddings=reference), Outputs(embeddings=candidate)
    metrics = compare(*sides, Labels(**names, kinds=("", "verse", "code", "verse")))
    assert sorted(metrics["by_kind"]) == ["code", "verse"]
    assert metrics["by_kind"]["code"]["loss"] == pytest.approx(0, abs=1e-12)
    assert metrics["by_kind"]["verse"]["texts"] == 2
    assert metrics["by_kind"]["verse"]["loss"] == pytest.approx((1 - math.cos(0.1)) / 2, rel=1e-4)
    assert "by_kind" not in compare(*sides, Labels(**names))
    with pytest.raises(ParityError, match="3 kinds for 4 texts"):
        compare(*sides, Labels(**names, kinds=("verse",) * 3))


def test_tied_neighbours_share_the_last_place() -> None:
    """Text 0 sees ten texts in a fan and two duplicates on its border; each gets half a place."""
    angles = [0.0, *(0.02 * step for step in range(1, 10)), 1.0, 1.0]
    reference = np.array([[math.cos(a), math.sin(a)] for a in angles], dtype=np.float32)
    candidate = reference.copy()
    candidate[11] = (math.cos(1.1), math.sin(1.1))  # now text 10 alone is the tenth neighbour
    labels = Labels(languages=("x", *["y"] * 11), lengths=(3,) * 12, dimensions=(2,))
    metrics = compare(Outputs(embeddings=reference), Outputs(embeddings=candidate), labels)
    assert metrics["by_language"]["x"]["top10_overlap"] == pytest.approx((9 + 0.5) / 10)


# --- invariants ---------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(2, 25), st.integers(1, 12))


@st.composite
def embedding_tables(draw: Any) -> np.ndarray:
    """Random tables; half of them of small integers, where rows and similarities repeat."""
    rng = np.random.default_rng(draw(seeds))
    size = draw(sizes)
    if draw(st.booleans()):
        table = rng.integers(-2, 3, size=size).astype(np.float32)
        table[~table.any(axis=1)] = 1
        return table
    return rng.normal(size=size).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(embedding_tables())
def test_identical_sides_are_perfect(table: np.ndarray) -> None:
    metrics = compared(table, table.copy())
    places = ("by_language", "by_length", "by_dimension")
    groups = [metrics["overall"], *(group for place in places for group in metrics[place].values())]
    for group in groups:
        assert group["cosine_min"] == group["cosine_mean"] == group["cosine_p1"] == 1
        assert group["top10_overlap"] == group["spearman"] == 1
        assert group["largest_difference"] == 0


@settings(max_examples=60, deadline=None)
@given(embedding_tables(), st.floats(1e-6, 1e6), seeds)
def test_scaling_a_side_changes_nothing(table: np.ndarray, factor: float, seed: int) -> None:
    candidate = near(table, seed=seed)
    wide = candidate.astype(np.float64)
    plain = compared(table, wide)["overall"]
    scaled = compared(table, wide * factor)["overall"]
    assert scaled == pytest.approx(plain, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(embedding_tables(), seeds)
def test_sides_can_be_exchanged_and_texts_reordered(table: np.ndarray, seed: int) -> None:
    candidate = near(table, seed=seed)
    plain = compared(table, candidate)["overall"]
    assert compared(candidate, table)["overall"] == pytest.approx(plain, abs=1e-9)
    order = np.random.default_rng(seed).permutation(len(table))
    shuffled = compared(table[order], candidate[order])["overall"]
    assert shuffled == pytest.approx(plain, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(embedding_tables(), seeds)
def test_numbers_stay_in_their_ranges(table: np.ndarray, seed: int) -> None:
    candidate = vectors(*table.shape, seed=seed)
    overall = compared(table, candidate)["overall"]
    assert -1 <= overall["cosine_min"] <= overall["cosine_p1"] <= 1
    assert overall["cosine_min"] <= overall["cosine_mean"] + 1e-12
    assert -1 <= overall["spearman"] <= 1
    assert 0 <= overall["top10_overlap"] <= 1
    assert 0 <= overall["largest_difference"] <= 2


def test_extreme_lengths_do_not_overflow() -> None:
    reference = vectors().astype(np.float64)
    for factor in (1e-300, 1e300):
        metrics = compared(reference, reference * factor)
        assert metrics["overall"]["cosine_min"] == pytest.approx(1, abs=1e-14)


# --- lengths of vectors ---------------------------------------------------------------------------


def test_norms_sees_what_cosines_do_not() -> None:
    table = vectors()
    assert norms(table, table) == {"texts": len(table), "largest_error": 0.0}
    longer = table.copy()
    longer[3] *= 1.25
    assert compared(table, longer)["overall"]["cosine_min"] == pytest.approx(1, abs=1e-12)
    assert norms(table, longer)["largest_error"] == pytest.approx(0.25, rel=1e-6)
    assert norms(longer, table)["largest_error"] == pytest.approx(0.2, rel=1e-6)
    assert norms(table * 1e30, table * 1e30)["largest_error"] == 0.0


def test_norms_refuses_what_it_cannot_measure() -> None:
    table, broken, empty = vectors(), vectors(), vectors()
    broken[2, 1], empty[4] = np.nan, 0
    for one, other in ((table, broken), (broken, table), (table, empty), (table, table[:3])):
        with pytest.raises(ParityError):
            norms(one, other)
    with pytest.raises(ParityError):
        norms(table[:0], table[:0])


# --- tokens and invariance ----------------------------------------------------------------------


def with_tokens(embeddings: np.ndarray, tokens: Sequence[np.ndarray]) -> Outputs:
    return Outputs(embeddings=embeddings, tokens=tuple(tokens))


def test_tokens_find_the_worst_one() -> None:
    table = vectors(3)
    tokens = [vectors(4, 6, seed) for seed in range(3)]
    changed = [token.copy() for token in tokens]
    changed[0][2] *= 5  # a length only
    changed[1][3] = vectors(1, 6, 77)[0]  # neither the first text nor the last
    metrics = compare(with_tokens(table, tokens), with_tokens(table, changed), labels_for(table))
    expected = cosine_oracle(tokens[1][3], changed[1][3])
    assert metrics["tokens"]["texts"] == 3
    assert metrics["tokens"]["cosine_min"] == pytest.approx(expected, abs=1e-14)
    assert metrics["tokens"]["largest_difference"] > 0.01
    assert metrics["overall"]["cosine_min"] == 1
    assert gate(metrics, {"token_cosine_min": 0.9999})[0].startswith("tokens: cosine_min ")


def test_no_tokens_on_either_side() -> None:
    assert compared(vectors(), vectors())["tokens"] is None


def test_invariance() -> None:
    alone = vectors(1)
    assert invariance(alone, alone * 2) == {
        "texts": 1,
        "cosine_min": 1.0,
        "largest_difference": 0.0,
    }
    found = invariance(
        np.array([[1, 0], [0, 2]], dtype=np.float32), np.array([[1, 0], [3, 4]], dtype=np.float32)
    )
    assert found["texts"] == 2
    assert found["cosine_min"] == pytest.approx(0.8, abs=1e-15)
    assert found["largest_difference"] == pytest.approx(0.6, abs=1e-15)


@pytest.mark.parametrize(
    ("alone", "batched", "words"),
    [
        (vectors(0), vectors(0), ["too few texts", "the texts alone"]),
        (vectors(3), vectors(2), ["text 2"]),
        (vectors(3, 8), vectors(3, 4), ["width"]),
        (vectors(3)[0], vectors(3)[0], ["table"]),
        (vectors(2), vectors(2) * np.float32("nan"), ["in a batch", "NaN", "text 0 and 1 more"]),
        (vectors(2) * 0, vectors(2), ["length zero", "the texts alone"]),
    ],
)
def test_invariance_refuses(alone: np.ndarray, batched: np.ndarray, words: list[str]) -> None:
    with pytest.raises(ParityError) as caught:
        invariance(alone, batched)
    assert_parts(caught, *words)


# --- nothing to compare -------------------------------------------------------------------------


def changed_row(row: int, value: float) -> np.ndarray:
    table = vectors()
    table[row, 3] = value
    return table


def zero_row(row: int, width: int = 8) -> np.ndarray:
    table = vectors()
    table[row, :width] = 0
    return table


@pytest.mark.parametrize(
    ("reference", "candidate", "words"),
    [
        (vectors(0), vectors(0), ["too few texts to compare: 0"]),
        (vectors(1), vectors(1), ["too few texts to compare: 1"]),
        (vectors(24), vectors(23), ["text 23", "language 'en'"]),
        (vectors(23), vectors(24), ["text 23"]),
        (vectors(24), vectors(0), ["text 0", "language 'de'"]),
        (vectors(24, 8), vectors(24, 7), ["width", "[24, 7]"]),
        (vectors(24, 0), vectors(24, 0), ["width"]),
        (vectors(24)[0], vectors(24)[0], ["table"]),
        (vectors(24), vectors(24)[np.newaxis], ["table"]),
        (changed_row(4, np.nan), vectors(), ["reference", "NaN", "text 4 (language 'th')"]),
        (vectors(), changed_row(5, np.nan), ["candidate", "NaN", "text 5 (language 'en')"]),
        (vectors(), changed_row(6, np.inf), ["infinity", "text 6 (language 'de')"]),
        (vectors(), changed_row(7, -np.inf), ["infinity", "text 7 (language 'th')"]),
        (changed_row(4, np.nan), changed_row(4, np.nan), ["NaN", "text 4"]),
        (vectors(), zero_row(8), ["candidate", "length zero", "text 8 (language 'en')"]),
        (zero_row(9), zero_row(9), ["reference", "length zero", "text 9 (language 'de')"]),
        (vectors(), vectors().astype(np.int8), ["floating point", "int8"]),
    ],
)
def test_compare_refuses(reference: np.ndarray, candidate: np.ndarray, words: list[str]) -> None:
    languages = tuple(LANGUAGES[index % 3] for index in range(len(reference)))
    labels = Labels(languages=languages, lengths=(5,) * len(reference), dimensions=(8,))
    with pytest.raises(ParityError) as caught:
        compare(Outputs(embeddings=reference), Outputs(embeddings=candidate), labels)
    assert_parts(caught, *words)


def test_a_vector_that_is_zero_only_when_cut() -> None:
    with pytest.raises(ParityError) as caught:
        compared(vectors(), zero_row(10, width=4), dimensions=(4,))
    assert_parts(caught, "cut to 4 values", "candidate", "text 10 (language 'th')")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            Labels(languages=("en",) * 2, lengths=(5,) * 3, dimensions=(8,)),
            ["2 languages", "text 2"],
        ),
        (
            Labels(languages=("en",) * 4, lengths=(5,) * 3, dimensions=(8,)),
            ["4 languages", "text 3"],
        ),
        (Labels(languages=("en",) * 3, lengths=(5,) * 2, dimensions=(8,)), ["2 lengths", "text 2"]),
        (Labels(languages=(), lengths=(), dimensions=(8,)), ["0 languages for 3 texts"]),
        (
            Labels(languages=("en", "th", "de"), lengths=(5, 0, 5), dimensions=(8,)),
            ["text 1 (language 'th')", "0 tokens"],
        ),
        (Labels(languages=("en",) * 3, lengths=(5,) * 3, dimensions=(8, 9)), ["dimension 9"]),
        (Labels(languages=("en",) * 3, lengths=(5,) * 3, dimensions=(0, 8)), ["dimension 0"]),
        (Labels(languages=("en",) * 3, lengths=(5,) * 3, dimensions=(-1, 8)), ["dimension -1"]),
        (Labels(languages=("en",) * 3, lengths=(5,) * 3, dimensions=(4,)), ["full dimension 8"]),
        (Labels(languages=("en",) * 3, lengths=(5,) * 3, dimensions=()), ["full dimension 8"]),
    ],
)
def test_labels_refused(labels: Labels, words: list[str]) -> None:
    side = Outputs(embeddings=vectors(3))
    with pytest.raises(ParityError) as caught:
        compare(side, side, labels)
    assert_parts(caught, *words)


def replaced(tokens: list[np.ndarray], index: int, value: np.ndarray) -> list[np.ndarray]:
    return [*tokens[:index], value, *tokens[index + 1 :]]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tokens: [], ["missing", "the candidate for 0"]),
        (lambda tokens: tokens[:2], ["missing", "the candidate for 2"]),
        (lambda tokens: replaced(tokens, 1, tokens[1][:3]), ["text 1 (language 'th')", "[3, 6]"]),
        (
            lambda tokens: replaced(tokens, 2, tokens[2][:, :5]),
            ["text 2 (language 'en')", "[4, 5]"],
        ),
        (lambda tokens: replaced(tokens, 0, tokens[0][0]), ["text 0 (language 'de')", "[6]"]),
        (
            lambda tokens: replaced(tokens, 1, tokens[1] * np.float32("nan")),
            ["NaN", "token 0 of text 1 (language 'th') and 3 more", "candidate"],
        ),
        (
            lambda tokens: replaced(tokens, 1, tokens[1] * np.array([[1], [1], [0], [1]], "f4")),
            ["length zero", "token 2 of text 1 (language 'th')"],
        ),
    ],
)
def test_tokens_refused(
    spoil: Callable[[list[np.ndarray]], list[np.ndarray]], words: list[str]
) -> None:
    table = vectors(3)
    tokens = [vectors(4, 6, seed) for seed in range(3)]
    good, bad = with_tokens(table, tokens), with_tokens(table, spoil(tokens))
    with pytest.raises(ParityError) as caught:
        compare(good, bad, labels_for(table))
    assert_parts(caught, *words)
    with pytest.raises(ParityError):
        compare(bad, good, labels_for(table))


def test_texts_without_any_token_refused() -> None:
    table = vectors(3)
    side = with_tokens(table, [vectors(0, 6)] * 3)
    with pytest.raises(ParityError) as caught:
        compare(side, side, labels_for(table))
    assert_parts(caught, "text 0")


# --- with the gates -----------------------------------------------------------------------------


def test_every_gate_passes_on_identical_outputs() -> None:
    table = vectors()
    tokens = [vectors(4, 6, seed) for seed in range(len(table))]
    side = with_tokens(table, tokens)
    metrics = compare(side, copy.deepcopy(side), labels_for(table, (4,)))
    metrics |= {"batch": invariance(table, table), "norms": norms(table, table)}
    gates = {key: 1.0 if GATES[key].at_least else 0.0 for key in GATES}
    assert gate(metrics, gates) == ()


def test_compare_alone_cannot_pass_a_gate_of_another_place() -> None:
    metrics = compared(vectors(), vectors())
    for key in ("batch_cosine_min", "token_cosine_min", "norm_error"):
        with pytest.raises(ParityError) as caught:
            gate(metrics, {key: 0.5})
        assert_parts(caught, key)


# --- losses of groups ---------------------------------------------------------------------------


def with_losses(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Texts of languages whose vectors are turned so that 1 - cosine is what is given."""
    names = [name for name, own in losses.items() for _ in own]
    wanted = np.array([loss for own in losses.values() for loss in own])
    reference = vectors(len(names), 16).astype(np.float64)
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    other = vectors(len(names), 16, seed=5).astype(np.float64)
    other -= (other * reference).sum(axis=1, keepdims=True) * reference
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosines = (1 - wanted)[:, None]
    turned = cosines * reference + np.sqrt(1 - cosines**2) * other
    return compare(
        Outputs(embeddings=reference.astype(np.float32)),
        Outputs(embeddings=turned.astype(np.float32)),
        Labels(languages=tuple(names), lengths=(5,) * len(names), dimensions=(16,)),
    )


LITTLE = [0.0006, 0.0007, 0.0008] * 5


def test_one_bad_text_is_no_bad_language_and_a_bad_language_is() -> None:
    gates = {"cosine_mean": 0.98, "group_loss": 0.004}
    single = with_losses({"en": LITTLE, "bn": [*LITTLE[:8], 0.2], "sw": [0.01]})
    assert gate(single, gates) == ()
    assert gate(single, {"cosine_min": 0.95}) != ()  # it counts there
    shared = with_losses({"en": LITTLE, "bn": [0.005, 0.0055, 0.006] * 3})
    [failure] = gate(shared, gates)
    assert failure.startswith("language 'bn': mean loss")


def test_twice_a_small_mean_is_no_loss() -> None:
    """All lose little, one of them more: the ratio that no improvement can meet."""
    metrics = with_losses({"en": [0.0003] * 9, "de": [0.0003] * 9, "bn": [0.0009] * 9})
    assert metrics["languages"]["largest_loss"] == 0
    assert metrics["by_language"]["bn"]["loss"] > 1.5 * metrics["overall"]["loss"]
    assert gate(metrics, {"language_loss": 1.2}) == ()
    lost = with_losses({"en": [0.003] * 9, "de": [0.003] * 9, "bn": [0.009] * 9})
    assert lost["languages"]["largest_loss"] == pytest.approx(1.8, rel=1e-3)
    assert gate(lost, {"language_loss": 1.2}) != ()
