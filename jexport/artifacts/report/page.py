"""report.html of an INT8 artifact, by page.html.j2.

The page holds its own style and its own SVG: no network. It is well-formed XML too, so a test can
read it. What a file lacks is left out, or shown as a dash.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jexport.artifacts.report import findings, plots, reading, sections
from jexport.artifacts.report.reading import Facts

if TYPE_CHECKING:
    import jinja2

TEMPLATE = "page.html.j2"


def render(quantization: Facts, parity: Facts, manifest: Facts) -> str:
    """One self-contained HTML page.

    Args:
        quantization: quantization.json.
        parity: parity.json.
        manifest: manifest.json or what of it is known so far; `speed`, a list of {"precision",
            "texts_per_second"}, is shown where there is one.

    Returns:
        HTML that is XML too.
    """
    template = _environment().get_template(TEMPLATE)
    return template.render(quantization=quantization, parity=parity, manifest=manifest)


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        findings=findings, plots=plots, sections=sections, quality=sections.QUALITY
    )
    environment.filters.update(
        listed=reading.listed,
        mapping=reading.mapping,
        percent=reading.percent,
        rows=reading.rows,
    )
    environment.tests["numeric"] = _is_numeric
    return environment


def _printable(value: object) -> object:
    """What autoescape does not do: control characters and lone surrogates, which XML lacks."""
    return value if hasattr(value, "__html__") else reading.printable(str(value))


def _is_numeric(cell: str) -> bool:
    """Whether the digits of a cell are to stand below each other."""
    return re.fullmatch(r"[\d+-][\d.,e+ %-]*", cell) is not None
