"""HTML that is well-formed XML too: escaped text, tables, figures. Knows no report."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from jexport.artifacts.report.reading import printable

NARROW = 3
"""Columns that a phone shows beside each other."""


class Markup(str):
    """HTML as it stands; `escape` escapes every other text."""


def escape(words: object) -> str:
    """Words as HTML shows them; control characters and lone surrogates become a replacement."""
    return words if isinstance(words, Markup) else html.escape(printable(str(words)))


def name(words: object) -> Markup:
    """A graph's name, which may be broken after each slash, dot and underscore."""
    return Markup(re.sub(r"([/._])", r"\1<wbr/>", escape(words)))


def table(caption: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column heads its rows.

    It scrolls sideways when it is too wide; on a phone one of more than NARROW columns shows each
    row as a block, each value behind the name of its column.
    """
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(map(_cell, heads[1:], cells))}</tr>\n'
        for first, *cells in lines
    )
    note = f'<p class="note">{escape(caption)}</p>' if caption else ""
    kind = ' class="many"' if len(heads) > NARROW else ""
    return (
        f'{note}<div class="wide" tabindex="0" role="region" '
        f'aria-label="{escape(caption or heads[0])}">'
        f"<table{kind}><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _cell(head: str, words: str) -> str:
    numeric = ' class="n"' if re.fullmatch(r"[\d+-][\d.,e+ %-]*", words) else ""
    return f'<td{numeric} data-head="{escape(head)}">{escape(words)}</td>'


def folded(summary: str, content: str) -> str:
    """Content that is shown when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def figure(caption: str, content: str) -> str:
    """What is drawn, below what it says."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>\n"


def figures(content: str) -> str:
    """Figures beside each other where there is room; '' without any."""
    return f'<div class="figures">{content}</div>' if content else ""
