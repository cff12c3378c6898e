"""`jexport cache ls`, `jexport cache gc` and `jexport cache verify`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jexport.cli import Nearest, console, flags
from jexport.errors import CacheError

if TYPE_CHECKING:
    from jexport.cache.entries import Entry

MIB = 1 << 20
HOUR_S = 3600


@click.group(cls=Nearest)
def cache() -> None:
    """What is kept so that it need not be made or fetched again.

    Two caches: the results of finished stages, in the folder of artifacts (--out DIR), and, with
    --pulled, the releases that open_artifact("oci://...") pulled, in the user's cache folder
    ($JEXPORT_CACHE) up to $JEXPORT_CACHE_GIB (32). Both stay below their limit by themselves: what
    was used least recently goes, and never what is in use.
    """


_which = flags.together(
    flags.path(
        "--out",
        metavar="DIR",
        help="Where artifacts are; the cache is DIR/.cache. Default: artifacts",
    ),
    flags.path(
        "--cache",
        "folder",
        metavar="DIR",
        help="The cache itself, where it is elsewhere.",
    ),
    click.option(
        "--pulled",
        is_flag=True,
        help="The pulled releases in the user's cache folder instead.",
    ),
)
"""The options that say which cache is meant; `_chosen` takes what they gave."""


def _chosen(out: Path | None, folder: Path | None, is_pulled: bool) -> tuple[Any, Path]:
    """The module that knows a cache (entries or pulled: the same words), and where it is."""
    from jexport.cache import entries
    from jexport.cache.stages import FOLDER
    from jexport.publishing import pull_cache as pulled

    if is_pulled:
        if out is not None or folder is not None:
            raise click.UsageError("--pulled is the user's cache folder; $JEXPORT_CACHE moves it")
        return pulled, pulled.root()
    return entries, folder if folder is not None else (out or Path("artifacts")) / FOLDER


@cache.command("ls")
@_which
@flags.as_json("As a JSON list.")
def list_(out: Path | None, folder: Path | None, pulled: bool, as_json: bool) -> None:
    """List what is kept, the least recently used first."""
    keeper, root = _chosen(out, folder, pulled)
    entries: list[Entry] = keeper.listed(root)
    if as_json:
        rows = [
            {
                "name": one.name,
                "stage": _stage(one, pulled),
                "about": one.about,
                "size_bytes": one.size_bytes,
                "used": round(one.used_s),
            }
            for one in entries
        ]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for one in entries:
        hours = (time.time() - one.used_s) / HOUR_S
        digits = one.name.rpartition("-")[2][:12]
        click.echo(
            f"{_stage(one, pulled):<9} {digits}  {one.size_bytes / MIB:>9,.1f} MiB  "
            f"used {hours:,.1f} h ago  {one.about}"
        )
    total = sum(one.size_bytes for one in entries) / MIB
    console.say(f"{len(entries)} entries, {total:,.1f} MiB, in {root}")


@cache.command()
@_which
@click.option(
    "--limit",
    "limit_gib",
    type=click.FloatRange(min=0),
    metavar="GIB",
    help="How much may stay. Default: 32, or $JEXPORT_CACHE_GIB with --pulled; 0 removes "
    "all that is not in use.",
)
def gc(out: Path | None, folder: Path | None, pulled: bool, limit_gib: float | None) -> None:
    """Remove what was used least recently until the rest fits, and what killed builds left.

    With --pulled also what was fetched of releases whose pull was stopped.
    """
    from jexport.cache.stages import LIMIT_GIB

    keeper, root = _chosen(out, folder, pulled)
    if limit_gib is not None:
        limit_bytes = int(limit_gib * (1 << 30))
    else:
        limit_bytes = keeper.limit_bytes() if pulled else LIMIT_GIB << 30
    try:
        removed: list[Entry] = keeper.shrink(root, limit_bytes)
        if pulled:
            keeper.clean(root)
    except OSError as error:
        raise CacheError(
            f"cannot remove entries of the cache {root}",
            evidence=str(error),
            fix="look at the folder's owner and permissions",
        ) from error
    size = sum(one.size_bytes for one in removed) / MIB
    click.echo(f"{len(removed)} entries removed, {size:,.1f} MiB")


@cache.command()
@_which
@click.option("--remove", is_flag=True, help="Remove damaged entries.")
def verify(out: Path | None, folder: Path | None, pulled: bool, remove: bool) -> None:
    """Read every entry and compare each file with its digest."""
    keeper, root = _chosen(out, folder, pulled)
    damaged, count = [], 0
    for name, problem in keeper.verify(root):
        count += 1
        if problem and not (remove and keeper.remove_damaged(root, name)):
            damaged.append(f"{name}: {problem}")
        elif problem:
            console.say(f"removed {name}: {problem}")
    if damaged:
        again = "opening it pulls it" if pulled else "a build makes them"
        words = "--pulled --remove" if pulled else "--remove"
        raise CacheError(
            f"{len(damaged)} of {count} entries of the cache are damaged",
            evidence="\n".join(damaged),
            fix=f"jexport cache verify {words}; {again} again by itself",
        )
    click.echo(f"{count} entries, all as they were kept")


def _stage(one: Entry, pulled: bool) -> str:
    return "pulled" if pulled else one.name.partition("-")[0]


COMMANDS = {"cache": cache}
