"""Many builds on a terminal: a table that is drawn over itself, or plain lines; then what became.

stdout gets one path a built artifact; the table, the plan's notes and failures go to stderr.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from jexport.cli import console
from jexport.errors import JexportError

if TYPE_CHECKING:
    from jexport.many import Outcome, Planned
    from jexport.matrix import Job
    from jexport.run import Event

GIB = 1 << 30
REDRAW_S = 0.1
BUG = 1


class Board:
    """What every job is at. Call it with each job's events."""

    def __init__(self, jobs: Sequence[Job], *, quiet: bool, json_lines: bool) -> None:
        self._quiet, self._json = quiet, json_lines
        self._live = sys.stderr.isatty() and not quiet and not json_lines
        self._said = dict.fromkeys(jobs, "waiting")
        self._begin: dict[Job, float] = {}
        self._took: dict[Job, float] = {}
        self._width = max((len(job.key) for job in jobs), default=0)
        self._drawn, self._last = 0, 0.0
        if self._live:
            self._draw()

    def __call__(self, job: Job, event: Event) -> None:
        """Show what happened to a job."""
        console.heed_ctrl_c()
        if self._json and not self._quiet:
            line = {"time": round(time.time(), 3), "job": job.key, **asdict(event)}
            click.echo(json.dumps(line, ensure_ascii=False), err=True)
        news = self._words(job, event)
        if news:
            self._said[job] = news
        if self._live:
            if event.kind != "progress" or time.monotonic() - self._last > REDRAW_S:
                self._draw()
        elif news and event.kind != "progress" and not (self._quiet or self._json):
            click.echo(f"{job.key:<{self._width}}  {news}", err=True)

    def _words(self, job: Job, event: Event) -> str:
        if event.kind == "begin":
            self._begin[job] = time.monotonic()
            return "begun"
        if event.kind == "end":
            self._took[job] = event.seconds
            return event.text
        if event.kind == "progress" and event.total:
            return f"{event.stage} {console.bar(event.done, event.total)}"
        if event.kind == "done":
            return f"{event.stage} {event.seconds:.1f} s  {event.text}".rstrip()
        return f"{event.stage} {event.text}".rstrip() if event.kind == "note" else ""

    def _draw(self) -> None:
        columns, rows = shutil.get_terminal_size()
        lines = []
        for job, said in self._said.items():
            took = self._took.get(job)
            if took is None and job in self._begin:
                took = time.monotonic() - self._begin[job]
            clock = f"{took:7,.0f} s" if took is not None else " " * 9
            lines.append(f"{job.key:<{self._width}} {clock}  {said}"[: columns - 1])
        over = len(lines) - (rows - 2)
        if over > 0:  # a table taller than the terminal cannot be drawn over: the rest is counted
            ended = [one for one, job in zip(lines, self._said, strict=True) if job in self._took]
            kept = [one for one in lines if one not in ended[: over + 1]]
            lines = [f"({len(lines) - len(kept)} more are done)", *kept][: rows - 2]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        text = up + "".join(f"\r\x1b[K{line}\n" for line in lines)
        if len(lines) < self._drawn:
            text += "\x1b[J"
        click.echo(text, nl=False, err=True)
        self._drawn, self._last = len(lines), time.monotonic()


def show_plan(found: Sequence[Planned], *, as_json: bool) -> None:
    """What is built, what is cached, and what the rest needs, on stdout."""
    if as_json:
        rows = [
            {
                "job": one.job.key, **asdict(one.job),
                "built": str(one.built) if one.built else None, "cached": list(one.cached),
                "need": asdict(one.need) if one.need else None,
            }
            for one in found
        ]  # fmt: skip
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    width = max((len(one.job.key) for one in found), default=0)
    for one in found:
        click.echo(f"{one.job.key:<{width}}  {_state(one)}")
    missing = [one for one in found if one.built is None]
    needs = [one.need for one in missing if one.need is not None]
    click.echo(f"\n{len(found)} jobs, {len(found) - len(missing)} built, {len(missing)} to build")
    if needs:
        click.echo(
            f"about {_minutes(sum(one.seconds for one in needs))} one after another, "
            f"{max(one.memory_bytes for one in needs) / GIB:.1f} GiB of memory at most, "
            f"{sum(one.disk_bytes for one in needs) / GIB:.1f} GiB of disk with the cache"
        )
        console.say(
            "estimated from the checkpoint's weights and the rates of the full-size build in "
            "BENCHMARKS.md (two cores); exports that jobs share are counted for each"
        )
    elif missing:
        console.say("no estimate: the checkpoint is not in a folder here")


def _state(one: Planned) -> str:
    if one.built is not None:
        return f"built: {one.built}"
    cached = f"cached: {', '.join(one.cached)}" if one.cached else "nothing cached"
    if one.need is None:
        return cached
    return (
        f"{cached}; about {_minutes(one.need.seconds)}, {one.need.memory_bytes / GIB:.1f} GiB of "
        f"memory, {one.need.disk_bytes / GIB:.1f} GiB of disk"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def report(outcomes: Sequence[Outcome]) -> int:
    """Paths on stdout, failures on stderr; the exit code: the first failure's, else 0."""
    failed = [one for one in outcomes if one.error is not None]
    for one in outcomes:
        if one.artifact is not None:
            click.echo(one.artifact.path)
    for one in failed:
        console.say(f"\n{one.job.key}:")
        _show(one.error)
    seconds = sum(one.seconds for one in outcomes)
    console.say(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} built"
        + (f", {len(failed)} failed" if failed else "")
        + f"; {_minutes(seconds)} of work"
    )
    if not failed:
        return 0
    first: Any = failed[0].error
    return first.exit_code if isinstance(first, JexportError) else BUG


def _show(error: Exception | None) -> None:
    if isinstance(error, JexportError):
        console.report_error(error)
    elif error is not None:
        console.say("".join(traceback.format_exception(error)).rstrip())
