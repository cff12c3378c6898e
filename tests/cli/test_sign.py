"""`jexport sign`, and `jexport verify` with a key or an identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.publishing import signing

SIGNING = Path(__file__).parents[1] / "publishing" / "signing" / "conftest.py"


@pytest.fixture(scope="module")
def tools(imported: Callable[[Path], Any]) -> Any:
    return imported(SIGNING)


def test_with_a_key(
    artifact_copy: Path, cli: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    own, other = (
        tools.write_pair(tmp_path, name, ec.generate_private_key(ec.SECP256R1()))
        for name in ("own", "other")
    )
    unsigned = cli("verify", artifact_copy, "--key", own.public)
    assert (unsigned.code, unsigned.out) == (34, "")
    assert "is not signed" in unsigned.err
    signed = cli("sign", artifact_copy, "--key", own.private)
    assert (signed.code, signed.path) == (0, signing.attest_folder(artifact_copy))
    good = cli("verify", artifact_copy, "--key", own.public)
    assert good.code == 0
    assert good.out.endswith(f"all as built, signed by {own.public}\n")
    assert cli("verify", artifact_copy).out.endswith("all as built\n")
    assert cli("verify", artifact_copy, "--key", other.public).code == 34
    (artifact_copy / "config.json").write_text("{}")
    assert cli("verify", artifact_copy, "--key", own.public).code == 13


def test_with_a_certificate(
    artifact_copy: Path, cli: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    trusted = tools.authority(tmp_path)
    leaf = trusted.issue("leaf", who=tools.WHO, provider=tools.PROVIDER)
    words = ("--key", leaf.private, "--certificate", leaf.certificate)
    signed = cli("sign", artifact_copy, *words, "--certificate-chain", trusted.between)
    assert signed.code == 0, signed.err
    asked = ("--issuer", tools.PROVIDER, "--certificate-chain", trusted.root)
    assert cli("verify", artifact_copy, "--identity", tools.WHO, *asked).code == 0
    assert cli("verify", artifact_copy, "--identity", "intern@example.org", *asked).code == 34


def test_an_encrypted_key(
    artifact_copy: Path,
    cli: Callable[..., Any],
    tools: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    pair = tools.write_pair(tmp_path, "k", ec.generate_private_key(ec.SECP256R1()), b"open sesame")
    monkeypatch.setenv("JEXPORT_KEY_PASSWORD", "wrong sesame")
    wrong = cli("sign", artifact_copy, "--key", pair.private)
    assert wrong.code == 34
    assert "sesame" not in wrong.err + wrong.out
    monkeypatch.setenv("JEXPORT_KEY_PASSWORD", "open sesame")
    assert cli("sign", artifact_copy, "--key", pair.private).code == 0


def test_words_that_name_no_signer(artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    pem = tmp_path / "some.pem"
    pem.touch()
    for words in (
        (),
        ("--certificate", pem),
        ("--key", pem, "--sigstore"),
        ("--key", pem, "--certificate-chain", pem),
        ("--key", tmp_path / "absent"),
    ):
        assert cli("sign", artifact, *words).code == 2
    assert not signing.attest_folder(artifact).exists()


def test_words_that_ask_for_nobody(artifact: Path, cli: Callable[..., Any]) -> None:
    for words in (("--identity", "a@b"), ("--issuer", "https://c")):
        answer = cli("verify", artifact, *words)
        assert answer.code == 34
        assert "not clear whose" in answer.err


def test_signed_when_published_and_checked_where_it_is_pulled(
    artifact_copy: Path, cli: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    import jexport
    from jexport.errors import SignatureError

    own, other = (
        tools.write_pair(tmp_path, name, ec.generate_private_key(ec.SECP256R1()))
        for name in ("own", "other")
    )
    place = tmp_path / "place"
    words = ("publish", artifact_copy, place, "--tag", "latest", "--quiet")
    assert cli(*words, "--key", own.private).code == 2  # a key that would not be used
    assert cli(*words, "--sign").code == 2  # no key
    assert not place.exists()
    ref = cli(*words, "--sign", "--key", own.private).out.strip()
    pulled = cli("pull", ref, tmp_path / "there", "--quiet").path
    assert cli("verify", pulled, "--key", own.public).code == 0
    assert cli("verify", pulled, "--key", other.public).code == 34
    with jexport.open_artifact(pulled, verify=signing.Policy(key=own.public)) as model:
        assert model.encode("a text").shape == (model.embedding.dimension,)
    with pytest.raises(SignatureError):
        jexport.open_artifact(pulled, verify=signing.Policy(key=other.public))
