"""`jexport convert-weights`."""

from __future__ import annotations

from pathlib import Path

import click

from jexport.cli import console, flags

NO_NETWORK = "read in a process of its own, without a network"
NETWORK = "read in a process of its own; this system does not let it be cut off from the network"


@click.command("convert-weights")
@click.argument("folder", type=flags.PATH)
@click.option("--force", is_flag=True, help="Replace safetensors files that are there already.")
@flags.quiet("Only digest and path of what was written, on stdout.")
def convert_weights(folder: Path, force: bool, quiet: bool) -> None:
    """Write safetensors beside the pickled weights of a checkpoint.

    Reads pytorch_model.bin, its shards, adapter_model.bin, and those of the checkpoint's modules.
    No code in them runs: a file that asks for any is refused. Each is read in a process of its own,
    without a network where the system allows that, with little more memory than the file is large.
    Every tensor keeps its dtype.

    stdout has a line `SHA-256  PATH` for each file written, as `sha256sum --check` reads them.
    """
    from jexport.checkpoints import weight_conversion

    done = weight_conversion.convert(folder, force=force)
    for path in done.there_already:
        console.say(f"{path} is there already and was left as it is (--force replaces it)")
    for one in done.written:
        if not quiet:
            console.say(f"{one.source}: sha256 {one.source_sha256}")
            console.say(f"  {one.tensors} tensors; {NO_NETWORK if one.isolated else NETWORK}")
            if not one.limited:
                console.say("  its memory could not be limited on this system")
            if one.repeated:
                console.say(f"  shared memory, written in full: {', '.join(one.repeated)}")
        click.echo(f"{one.sha256}  {one.path}")


COMMANDS = {"convert-weights": convert_weights}
