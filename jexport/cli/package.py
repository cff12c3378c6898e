"""`jexport package`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from jexport.cli import console, flags
from jexport.serving import layouts


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...", type=flags.PATH)
@click.option(
    "--layout", required=True, type=click.Choice(layouts.names()), help="What the server reads."
)
@flags.path(
    "--out",
    required=True,
    metavar="DIR",
    help="Where the layout goes; versions are added to what is there.",
)
@click.option(
    "--device",
    type=click.Choice(layouts.DEVICES),
    default="auto",
    help="Where it is served. Default: onnx on the CPU, trt on the GPU.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="The largest batch. Default: 8 on a CPU, 32 on a GPU; trt: as its profiles allow.",
)
@click.option(
    "--replace", is_flag=True, help="The next version of a model may be of another checkpoint."
)
@flags.quiet("Only the paths, on stdout.")
def package(
    artifacts: tuple[Path, ...],
    layout: str,
    out: Path,
    device: str,
    max_batch: int | None,
    replace: bool,
    quiet: bool,
) -> None:
    """Lay built artifacts out as a server reads them.

    Each artifact is checked and copied. The folder of each is a line on stdout.
    """
    from jexport.artifacts import manifest
    from jexport.types import Artifact

    opened = [Artifact(path=path, manifest=manifest.read(path)) for path in artifacts]
    wishes = layouts.Wishes(device=device, max_batch=max_batch or 0, replace=replace)
    for one in layouts.load(layout).write(opened, out, wishes):
        if not quiet:
            state = "written" if one.new else "there already"
            console.say(f"{one.name}, version {one.version}: {state}")
            for note in one.notes:
                console.say(f"  {note}")
        click.echo(one.path)


COMMANDS: Mapping[str, Any] = {"package": package}
