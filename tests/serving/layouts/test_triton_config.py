"""config.pbtxt: batches that every profile takes, strings, the seal."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from jexport.errors import LayoutError
from jexport.serving.layouts import Wishes
from jexport.serving.layouts._triton_config import (
    Profile,
    is_sealed,
    largest_batch,
    plan,
    profiles_of,
    quoted,
    sealed,
)


def profile(batch: tuple[int, int], tokens: tuple[int, int]) -> Profile:
    return Profile(batch=(batch[0], batch[1], batch[1]), tokens=(tokens[0], tokens[1], tokens[1]))


def content(profiles: Any) -> dict[str, Any]:
    return {
        "name": "m",
        "task": "t",
        "target": "trt",
        "embedding": {"max_tokens": 512},
        "engine": {"facts": {"profiles": profiles}, "runs_on": {}},
    }


def ranges(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    both = st.tuples(st.integers(1, limit), st.integers(1, limit))
    return both.map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.builds(profile, ranges(6), ranges(8)), min_size=1, max_size=4))
def test_no_batch_that_triton_may_form_falls_outside_every_profile(found: list[Profile]) -> None:
    def taken(batch: int, tokens: int) -> bool:
        return any(
            p.batch[0] <= batch <= p.batch[2] and p.tokens[0] <= tokens <= p.tokens[2]
            for p in found
        )

    lengths = [t for t in range(1, 9) if any(p.tokens[0] <= t <= p.tokens[2] for p in found)]

    def all_taken(largest: int) -> bool:
        sizes = range(1, largest + 1)
        return all(taken(b, t) for b, t in itertools.product(sizes, lengths))

    if not all_taken(1):
        with pytest.raises(LayoutError, match="no profile takes a single text"):
            largest_batch(found)
        return
    largest = largest_batch(found)
    assert all_taken(largest)
    assert not all_taken(largest + 1)


def test_a_profile_above_the_largest_batch_is_not_opened() -> None:
    made = plan(
        content(
            [
                {"batch": [1, 1, 1], "tokens": [1, 32, 64]},
                {"batch": [2, 16, 32], "tokens": [1, 32, 64]},
                {"batch": [1, 1, 1], "tokens": [65, 128, 512]},
            ]
        ),
        Wishes(),
    )
    assert (made.max_batch, made.profiles, made.preferred) == (1, (0, 2), ())
    assert [(one.batch, one.tokens) for one in made.warmups] == [(1, 32), (1, 128)]
    assert "a profile takes 32" in made.notes[0]


def test_wishes_can_only_shrink_a_profile() -> None:
    said = content([{"batch": [1, 8, 32], "tokens": [1, 32, 64]}])
    assert plan(said, Wishes(max_batch=4)).preferred == (4,)
    with pytest.raises(LayoutError, match="do not take batches of 33"):
        plan(said, Wishes(max_batch=33))
    with pytest.raises(LayoutError, match="cannot be served on the CPU"):
        plan(said, Wishes(device="cpu"))
    with pytest.raises(ValueError, match="device"):
        plan(said, Wishes(device="tpu"))


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        [3],
        [{}],
        [{"batch": [1, 2, 3]}],
        [{"batch": [1, 2, 3], "tokens": [1, 2]}],
        [{"batch": [0, 2, 3], "tokens": [1, 2, 3]}],
        [{"batch": [1, 2, 3], "tokens": [3, 2, 4]}],
        [{"batch": [1, 2, 3], "tokens": [1, 2.0, 3]}],
        [{"batch": [1, 2, 3], "tokens": "123"}],
    ],
)
def test_profiles_that_cannot_be_read(wrong: Any) -> None:
    with pytest.raises(LayoutError, match="profiles"):
        profiles_of(content(wrong))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_strings_come_back_from_tritons_protobuf(value: str) -> None:
    config = text_format.Parse(f"name: {quoted(value)}", model_config_pb2.ModelConfig())
    assert config.name == value


def test_a_seal_breaks_with_any_change() -> None:
    config = sealed('name: "m"\n')
    assert is_sealed(config)
    assert not is_sealed(config.replace('"m"', '"n"'))
    assert not is_sealed(config + "\n")
    assert not is_sealed('name: "m"\n')
    assert not is_sealed("")
