"""Many builds on a terminal: a table that is drawn over itself, or plain lines; then what became.

stdout gets one path a built artifact; the table, the plan's notes and failures go to stderr.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jexport.cli import console, table
from jexport.cli.table import Table
from jexport.errors import JexportError

if TYPE_CHECKING:
    from jexport.jobs.local import PlannedJob
    from jexport.jobs.matrix import Job
    from jexport.jobs.result import JobResult
    from jexport.workspace.run import Event

GIB = 1 << 30
REDRAW_S = 0.1
BUG = 1
WAITING, FAILED = "waiting", "failed: "
CLOCK, STATE, NARROWEST, GAP = 9, 18, 9, ".."
"""Columns: of the seconds (left out where there is no room), of what a job is at (at least, with
two blanks before it), of a key at least."""

BELOW = 2
"""Rows that the table leaves free: the cursor's, and one that shows what was before."""


class Board:
    """What every job is at. Call it with each job's events, inside a `with` block."""

    def __init__(self, jobs: Sequence[Job], *, quiet: bool, json_lines: bool) -> None:
        self._quiet, self._json = quiet, json_lines
        self._status = dict.fromkeys(jobs, WAITING)
        self._begin: dict[Job, float] = {}
        self._took: dict[Job, float] = {}
        self._failed: set[Job] = set()
        self._width = max((len(job.key) for job in jobs), default=0)
        self._last = 0.0
        self._table: Table | None = None

    def __enter__(self) -> Board:
        if not self._quiet and not self._json and table.can_be_shown():
            self._table = Table(self._lines)
        return self

    def __exit__(self, *_: object) -> None:
        if self._table is None:
            return
        for job in self._running():  # of a build that was interrupted
            self._status[job] = f"stopped at: {self._status[job]}"
        self._table.close()

    def __call__(self, job: Job, event: Event) -> None:
        """Show what happened to a job."""
        console.check_ctrl_c()
        if self._json and not self._quiet:
            line = {"time": round(time.time(), 3), "job": job.key, **asdict(event)}
            click.echo(json.dumps(line, ensure_ascii=False), err=True)
        news = self._words(job, event)
        if self._table is not None:
            self._status[job] = self._now(event) or news or self._status[job]
            if event.kind != "progress" or time.monotonic() - self._last > REDRAW_S:
                self._last = time.monotonic()
                self._table.refresh()
        elif news and event.kind != "progress" and not (self._quiet or self._json):
            click.echo(f"{job.key:<{self._width}}  {news}", err=True)

    def _words(self, job: Job, event: Event) -> str:
        if event.kind == "begin":
            self._begin[job] = time.monotonic()
            return "begun"
        if event.kind == "end":
            self._took[job] = event.seconds
            if event.text.startswith(FAILED):
                self._failed.add(job)
            return event.text
        if event.kind == "progress" and event.total:
            return f"{event.stage} {console.bar(event.done, event.total)}"
        if event.kind == "done":
            return f"{event.stage} {event.seconds:.1f} s  {event.text}".rstrip()
        return f"{event.stage} {event.text}".rstrip() if event.kind == "note" else ""

    def _now(self, event: Event) -> str:
        """What stands in the table where that is not what goes into a log."""
        if event.kind == "start":
            return f"{event.stage} ..."
        if event.kind == "end" and not event.text.startswith(FAILED):
            return f"built {Path(event.text).name}"  # its path is on stdout at the end
        return ""

    def _running(self) -> list[Job]:
        return [job for job in self._begin if job not in self._took]

    def _lines(self, columns: int, rows: int) -> list[str]:
        """A line a job; where there are more than rows, those that matter now and a count."""
        shown = list(self._status)
        hidden: list[Job] = []
        height = max(rows - BELOW, min(rows - 1, 1)) if rows else len(shown)
        if not height:
            return []
        if len(shown) > height:
            kept = set(sorted(shown, key=self._rank)[: height - 1])
            hidden = [job for job in shown if job not in kept]
            shown = [job for job in shown if job in kept]
        clock = CLOCK if self._width + CLOCK + STATE <= columns else 0
        width = min(self._width, max(columns - clock - STATE, NARROWEST))
        lines = [self._line(job, width, clock) for job in shown]
        if hidden:
            built = sum(job in self._took and job not in self._failed for job in hidden)
            counts = {
                "built": built,
                "failed": len(self._failed.intersection(hidden)),
                "running": len(set(self._running()).intersection(hidden)),
                WAITING: sum(job not in self._begin for job in hidden),
            }
            summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            lines.append(f"and {summary}")
        return lines

    def _rank(self, job: Job) -> int:
        """What matters first: running, failed, next to run, built."""
        if job in self._took:
            return 1 if job in self._failed else 3
        return 0 if job in self._begin else 2

    def _line(self, job: Job, width: int, clock: int) -> str:
        took = self._took.get(job)
        if took is None and job in self._begin:
            took = time.monotonic() - self._begin[job]
        seconds = f"{took:,.0f} s" if took is not None and clock else ""
        return f"{_short(job.key, width):<{width}}{seconds:>{clock}}  {self._status[job]}"


def _short(key: str, width: int) -> str:
    """A key without its middle, where it is too long: more of its begin, which is the task."""
    if len(key) <= width:
        return key
    head = (width - len(GAP)) * 3 // 5
    return f"{key[:head]}{GAP}{key[len(key) - (width - len(GAP) - head) :]}"


def show_plan(planned: Sequence[PlannedJob], *, as_json: bool) -> None:
    """What is built, what is cached, and what the rest needs, on stdout."""
    if as_json:
        rows = [
            {
                "job": one.job.key,
                **asdict(one.job),
                "built": str(one.built) if one.built else None,
                "cached": list(one.cached),
                "need": asdict(one.need) if one.need else None,
            }
            for one in planned
        ]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    width = max((len(one.job.key) for one in planned), default=0)
    for one in planned:
        click.echo(f"{one.job.key:<{width}}  {_state(one)}")
    missing = [one for one in planned if one.built is None]
    needs = [one.need for one in missing if one.need is not None]
    click.echo(
        f"\n{len(planned)} jobs, {len(planned) - len(missing)} built, {len(missing)} to build"
    )
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


def _state(one: PlannedJob) -> str:
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


def report(outcomes: Sequence[JobResult]) -> int:
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
