"""`jexport cache ls`, `jexport cache gc` and `jexport cache verify`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jexport.cli import Nearest, console
from jexport.errors import CacheError

if TYPE_CHECKING:
    from jexport.entries import Entry

MIB = 1 << 20
HOUR_S = 3600


@click.group(cls=Nearest)
def cache() -> None:
    """What finished stages left, so that later builds need not do them again."""


def _where(command: click.Command) -> click.Command:
    """The options that say which cache is meant."""
    command.params[:0] = [
        click.Option(["--out"], type=click.Path(path_type=Path), default=Path("artifacts"),
                     metavar="DIR", help="Where artifacts are; the cache is DIR/.cache."),
        click.Option(["--cache", "folder"], type=click.Path(path_type=Path), metavar="DIR",
                     help="The cache itself, where it is elsewhere."),
    ]  # fmt: skip
    return command


@_where
@cache.command("ls")
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
def list_(out: Path, folder: Path | None, as_json: bool) -> None:
    """List what is kept, the least recently used first."""
    from jexport import entries

    found = entries.listed(_root(out, folder))
    if as_json:
        rows = [
            {"name": one.name, "stage": _stage(one), "about": one.about,
             "size_bytes": one.size_bytes, "used": round(one.used_s)}
            for one in found
        ]  # fmt: skip
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for one in found:
        hours = (time.time() - one.used_s) / HOUR_S
        digits = one.name.rpartition("-")[2][:12]
        click.echo(
            f"{_stage(one):<9} {digits}  {one.size_bytes / MIB:>9,.1f} MiB  "
            f"used {hours:,.1f} h ago  {one.about}"
        )
    total = sum(one.size_bytes for one in found) / MIB
    console.say(f"{len(found)} entries, {total:,.1f} MiB, in {_root(out, folder)}")


@_where
@cache.command()
@click.option("--limit", "limit_gib", type=click.FloatRange(min=0), metavar="GIB",
              help="How much may stay. Default: 32; 0 removes all that is not in use.")  # fmt: skip
def gc(out: Path, folder: Path | None, limit_gib: float | None) -> None:
    """Remove what was used least recently until the rest fits, and what killed builds left."""
    from jexport import entries
    from jexport.cache import LIMIT_GIB

    limit = LIMIT_GIB if limit_gib is None else limit_gib
    root = _root(out, folder)
    try:
        removed = entries.shrink(root, int(limit * (1 << 30)))
    except OSError as error:
        raise CacheError(
            f"cannot remove entries of the cache {root}",
            evidence=str(error),
            fix="look at the folder's owner and permissions",
        ) from error
    size = sum(one.size_bytes for one in removed) / MIB
    click.echo(f"{len(removed)} entries removed, {size:,.1f} MiB")


@_where
@cache.command()
@click.option("--remove", is_flag=True, help="Remove damaged entries.")
def verify(out: Path, folder: Path | None, remove: bool) -> None:
    """Read every entry and compare each file with its digest."""
    from jexport import entries

    root = _root(out, folder)
    damaged, count = [], 0
    for name, problem in entries.verify(root):
        count += 1
        if problem and not (remove and entries.remove_damaged(root, name)):
            damaged.append(f"{name}: {problem}")
        elif problem:
            console.say(f"removed {name}: {problem}")
    if damaged:
        raise CacheError(
            f"{len(damaged)} of {count} entries of the cache are damaged",
            evidence="\n".join(damaged),
            fix="jexport cache verify --remove; a build makes them again by itself",
        )
    click.echo(f"{count} entries, all as they were kept")


def _root(out: Path, folder: Path | None) -> Path:
    from jexport.cache import FOLDER

    return folder if folder is not None else out / FOLDER


def _stage(one: Entry) -> str:
    return one.name.partition("-")[0]


COMMANDS = {"cache": cache}
