"""`jexport pull` with a policy: whose signature a release must have before it is put in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest
from jexport.errors import DependencyError, OutputPathError, SignatureError
from jexport.publishing import pull, registries, signing
from jexport.publishing.signing import Policy, Signer
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact

SIGNING = Path(__file__).parents[1] / "signing" / "conftest.py"
KINDS = ("unsigned", "half", "another key", "altered", "of another build")


@pytest.fixture(scope="module")
def tools(imported: Callable[[Path], Any]) -> Any:
    return imported(SIGNING)


@pytest.fixture(scope="module")
def pairs(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Our key pair, and somebody else's."""
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    own, other = (
        tools.write_pair(folder, name, ec.generate_private_key(ec.SECP256R1()))
        for name in ("own", "other")
    )
    return own, other


@pytest.fixture
def published(
    made: Callable[..., Artifact], pairs: tuple[Any, Any], tmp_path: Path
) -> Callable[[str], str]:
    """`published("altered")`: the ref of the artifact of seed 0, signed in that way."""

    def release(kind: str) -> str:
        shutil.rmtree(tmp_path / "built-0", ignore_errors=True)
        artifact, (own, other) = made(), pairs
        attest = signing.attest_folder(artifact.path)
        if kind != "unsigned":
            signer = Signer(key=(other if kind == "another key" else own).private)
            signing.sign(artifact.path, signer)
        if kind == "half":
            (attest / signing.PROVENANCE).unlink()
        if kind == "altered":
            line = (attest / signing.SIGNATURE).read_bytes()
            at = line.index(b'"sig"') + 20
            flipped = b"A" if line[at : at + 1] != b"A" else b"B"
            (attest / signing.SIGNATURE).write_bytes(line[:at] + flipped + line[at + 1 :])
        if kind == "of another build":
            shutil.rmtree(tmp_path / "built-7", ignore_errors=True)
            stranger = made(seed=7)
            signing.sign(stranger.path, Signer(key=own.private))
            shutil.copytree(signing.attest_folder(stranger.path), attest, dirs_exist_ok=True)
        return publish.run(artifact, str(tmp_path / "registry"), PublishSpec()).ref

    return release


