"""Signing: who vouches for an artifact, and of what it was made; both checked before it is opened.

An artifact is what was built, so nothing is added to it. Beside `<version>/` lies
`<version>.attest/` with `model.sig`, an OpenSSF model-signing signature over the manifest and every
file, and `provenance.intoto.jsonl`, the SLSA provenance in an envelope signed by the same signer.
Knows no engine; the libraries are imported when something is signed or checked.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jexport.artifacts import manifest, store
from jexport.errors import DependencyError, OutputPathError, SignatureError
from jexport.types import Manifest
from jexport.workspace.run import NO_SPACE

SUFFIX = ".attest"
SIGNATURE = "model.sig"
PROVENANCE = "provenance.intoto.jsonl"
NEEDS = ("model_signing", "sigstore", "cryptography", "OpenSSL")
LARGEST_BYTES = 1 << 26
"""A signature of a hundred files has 20 kB: what is larger is none, and is not read."""


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Who signs.

    With neither key nor certificate Sigstore is asked, which needs a network: with identity_token,
    else with the machine's own identity (as in CI), else in a browser.

    Args:
        key: a private key of the curve P-256, P-384 or P-521, as PEM.
        password: of an encrypted key (not with a certificate: the library reads plain ones only
            then).
        certificate: of that key's public half.
        chain: the certificates between it and the root.
        identity_token: an OpenID token for Sigstore.

    Raises:
        SignatureError: a certificate without its key, or with an encrypted one.
    """

    key: Path | None = None
    password: str = field(default="", repr=False)
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()
    identity_token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.certificate is not None and (self.key is None or self.password):
            raise SignatureError(
                "a certificate signs with its own plain private key",
                evidence="there is no key" if self.key is None else "the key is encrypted",
                fix="give the private key that belongs to the certificate, without a password",
            )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Whose signature is asked for: that of a key, or that of an identity.

    A certificate that has expired since still counts: it is checked at the first moment of its
    life, because nothing here says when the signature was made.

    Args:
        key: a public key as PEM.
        identity: the e-mail address, URI or DNS name in the certificate that signed (its common
            name where there is none).
        issuer: the OpenID provider that vouched for the identity; may be empty with a chain.
        chain: the root certificate, as PEM, that it must lead to; without it Sigstore's own roots
            are meant, and `issuer` is needed.

    Raises:
        SignatureError: neither a key alone, nor an identity with an issuer or a chain.
    """

    key: str | Path | None = None
    identity: str = ""
    issuer: str = ""
    chain: tuple[str | Path, ...] = ()

    def __post_init__(self) -> None:
        if self.key is not None:
            sound = not (self.identity or self.issuer or self.chain)
        else:
            sound = bool(self.identity and (self.issuer or self.chain))
        if not sound:
            raise SignatureError(
                "it is not clear whose signature is asked for",
                evidence=f"key: {self.key}, identity: {self.identity!r}, issuer: {self.issuer!r}, "
                f"certificates: {len(self.chain)}",
                fix="give a public key; or an identity and its issuer; or an identity and the root "
                "certificate it must lead to",
            )


def attest_folder(folder: Path) -> Path:
    """Where an artifact's signature and provenance lie.

    Args:
        folder: of the artifact; links such as `latest` are followed.

    Returns:
        The folder beside it, whether it is there or not.
    """
    real = folder.resolve()
    return real.with_name(real.name + SUFFIX)


def sign(folder: Path, signer: Signer) -> Path:
    """Sign an artifact and its provenance.

    The artifact is verified first. What was signed before is replaced, the signature last.

    Args:
        folder: of the artifact.
        signer: a key, a certificate, or Sigstore's identity.

    Returns:
        The folder that signature and provenance lie in.

    Raises:
        ArtifactError: a file was changed.
        SignatureError: the key or the identity cannot sign.
        DependencyError: a library of the extra `sign` is missing.
        OutputPathError: the folder cannot be written.
    """
    check_installed("signing an artifact")
    from jexport.publishing.signing import envelope, keyless, openssf, provenance

    content = manifest.verify(folder).content
    statement = provenance.statement(content, _digests(folder, content))
    if signer.key is None:
        token = keyless.token(signer.identity_token)
        line = keyless.seal(statement, token)
        signature = openssf.sign(folder.resolve(), signer, token=token)
    else:
        line = envelope.seal(statement, openssf.private_key(signer))
        signature = openssf.sign(folder.resolve(), signer)
    return _placed(attest_folder(folder), {PROVENANCE: line + b"\n", SIGNATURE: signature})


def verify(
    folder: Path, policy: Policy, *, attest: Path | None = None, called: str = ""
) -> Manifest:
    """Check an artifact's files, its signature and its provenance.

    Imports no engine, and nothing of the artifact is run or parsed but its manifest.

    Args:
        folder: of the artifact.
        policy: whose signature is asked for.
        attest: where signature and provenance lie, if not beside the folder.
        called: what errors name, if not the folder.

    Returns:
        The manifest.

    Raises:
        ArtifactError: a file was changed.
        SignatureError: the signature is missing, broken, of somebody else or of something else.
        DependencyError: a library of the extra `sign` is missing.
    """
    check_installed("checking a signature")
    from jexport.publishing.signing import envelope, keyless, openssf, provenance

    folder = folder.resolve()  # once: `latest` may move meanwhile
    verified = manifest.verify(folder)
    place = attest if attest is not None else attest_folder(folder)
    called = called or f"artifact {folder}"
    files = _digests(folder, verified.content)
    _read(place / SIGNATURE, called)
    line = _read(place / PROVENANCE, called)
    key = openssf.check(folder, place / SIGNATURE, policy, files, called=called)
    statement = keyless.opened(line, policy) if key is None else envelope.opened(line, key)
    provenance.check(statement, files)
    return verified


def check_policy(policy: Policy) -> None:
    """Refuse a policy by which nothing could be checked, for whoever has much to do before.

    Args:
        policy: whose signature will be asked for.

    Raises:
        DependencyError: a library of the extra `sign` is missing.
        SignatureError: the policy's key or certificate cannot be read.
    """
    check_installed("checking a signature")
    from jexport.publishing.signing import openssf

    openssf.check_policy(policy)


def check_installed(purpose: str) -> None:
    """Refuse an environment without every library of the extra `sign`.

    Args:
        purpose: what needs them, for the message.

    Raises:
        DependencyError: one is missing.
    """
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise DependencyError(
            f"{purpose} needs libraries that are not installed",
            evidence=f"missing: {', '.join(absent)}",
            fix='pip install "jexport[sign]"',
        )


def _digests(folder: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every file by name, the manifest's own among them."""
    own = manifest.file_digest(folder / manifest.NAME, root=folder)
    return {own.path: own.sha256} | {one["path"]: one["sha256"] for one in content["files"]}


