"""Lines at the bottom of a terminal that are drawn over themselves, and what else comes to stderr.

While a table is shown, stderr itself is a pipe: what libraries and worker processes write there
comes out above the table, line by line, instead of into it. No colour is used and the cursor stays
visible, so there is nothing to restore when a process is killed. Knows nothing of what is shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator

STDERR = 2
TICK_S = 0.25
"""How often clocks are looked at; what did not change is not written."""

USUAL_SIZE = (80, 24)
LONGEST_BYTES = 1 << 16
"""Of a line that is not ours: more without an end of line is shown as it is."""

ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?")

Lines = Callable[[int, int], list[str]]
"""(columns, rows) -> what to show in so many rows at most; 0 rows: all there is, at the end."""


def can_be_shown() -> bool:
    """Whether stderr is a terminal that can be drawn on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        is_ours = sys.stderr.fileno() == STDERR  # not a test's, nor a notebook's
        return is_ours and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return False


class Table:
    """Shows lines until it is closed; then the terminal and stderr are as before."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._shown: list[str] = []
        self._foreign = b""
        self._lock, self._ended = threading.Lock(), threading.Event()
        sys.stderr.flush()
        self._terminal = os.dup(STDERR)
        self.refresh()  # first, so that its error would be seen
        self._pipe, theirs = os.pipe()
        os.dup2(theirs, STDERR)
        os.close(theirs)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Draw what changed."""
        with self._lock:
            self._draw(self._lines(*self._size()))

    def close(self) -> None:
        """Show all lines a last time, below what came in last, and give stderr back."""
        try:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            self._ended.set()
            self._thread.join()
            with self._lock:
                self._take(b"\n" if self._foreign else b"")
                columns, _ = self._size()
                self._draw(self._lines(columns, 0))
        finally:  # also when Ctrl-C is pressed again
            os.dup2(self._terminal, STDERR)
        os.close(self._terminal)
        os.close(self._pipe)

    def _size(self) -> tuple[int, int]:
        """Of the terminal that stderr is: stdout may be another one, or a file."""
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(self._terminal)
            if columns > 0 and rows > 0:
                return columns, rows
        return USUAL_SIZE

    def _draw(self, lines: list[str], above: list[str] | None = None) -> None:
        """One write: over what is there, then away with what is left of it."""
        if lines == self._shown and not above:
            return
        columns, _ = self._size()
        up = f"\x1b[{len(self._shown)}A" if self._shown else ""
        # Each line is written first and erased behind: erased before, it would flicker. The last
        # column stays free, for a terminal may wrap when it is filled.
        text = "".join(f"{cut(line, columns - 1)}\x1b[K\n" for line in [*(above or ()), *lines])
        self._write(f"\r{up}{text}\x1b[J")
        self._shown = list(lines)

    def _write(self, text: str) -> None:
        left = text.encode(errors="replace")
        with contextlib.suppress(OSError):  # a terminal that was closed: the work goes on
            while left:
                left = left[os.write(self._terminal, left) :]

    def _watch(self) -> None:
        while True:
            ended = self._ended.is_set()
            ready, _, _ = select.select([self._pipe], [], [], 0 if ended else TICK_S)
            if ready:
                with self._lock:
                    self._take(os.read(self._pipe, LONGEST_BYTES))
            elif ended:
                return
            else:
                self.refresh()

    def _take(self, content: bytes) -> None:
        """What somebody wrote to stderr: whole lines go above the table."""
        self._foreign += content
        if len(self._foreign) > LONGEST_BYTES:
            self._foreign += b"\n"
        *whole, self._foreign = self._foreign.split(b"\n")
        if whole:
            columns, _ = self._size()
            above = [part for line in whole for part in wrapped(line, columns - 1)]
            self._draw(self._shown, above)


def wrapped(line: bytes, columns: int) -> Iterator[str]:
    """A foreign line as it may stand on a terminal, in pieces that fit; bars leave their last."""
    plain = ESCAPES.sub("", line.decode(errors="replace")).expandtabs()
    text = plain.rstrip("\r").rpartition("\r")[2]
    while True:
        piece = cut(text, columns)
        yield piece
        text = text[len(piece) :]
        if not text or not piece:
            return


def cut(text: str, columns: int) -> str:
    """As much of a text as fits, with nothing in it that moves the cursor."""
    left, characters = columns, []
    for char in text:
        if unicodedata.combining(char):
            width = 0
        else:
            width = 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if width > left:
            break
        left -= width
        characters.append(char if char.isprintable() else " ")
    return "".join(characters)
