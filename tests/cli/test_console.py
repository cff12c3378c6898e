"""What a terminal shows while a stage works."""

from __future__ import annotations

import fcntl
import os
import struct
import termios

import pytest

from jexport.cli import console
from jexport.workspace.run import Event


class Terminal:
    """stderr of a person."""

    @staticmethod
    def isatty() -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, columns: int, *events: Event) -> list[str]:
    said: list[str] = []
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(console.sys, "stderr", Terminal)
    monkeypatch.setattr(console.click, "echo", lambda text, **_: said.append(text))
    tell = console.listener(quiet=False, json_lines=False)
    for event in events:
        tell(event)
    return [text.removeprefix("\r\x1b[K") for text in said]


def at(done: int, text: str) -> Event:
    return Event(kind="progress", stage="quantize", done=done, total=8, text=text)


def test_the_bar_says_what_is_tried_and_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(
        monkeypatch,
        120,
        at(2, "trying 3 of 24 layers at higher precision; best top-10 so far 0.9507"),
    )
    assert lines == [
        "  quantize [######------------------]  25 %  0 s  "
        "trying 3 of 24 layers at higher precision; best top-10 so far 0.9507"
    ]


def test_other_words_are_shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 120, at(1, "one"), at(1, "one"), at(2, "another"))
    assert [line.rsplit(None, 1)[-1] for line in lines] == ["one", "another"]


def test_a_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 60, at(2, "trying " + "very " * 40))
    assert [len(line) for line in lines] == [59]


def test_a_bar_is_as_long_as_the_terminal_that_stderr_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 33, 0, 0))
    monkeypatch.setenv("COLUMNS", "200")  # what stdout, a file, would be taken for
    with open(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(console.sys, "stderr", stream)
        assert console.columns() == 33
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
        assert console.columns() == 200  # a terminal that does not say
    os.close(ours)
