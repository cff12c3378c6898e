"""`jexport doctor`."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from typing import Any

import click

from jexport.cli import flags
from jexport.errors import JexportError


@click.command()
@flags.as_json("As JSON.")
def doctor(as_json: bool) -> None:
    """Say what is installed, what can be built and run here, and the remedy for what cannot."""
    from jexport import targets
    from jexport.building import cache_keys

    versions = cache_keys.tools()
    rows = [_target_row(targets.load(name)) for name in targets.names()]
    if as_json:
        content = {"machine": _machine(), "tools": versions, "targets": rows}
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for key, value in _machine().items():
        click.echo(f"{key:<18}{value}")
    for name in ("jexport", *cache_keys.TOOLS):
        click.echo(f"{name:<18}{versions.get(name, 'not installed')}")
    click.echo("")
    for row in rows:
        can = {True: "yes", False: "no"}
        click.echo(
            f"target {row['target']:<11}build: {can[row['build']]:<5}run: {can[row['run']]:<5}"
            f"{', '.join(row['precisions'])}"
        )
        for remedy in row["remedies"]:
            click.echo(f"  fix: {remedy}")


def _target_row(target: Any) -> dict[str, Any]:
    absent = {
        kind: [name for name in needs if importlib.util.find_spec(name) is None]
        for kind, needs in (("build", target.requirements.build), ("run", target.requirements.run))
    }
    extras = {"build": "build", "run": target.requirements.extra}
    lacking = []
    try:
        target.ready()
    except JexportError as error:
        lacking = [f"to build here: {error.what}; {error.fix}"]
    return {
        "target": target.name,
        "precisions": list(target.precisions),
        "build": not absent["build"] and not lacking,
        "run": not absent["run"],
        "remedies": [
            f'to {kind}: pip install "jexport[{extras[kind]}]" (missing: {", ".join(names)})'
            for kind, names in absent.items()
            if names
        ]
        + lacking,
    }


def _machine() -> dict[str, str]:
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # What this process may use, where the system tells (Linux).
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(cores),
        "memory": f"{memory_bytes / 2**30:.1f} GiB",
    }


COMMANDS = {"doctor": doctor}
