"""The program around the commands: codes, one clear error, no traceback but for a bug."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from jexport import cli as program
from jexport.errors import RecipeError


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `jexport doctor` raise."""
    from jexport.cli import doctor

    def fail() -> dict[str, str]:
        raise error

    monkeypatch.setattr(doctor, "_machine", fail)


def test_a_foreseen_error_is_text_and_its_code(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RecipeError("it broke", evidence="here", fix="mend it")
    error.add_note("  report: there")
    failing(monkeypatch, error)
    answer = cli("doctor")
    assert (answer.code, answer.out) == (5, "")
    assert answer.err.splitlines() == [
        "error: it broke",
        "  here",
        "  fix: mend it",
        "  report: there",
    ]


@pytest.mark.parametrize("error", [ValueError("a bug"), EOFError("a bug"), OSError(5, "a bug")])
def test_a_bug_keeps_its_traceback(
    error: Exception, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error), match="a bug") as caught:
        cli("doctor")
    assert caught.value is error


def test_a_bug_exits_with_1_and_shows_the_traceback() -> None:
    code = (
        "import sys\nfrom jexport.cli import doctor, main\n"
        "def fail():\n    raise RuntimeError('a bug')\n"
        "doctor._machine = fail\nsys.argv = ['jexport', 'doctor']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: a bug" in done.stderr


def test_a_full_disk_that_no_stage_saw(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError(28, "No space left on device"))
    answer = cli("doctor")
    assert answer.code == 12
    assert "no space left" in answer.err


def test_ctrl_c_is_one_line(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    answer = cli("doctor")
    assert (answer.code, answer.out) == (130, "")
    assert answer.err == "interrupted; nothing half-made was left\n"


@pytest.mark.parametrize("becomes", ["raise ValueError('not a tensor')", "go_on()"])
def test_ctrl_c_that_a_library_keeps_to_itself(becomes: str) -> None:
    """Code written in C may make another error of it, or lose it."""
    code = (
        "import os, signal, sys\n"
        "from jexport.cli import console, doctor, main\n"
        "from jexport.workspace.run import Event\n"
        "def go_on():\n"
        "    console.listener(quiet=True, json_lines=False)(Event(kind='start', stage='export'))\n"
        "def library():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        f"    {becomes}\n"
        "doctor._machine = library\nsys.argv = ['jexport', 'doctor']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "interrupted; nothing half-made was left\n"


def test_ctrl_c_handler_is_given_back(cli: Callable[..., Any]) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert cli("recipe", "show").code == 0
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["biuld"], "did you mean 'build'?"),
        (["recipe", "shwo"], "did you mean 'show'?"),
        (["xyz"], "known: build, compile, matrix"),
        (["build", "--taks", "x"], "--task"),
        (["build", "--task", "none", "--target", "onnx", "--ouput", "x"], "--out"),
        (["embed", "x", "--ipnut", "y"], "--input"),
        (["build", "--target", "onnx"], "Missing option '--task'"),
        (["build", "--task", "none"], "Missing option '--target'"),
        (["embed", "x", "--output", "y.npy"], "Missing option '--input'"),
        (["embed", "x", "--input", "-"], "Missing option '--output'"),
        (["verify"], "Missing argument"),
        (["build", "--task", "none", "--target", "onnx", "--validate-tokens", "many"], "many"),
        (["embed", "x", "--input", "-", "--output", "y.npy", "--device", "gpu"], "gpu"),
        (["embed", "x", "--input", "-", "--output", "y.npy", "--batch-tokens", "0"], "0"),
        (["toy", "x", "--layout", "orignal"], "orignal"),
    ],
)
def test_wrong_words_are_refused_with_what_was_meant(
    words: list[str], hint: str, cli: Callable[..., Any]
) -> None:
    answer = cli(*words)
    assert (answer.code, answer.out) == (2, "")
    assert hint in answer.err
    assert "Traceback" not in answer.err


def test_wrong_words_for_a_build_that_logs_json(cli: Callable[..., Any]) -> None:
    answer = cli("build", "--json", "--target", "onnx")
    [line] = map(json.loads, answer.err.splitlines())
    assert answer.code == line["exit_code"] == 2
    assert "--task" in line["what"]
    assert cli("biuld").err.startswith("Usage: ")  # and the next command is as it ever was


