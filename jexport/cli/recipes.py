"""`jexport recipe`."""

from __future__ import annotations

import json

import click

from jexport.cli import Nearest, flags


@click.group("recipe", cls=Nearest)
def recipe_group() -> None:
    """Show recipes: what a build of a known model needs to know."""


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
