"""The folder of layouts is the registry."""

from __future__ import annotations

import pytest

from jexport.errors import LayoutError
from jexport.serving import layouts


@pytest.mark.parametrize("name", layouts.names())
def test_a_layout_says_what_it_is(name: str) -> None:
    layout = layouts.load(name)
    assert layout.name == name
    assert layout.summary
    assert layout.targets


def test_names_are_files_and_an_unknown_one_gets_a_hint() -> None:
    assert layouts.names() == ["triton"]
    with pytest.raises(LayoutError, match="unknown layout 'tritn'") as caught:
        layouts.load("tritn")
    assert caught.value.fix == "did you mean 'triton'?"
