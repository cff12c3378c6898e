"""The table of many builds on real terminals: what is on the screen meanwhile, and at the end."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jexport
from jexport.cli.table import cut, wrapped

PROJECT = Path(str(jexport.__file__)).parents[1]
SCRIPT = Path(__file__).with_name("boarding.py")
OWN_TERMINAL = (  # opened by the leader of a session, a terminal becomes its own: for Ctrl-C
    "import os, sys; os.close(os.open(os.ttyname(2), os.O_RDWR));"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
PATIENCE_S = 240


class Screen:
    """What a terminal of this size shows of some bytes. Knows what is used, refuses all else."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.above: list[str] = []
        self._cells = [[" "] * columns for _ in range(rows)]
        self.row = self.column = 0
        self._rest = ""

    @property
    def lines(self) -> list[str]:
        """The rows, without the empty ones at the end."""
        found = ["".join(row).rstrip() for row in self._cells]
        while found and not found[-1]:
            found.pop()
        return found

    @property
    def everything(self) -> list[str]:
        return self.above + self.lines

    def feed(self, content: bytes) -> None:
        text = self._rest + content.decode()
        self._rest = ""
        at = 0
        while at < len(text):
            if text[at] != "\x1b":
                self._put(text[at])
                at += 1
                continue
            found = re.compile(r"\x1b\[(\d*)([AKJ])").match(text, at)
            if found is None:
                assert re.fullmatch(r"\x1b(\[\d*)?", text[at:]), f"unknown: {text[at : at + 12]!r}"
                self._rest = text[at:]
                return
            self._do(int(found[1] or 0), found[2])
            at = found.end()

    def _do(self, count: int, letter: str) -> None:
        if letter == "A":
            assert count <= self.row, "above the first row"
            self.row -= count
            return
        assert count == 0
        self._cells[self.row][self.column :] = [" "] * (self.columns - self.column)
        if letter == "J":
            for row in range(self.row + 1, self.rows):
                self._cells[row] = [" "] * self.columns

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._next_row()
        else:
            assert char.isprintable(), repr(char)
            if self.column == self.columns:
                self.column = 0
                self._next_row()
            self._cells[self.row][self.column] = char
            self.column += 1

    def _next_row(self) -> None:
        if self.row < self.rows - 1:
            self.row += 1
            return
        self.above.append("".join(self._cells.pop(0)).rstrip())
        self._cells.append([" "] * self.columns)


