"""click words -> library calls; the only code that prints or exits.

Each command's library is imported inside its function, so that `jexport --help` loads none.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from jexport.errors import JexportError
from jexport.cli import console

COMMANDS = {
    "build": "jexport.cli.build",
    "embed": "jexport.cli.embed",
    "verify": "jexport.cli.artifacts",
    "inspect": "jexport.cli.artifacts",
    "list": "jexport.cli.artifacts",
    "recipe": "jexport.cli.recipes",
    "doctor": "jexport.cli.doctor",
    "toy": "jexport.cli.toy",
}
INTERRUPTED = 130


class Commands(click.Group):
    """Commands by name, each imported when it is used; errors become text and an exit code."""

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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The same, with the nearest command's name when there is none of that name."""
        from jexport.errors import nearest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command '{args[0]}': {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jexport", message="jexport %(version)s")
def root() -> None:
    """Turn an embedding checkpoint and a task into a verified artifact.

    \b
    jexport build --model FOLDER --task none --target onnx
    jexport embed ARTIFACT --input texts.txt --output vectors.npy
    """


def main() -> None:
    """The program: runs a command and exits with its code."""
    # A progress table of a library in the middle of ours helps nobody; a user's own value stays.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code: Any = root.main(standalone_mode=False)
        sys.stdout.flush()
    except JexportError as error:
        console.report_error(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        console.say("interrupted; nothing half-made was left")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(code if isinstance(code, int) else 0)
