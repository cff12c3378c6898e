"""`jexport toy`."""

from __future__ import annotations

from pathlib import Path

import click

from jexport.cli import flags


@click.command()
@click.argument("folder", type=flags.PATH)
@click.option(
    "--layout",
    type=click.Choice(["original", "native", "jina-v5-small", "jina-v5-nano"]),
    default="original",
    show_default=True,
    help="original and native: of jina-embeddings-v3.",
)
@click.option(
    "--like",
    metavar="RECIPE",
    help="Tiny, with the files of a shipped recipe's model, such as bge-m3.",
)
@click.option("--full-size", is_flag=True, help="The real model's sizes (v3 1.1 GB).")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="A tokenizer.json to use instead of a small one.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
def toy(
    folder: Path, layout: str, like: str | None, full_size: bool, tokenizer: Path | None, seed: int
) -> None:
    """Write a checkpoint with seeded random weights, for tests and rehearsals.

    Its vectors mean nothing; its files have the names, shapes and dtypes of the real thing; with
    --like, smaller shapes.
    """
    from jexport.toy import checkpoint as writer

    if like is not None:
        from jexport.toy import like as like_writer

        if full_size or tokenizer is not None:
            raise click.UsageError("--like goes without --full-size and --tokenizer")
        click.echo(like_writer.write(folder, like, seed=seed))
        return
    click.echo(
        writer.write(folder, layout=layout, full_size=full_size, tokenizer=tokenizer, seed=seed)
    )


COMMANDS = {"toy": toy}