class Terminal:
    """A program on a terminal of its own. stdout: where that goes, None for the terminal."""

    def __init__(
        self, words: list[object], columns: int, rows: int, *, stdout: Any = None, **environ: str
    ) -> None:
        self._ours, theirs = os.openpty()
        if SCRIPT in words:  # what is typed there only makes it go on
            modes = termios.tcgetattr(theirs)
            modes[3] &= ~termios.ECHO
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen = Screen(columns, rows)
        usual = {"TERM": "xterm", "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        dropped = ("COLUMNS", "LINES", "NO_COLOR", "PYTHONWARNINGS")
        env = {key: value for key, value in os.environ.items() if key not in dropped}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *map(str, words)],
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            start_new_session=True,
            env={**env, **usual, **environ},
        )
        os.close(theirs)
        self.seen = b""

    def type(self, content: bytes) -> None:
        os.write(self._ours, content)

    def _read(self) -> bool:
        """Take what comes; whether there may be more."""
        ready, _, _ = select.select([self._ours], [], [], PATIENCE_S)
        assert ready, self.screen.lines
        try:
            content = os.read(self._ours, 65536)
        except OSError:  # Linux says EIO when the other side is closed
            return False
        self.seen += content
        self.screen.feed(content)
        return bool(content)

    def until(self, word: str) -> list[str]:
        """The rows as soon as they hold a word, each drawing whole."""
        limit = time.monotonic() + PATIENCE_S
        while True:
            drawn = self.seen.endswith(b"\x1b[J")
            if drawn and any(word in line for line in self.screen.lines):
                return self.screen.lines
            told = self.screen.everything
            assert self._read(), (self.process.wait(PATIENCE_S), told, self.seen[-300:])
            assert time.monotonic() < limit, told

    def end(self) -> int:
        while self._read():
            pass
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def on_terminal() -> Iterator[Callable[..., Terminal]]:
    """`on_terminal(words, columns, rows)`: that program of Python on a terminal."""
    started: list[Terminal] = []

    def start(*words: Any, **options: Any) -> Terminal:
        started.append(Terminal(*words, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def building(small: Path, tmp_path: Path, *tasks: str) -> list[object]:
    recipe = tmp_path / "quick.toml"
    recipe.write_text('name = "small"\n[validate]\nbudget_tokens = 1\nmax_tokens = 64\n')
    asked = [word for task in tasks for word in ("--task", task)]
    return [
        "-m",
        "jexport",
        "build",
        "--recipe",
        recipe,
        "--model",
        small,
        *asked,
        "--target",
        "onnx",
        "--precision",
        "fp32",
        "--jobs",
        2,
        "--out",
        tmp_path / "out",
    ]


def test_builds_of_which_one_fails(
    on_terminal: Callable[..., Terminal], small: Path, tmp_path: Path
) -> None:
    words = building(small, tmp_path, "separation", "none", "wrong")
    terminal = on_terminal(words, 80, 24)
    lines = terminal.until("export ...")
    assert [line.split()[0] for line in lines] == [
        "separation-onnx-fp32",
        "none-onnx-fp32",
        "wrong-onnx-fp32",
    ]
    assert lines[2].split()[1:] == ["waiting"]
    assert re.fullmatch(r"\w+-onnx-fp32 +\d+ s  (load|merge|export) (\.\.\.|.*)", lines[0])
    assert terminal.screen.row == 3  # below the table
    assert terminal.end() == 3
    table, rest = terminal.screen.everything[:3], terminal.screen.everything[3:]
    found = (path.parent for path in (tmp_path / "out").glob("*/*/*/*/manifest.json"))
    paths = [path for path in found if not path.is_symlink()]
    assert len(paths) == 2
    for line, path in zip(table[:2], sorted(paths, reverse=True), strict=True):
        assert re.fullmatch(rf"{path.parents[1].name}-onnx-fp32 +\d+ s  built {path.name}", line)
    assert re.fullmatch(r"wrong-onnx-fp32 +\d+ s  failed: unknown task 'wrong'", table[2])
    text = "\n".join(rest)
    assert "".join(rest).startswith("".join(map(str, sorted(paths, reverse=True))))
    assert "wrong-onnx-fp32:\nerror: unknown task 'wrong'\n" in text
    assert re.search(r"2 of 3 built, 1 failed; \d+ (s|min) of work$", text)
    assert text.count("waiting") == 0


def test_ctrl_c_on_a_small_terminal(
    on_terminal: Callable[..., Terminal], small: Path, tmp_path: Path
) -> None:
    words = building(small, tmp_path, "retrieval.passage", "retrieval.query", "none")
    terminal = on_terminal(words, 40, 10)
    lines = terminal.until("load ...")
    assert [line.split()[0] for line in lines] == [
        "retrieval.pa..nnx-fp32",
        "retrieval.qu..nnx-fp32",
        "none-onnx-fp32",
    ]
    terminal.type(b"\x03")
    assert terminal.end() == 130
    assert re.fullmatch(
        r"retrieval\.pa\.\.nnx-fp32  stopped at: \w+\n"
        r"retrieval\.qu\.\.nnx-fp32  stopped at: \w+\n"
        r"none-onnx-fp32          waiting\n"
        r"interrupted; nothing half-made was left",
        "\n".join(terminal.screen.everything),
    )
    assert b"^C" in terminal.seen  # the terminal's own, drawn over
    assert not list((tmp_path / "out").glob("*"))


def test_more_jobs_than_rows(on_terminal: Callable[..., Terminal]) -> None:
    terminal = on_terminal([SCRIPT, "many", 30], 60, 10)
    lines = terminal.until("and ")
    first = [f"task{n}-onnx-fp32" for n in range(7)]
    assert [line.split()[0] for line in lines] == [*first, "and"]
    assert lines[-1] == "and 23 waiting"
    terminal.type(b"\n")
    terminal.until("task25-onnx-fp32      0 s  export ...")
    lines = terminal.screen.lines
    # What runs, what failed, what is next; then how many more there are, and of what kind.
    assert [line.split()[0] for line in lines[-8:]] == [
        *(f"task{n}-onnx-fp32" for n in (3, 4, 25, 26, 27, 28, 29)),
        "and",
    ]
    assert lines[-8].endswith("  failed: of itself")
    assert lines[-1] == "and 23 built"
    assert terminal.screen.above + lines[:-8] == []  # nothing scrolled away
    terminal.type(b"\n")
    assert terminal.end() == 0
    shown = [line for line in terminal.screen.everything if line]
    assert [line.split()[0] for line in shown[:30]] == [f"task{n}-onnx-fp32" for n in range(30)]
    assert all(re.search(r"  (built v\d+|failed: of itself)$", line) for line in shown[:30])
    assert shown[30:] == ["that was all"]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_terminal_of_hardly_any_rows(rows: int, on_terminal: Callable[..., Terminal]) -> None:
    terminal = on_terminal([SCRIPT, "many", 8], 30, rows)
    terminal.type(b"\n\n")
    assert terminal.end() == 0
    shown = [line for line in terminal.screen.everything if line.startswith("task")]
    assert [line.split()[0] for line in shown[-8:]] == [f"task{n}-..fp32" for n in range(8)]


def test_what_others_write_comes_above(on_terminal: Callable[..., Terminal]) -> None:
    terminal = on_terminal([SCRIPT, "foreign"], 70, 24)
    lines = terminal.until("quantize two lines")
    table = ["retrieval.query-onnx-fp32", "retrieval.passage-onnx-fp32", "separation-onnx-fp32"]
    assert [line.split()[0] for line in lines[-3:]] == table
    terminal.type(b"\n")
    assert terminal.end() == 0
    told = terminal.screen.everything
    assert told[:4] == ["from a library", "100 %", "half from a child", told[3]]
    assert "UserWarning: from Python" in "".join(told[3:6])
    text = "\n".join(told)
    assert (" ".join(["long"] * 20)).replace(" ", "") in "".join(told).replace(" ", "")
    assert re.search(r"^clears +nothing$", text, re.MULTILINE)
    # The table once, whole, below all that came while it was shown.
    assert [line.split()[0] for line in told[-5:-2]] != table
    assert [line.split()[0] for line in told[-4:-1]] == table
    assert told[-5] == "the last, without an end"
    assert told[-1] == "told afterwards"
    for key in table:
        assert text.count(key) == 1


def test_the_size_is_that_of_the_terminal_that_is_drawn_on(
    on_terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    with open(tmp_path / "paths", "wb") as elsewhere:
        terminal = on_terminal([SCRIPT, "many", 5], 24, 30, stdout=elsewhere)
        terminal.type(b"\n\n")
        assert terminal.end() == 0
    assert (tmp_path / "paths").read_text() == "that was all\n"
    shown = [line for line in terminal.screen.everything if line]
    assert len(shown) == 5  # no line was wrapped
    assert all(len(line) < 24 for line in shown)


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1"}])
def test_a_terminal_that_cannot_be_drawn_on(
    environ: dict[str, str], on_terminal: Callable[..., Terminal]
) -> None:
    terminal = on_terminal([SCRIPT, "many", 5], 80, 24, **environ)
    terminal.type(b"\n\n")
    assert terminal.end() == 0
    assert b"\x1b" not in terminal.seen
    assert b"task4-onnx-fp32  begun\r\n" in terminal.seen


def test_no_colour_and_no_cursor_is_hidden(on_terminal: Callable[..., Terminal]) -> None:
    seen = []
    for environ in ({}, {"NO_COLOR": "1"}):
        terminal = on_terminal([SCRIPT, "many", 5], 80, 24, **environ)
        terminal.type(b"\n\n")
        assert terminal.end() == 0
        seen.append(set(re.findall(rb"\x1b\[[\d;?]*(.)", terminal.seen)))
    assert seen == [{b"A", b"K", b"J"}] * 2
    # Written first, erased behind: a line that is erased before it is written flickers.
    assert not re.search(rb"\x1b\[K[^\r\n]", terminal.seen)


def test_lines_where_there_is_no_terminal(small: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "many", "5"],
        input="\n\n",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm"},
    )
    assert "\x1b" not in done.stderr + done.stdout
    assert done.stderr.splitlines()[:2] == [
        "task0-onnx-fp32  begun",
        "task0-onnx-fp32  /out/m/task0/v0",
    ]
    assert done.stdout == "that was all\n"


def test_what_is_cut() -> None:
    assert cut("abcdef", 3) == "abc"
    assert cut("語語語", 5) == "語語"
    assert cut("e\u0301e\u0301", 1) == "e\u0301"
    assert cut("a\x1b[5Ab\nc", 20) == "a [5Ab c"
    assert cut("a", 0) == ""
    assert list(wrapped(b"abcdef", 4)) == ["abcd", "ef"]
    assert list(wrapped(b"", 4)) == [""]
    assert list(wrapped(b"\r 5 %\r100 %\r", 10)) == ["100 %"]
    assert list(wrapped("語".encode(), 1)) == [""]  # never for ever
    assert list(wrapped(b"\xff\x1b]0;title\x07x\x1b[1;31my", 9)) == ["\ufffdxy"]


def test_a_plan_of_all_tasks_of_a_folder(
    cli: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    words = ("build", "--model", small, "--task", "all", "--target", "hf", "--plan", "--json")
    answer = cli(*words, "--precision", "fp32", "--out", tmp_path)
    assert answer.code == 0, answer.err
    tasks = [row["task"] for row in json.loads(answer.out)]
    assert tasks[0] == "retrieval.query"
    assert len(tasks) == 5
    assert "none" not in tasks
