"""`jexport embed`."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import IO, Any

import click

from jexport.cli import console, flags

CHUNK_BYTES = 1 << 20


def _device(context: click.Context, option: click.Parameter, text: str) -> str:
    """One of the names that an engine may know: which GPUs there are, only it can say."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise click.BadParameter(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


@click.command()
@click.argument("artifact", type=flags.PATH)
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE|-",
    help="A .txt (one text a line) or .jsonl file; - for stdin.",
)
@flags.path(
    "--output",
    required=True,
    metavar="FILE",
    help="A .npy (float32, rows in input order) or .jsonl file.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["txt", "jsonl"]),
    help="Of the input; default: by its name, txt for stdin.",
)
@click.option("--task", default="", help="Refuse an artifact of another task.")
@click.option("--dimensions", type=int, metavar="N", help="Matryoshka size; default: full.")
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="To length 1, or not; default: as the checkpoint does.",
)
@click.option(
    "--prompt-name", metavar="NAME", help="The prompt before each text (inspect lists them)."
)
@click.option("--no-prompt", is_flag=True, help="Put no prompt before the texts.")
@click.option("--no-truncate", is_flag=True, help="Refuse over-long texts instead of cutting them.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of one forward pass, with padding; default: the engine's.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    callback=_device,
    metavar="NAME",
    help="auto (a GPU where the engine sees one), cpu, cuda, cuda:1 ...",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, metavar="N", help="0: all cores.")
@flags.quiet("Only the output's path, on stdout.")
def embed(
    artifact: Path,
    source: str,
    output: Path,
    kind: Any,
    task: str,
    dimensions: int | None,
    normalize: bool | None,
    prompt_name: str | None,
    no_prompt: bool,
    no_truncate: bool,
    batch_tokens: int | None,
    device: str,
    threads: int,
    quiet: bool,
) -> None:
    """Embed the texts of a file with an artifact.

    Reads, embeds and writes window by window, so that an input larger than memory works.
    """
    console.listener(quiet=quiet, json_lines=False)
    from jexport.runtime.open import open_artifact
    from jexport.runtime.stream import embed_stream, read_texts

    stream, form = _source(source, kind)
    if isinstance(stream, Path) and output.exists() and output.samefile(stream):
        raise click.BadParameter("this would replace the input", param_hint="--output")
    with open_artifact(artifact, task=task, device=device, threads=threads) as model:
        bar = _Bar(stream, quiet=quiet)
        rows = embed_stream(
            model,
            read_texts(stream, form),
            output,
            on_progress=bar.add,
            dimensions=dimensions,
            normalize=normalize,
            prompt=not no_prompt,
            prompt_name=prompt_name,
            truncate=not no_truncate,
            max_batch_tokens=batch_tokens,
        )
        bar.close()
        if model.truncated and not quiet:
            limit = model.embedding.max_tokens
            console.say(f"truncated {model.truncated:,} texts to {limit:,} tokens")
    if not quiet:
        console.say(f"{rows:,} texts in {bar.seconds:,.1f} s ({bar.rate:,.0f} a second)")
    click.echo(output)


def _source(source: str, kind: Any) -> tuple[Path | IO[bytes], Any]:
    if source == "-":
        return sys.stdin.buffer, kind or "txt"
    path = Path(source)
    if not path.is_file():
        raise click.BadParameter(f"there is no file {source}", param_hint="--input")
    form = kind or path.suffix.removeprefix(".")
    if form not in ("txt", "jsonl"):
        raise click.BadParameter(
            f"cannot tell the format of {source}: give --format txt or jsonl", param_hint="--input"
        )
    return path, form


class _Bar:
    """Texts done and texts a second on one line of a terminal; for a file also how far it is."""

    def __init__(self, stream: Path | IO[bytes], *, quiet: bool) -> None:
        self._live = not quiet and sys.stderr.isatty()
        # Counting the lines of a file takes about a second for 2 GB; a pipe has no end to know.
        self._total = _lines(stream) if self._live and isinstance(stream, Path) else 0
        self._begin = time.monotonic()
        self._shown = 0.0
        self._done = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    @property
    def rate(self) -> float:
        return self._done / max(self.seconds, 1e-9)

    def add(self, texts: int) -> None:
        console.check_ctrl_c()
        self._done += texts
        now = time.monotonic()
        if self._live and now - self._shown >= 0.1:
            self._shown = now
            far = console.bar(self._done, self._total) + "  " if self._total else ""
            line = f"  {far}{self._done:,} texts, {self.rate:,.0f} a second"
            click.echo(f"\r\x1b[K{line}", nl=False, err=True)

    def close(self) -> None:
        if self._live:
            click.echo("\r\x1b[K", nl=False, err=True)


def _lines(path: Path) -> int:
    """Texts in a file: its lines, the last one also without its end."""
    count, last = 0, b"\n"
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")


COMMANDS = {"embed": embed}
