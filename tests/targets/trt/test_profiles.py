"""Optimization profiles: read, refused, chosen from lengths, and picked for a batch."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jexport.errors import ProfileError
from jexport.recipe import ProfileSpec
from jexport.targets.trt import profiles
from jexport.targets.trt.profiles import Profile, Range

SHORT = {"batch": [1, 8, 32], "tokens": [1, 64, 128]}
LONG = {"batch": [1, 2, 8], "tokens": [129, 256, 512]}


def tables(*given: dict[str, Any], max_tokens: int = 512) -> tuple[Profile, ...]:
    return profiles.from_tables(given, max_tokens=max_tokens)


# --- reading ------------------------------------------------------------------------------------


def test_tables_become_profiles_and_back() -> None:
    found = tables(SHORT, LONG)
    assert found[0] == Profile(
        batch=Range(min=1, opt=8, max=32), tokens=Range(min=1, opt=64, max=128)
    )
    assert [one.plain() for one in found] == [SHORT, LONG]
    specs = [
        ProfileSpec(batch=(1, 8, 32), tokens=(1, 64, 128)),
        ProfileSpec(batch=(1, 2, 8), tokens=(129, 256, 512)),
    ]
    assert profiles.read(specs, max_tokens=512) == found
    assert profiles.specs(found) == tuple(specs)


def test_without_any_the_standard_ones_are_read() -> None:
    assert profiles.read((), max_tokens=8192) == profiles.standard(8192)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [64, 1, 128]}, "impossible tokens range"),
        ({"tokens": [1, 200, 128]}, "impossible tokens range"),
        ({"tokens": [0, 64, 128]}, "impossible tokens range"),
        ({"batch": [0, 1, 2]}, "impossible batch range"),
        ({"batch": [3, 2, 1]}, "impossible batch range"),
        ({"batch": [1, 2]}, "no usable batch range"),
        ({"batch": [1, 2, "3"]}, "no usable batch range"),
        ({"batch": [1, 2, True]}, "no usable batch range"),
        ({"tokens": [1, 64, 513]}, "longer texts than the model takes"),
    ],
)
def test_an_impossible_profile_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileError, match=said) as caught:
        tables(SHORT | change)
    assert caught.value.evidence
    assert caught.value.fix
    assert "profile 0" in caught.value.what


@pytest.mark.parametrize(
    ("second", "apart"),
    [
        (LONG, True),
        (LONG | {"tokens": [128, 256, 512]}, False),  # they share 128
        ({"batch": [33, 40, 64], "tokens": [1, 64, 128]}, True),  # apart in the batch is enough
        ({"batch": [32, 40, 64], "tokens": [1, 64, 128]}, False),
        ({"batch": [2, 3, 4], "tokens": [2, 3, 4]}, False),  # one inside the other
        (SHORT, False),
    ],
)
def test_profiles_that_overlap_are_refused(second: dict[str, Any], apart: bool) -> None:
    if apart:
        assert len(tables(SHORT, second)) == 2
        return
    with pytest.raises(ProfileError, match="profiles 0 and 1 overlap") as caught:
        tables(SHORT, second)
    assert "129 tokens" in caught.value.fix


def test_none_and_five_are_refused() -> None:
    with pytest.raises(ProfileError, match="0 optimization profiles"):
        tables()
    five = [{"batch": [n, n, n], "tokens": [1, 2, 3]} for n in range(1, 6)]
    with pytest.raises(ProfileError, match="5 optimization profiles"):
        tables(*five)


def test_exit_code() -> None:
    assert ProfileError.exit_code == 27


# --- standard and chosen ------------------------------------------------------------------------


def disjoint(found: tuple[Profile, ...]) -> None:
    for one, two in itertools.combinations(found, 2):
        assert one.tokens.max < two.tokens.min or two.tokens.max < one.tokens.min


def covers(found: tuple[Profile, ...], max_tokens: int) -> None:
    """Every length there may be, alone, lies in exactly one profile."""
    assert found[0].tokens.min == 1
    assert found[-1].tokens.max == max_tokens
    for one, two in itertools.pairwise(found):
        assert two.tokens.min == one.tokens.max + 1
    assert all(one.batch.min == 1 for one in found)


@pytest.mark.parametrize("max_tokens", [1, 16, 128, 129, 256, 512, 513, 8192])
def test_standard_profiles_cover_the_model(max_tokens: int) -> None:
    found = profiles.standard(max_tokens)
    assert profiles.check(found, max_tokens=max_tokens) == found
    covers(found, max_tokens)
    assert len(found) == 1 + sum(edge < max_tokens for edge in (128, 512))


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    max_tokens=st.integers(8, 2048),
    count=st.integers(2, 4),
    budget=st.integers(1, 40_000),
)
@settings(deadline=None)
def test_chosen_profiles_are_possible_cover_everything_and_keep_the_budget(
    lengths: list[int], max_tokens: int, count: int, budget: int
) -> None:
    found = profiles.choose(lengths, max_tokens=max_tokens, count=count, token_budget=budget)
    assert profiles.check(found, max_tokens=max_tokens) == found
    assert 1 <= len(found) <= count
    covers(found, max_tokens)
    disjoint(found)
    for one in found:
        assert one.batch.max == 1 or one.batch.max * one.tokens.max <= budget
    again = profiles.choose(lengths[::-1], max_tokens=max_tokens, count=count, token_budget=budget)
    assert again == found  # neither order nor chance


def padded(lengths: list[int], edges: tuple[int, ...]) -> int:
    return sum(min(edge for edge in edges if edge >= length) for length in lengths)


@given(st.lists(st.integers(1, 128), min_size=1, max_size=25), st.integers(2, 4))
@settings(deadline=None, max_examples=60)
def test_borders_are_the_best_there_are(lengths: list[int], count: int) -> None:
    found = profiles.choose(lengths, max_tokens=128, count=count)
    ours = tuple(one.tokens.max for one in found)
    highest = min(-(-max(lengths) // 8) * 8, 128)
    free = count - (highest < 128)
    every = range(8, highest, 8)
    best = min(
        padded(lengths, (*edges, highest))
        for size in range(free)
        for edges in itertools.combinations(every, size)
    )
    assert padded(lengths, ours) == best


def test_two_kinds_of_texts_get_two_profiles() -> None:
    lengths = [12] * 900 + [14] * 50 + [300] * 50
    short, long, rest = profiles.choose(lengths, max_tokens=8192)
    assert (short.tokens.max, short.tokens.opt) == (16, 12)
    assert (long.tokens.max, long.tokens.opt) == (304, 300)
    assert rest.tokens == Range(min=305, opt=4249, max=8192)
    assert short.batch.max > long.batch.max > rest.batch.max


def test_texts_over_the_limit_count_as_cut() -> None:
    found = profiles.choose([5000, 5000, 20], max_tokens=512, count=2)
    assert [one.tokens.max for one in found] == [24, 512]


@pytest.mark.parametrize(
    ("lengths", "count", "said"),
    [([], 3, "no texts"), ([0, 0], 3, "no texts"), ([5], 1, "1 profiles"), ([5], 5, "5 profiles")],
)
def test_what_cannot_be_chosen(lengths: list[int], count: int, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        profiles.choose(lengths, max_tokens=512, count=count)


# --- for a batch --------------------------------------------------------------------------------

FOUND = tables(SHORT, LONG)


@pytest.mark.parametrize(
    ("batch", "tokens", "chosen"),
    [
        (1, 1, 0),
        (32, 128, 0),
        (33, 128, None),
        (1, 129, 1),
        (8, 512, 1),
        (9, 129, None),
        (1, 513, None),
        (0, 5, None),
    ],
)
def test_pick(batch: int, tokens: int, chosen: int | None) -> None:
    assert profiles.pick(FOUND, batch, tokens) == chosen


@given(st.lists(st.integers(1, 512), min_size=1, max_size=90))
@settings(deadline=None)
def test_a_split_loses_no_row_and_fits(lengths: list[int]) -> None:
    groups = profiles.split(FOUND, lengths)
    assert sorted(row for _, rows in groups for row in rows) == list(range(len(lengths)))
    for number, rows in groups:
        longest = max(lengths[row] for row in rows)
        shape = profiles.shape(FOUND[number], len(rows), longest)
        assert FOUND[number].holds(*shape)
        assert profiles.pick(FOUND, *shape) == number


def test_a_split_puts_short_texts_together() -> None:
    assert profiles.split(FOUND, [300, 5, 200, 6]) == [(0, [1, 3]), (1, [0, 2])]
    assert profiles.split(FOUND, [300] * 9) == [(1, list(range(8))), (1, [8])]


def test_a_text_between_two_profiles_is_padded() -> None:
    gap = tables(SHORT, LONG | {"tokens": [200, 256, 512]})
    assert profiles.split(gap, [150]) == [(1, [0])]
    assert profiles.shape(gap[1], 1, 150) == (1, 200)


def test_a_text_that_is_too_long_is_named() -> None:
    with pytest.raises(ProfileError, match="text 2 of a batch") as caught:
        profiles.split(FOUND, [5, 512, 513])
    assert "513 tokens" in caught.value.evidence


def test_no_framework_is_loaded() -> None:
    code = """
import sys
from jexport.targets.trt import profiles
profiles.choose([5, 6, 700], max_tokens=8192)
heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "polygraphy", "cuda"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
