"""click words -> library calls; the only code that prints or exits.

Each command's library is imported inside its function, so that `jexport --help` loads none.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from jexport.cli import console
from jexport.errors import JexportError, nearest
from jexport.workspace.run import disk_full, is_out_of_space

COMMANDS = {
    "build": "jexport.cli.build",
    "compile": "jexport.cli.compile",
    "matrix": "jexport.cli.matrix",
    "embed": "jexport.cli.embed",
    "package": "jexport.cli.package",
    "serve-with": "jexport.cli.serve_with",
    "verify": "jexport.cli.artifacts",
    "sign": "jexport.cli.sign",
    "inspect": "jexport.cli.artifacts",
    "list": "jexport.cli.artifacts",
    "publish": "jexport.cli.publish",
    "pull": "jexport.cli.publish",
    "report": "jexport.cli.report",
    "compare": "jexport.cli.report",
    "lint": "jexport.cli.lint",
    "cache": "jexport.cli.cache",
    "recipe": "jexport.cli.recipes",
    "doctor": "jexport.cli.doctor",
    "convert-weights": "jexport.cli.convert_weights",
    "toy": "jexport.cli.toy",
}
PROGRAM, COMPLETION = "jexport", "_JEXPORT_COMPLETE"
INTERRUPTED = 130
READER_GONE = 141
"""What a shell shows for a program that wrote into a closed pipe (128 + SIGPIPE)."""


class Nearest(click.Group):
    """A group that answers a mistyped command with the nearest name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Look the command up; a UsageError with a hint when there is none of that name."""
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            ctx.fail(f"no such command '{args[0]}': {nearest(args[0], known)}")
        return super().resolve_command(ctx, args)


class Commands(Nearest):
    """The top commands by name, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command's module."""
        import importlib

        if name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[name])
        command: click.Command = module.COMMANDS[name]
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jexport", message="jexport %(version)s")
def root() -> None:
    """Turn an embedding checkpoint and a task into a verified artifact.

    jexport build --model FOLDER --task none --target onnx

    jexport embed ARTIFACT --input texts.txt --output vectors.npy
    """


def main() -> None:
    """The program: runs a command and exits with its code."""
    # A progress table of a library in the middle of ours helps nobody; a user's own value stays.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if COMPLETION in os.environ:
        root.main(prog_name=PROGRAM)
    # Known before click has read the words: they may be what is wrong.
    console.tell_as_json(sys.argv[1:2] == ["build"] and "--json" in sys.argv)
    try:
        with console.remembered_ctrl_c():
            _run(sys.argv[1:])
        sys.stdout.flush()
    except JexportError as error:
        console.report_error(error)
        _exit(error.exit_code)
    except click.ClickException as error:
        console.report_usage(error)
        _exit(error.exit_code)
    except click.exceptions.Exit as stop:
        _exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        console.say("interrupted; nothing half-made was left")
        _exit(INTERRUPTED)
    except BrokenPipeError:
        _exit(READER_GONE)
    except OSError as error:
        if not is_out_of_space(error):
            raise
        full = disk_full("jexport", Path.cwd(), error)
        console.report_error(full)
        _exit(full.exit_code)
    sys.exit(0)


def _run(words: list[str]) -> None:
    # Not root.main(): click's own takes an EOFError of any library for Ctrl-C.
    with root.make_context(PROGRAM, words) as context:
        root.invoke(context)


def _exit(code: int) -> NoReturn:
    """Exit with this code, also when stdout can no longer be written (the interpreter flushes)."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
