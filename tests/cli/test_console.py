"""What a terminal shows while a stage works."""

from __future__ import annotations

import pytest

from jexport.cli import console
from jexport.run import Event


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
    lines = shown(monkeypatch, 120, at(2, "trying 3 of 24 wide; best top-10 so far 0.9507"))
    assert lines == [
        "  quantize [######------------------]  25 %  0 s  "
        "trying 3 of 24 wide; best top-10 so far 0.9507"
    ]


def test_other_words_are_shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 120, at(1, "one"), at(1, "one"), at(2, "another"))
    assert [line.rsplit(None, 1)[-1] for line in lines] == ["one", "another"]


def test_a_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 60, at(2, "trying " + "very " * 40))
    assert [len(line) for line in lines] == [59]
