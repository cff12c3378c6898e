"""Sigstore without a network: the real code is reached, and its failure is told as one."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from jexport.errors import SignatureError
from jexport.publishing import signing
from jexport.publishing.signing import Policy, Signer, keyless

ASKED = Policy(identity="release@example.org", issuer="https://login.example.org")


@pytest.fixture(autouse=True)
def cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """No network, and Sigstore's own folders below tmp_path; what was asked for."""
    asked: list[object] = []

    def refuse(*words: Any, **_: Any) -> NoReturn:
        asked.append(words[0])
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", lambda _, where: refuse(where))
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return asked


def test_signing(artifact_copy: Path, cut_off: list[object]) -> None:
    with pytest.raises(SignatureError, match="network"):
        signing.sign(artifact_copy, Signer())
    assert cut_off, "Sigstore was not asked"
    assert not signing.attest_folder(artifact_copy).exists()


def test_a_token_that_is_none(artifact_copy: Path) -> None:
    with pytest.raises(SignatureError, match=r"no identity to sign with") as caught:
        signing.sign(artifact_copy, Signer(identity_token="secret-but-no-token"))
    assert "secret" not in str(caught.value)


def test_a_key_is_no_identity(signed: Path) -> None:
    with pytest.raises(SignatureError, match="not a certificate"):
        signing.verify(signed, ASKED)


def test_checking(signed: Path, cut_off: list[object]) -> None:
    path = signing.attest_folder(signed) / signing.SIGNATURE
    bundle = json.loads(path.read_text())
    bundle["verificationMaterial"] = {"certificate": {"rawBytes": ""}, "tlogEntries": []}
    path.write_text(json.dumps(bundle))
    with pytest.raises(SignatureError):
        signing.verify(signed, ASKED)
    assert cut_off, "Sigstore was not asked"


@pytest.mark.parametrize("line", [b"", b"{}", b"\xff", b'{"mediaType": "x"}'])
def test_provenance_by_nobody(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from sigstore import models

    real = models.ClientTrustConfig.production  # the roots that come with the library
    monkeypatch.setattr(models.ClientTrustConfig, "production", lambda: real(offline=True))
    with pytest.raises(SignatureError, match="provenance"):
        keyless.opened(line, ASKED)
