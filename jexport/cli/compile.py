"""`jexport compile`."""

from __future__ import annotations

from pathlib import Path

import click

from jexport.cli import console


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where artifacts go. Default: beside the portable one.")  # fmt: skip
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep TensorRT's timings there; later builds are faster.",
)
@click.option("--allow-slower", is_flag=True, help="int8: keep it even when fp16 is as fast here.")
@click.option("--quiet", is_flag=True, help="Only the artifact's path, on stdout.")
@click.option("--json", "json_lines", is_flag=True, help="Progress as JSON lines on stderr.")
def compile_(
    artifact: Path,
    out: Path | None,
    timing_cache: Path | None,
    allow_slower: bool,
    quiet: bool,
    json_lines: bool,
) -> None:
    """Build the engine of a portable artifact on this machine, and validate it here.

    ARTIFACT is what `jexport build --until compile` made. Needs neither the checkpoint nor torch.
    The artifact's path is the last line on stdout.
    """
    listen = console.listener(quiet=quiet, json_lines=json_lines)
    from jexport import completion

    changes = {} if timing_cache is None else {"timing_cache": str(timing_cache)}
    made = completion.complete(
        artifact, out=out, allow_slower=allow_slower, listen=listen, **changes
    )
    click.echo(made.path)


COMMANDS = {"compile": compile_}
