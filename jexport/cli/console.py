"""What the terminal shows: stages with their time, a progress bar, errors, JSON log lines.

Everything goes to stderr; stdout belongs to a command's result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from jexport.errors import JexportError
from jexport.workspace.run import Event, Listener, silent

BAR = 24
_json_lines = False
_interrupted = False


def tell_as_json(as_json: bool) -> None:
    """Whether every line on stderr is JSON from now on."""
    global _json_lines
    _json_lines = as_json


def listener(*, quiet: bool, json_lines: bool) -> Listener:
    """How a run tells its events: not at all, as JSON lines, or for people.

    Errors are told in any case, and as JSON when that was asked for.
    """
    tell_as_json(json_lines)
    tell = _as_json if json_lines else _Progress()
    if quiet:
        tell = silent

    def check_and_tell(event: Event) -> None:
        check_ctrl_c()
        tell(event)

    return check_and_tell


@contextlib.contextmanager
def remembered_ctrl_c() -> Iterator[None]:
    """Whatever becomes of Ctrl-C's KeyboardInterrupt on its way, it stays one.

    Code written in C may turn it into an error of its own, or lose it: torch made "could not
    determine the shape of object type 'torch.storage.UntypedStorage'" of one.
    """
    global _interrupted
    _interrupted = False
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler  # not when a shell has it ignored
    ours = ours and threading.current_thread() is threading.main_thread()

    def remember(number: int, frame: object) -> None:
        global _interrupted
        _interrupted = True
        logging.disable()  # what libraries have to say about it helps nobody (torch: 40 lines)
        raise KeyboardInterrupt

    def unraisable(report: sys.UnraisableHookArgs) -> None:
        # It came while an object was being dropped (a zip file's __del__); it is remembered.
        if report.exc_type is not KeyboardInterrupt:
            sys.__unraisablehook__(report)

    if ours:
        signal.signal(signal.SIGINT, remember)
        sys.unraisablehook = unraisable
    try:
        yield
    except Exception as error:
        if _interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
            sys.unraisablehook = sys.__unraisablehook__
            logging.disable(logging.NOTSET)


def check_ctrl_c() -> None:
    """Raise KeyboardInterrupt when Ctrl-C was pressed and somebody kept it to themselves."""
    if _interrupted:
        raise KeyboardInterrupt


def say(text: str) -> None:
    """A line on stderr."""
    if _json_lines:
        click.echo(json.dumps({"kind": "say", "text": text}), err=True)
    else:
        click.echo(text, err=True)


def report_error(error: JexportError) -> None:
    """An error's three parts; as one JSON line where --json asked for them."""
    if _json_lines:
        line = {
            "kind": "error",
            "error": type(error).__name__,
            "exit_code": error.exit_code,
            "what": error.what,
            "evidence": error.evidence,
            "fix": error.fix,
            "notes": list(getattr(error, "__notes__", [])),
        }
        click.echo(json.dumps(line, ensure_ascii=False), err=True)
    else:
        click.echo(f"error: {error}", err=True)


def report_usage(error: click.ClickException) -> None:
    """Wrong words on the command line, as click shows them; as one JSON line for `build --json`."""
    if _json_lines:
        line = {
            "kind": "error",
            "error": "UsageError",
            "exit_code": error.exit_code,
            "what": error.format_message(),
        }
        click.echo(json.dumps(line, ensure_ascii=False), err=True)
    else:
        error.show()


def _as_json(event: Event) -> None:
    line: dict[str, Any] = {"time": round(time.time(), 3), **asdict(event)}
    click.echo(json.dumps(line, ensure_ascii=False), err=True)


def bar(done: int, total: int) -> str:
    """A progress bar with its share: [######------]  50 %."""
    done = min(done, total)
    filled = BAR * done // total
    return f"[{'#' * filled}{'-' * (BAR - filled)}] {100 * done // total:>3} %"


def columns() -> int:
    """Of the terminal that stderr is: stdout may be a file, whose size would be a guess."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        width = os.get_terminal_size(sys.stderr.fileno()).columns
        if width > 0:
            return width
    return shutil.get_terminal_size().columns


class _Progress:
    """One line a stage; on a terminal a bar while a stage can say how far it is."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._begin = time.monotonic()
        self._shown = 0.0
        self._text = ""

    def __call__(self, event: Event) -> None:
        if event.kind == "done":
            memory = f"{event.peak_memory_mib:,.0f} MiB"
            line = f"  {event.stage:<9}{event.seconds:>8.1f} s {memory:>12}  {event.text}"
            self._write(line.rstrip(), end="\n")
        elif event.kind == "note":
            self._write(f"  {event.stage:<9}{event.text}", end="\n")
        elif self._live and event.kind == "start":
            self._write(f"  {event.stage:<9}...", end="")
        elif self._live and event.kind == "progress" and event.total:
            now = time.monotonic()
            news = event.text != self._text
            if now - self._shown < 0.1 and event.done < event.total and not news:
                return
            self._shown, self._text = now, event.text
            far = bar(event.done, event.total)
            line = f"  {event.stage:<9}{far}  {now - self._begin:,.0f} s  {event.text}".rstrip()
            # A line that wraps is not overwritten by the next one.
            self._write(line[: columns() - 1], end="")

    def _write(self, text: str, *, end: str) -> None:
        start = "\r\x1b[K" if self._live else ""
        click.echo(f"{start}{text}", nl=end == "\n", err=True)
