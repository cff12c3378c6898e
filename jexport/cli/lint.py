"""`jexport lint`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from jexport.cli import flags

GRAPH = "model.onnx"


@click.command()
@click.argument("model", type=flags.PATH)
@click.option("--target", required=True, help="The engine it is meant for.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The longest text it will be given.")
@flags.as_json("The diagnostics as JSON.")
def lint(model: Path, target: str, max_tokens: int | None, as_json: bool) -> None:
    """Name what an engine would refuse in an ONNX graph (a .onnx file, or a folder with one)."""
    from jexport import targets
    from jexport.graph import diagnostics

    chosen = targets.load(target)
    if chosen.lint is None:
        able = [name for name in targets.names() if targets.load(name).lint is not None]
        raise click.UsageError(
            f"target '{target}' has no lint; targets that have one: {', '.join(able) or 'none'}"
        )
    path = model / GRAPH if model.is_dir() else model
    problems = chosen.lint(path, max_tokens)
    bad = diagnostics.errors(problems)
    if as_json:
        output = {
            "model": str(path),
            "target": target,
            "errors": len(bad),
            "warnings": len(problems) - len(bad),
            "findings": [dataclasses.asdict(one) for one in problems],
        }
        click.echo(json.dumps(output, indent=2, ensure_ascii=False))
    else:
        for one in problems:
            click.echo(one.to_text())
        click.echo(
            f"{path} for target {target}: errors: {len(bad)}, warnings: {len(problems) - len(bad)}"
        )
    diagnostics.raise_for_errors(problems)


COMMANDS = {"lint": lint}
