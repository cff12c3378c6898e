"""Files that may lack anything, and their numbers in words.

What is not there, or not of its kind, reads as nothing and is shown as a dash. Knows no key.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"

Facts = Mapping[str, Any]


def mapping(parent: Facts, key: str) -> Facts:
    """The object of a key.

    Args:
        parent: an object of a file.
        key: in it.

    Returns:
        The object, {} when there is none.
    """
    child = parent.get(key)
    return child if isinstance(child, Mapping) else {}


def rows(parent: Facts, key: str) -> list[Facts]:
    """The objects in the list of a key.

    Args:
        parent: an object of a file.
        key: in it.

    Returns:
        The objects; what else is in the list is left out.
    """
    return [row for row in listed(parent, key) if isinstance(row, Mapping)]


def listed(parent: Facts, key: str) -> Sequence[Any]:
    """The list of a key.

    Args:
        parent: an object of a file.
        key: in it.

    Returns:
        The list, () when there is none.
    """
    items = parent.get(key)
    return items if isinstance(items, list | tuple) else ()


def value(parent: Facts, key: str) -> object:
    """The value of a key; the shared neighbours go by `overlap` too.

    Args:
        parent: an object of a file.
        key: in it.

    Returns:
        The value, None when there is none.
    """
    return parent.get(key, parent.get("overlap") if key == "top10_overlap" else None)


def number(value: object) -> float | None:
    """A number to compute with.

    Args:
        value: as a file has it.

    Returns:
        A finite number, None for anything else.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def or_infinite(value: object) -> float:
    """The number to sort by: what is missing comes last.

    Args:
        value: as a file has it.

    Returns:
        The number; infinity for anything else.
    """
    known = number(value)
    return math.inf if known is None else known


def cosine(value: object) -> str:
    """Five digits: 1e-5 is what rounding alone does to a cosine.

    Args:
        value: as a file has it.

    Returns:
        In words, a dash for no number.
    """
    known = number(value)
    return MISSING if known is None else f"{known:.5f}"


def fine(value: object) -> str:
    """Seven digits, for what must be the same: float32 has no more.

    Args:
        value: as a file has it.

    Returns:
        In words, a dash for no number.
    """
    known = number(value)
    return MISSING if known is None else f"{known:.7f}"


def share(value: object) -> str:
    """Four digits: of 450 texts with 10 neighbours each, one neighbour is 0.0002.

    Args:
        value: as a file has it.

    Returns:
        In words, a dash for no number.
    """
    known = number(value)
    return MISSING if known is None else f"{known:.4f}"


def short(value: object) -> str:
    """Three digits that count.

    Args:
        value: as a file has it.

    Returns:
        In words, a dash for no number.
    """
    known = number(value)
    return MISSING if known is None else f"{known:.3g}"


def percent(value: object) -> str:
    """0.256 as '25.6 %'.

    Args:
        value: as a file has it.

    Returns:
        In words, a dash for no number.
    """
    known = number(value)
    return MISSING if known is None else f"{known:.1%}".replace("%", " %")


def count(value: object) -> str:
    """Whole, in groups of three.

    Args:
        value: as a file has it.

    Returns:
        In words, a dash for no number.
    """
    known = number(value)
    return MISSING if known is None else f"{known:,.0f}"


def line(words: object) -> str:
    """The words in one line that a terminal may show.

    Args:
        words: shown by `str`.

    Returns:
        The line; all white space in it is single spaces.
    """
    return printable(" ".join(str(words).split()))


def printable(words: str) -> str:
    """Without what a terminal would obey and what UTF-8 and XML do not have.

    Args:
        words: of anybody.

    Returns:
        The words, a replacement character for each that is none; line ends stay.
    """
    return re.sub(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", words)


def fitting(words: str, width: int) -> str:
    """The words in that many columns; an ellipsis says that some are left out.

    Args:
        words: of anybody.
        width: columns of a terminal.

    Returns:
        One line.
    """
    words = line(words)
    if columns(words) <= width:
        return words
    while words and columns(words) >= width:
        words = words[:-1]
    return words + "…"


def columns(words: str) -> int:
    """How wide words are: Chinese, Japanese and Korean letters take two columns.

    Args:
        words: in one line.

    Returns:
        Columns of a terminal.
    """
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in words)
