"""`jexport serve-with`."""

from __future__ import annotations

from pathlib import Path

import click

from jexport.cli import console, flags
from jexport.serving.servers.lines import HOST, PORT, Served


@click.command("serve-with")
@click.argument("engine", metavar="ENGINE")
@click.argument("artifact", type=flags.PATH)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=PORT,
    show_default=True,
    help="Where a server is to listen.",
)
@click.option("--host", default=HOST, show_default=True, help="0.0.0.0 for every interface.")
@click.option(
    "--version",
    "installed",
    multiple=True,
    metavar="PACKAGE==VERSION",
    help="A package where it will run, to be checked.",
)
@flags.quiet("Only the line, on stdout.")
def serve_with(
    engine: str, artifact: Path, port: int, host: str, installed: tuple[str, ...], quiet: bool
) -> None:
    """Print the line that loads an artifact with another engine.

    The artifact is checked first, which most engines do not do; nothing is started.

    jexport serve-with vllm ARTIFACT

    jexport serve-with sentence-transformers ARTIFACT --version transformers==5.5.4
    """
    from jexport.artifacts import manifest
    from jexport.serving import servers

    content = manifest.verify(artifact).content
    way = servers.way(engine, content)
    for one in installed:
        package, given, version = one.partition("==")
        if not (package and given and version):
            raise click.BadParameter(f"'{one}' is not like vllm==0.32.0", param_hint="--version")
        servers.check_version(engine, content, package.strip(), version.strip())
    if not quiet:
        for note in servers.notes(engine, content):
            console.say(note)
    served = Served(folder=artifact.absolute(), content=content, host=host, port=port)
    click.echo(way.line(served))


COMMANDS = {"serve-with": serve_with}
