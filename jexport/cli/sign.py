"""`jexport sign`."""

from __future__ import annotations

import os
from pathlib import Path

import click

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
PASSWORD = "JEXPORT_KEY_PASSWORD"


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--key", type=FILE, metavar="FILE", help=f"Private key (PEM; ${PASSWORD} opens it).")
@click.option("--certificate", type=FILE, metavar="FILE", help="Its certificate (PEM).")
@click.option(
    "--certificate-chain",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="Certificates between that one and the root; may be repeated.",
)
@click.option("--sigstore", is_flag=True, help="No key: an identity, through Sigstore (network).")
def sign(
    artifact: Path,
    key: Path | None,
    certificate: Path | None,
    certificate_chain: tuple[Path, ...],
    sigstore: bool,
) -> None:
    """Sign an artifact and its provenance; they lie beside it, in VERSION.attest."""
    from jexport import signing

    if (key is not None) == sigstore:
        raise click.UsageError("give --key FILE (with --certificate FILE), or --sigstore")
    if certificate_chain and certificate is None:
        raise click.UsageError("--certificate-chain belongs to a --certificate")
    signer = signing.Signer(
        key=key,
        password=os.environ.get(PASSWORD, "") if key is not None else "",
        certificate=certificate,
        chain=certificate_chain,
    )
    click.echo(signing.sign(artifact, signer))


COMMANDS = {"sign": sign}
