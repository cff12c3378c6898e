"""YAML of plain values: block style, every text in double quotes, so nothing is read as a number.

Double quotes are JSON's: YAML reads them alike. Knows dicts, lists, texts, numbers and booleans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SWITCHES = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Bare words that YAML 1.1 does not read as texts."""

UNPRINTED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]")
"""What JSON leaves as it is and YAML does not take."""


def stream(documents: Iterable[Mapping[str, Any]]) -> str:
    """One text of several documents.

    Args:
        documents: JSON-ready.

    Returns:
        Each document after a line '---'.
    """
    return "".join("---\n" + "\n".join(_lines(one)) + "\n" for one in documents)


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            bare = key.isascii() and key.isalpha() and key.lower() not in SWITCHES
            name = key if bare else _plain(key)
            if isinstance(inner, (Mapping, list)) and inner:
                yield f"{name}:"
                yield from (f"  {line}" for line in _lines(inner))
            else:
                yield f"{name}: {_plain(inner)}"
    else:
        for item in value:
            if isinstance(item, (Mapping, list)) and item:
                first, *rest = _lines(item)
                yield f"- {first}"
                yield from (f"  {line}" for line in rest)
            else:
                yield f"- {_plain(item)}"


def _plain(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return UNPRINTED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
