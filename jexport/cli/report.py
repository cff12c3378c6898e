"""`jexport report` and `jexport compare`."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jexport.cli import flags
from jexport.errors import ArtifactError

if TYPE_CHECKING:
    from jexport.artifacts.report.compare import Sides

NARROW, WIDEST = 60, 100
"""Columns that are taken to be there, and that are taken where nobody knows."""

QUANTIZATION, PARITY, PAGE = "quantization.json", "parity.json", "report.html"


@click.command()
@click.argument("artifact", type=flags.PATH)
@click.option("--open", "open_page", is_flag=True, help="Open report.html in a browser.")
@flags.as_json("quantization.json and parity.json as JSON.")
def report(artifact: Path, open_page: bool, as_json: bool) -> None:
    """Show what quantization cost an int8 artifact, and where its report.html is."""
    from jexport.artifacts import manifest, store
    from jexport.artifacts.report import text

    content = manifest.read(artifact).content
    quantization = {**_quantization(artifact)}
    if not quantization:
        raise ArtifactError(
            f"{artifact} was not quantized",
            evidence=f"there is no {QUANTIZATION} in it; its precision is {content['precision']}",
            fix="give an int8 artifact (see `jexport list`), or `jexport inspect` this one",
        )
    measured = store.measured(artifact)
    quantization |= {key: measured[key] for key in ("speed", "pair") if key in measured}
    parity, page = _json(artifact, PARITY), artifact / PAGE
    if as_json:
        page_path = str(page) if page.is_file() else None
        summary = {"page": page_path, "quantization": quantization, "parity": parity}
        click.echo(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        click.echo(text.render(quantization, parity, content, width=_columns()))
        if page.is_file():
            click.echo(page)
    if open_page:
        _open(page)


@click.command()
@click.argument("a", type=flags.PATH)
@click.argument("b", type=flags.PATH)
@flags.as_json("As JSON.")
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Show two artifacts side by side; * marks what differs (files are not checked; see verify)."""
    from jexport.artifacts.report import compare as compared

    ours, theirs = _sides(a), _sides(b)
    rows = compared.rows(ours, theirs)
    if as_json:
        listed = [
            {"name": row.name, "a": row.a.value, "b": row.b.value, "differs": row.differs}
            for row in rows
        ]
        content = {
            "a": str(a),
            "b": str(b),
            "same_space": compared.same_space(ours, theirs),
            "same_parity_texts": compared.same_texts(ours, theirs),
            "rows": listed,
        }
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    click.echo(f"A  {a}\nB  {b}\n")
    named = max(len(row.name) for row in rows)
    column = (_columns() - named - 6) // 2
    width = min(max(len(row.a.shown) for row in rows), max(column, 16))
    click.echo(f"  {'':<{named}}  {'A':<{width}}  B")
    for row in rows:
        first = _wrapped(row.a.shown, width)
        second = _wrapped(row.b.shown, max(_columns() - named - 6 - width, 16))
        names = [("*" if row.differs else " ") + f" {row.name}"]
        for name, left, right in zip_longest(names, first, second, fillvalue=""):
            click.echo(f"{name:<{named + 2}}  {left:<{width}}  {right}".rstrip())
    click.echo()
    for line in compared.verdicts(ours, theirs):
        click.echo(textwrap.fill(line, _columns(), subsequent_indent="  "))


def _sides(artifact: Path) -> Sides:
    from jexport.artifacts import manifest, store
    from jexport.artifacts.report.compare import Sides

    content = manifest.read(artifact).content
    content = {**content, "speed": store.measured(artifact).get("speed", ())}
    return Sides(content, _quantization(artifact), _json(artifact, PARITY))


def _columns() -> int:
    """As wide as the terminal, where there is one or COLUMNS is set."""
    return max(shutil.get_terminal_size((WIDEST, 24)).columns, NARROW)


def _wrapped(words: str, width: int) -> list[str]:
    from jexport.artifacts.report.reading import line

    return textwrap.wrap(line(words), width) or [""]


def _quantization(artifact: Path) -> Mapping[str, Any]:
    """quantization.json, {} when there is none; ArtifactError for another format."""
    from jexport.artifacts.report import findings

    content = _json(artifact, QUANTIZATION)
    if content and content.get("format") != findings.FORMAT:
        raise ArtifactError(
            f"{artifact / QUANTIZATION} has format {content.get('format')!r:.40}",
            evidence=f"this jexport reads format {findings.FORMAT}",
            fix="use the jexport that wrote it, or build it again",
        )
    return content


def _json(artifact: Path, name: str) -> Mapping[str, Any]:
    """A JSON object of an artifact, {} when there is no such file."""
    path = artifact / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = "" if isinstance(content, dict) else "it is not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise ArtifactError(
            f"{path} cannot be read",
            evidence=problem,
            fix=f"see `jexport verify {artifact}`; fetch it again, or build it again",
        )
    mapping: Mapping[str, Any] = content
    return mapping


def _open(page: Path) -> None:
    """Show the page in a browser; one line on stderr where there is none."""
    import webbrowser

    if not page.is_file():
        raise ArtifactError(
            "there is no report to open",
            evidence=f"{page} is missing",
            fix="leave out --open, or build the artifact again",
        )
    if not webbrowser.open(page.resolve().as_uri()):
        click.echo(f"no browser here; open {page} yourself", err=True)


COMMANDS = {"report": report, "compare": compare}
