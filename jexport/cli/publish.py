"""`jexport publish` and `jexport pull`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from jexport.cli import console, flags
from jexport.cli.sign import policy, policy_options, signer, signer_options


@click.command()
@click.argument("artifact", type=flags.PATH)
@click.argument("dest")
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="T",
    help="A name for it from now on, such as latest; may be repeated.",
)
@flags.accept_licence
@click.option("--sign", is_flag=True, help="Sign it first; with one of the next four.")
@signer_options
@click.option("--public", is_flag=True, help="Everybody can read DEST (hf:// says so itself).")
@click.option("--repair", is_flag=True, help="Send also what seems to be there.")
@flags.transfers
@click.option(
    "--replace", is_flag=True, help="A tag may move to it from an artifact of another checkpoint."
)
@flags.quiet("Only the ref, on stdout.")
def publish(
    artifact: Path,
    dest: str,
    tags: tuple[str, ...],
    accept_licence: bool,
    sign: bool,
    public: bool,
    repair: bool,
    threads: int,
    plain_http: bool,
    replace: bool,
    quiet: bool,
    **who: Any,
) -> None:
    """Publish an artifact: DEST is a folder, s3://, oci:// or hf://.

    The ref that `jexport pull` takes is the last line on stdout.
    """
    listen = console.listener(quiet=quiet, json_lines=False)
    from jexport.artifacts import manifest
    from jexport.publishing import signing
    from jexport.publishing.registries import Access
    from jexport.stages import publish as stage
    from jexport.types import Artifact

    if not sign and any(who.values()):
        raise click.UsageError("a key, a certificate or --sigstore needs --sign")
    if sign:
        signing.sign(artifact, signer(**who))
    opened = Artifact(path=artifact, manifest=manifest.read(artifact))
    spec = stage.PublishSpec(
        tags=tags,
        accept_licence=accept_licence,
        repair=repair,
        replace=replace,
        threads=threads,
        access=Access(plain_http=plain_http, public=public),
    )
    if not quiet:
        licence = opened.manifest.content["licence"] or "not stated"
        console.say(f"jexport publish: {artifact}, licence {licence}")
    done = stage.run(opened, dest, spec, listen=listen)
    click.echo(done.ref)


@click.command()
@click.argument("ref")
@click.argument("folder", metavar="DIR", type=flags.PATH)
@policy_options
@flags.transfers
@flags.replace
@flags.quiet(flags.ARTIFACT_ONLY)
def pull(
    ref: str,
    folder: Path,
    threads: int,
    plain_http: bool,
    replace: bool,
    quiet: bool,
    **who: Any,
) -> None:
    """Fetch a published artifact into DIR, as a build with --out DIR would lay it down.

    REF is DEST@sha256:..., as `jexport list DEST` shows it, DEST:TAG, or DEST for the tag latest.
    Every file is checked, and with --key or --identity also whose signature the release has, as
    `jexport verify` does: one that is refused leaves nothing in DIR. The artifact's path is the
    last line on stdout.
    """
    asked = policy(**who)
    listen = console.listener(quiet=quiet, json_lines=False)
    from jexport.publishing import pull as puller
    from jexport.publishing import registries

    source = registries.parse(ref)
    if not quiet:
        console.say(f"jexport pull: {ref if source.digest else source.address}")
    access = registries.Access(plain_http=plain_http)
    pulled = puller.run(
        source, folder, access=access, threads=threads, policy=asked, replace=replace, listen=listen
    )
    click.echo(pulled.path)


COMMANDS: Mapping[str, Any] = {"publish": publish, "pull": pull}