def unsigned(called: str, evidence: str) -> SignatureError:
    """The error for something that lacks its signature or its provenance.

    Args:
        called: what lacks it.
        evidence: what shows that.

    Returns:
        The error, to be raised.
    """
    return SignatureError(
        f"{called} is not signed",
        evidence=evidence,
        fix="fetch it with its .attest folder, sign it (`jexport sign`), or open it without a "
        "policy if you trust where it came from",
    )


def _read(path: Path, called: str) -> bytes:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise SignatureError(
                f"{path.name} of {called} is not a signature",
                evidence=f"it has {path.stat().st_size:,} bytes",
                fix="fetch the artifact again, with its .attest folder",
            )
        return path.read_bytes()
    except OSError as error:
        raise unsigned(called, f"{path}: {error.strerror}") from error


def _placed(place: Path, files: Mapping[str, bytes]) -> Path:
    """Write each file under its name in one step, in this order, and have them on the disk."""
    try:
        place.mkdir(exist_ok=True)
        for name, content in files.items():
            part = place / f".{name}.part"
            part.write_bytes(content)
            store.sync(part)
            os.replace(part, place / name)
        store.sync(place)
        store.sync(place.parent)
        return place
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise OutputPathError(
            f"cannot put a signature into {place}", evidence=str(error), fix="make it writable"
        ) from error
