"""HTML that is well-formed XML too, beside a template: text that is escaped. Knows no report."""

from __future__ import annotations

import html
import re

from jexport.artifacts.report.reading import printable


class Markup(str):
    """HTML as it stands; `escape`, and a template, escape every other text."""

    def __html__(self) -> str:
        """Itself, to a template."""
        return self


def escape(words: object) -> str:
    """Words as HTML shows them; control characters and lone surrogates become a replacement.

    Args:
        words: shown by `str`; Markup stays as it is.

    Returns:
        HTML that is XML too.
    """
    return words if isinstance(words, Markup) else html.escape(printable(str(words)))


def name(words: object) -> Markup:
    """A graph's name, which may be broken after each slash, dot and underscore.

    Args:
        words: the name.

    Returns:
        HTML, escaped.
    """
    return Markup(re.sub(r"([/._])", r"\1<wbr/>", escape(words)))
