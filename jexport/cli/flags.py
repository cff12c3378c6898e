"""Options that several commands have, in the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import click

Decorator: TypeAlias = Callable[[Any], Any]

PATH = click.Path(path_type=Path)

ARTIFACT_ONLY = "Only the artifact's path, on stdout."


def together(*options: Decorator) -> Decorator:
    """One decorator of several options, shown in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def path(*names: str, metavar: str, help: str, **settings: Any) -> Decorator:
    """An option that takes a file or a folder.

    Args:
        names: as click.option takes them.
        metavar: DIR, FILE or another noun.
        help: what it is.
        settings: what else click.option takes.
    """
    return click.option(*names, type=PATH, metavar=metavar, help=help, **settings)


def quiet(help: str) -> Decorator:
    """--quiet, for a command that then prints nothing but what `help` says."""
    return click.option("--quiet", is_flag=True, help=help)


def as_json(help: str) -> Decorator:
    """--json, for a command whose result may be JSON on stdout."""
    return click.option("--json", "as_json", is_flag=True, help=help)


use = click.option(
    "--use",
    metavar="USE",
    help="query, document, or another prompt of a model without adapters: the default prompt.",
)

replace = click.option(
    "--replace",
    is_flag=True,
    help="The name's checkpoint is another one now, and that is meant: `latest` moves to it.",
)

progress = together(
    quiet(ARTIFACT_ONLY),
    click.option("--json", "json_lines", is_flag=True, help="Progress as JSON lines on stderr."),
)

plain_http = click.option(
    "--plain-http", is_flag=True, help="An OCI registry without TLS that is not on this machine."
)

transfers = together(
    click.option(
        "--threads",
        type=click.IntRange(min=1, max=64),
        default=4,
        metavar="N",
        help="Transfers at a time.",
    ),
    plain_http,
)

accept_licence = click.option(
    "--accept-licence",
    is_flag=True,
    help="Publish a non-commercial model where everybody can read it.",
)
