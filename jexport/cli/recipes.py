"""`jexport recipe`."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import click

from jexport.cli import Nearest, flags

if TYPE_CHECKING:
    from jexport.recipe import Recipe

COLUMNS = 100
MILLION, BILLION = 10**6, 10**9


@click.group("recipe", cls=Nearest)
def recipe_group() -> None:
    """Show recipes: what a build of a known model needs to know."""


@recipe_group.command("list")
@flags.as_json("As a JSON list.")
def list_(as_json: bool) -> None:
    """List the shipped recipes: size, dimension, languages, licence; targets; tasks or uses.

    A use is a prompt by its name, such as query and document.
    """
    from jexport import recipe

    rows = [_row(recipe.read(name)) for name in sorted(recipe.names(), key=str.lower)]
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    click.echo(f"{'name':<39}{'size':>7}{'dim':>6}  {'languages':<26}licence")
    for row in rows:
        languages = _shortened(row["languages"])
        click.echo(
            f"{row['name']:<39}{_size(row['parameters']):>7}{row['dimension'] or '':>6}  "
            f"{languages:<26}{row['licence'] or 'see its card'}"
        )
        names = [*(task for task in row["tasks"] if task != "none"), *row["uses"]]
        line = f"{', '.join(row['targets'])}{'; ' if names else ''}{', '.join(names)}"
        click.echo(textwrap.fill(line, COLUMNS, initial_indent="  ", subsequent_indent="    "))


def _row(recipe: Recipe) -> dict[str, Any]:
    """What the list says of a recipe."""
    return {
        "name": recipe.name,
        "model": recipe.load.model,
        "parameters": recipe.model.parameters,
        "dimension": recipe.model.dimension,
        "languages": list(recipe.model.languages),
        "licence": recipe.load.licence,
        "max_tokens": recipe.load.max_tokens,
        "tasks": list(recipe.tasks),
        "uses": list(recipe.uses),
        "targets": list(recipe.targets),
        "precisions": list(recipe.precisions),
    }


def _size(parameters: int) -> str:
    """A number of weights as model cards say it: '22.7 M', '568 M', '4.0 B'; '' for 0."""
    if not parameters:
        return ""
    unit, name = (BILLION, "B") if parameters >= BILLION else (MILLION, "M")
    number = parameters / unit
    return f"{number:.0f} {name}" if number >= 100 else f"{number:.1f} {name}"


def _shortened(languages: list[str]) -> str:
    """As many codes as fit, and how many there are."""
    text = ", ".join(languages)
    return text if len(text) <= 24 else f"{', '.join(languages[:3])}, ... ({len(languages)})"


@recipe_group.command("show")
@click.argument("name", metavar="NAME|FILE", required=False)
@flags.as_json("As JSON.")
def show(name: str | None, as_json: bool) -> None:
    """Show a recipe with every default resolved; without a name, list the shipped ones."""
    from jexport import recipe

    if name is None:
        for known in recipe.names():
            click.echo(known)
        return
    resolved = recipe.read(name).resolved()
    if as_json:
        click.echo(json.dumps(resolved, indent=2, ensure_ascii=False))
        return
    for key, value in _flat(resolved, ""):
        click.echo(f"{key:<46}{json.dumps(value, ensure_ascii=False)}")


def _flat(table: object, prefix: str) -> list[tuple[str, object]]:
    if not isinstance(table, dict) or not table:
        return [(prefix, table)]
    rows = []
    for key, value in table.items():
        shown = f'"{key}"' if "." in key else key
        rows += _flat(value, f"{prefix}.{shown}" if prefix else shown)
    return rows


COMMANDS = {"recipe": recipe_group}
