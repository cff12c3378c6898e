"""Who signed an artifact: what is refused, and that everything else is not."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import jexport
from jexport.artifacts import manifest, store
from jexport.errors import ArtifactError, DependencyError, OutputPathError, SignatureError
from jexport.publishing import signing
from jexport.publishing.signing import Policy, Signer

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def tools(imported: Callable[[Path], Any]) -> Any:
    return imported(HERE / "conftest.py")


def reseal(folder: Path) -> None:
    """What an attacker does: the manifest says what is there now, its own digest included."""
    path = folder / manifest.NAME
    content = json.loads(path.read_text())
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != manifest.NAME]
    content["files"] = manifest.listed(manifest.file_digest(p, root=folder) for p in files)
    content["sha256"] = manifest.seal(content)
    manifest.write_json(path, content)


def test_a_signed_artifact_is_what_it_was(artifact: Path, signed: Path, keys: Any) -> None:
    files = {p.relative_to(signed): p.read_bytes() for p in signed.rglob("*") if p.is_file()}
    built = {p.relative_to(artifact): p.read_bytes() for p in artifact.rglob("*") if p.is_file()}
    assert files == built
    found = signing.verify(signed, Policy(key=keys.public))
    assert found == manifest.verify(signed)
    place = signing.attest_folder(signed)
    assert place == signed.parent / "artifact.attest"
    assert sorted(p.name for p in place.iterdir()) == ["model.sig", "provenance.intoto.jsonl"]


def test_the_library_itself_takes_the_signature(signed: Path, keys: Any) -> None:
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    config.verify(signed, signing.attest_folder(signed) / signing.SIGNATURE)
    (signed / "README.md").write_text("changed")
    with pytest.raises(ValueError, match=r"README\.md"):
        config.verify(signed, signing.attest_folder(signed) / signing.SIGNATURE)


def test_name_and_links_do_not_matter(signed: Path, keys: Any, tools: Any, tmp_path: Path) -> None:
    moved = tools.copy_with_attest(signed, tmp_path / "elsewhere")
    (tmp_path / "latest").symlink_to(moved.name)
    for path in (moved, tmp_path / "latest"):
        signing.verify(path, Policy(key=str(keys.public)))


def test_no_signature(artifact_copy: Path, keys: Any) -> None:
    with pytest.raises(SignatureError, match="is not signed"):
        signing.verify(artifact_copy, Policy(key=keys.public))


@pytest.mark.parametrize("name", [signing.SIGNATURE, signing.PROVENANCE])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"\xff", b'{"a":' * 100_000])
def test_half_a_signature(name: str, content: bytes | None, signed: Path, keys: Any) -> None:
    path = signing.attest_folder(signed) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SignatureError):
        signing.verify(signed, Policy(key=keys.public))


def test_another_key(signed: Path, other_keys: Any) -> None:
    with pytest.raises(SignatureError, match="not one that is asked for"):
        signing.verify(signed, Policy(key=other_keys.public))


def test_provenance_by_another_key(signed: Path, keys: Any, other_keys: Any) -> None:
    place = signing.attest_folder(signed)
    own = (place / signing.SIGNATURE).read_bytes()
    signing.sign(signed, Signer(key=other_keys.private))
    (place / signing.SIGNATURE).write_bytes(own)
    with pytest.raises(SignatureError, match="provenance is not signed"):
        signing.verify(signed, Policy(key=keys.public))


def test_a_changed_file(signed: Path, keys: Any) -> None:
    path = signed / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        signing.verify(signed, Policy(key=keys.public))


@pytest.mark.parametrize("change", ["changed", "removed", "added", "git"])
def test_a_manifest_that_was_made_to_fit(change: str, signed: Path, keys: Any) -> None:
    if change == "changed":
        (signed / "config.json").write_text("{}")
    elif change == "removed":
        (signed / "parity.json").unlink()
    else:
        (signed / (".gitattributes" if change == "git" else "evil.py")).write_text("x")
    reseal(signed)
    manifest.verify(signed)
    with pytest.raises(SignatureError):
        signing.verify(signed, Policy(key=keys.public))


def test_the_signature_of_another_build(
    signed: Path, builds: Callable[..., Any], keys: Any, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(builds("separation").path, tmp_path / "other"))
    shutil.copytree(signing.attest_folder(signed), signing.attest_folder(other))
    with pytest.raises(SignatureError):
        signing.verify(other, Policy(key=keys.public))


def test_the_provenance_of_another_build(
    signed: Path, builds: Callable[..., Any], keys: Any, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(builds("separation").path, tmp_path / "other"))
    signing.sign(other, Signer(key=keys.private))
    name = signing.PROVENANCE
    shutil.copy(signing.attest_folder(other) / name, signing.attest_folder(signed) / name)
    with pytest.raises(SignatureError, match=r"not this artifact's(.|\n)*about other files"):
        signing.verify(signed, Policy(key=keys.public))


def test_a_signature_that_leaves_a_file_out(signed: Path, keys: Any) -> None:
    # The library honours what the signer left out; here nothing may be.
    from model_signing import hashing, verifying
    from model_signing import signing as theirs

    place = signing.attest_folder(signed) / signing.SIGNATURE
    partial = hashing.Config().set_ignored_paths(paths=["model.onnx_data"])
    config = theirs.Config().use_elliptic_key_signer(private_key=keys.private)
    config.set_hashing_config(partial).sign(signed, place)
    verifying.Config().use_elliptic_key_verifier(public_key=keys.public).verify(signed, place)
    with pytest.raises(SignatureError, match=r"model\.onnx_data"):
        signing.verify(signed, Policy(key=keys.public))


@pytest.mark.parametrize("name", [signing.SIGNATURE, signing.PROVENANCE])
def test_changed_bytes_of_a_signature(
    name: str, signed: Path, keys: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = signing.attest_folder(signed) / name
    good = path.read_bytes()
    chance = random.Random(7)
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        spot = chance.randrange(len(bad))
        bad[spot] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(bad))
        try:
            signing.verify(signed, Policy(key=keys.public))
        except SignatureError:
            refused += 1
    # A key's name in the envelope is not signed; all that is said about files is.
    assert refused > 120
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"mediaType"', '"dsseEnvelope": {}, "mediaType"', 1),
        lambda text: text.replace('"mediaType"', '"dsse_envelope": {}, "mediaType"', 1),
        lambda text: text.replace('"payloadType"', '"payload": "e30=", "payloadType"', 1),
    ],
)
def test_a_signature_that_can_be_read_in_two_ways(change: Any, signed: Path, keys: Any) -> None:
    path = signing.attest_folder(signed) / signing.SIGNATURE
    text = change(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(SignatureError):
        signing.verify(signed, Policy(key=keys.public))


def test_latest_is_followed_once(
    signed: Path, artifact: Path, keys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It moves to an unsigned artifact between the check and the engine: the checked one is opened.
    latest = tmp_path / "latest"
    latest.symlink_to(signed)
    check, opened = signing.verify, []

    def and_move(folder: Path, policy: Policy) -> Any:
        found = check(folder, policy)
        latest.unlink()
        latest.symlink_to(artifact)
        return found

    from jexport.runtime import open as opening

    monkeypatch.setattr(opening.signing, "verify", and_move)
    real = opening.compiled_model
    monkeypatch.setattr(
        opening, "compiled_model", lambda folder, c: (opened.append(folder), real(folder, c))[1]
    )
    jexport.open_artifact(latest, verify=Policy(key=keys.public)).close()
    assert opened == [signed.resolve()]


def test_a_signature_that_does_not_name_its_key_prints_nothing(
    signed: Path, keys: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = signing.attest_folder(signed) / signing.SIGNATURE
    bundle = json.loads(path.read_text())
    bundle["verificationMaterial"]["publicKey"] = {}
    path.write_text(json.dumps(bundle))
    with pytest.raises(SignatureError):
        signing.verify(signed, Policy(key=keys.public))
    assert capsys.readouterr().out == ""


def test_signing_again_replaces(signed: Path, keys: Any, other_keys: Any) -> None:
    signing.sign(signed, Signer(key=other_keys.private))
    signing.verify(signed, Policy(key=other_keys.public))
    with pytest.raises(SignatureError):
        signing.verify(signed, Policy(key=keys.public))


def test_what_was_changed_is_not_signed(artifact_copy: Path, keys: Any) -> None:
    (artifact_copy / "config.json").write_text("{}")
    with pytest.raises(ArtifactError):
        signing.sign(artifact_copy, Signer(key=keys.private))
    assert not signing.attest_folder(artifact_copy).exists()


def test_no_place_for_it(artifact_copy: Path, keys: Any) -> None:
    signing.attest_folder(artifact_copy).write_text("a file")
    with pytest.raises(OutputPathError):
        signing.sign(artifact_copy, Signer(key=keys.private))


def test_keys_of_other_kinds(artifact_copy: Path, tools: Any, tmp_path: Path) -> None:
    kinds = {
        "rsa": rsa.generate_private_key(65537, 2048),
        "ed": ed25519.Ed25519PrivateKey.generate(),
        "k1": ec.generate_private_key(ec.SECP256K1()),
    }
    for name, key in kinds.items():
        pair = tools.write_pair(tmp_path, name, key)
        with pytest.raises(SignatureError, match=f"private key .*{name}"):
            signing.sign(artifact_copy, Signer(key=pair.private))
    (tmp_path / "junk").write_text("junk")
    for path in (tmp_path / "junk", tmp_path / "absent"):
        with pytest.raises(SignatureError):
            signing.sign(artifact_copy, Signer(key=path))
    assert not signing.attest_folder(artifact_copy).exists()


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_every_curve_and_an_encrypted_key(
    curve: Any, artifact_copy: Path, tools: Any, tmp_path: Path
) -> None:
    pair = tools.write_pair(tmp_path, "own", ec.generate_private_key(curve()), b"open sesame")
    with pytest.raises(SignatureError):
        signing.sign(artifact_copy, Signer(key=pair.private))
    signer = Signer(key=pair.private, password="open sesame")
    assert "sesame" not in repr(signer)
    signing.sign(artifact_copy, signer)
    signing.verify(artifact_copy, Policy(key=pair.public))


@pytest.mark.parametrize("content", [None, "junk"])
def test_a_policy_whose_key_cannot_be_read(
    content: str | None, signed: Path, tmp_path: Path
) -> None:
    if content:
        (tmp_path / "k.pub").write_text(content)
    with pytest.raises(SignatureError, match="cannot be used"):
        signing.verify(signed, Policy(key=tmp_path / "k.pub"))


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"identity": "x"},
        {"issuer": "x"},
        {"chain": ("x",)},
        {"key": "k", "identity": "x"},
        {"issuer": "x", "chain": ("x",)},
    ],
)
def test_policies_that_ask_for_nobody(words: Any) -> None:
    with pytest.raises(SignatureError, match="not clear"):
        Policy(**words)


def test_certificates_need_their_key(tmp_path: Path) -> None:
    with pytest.raises(SignatureError):
        Signer(certificate=tmp_path / "c.pem")
    with pytest.raises(SignatureError):
        Signer(certificate=tmp_path / "c.pem", key=tmp_path / "k", password="x")


def test_the_folder_beside_is_no_version(signed: Path, keys: Any, tmp_path: Path) -> None:
    out = tmp_path / "out" / "m" / "t" / "onnx-fp32"
    out.mkdir(parents=True)
    shutil.move(signed, out / "1.0")
    signing.sign(out / "1.0", Signer(key=keys.private))
    assert [one.path.name for one in store.artifacts(tmp_path / "out")] == ["1.0"]


def test_without_the_libraries(signed: Path, keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing.importlib.util, "find_spec", lambda _: None)
    for call in (
        lambda: signing.verify(signed, Policy(key=keys.public)),
        lambda: signing.sign(signed, Signer(key=keys.private)),
    ):
        with pytest.raises(DependencyError, match=r"jexport\[sign\]"):
            call()


def test_opening_with_a_policy(signed: Path, keys: Any) -> None:
    with jexport.open_artifact(signed, verify=Policy(key=keys.public)) as model:
        assert model.encode("a text").shape == (64,)
    with pytest.raises(TypeError, match="Policy"):
        jexport.open_artifact(signed, verify=str(keys.public))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["unsigned", "altered"])
def test_refused_before_any_engine_is_imported(what: str, signed: Path, keys: Any) -> None:
    if what == "unsigned":
        shutil.rmtree(signing.attest_folder(signed))
    else:
        (signed / "model.onnx").write_bytes(b"not a graph")
        reseal(signed)
    code = (
        "import sys, jexport\nfrom jexport.errors import SignatureError\n"
        "from jexport.publishing.signing import Policy\n"
        f"try:\n    jexport.open_artifact({str(signed)!r}, verify=Policy(key={str(keys.public)!r}))"
        "\nexcept SignatureError as error:\n    assert error.exit_code == 34\n"
        "else:\n    raise SystemExit('it was opened')\n"
        "engines = {'onnxruntime', 'openvino', 'tensorrt', 'torch', 'transformers', 'tokenizers'}\n"
        "assert not engines & set(sys.modules), engines & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