def test_help_is_help_and_no_words_are_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jexport"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 2)  # click 8.2 changed it
    assert "Usage: jexport" in done.stdout + done.stderr


@pytest.mark.parametrize("command", list(program.COMMANDS))
def test_every_command_explains_itself(command: str, cli: Callable[..., Any]) -> None:
    answer = cli(command, "--help")
    assert answer.code == 0
    assert f"Usage: jexport {command}" in answer.out
    assert cli(command, "-h").out == answer.out


def test_every_option_is_explained() -> None:
    context = click.Context(program.root)
    for name in program.root.list_commands(context):
        command = program.root.get_command(context, name)
        assert command is not None
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_a_reader_that_went_away_is_no_bug(artifact: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m jexport inspect {artifact} --json | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() in ("0", "141")  # 0 when it had written all before
    assert done.stderr == ""


def test_stdout_on_a_full_disk(artifact: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jexport", "inspect", str(artifact), "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 12
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_shell_completion() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jexport"],
        env={
            **os.environ,
            "_JEXPORT_COMPLETE": "bash_complete",
            "COMP_WORDS": "jexport do",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "plain,doctor"


def test_ctrl_c_in_a_real_process(artifact: Path, tmp_path: Path) -> None:
    """`embed` waits for its input; Ctrl-C ends it and leaves no output."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jexport",
            "embed",
            str(artifact),
            "--input",
            "-",
            "--output",
            str(tmp_path / "out.npy"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    for _ in range(200):
        if list(tmp_path.iterdir()):  # the temporary file: it is reading now
            break
        time.sleep(0.05)
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted; nothing half-made was left\n"
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_build_that_logs_json(cli: Callable[..., Any], tmp_path: Path) -> None:
    words = ("build", "--json", "--model", tmp_path, "--task", "none", "--target", "onnx")
    answer = cli(*words, "--out", tmp_path / "out")
    *events, error = map(json.loads, answer.err.splitlines())
    assert [event["kind"] for event in events] == ["start"]
    assert error["kind"] == "error"
    assert error["error"] == "CheckpointError"
    assert error["exit_code"] == answer.code == 7
    assert error["what"]
    assert error["evidence"]
    assert error["fix"]
    quiet = cli(*words, "--out", tmp_path / "out", "--quiet")
    assert [json.loads(line)["kind"] for line in quiet.err.splitlines()] == ["error"]


def test_json_state_does_not_outlive_a_command(cli: Callable[..., Any]) -> None:
    assert cli("build", "--json", "--task", "x", "--target", "onxx").err.startswith("{")
    assert cli("verify", "nowhere").err.startswith("error: ")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--gpu", "L4"), "go with --executor ray"),
        (("--ray-address", "127.0.0.1:6379"), "go with --executor ray"),
        (("--executor", "ray", "--jobs", "2"), "are for builds on this machine"),
        (("--executor", "ray", "--no-cache"), "are for builds on this machine"),
        (("--executor", "rya"), "'local', 'ray'"),
    ],
)
def test_words_of_one_executor_are_refused_with_the_other(
    cli: Callable[..., Any], words: tuple[str, ...], hint: str
) -> None:
    answer = cli("build", "--task", "none", "--target", "onnx", *words)
    assert (answer.code, answer.out) == (2, "")
    assert hint in answer.err


def test_a_cluster_without_ray_installed(
    cli: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    answer = cli(
        "build",
        "--model",
        small,
        "--task",
        "separation",
        "--target",
        "hf",
        "--executor",
        "ray",
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 15
    assert 'pip install "jexport[ray]"' in answer.err


def test_ctrl_c_while_an_object_is_dropped_is_remembered() -> None:
    code = (
        "import os, signal, sys\n"
        "from jexport.cli import console, doctor, main\n"
        "from jexport.workspace.run import Event\n"
        "class Dropped:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "def library():\n"
        "    Dropped()\n"
        "    console.listener(quiet=True, json_lines=False)(Event(kind='start', stage='export'))\n"
        "doctor._machine = library\nsys.argv = ['jexport', 'doctor']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "interrupted; nothing half-made was left\n"
