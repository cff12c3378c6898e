"""YAML that is read back as it was, by a reader that somebody else wrote."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import yaml
from hypothesis import given

from jexport.jobs.schedulers import _yaml

WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "no",
            "on",
            "y",
            "1e3",
            "0o7",
            "- a",
            "a: b",
            "#",
            "~",
            "=",
            "2026-11-23",
            "\x85",
            "\u2028",
            "\ufeff",
            "\x7f",
            "😀",
            '"',
            "\\",
            "a\nb",
            " ",
        ]
    ),
)
VALUES = st.recursive(
    st.one_of(WORDS, st.booleans(), st.integers(-(10**9), 10**9)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(WORDS, VALUES, min_size=1, max_size=4), max_size=3))
def test_what_is_read_is_what_was_written(documents: list[dict[str, Any]]) -> None:
    assert list(yaml.safe_load_all(_yaml.stream(documents))) == documents
