"""Signatures with certificates, offline: which root, whose name, who vouched for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jexport.errors import SignatureError
from jexport.publishing import signing
from jexport.publishing.signing import Policy, Signer

WHO, PROVIDER = "release@example.org", "https://login.example.org"


def sign(folder: Path, trusted: Any, pair: Any) -> None:
    chain = (trusted.between,)
    signing.sign(folder, Signer(key=pair.private, certificate=pair.certificate, chain=chain))


def test_by_identity(artifact_copy: Path, trusted: Any) -> None:
    sign(artifact_copy, trusted, trusted.issue("leaf", who=WHO, provider=PROVIDER))
    for issuer in ("", PROVIDER):
        policy = Policy(identity=WHO, issuer=issuer, chain=(trusted.root,))
        assert signing.verify(artifact_copy, policy).content["task"] == "retrieval.query"


def test_by_common_name_where_there_is_no_other(artifact_copy: Path, trusted: Any) -> None:
    sign(artifact_copy, trusted, trusted.issue("builder-7"))
    signing.verify(artifact_copy, Policy(identity="builder-7", chain=(trusted.root,)))


def test_another_identity_of_the_same_root(artifact_copy: Path, trusted: Any) -> None:
    from model_signing import verifying

    sign(artifact_copy, trusted, trusted.issue("leaf", who="intern@example.org"))
    # The library alone takes any certificate that leads to the root.
    alone = verifying.Config().use_certificate_verifier(certificate_chain=[trusted.root])
    alone.verify(artifact_copy, signing.attest_folder(artifact_copy) / signing.SIGNATURE)
    with pytest.raises(SignatureError, match=r"intern@example.org, not by release@"):
        signing.verify(artifact_copy, Policy(identity=WHO, chain=(trusted.root,)))
    with pytest.raises(SignatureError, match="not by leaf"):  # it has an alternative name
        signing.verify(artifact_copy, Policy(identity="leaf", chain=(trusted.root,)))


def test_a_certificate_that_has_expired_still_counts(artifact_copy: Path, trusted: Any) -> None:
    # As Policy says: nothing tells when the signature was made.
    sign(artifact_copy, trusted, trusted.issue("leaf", who=WHO, days=-0.5))
    signing.verify(artifact_copy, Policy(identity=WHO, chain=(trusted.root,)))


@pytest.mark.parametrize("provider", ["", "https://login.example.com"])
def test_another_issuer(provider: str, artifact_copy: Path, trusted: Any) -> None:
    sign(artifact_copy, trusted, trusted.issue("leaf", who=WHO, provider=provider))
    with pytest.raises(SignatureError, match="vouched"):
        signing.verify(artifact_copy, Policy(identity=WHO, issuer=PROVIDER, chain=(trusted.root,)))


def test_another_root(artifact_copy: Path, trusted: Any, stranger: Any) -> None:
    sign(artifact_copy, stranger, stranger.issue("leaf", who=WHO, provider=PROVIDER))
    with pytest.raises(SignatureError):
        signing.verify(artifact_copy, Policy(identity=WHO, issuer=PROVIDER, chain=(trusted.root,)))


def test_a_key_is_no_certificate(artifact_copy: Path, trusted: Any, keys: Any) -> None:
    pair = trusted.issue("leaf", who=WHO)
    sign(artifact_copy, trusted, pair)
    with pytest.raises(SignatureError, match="certificate, not a key"):
        signing.verify(artifact_copy, Policy(key=pair.public))
    signing.sign(artifact_copy, Signer(key=keys.private))
    with pytest.raises(SignatureError, match="key, not a certificate"):
        signing.verify(artifact_copy, Policy(identity=WHO, chain=(trusted.root,)))


def test_a_certificate_of_another_key(artifact_copy: Path, trusted: Any, keys: Any) -> None:
    pair = trusted.issue("leaf", who=WHO)
    with pytest.raises(SignatureError):
        signing.sign(artifact_copy, Signer(key=keys.private, certificate=pair.certificate))


def test_a_root_that_cannot_be_read(artifact_copy: Path, trusted: Any, tmp_path: Path) -> None:
    sign(artifact_copy, trusted, trusted.issue("leaf", who=WHO))
    (tmp_path / "root.pem").write_text("junk")
    with pytest.raises(SignatureError, match="cannot be used"):
        signing.verify(artifact_copy, Policy(identity=WHO, chain=(tmp_path / "root.pem",)))
