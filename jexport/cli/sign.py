"""`jexport sign`, and the options of all commands that sign or ask whose signature it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jexport.cli import flags

if TYPE_CHECKING:
    from jexport.publishing.signing import Policy, Signer

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
PASSWORD = "JEXPORT_KEY_PASSWORD"


signer_options = flags.together(
    click.option(
        "--key", type=FILE, metavar="FILE", help=f"Private key (PEM; ${PASSWORD} opens it)."
    ),
    click.option("--certificate", type=FILE, metavar="FILE", help="Its certificate (PEM)."),
    click.option(
        "--certificate-chain",
        "chain",
        type=FILE,
        multiple=True,
        metavar="FILE",
        help="Certificates between that one and the root; may be repeated.",
    ),
    click.option(
        "--sigstore", is_flag=True, help="No key: an identity, through Sigstore (network)."
    ),
)
"""The options that say who signs; `signer` takes what they gave."""


def signer(
    key: Path | None, certificate: Path | None, chain: tuple[Path, ...], sigstore: bool
) -> Signer:
    """Who signs. Raises click.UsageError for words that contradict each other."""
    from jexport.publishing.signing import Signer

    if (key is not None) == sigstore:
        raise click.UsageError("give --key FILE (with --certificate FILE), or --sigstore")
    if chain and certificate is None:
        raise click.UsageError("--certificate-chain belongs to a --certificate")
    password = os.environ.get(PASSWORD, "") if key is not None else ""
    return Signer(key=key, password=password, certificate=certificate, chain=chain)


policy_options = flags.together(
    click.option("--key", type=FILE, metavar="PUB", help="Its signature, too: by this public key."),
    click.option(
        "--identity", metavar="ID", help="Its signature, too: by this e-mail, URI or name."
    ),
    click.option("--issuer", metavar="URL", help="Who must have vouched for the identity."),
    click.option(
        "--certificate-chain",
        "chain",
        type=FILE,
        metavar="FILE",
        help="The root certificate the identity's must lead to; without it Sigstore's.",
    ),
)
"""The options that say whose signature is asked for; `policy` takes what they gave."""


def policy(
    key: Path | None, identity: str | None, issuer: str | None, chain: Path | None
) -> Policy | None:
    """Whose signature is asked for; None where nobody's is. Raises SignatureError."""
    from jexport.publishing.signing import Policy

    if not (key or identity or issuer or chain):
        return None
    return Policy(
        key=key, identity=identity or "", issuer=issuer or "", chain=(chain,) if chain else ()
    )


@click.command()
@click.argument("artifact", type=flags.PATH)
@signer_options
def sign(artifact: Path, **who: Any) -> None:
    """Sign an artifact and its provenance; they lie beside it, in VERSION.attest."""
    from jexport.publishing import signing

    click.echo(signing.sign(artifact, signer(**who)))


COMMANDS = {"sign": sign}