def everything(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def test_the_right_signature(
    published: Callable[[str], str], pairs: tuple[Any, Any], tmp_path: Path
) -> None:
    ref, policy, out = published("right"), Policy(key=pairs[0].public), tmp_path / "out"
    for _ in range(2):  # fetched, then there already
        found = pull.run(registries.parse(ref), out, policy=policy)
        assert signing.verify(found.path, policy).content["task"] == "none"
        assert (found.path.parent / "latest").resolve() == found.path
        assert sorted(path.name for path in out.iterdir()) == ["m"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_release_leaves_nothing(
    kind: str, published: Callable[[str], str], pairs: tuple[Any, Any], tmp_path: Path
) -> None:
    ref, policy, out = published(kind), Policy(key=pairs[0].public), tmp_path / "out"
    for _ in range(2):
        with pytest.raises(SignatureError) as caught:
            pull.run(registries.parse(ref), out, policy=policy)
        assert everything(out) == []
        told = str(caught.value)
        assert str(out) not in told  # nothing is named that is not there
        digest = ref.rpartition("@")[2]
        if kind in ("unsigned", "half"):
            assert f"{digest} is not signed" in told
            assert ("model.sig" in told) == (kind == "unsigned")
    # Without a policy each of them is what was published.
    assert manifest.verify(pull.run(registries.parse(ref), out).path)


@pytest.mark.parametrize("kind", KINDS)
def test_refused_where_the_artifact_is_there_already(
    kind: str,
    published: Callable[[str], str],
    pairs: tuple[Any, Any],
    tmp_path: Path,
    files_in: Callable[[Path], Any],
) -> None:
    policy, out = Policy(key=pairs[0].public), tmp_path / "out"
    path = pull.run(registries.parse(published("right")), out).path
    before = files_in(out)
    refused = registries.parse(published(kind))
    with pytest.raises(SignatureError):
        pull.run(refused, out, policy=policy)
    assert files_in(out) == before  # the good signature among them
    assert signing.verify(path, policy)


def test_nothing_large_is_fetched_of_an_unsigned_release(
    published: Callable[[str], str], pairs: tuple[Any, Any], faults: Any, tmp_path: Path
) -> None:
    ref = registries.parse(published("unsigned"))
    faults.log.clear()
    with pytest.raises(SignatureError):
        pull.run(ref, tmp_path / "out", policy=Policy(key=pairs[0].public))
    assert "document" in faults.log
    assert "read" not in faults.log


def test_what_cannot_check_is_said_before_anything_is_fetched(
    published: Callable[[str], str],
    pairs: tuple[Any, Any],
    faults: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref = registries.parse(published("right"))
    faults.log.clear()
    (tmp_path / "junk.pub").write_text("junk")
    with pytest.raises(SignatureError, match="cannot be used"):
        pull.run(ref, tmp_path / "out", policy=Policy(key=tmp_path / "junk.pub"))
    monkeypatch.setattr(signing, "NEEDS", ("no_such_library",))
    with pytest.raises(DependencyError, match="checking a signature"):
        pull.run(ref, tmp_path / "out", policy=Policy(key=pairs[0].public))
    assert faults.log == []
    assert not (tmp_path / "out").exists()


def test_another_build_that_was_placed_meanwhile_is_not_passed_off_as_the_signed_one(
    made: Callable[..., Artifact],
    published: Callable[[str], str],
    pairs: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref, out = registries.parse(published("right")), tmp_path / "out"
    place = pull.place

    def slower(staged: Path, slot: Any, **options: bool) -> Artifact:
        shutil.copytree(staged, slot.path)
        content = dict(manifest.read(staged).content) | {"tools": {"another": "1"}}
        content["sha256"] = manifest.seal(content)
        manifest.write_json(slot.path / manifest.NAME, content)
        return place(staged, slot, **options)

    monkeypatch.setattr(pull, "place", slower)
    with pytest.raises(OutputPathError, match="another build of this version"):
        pull.run(ref, out, policy=Policy(key=pairs[0].public))


def test_on_the_command_line(
    published: Callable[[str], str],
    pairs: tuple[Any, Any],
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    (own, other), out = pairs, tmp_path / "out"
    ref = published("right")
    asked = ("pull", ref, out, "--quiet")
    wrong = cli(*asked, "--key", other.public)
    assert (wrong.code, wrong.out, everything(out)) == (34, "", [])
    good = cli(*asked, "--key", own.public)
    assert good.code == 0, good.err
    told = cli("verify", good.path, "--key", other.public)
    assert told.code == 34
    assert wrong.err.splitlines()[1:] == told.err.splitlines()[1:]  # the first names what it is
    assert ref.rpartition("@")[2] in wrong.err.splitlines()[0]
    assert cli(*asked, "--issuer", "https://c").code == 34  # nobody's
    assert cli(*asked, "--key", tmp_path / "absent").code == 2
    before = os.stat(good.path).st_mtime_ns
    assert cli(*asked, "--key", other.public).code == 34
    assert os.stat(good.path).st_mtime_ns == before


def test_by_identity(
    made: Callable[..., Artifact], tools: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    trusted = tools.authority(tmp_path)
    leaf = trusted.issue("leaf", who=tools.WHO, provider=tools.PROVIDER)
    artifact = made()
    signer = Signer(key=leaf.private, certificate=leaf.certificate, chain=(trusted.between,))
    signing.sign(artifact.path, signer)
    ref = publish.run(artifact, str(tmp_path / "registry"), PublishSpec()).ref
    chain = ("--certificate-chain", trusted.root)
    refused = cli("pull", ref, tmp_path / "no", "--identity", "intern@example.org", *chain)
    assert (refused.code, everything(tmp_path / "no")) == (34, [])
    words = ("--identity", tools.WHO, "--issuer", tools.PROVIDER, *chain)
    assert cli("pull", ref, tmp_path / "yes", *words).code == 0
