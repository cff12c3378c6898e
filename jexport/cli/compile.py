"""`jexport compile`."""

from __future__ import annotations

from pathlib import Path

import click

from jexport.cli import console, flags


@click.command("compile")
@click.argument("artifact", type=flags.PATH)
@flags.path(
    "--out",
    metavar="DIR",
    help="Where artifacts go. Default: beside the portable one.",
)
@flags.path(
    "--timing-cache",
    metavar="DIR",
    help="Keep TensorRT's timings there; later builds are faster.",
)
@click.option(
    "--weight-stripped", is_flag=True, help="Keep an engine without weights too, for --refit-from."
)
@flags.path(
    "--refit-from",
    metavar="ARTIFACT",
    help="Give that task's engine these weights instead of building one.",
)
@flags.path(
    "--cache",
    "cache_folder",
    metavar="DIR",
    help="Where the built engine is kept. Default: OUT/.cache",
)
@click.option("--no-cache", is_flag=True, help="Build the engine in any case, and keep none.")
@click.option("--allow-slower", is_flag=True, help="int8: keep it even when fp16 is as fast here.")
@flags.replace
@flags.progress
def compile_(
    artifact: Path,
    out: Path | None,
    timing_cache: Path | None,
    weight_stripped: bool,
    refit_from: Path | None,
    cache_folder: Path | None,
    no_cache: bool,
    allow_slower: bool,
    replace: bool,
    quiet: bool,
    json_lines: bool,
) -> None:
    """Build the engine of a portable artifact on this machine, and validate it here.

    ARTIFACT is what `jexport build --until compile` made. Needs neither the checkpoint nor torch.
    The artifact's path is the last line on stdout.
    """
    listen = console.listener(quiet=quiet, json_lines=json_lines)
    from jexport.building import portable
    from jexport.cache.stages import Cache

    given = {
        "timing_cache": str(timing_cache) if timing_cache else None,
        "weight_stripped": weight_stripped or None,
        "refit_from": str(refit_from) if refit_from else None,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    cache = None  # beside the artifacts, wherever those go
    if no_cache or cache_folder:
        cache = Cache(root=None if no_cache else cache_folder)
    compiled = portable.compile_portable(
        artifact,
        out=out,
        cache=cache,
        allow_slower=allow_slower,
        replace=replace,
        listen=listen,
        **changes,
    )
    click.echo(compiled.path)


COMMANDS = {"compile": compile_}
