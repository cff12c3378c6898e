"""A folder as a registry, through publish, list, pull and open_artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest
from jexport.errors import ArtifactError, OutputPathError, RegistryError
from jexport.publishing import listing, pull, registries
from jexport.publishing.registries import Access
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact
from jexport.workspace.run import Event

ATTEST = {"model.sig": b"signed", "deep/provenance.json": b"{}"}


def rows(place: Path) -> tuple[listing.Row, ...]:
    found = listing.read(registries.parse(str(place)), Access())
    assert not found.troubles
    return found.rows


def pulled(ref: str, out: Path) -> Artifact:
    return pull.run(registries.parse(ref), out)


def test_there_and_back(
    made: Callable[..., Artifact], files_in: Callable[[Path], Any], tmp_path: Path
) -> None:
    artifact = made(attest=ATTEST)
    place = tmp_path / "registry"
    done = publish.run(artifact, f"folder://{place}", PublishSpec(tags=("latest", "1.0")))
    assert done.ref == f"folder://{place}@{done.digest}"
    assert done.sent == done.files
    out = tmp_path / "out"
    for ref in (done.ref, str(place), f"folder://{place}:1.0"):
        back = pulled(ref, out)
        assert back.path == out / artifact.path.relative_to(artifact.path.parents[3])
        assert files_in(back.path) == files_in(artifact.path)
    assert files_in(back.path.with_name(f"{back.path.name}.attest")) == ATTEST
    assert (back.path.parent / "latest").resolve() == back.path
    assert sorted(p.name for p in out.iterdir()) == ["m"]


def test_equal_bytes_lie_there_once(made: Callable[..., Artifact], tmp_path: Path) -> None:
    place = tmp_path / "registry"
    first = publish.run(made(seed=1), str(place), PublishSpec())
    second = publish.run(made(seed=2), str(place), PublishSpec())
    # 7 files, of which two are equal in each, and the model config of the release.
    assert (first.sent, first.files) == (6, 6)
    assert (second.sent, second.files) == (4, 6)
    kept = {path.name for path in (place / "blobs" / "sha256").iterdir()}
    assert len(kept) == 10
    again = publish.run(made_again(tmp_path, 2), str(place), PublishSpec())
    assert (again.sent, again.ref) == (0, second.ref)


def made_again(tmp_path: Path, seed: int) -> Artifact:
    [path] = (tmp_path / f"built-{seed}").glob("*/*/*/*/manifest.json")
    return Artifact(path=path.parent, manifest=manifest.read(path.parent))


def test_one_digest_everywhere(made: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = made(attest=ATTEST)
    one = publish.run(artifact, str(tmp_path / "one"), PublishSpec())
    two = publish.run(artifact, str(tmp_path / "two"), PublishSpec(threads=1))
    assert one.digest == two.digest
    sig = artifact.path.with_name(f"{artifact.path.name}.attest") / "model.sig"
    sig.write_bytes(b"signed by another")
    signed = publish.run(artifact, str(tmp_path / "two"), PublishSpec(tags=("latest",)))
    assert signed.digest != one.digest  # a ref says what was signed, too
    assert signed.sent == 2  # the signature and the config that lists it
    old = pulled(two.ref, tmp_path / "old").path
    new = pulled(signed.ref, tmp_path / "new").path
    assert (old.with_name(f"{old.name}.attest") / "model.sig").read_bytes() == b"signed"
    assert (new.with_name(f"{new.name}.attest") / "model.sig").read_bytes() == sig.read_bytes()


def test_tags_move_and_digests_do_not(made: Callable[..., Artifact], tmp_path: Path) -> None:
    place = tmp_path / "registry"
    first = publish.run(made(seed=1), str(place), PublishSpec(tags=("latest", "one")))
    second = publish.run(made(seed=2), f"folder://{place}:latest", PublishSpec())
    tags = {row.ref: row.tags for row in rows(place)}
    assert tags == {first.ref: ("one",), second.ref: ("latest",)}
    latest = pulled(f"{place}", tmp_path / "a").manifest
    assert latest == pulled(second.ref, tmp_path / "b").manifest
    assert latest != pulled(first.ref, tmp_path / "b").manifest


def test_what_is_there_is_not_fetched_again(
    made: Callable[..., Artifact], faults: Any, tmp_path: Path
) -> None:
    done = publish.run(made(attest=ATTEST), str(tmp_path / "r"), PublishSpec())
    path = pulled(done.ref, tmp_path / "out").path
    faults.log.clear()
    pulled(done.ref, tmp_path / "out")
    assert faults.log.count("read") == len(ATTEST)  # small, and they may be other ones
    (path / "README.md").write_text("changed")
    with pytest.raises(ArtifactError, match="not what was built"):
        pulled(done.ref, tmp_path / "out")


def test_another_build_of_the_version_is_not_replaced(
    made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made()
    done = publish.run(artifact, str(tmp_path / "r"), PublishSpec())
    out = tmp_path / "out"
    other = Path(
        shutil.copytree(artifact.path, out / artifact.path.relative_to(artifact.path.parents[3]))
    )
    content = json.loads((other / manifest.NAME).read_text())
    content["tools"] = {"another": "1"}
    content["sha256"] = manifest.seal(content)
    manifest.write_json(other / manifest.NAME, content)
    with pytest.raises(OutputPathError, match="another build of this version"):
        pulled(done.ref, out)
    assert json.loads((other / manifest.NAME).read_text()) == content


@pytest.mark.parametrize("which", ["model.onnx", "manifest.json", "document", "gone", "longer"])
def test_corrupted_content_is_refused(
    which: str, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made()
    place = tmp_path / "registry"
    done = publish.run(artifact, str(place), PublishSpec(tags=("latest",)))
    name = "model.onnx" if which in ("gone", "longer") else which
    if which == "document":
        victim = place / "releases" / "sha256" / done.digest.removeprefix("sha256:")
    else:
        sha = manifest.file_digest(artifact.path / name, root=artifact.path).sha256
        victim = place / "blobs" / "sha256" / sha
    good = victim.read_bytes()
    if which == "gone":
        victim.unlink()
    elif which == "longer":
        victim.write_bytes(good + b"x")
    else:
        victim.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    out = tmp_path / "out"
    for ref in (done.ref, str(place)):
        with pytest.raises(RegistryError):
            pulled(ref, out)
        assert not [path for path in out.rglob("*") if path.name == artifact.path.name]
    listed = listing.read(registries.parse(str(place)), Access())
    assert bool(listed.troubles) == (which == "document") == (not listed.rows)
    repaired = publish.run(artifact, str(place), PublishSpec())
    assert repaired.sent == (0 if which == "document" else 1)
    assert manifest.verify(pulled(done.ref, out).path)


def test_progress_is_told_in_bytes(made: Callable[..., Artifact], tmp_path: Path) -> None:
    told: list[Event] = []
    done = publish.run(made(), str(tmp_path / "r"), PublishSpec(), listen=told.append)
    pull.run(registries.parse(done.ref), tmp_path / "out", listen=told.append)
    for stage in ("publish", "pull"):
        events = [event for event in told if event.stage == stage]
        assert (events[0].kind, events[-1].kind) == ("start", "done")
        steps = [event for event in events if event.kind == "progress"]
        assert steps[-1].done == steps[-1].total > 300_000
        assert all(0 <= event.done <= event.total for event in steps)


def test_a_changed_artifact_is_not_published(made: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = made()
    (artifact.path / "model.onnx").write_bytes(b"another")
    with pytest.raises(ArtifactError):
        publish.run(artifact, str(tmp_path / "r"), PublishSpec())
    assert not (tmp_path / "r").exists()


def test_links_beside_are_not_published(made: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = made(attest=ATTEST)
    (artifact.path.with_name(f"{artifact.path.name}.attest") / "key").symlink_to("/etc/hostname")
    with pytest.raises(RegistryError, match="link or special file"):
        publish.run(artifact, str(tmp_path / "r"), PublishSpec())


def test_a_non_commercial_licence_in_public(made: Callable[..., Artifact], tmp_path: Path) -> None:
    place = tmp_path / "r"
    artifact = made(licence="CC-BY-NC-4.0")
    public = Access(public=True)
    with pytest.raises(RegistryError, match="non-commercial") as caught:
        publish.run(artifact, str(place), PublishSpec(access=public))
    assert "--accept-licence" in caught.value.fix
    assert not place.exists()
    publish.run(artifact, str(place), PublishSpec(access=public, accept_licence=True))
    publish.run(artifact, str(tmp_path / "private"), PublishSpec())
    publish.run(made(seed=3), str(tmp_path / "free"), PublishSpec(access=public))


def test_a_place_that_is_none(made: Callable[..., Artifact], tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="is not a registry"):
        pulled(str(tmp_path / "nowhere"), tmp_path / "out")
    done = publish.run(made(), str(tmp_path / "r"), PublishSpec(tags=("one",)))
    with pytest.raises(RegistryError, match="no tag 'latest'") as caught:
        pulled(str(tmp_path / "r"), tmp_path / "out")
    assert "one" in caught.value.evidence
    with pytest.raises(RegistryError, match="no release"):
        pulled(done.ref[:-4] + "0000", tmp_path / "out")
    with pytest.raises(RegistryError, match="follows from the artifact"):
        publish.run(made(seed=1), done.ref, PublishSpec())
    (tmp_path / "r" / "jexport-registry.json").write_text('{"format": 2}')
    with pytest.raises(RegistryError, match="another format"):
        publish.run(made(seed=2), str(tmp_path / "r"), PublishSpec())


def test_a_folder_of_something_else_is_left_alone(
    made: Callable[..., Artifact], files_in: Callable[[Path], Any], tmp_path: Path
) -> None:
    artifact = made()
    out = artifact.path.parents[3]
    before = files_in(out)
    with pytest.raises(RegistryError, match="a folder of something else"):
        publish.run(artifact, str(out), PublishSpec())
    assert files_in(out) == before
    (tmp_path / "empty").mkdir()
    assert publish.run(artifact, str(tmp_path / "empty"), PublishSpec()).sent


def test_on_the_command_line(
    made: Callable[..., Artifact], cli: Callable[..., Any], tmp_path: Path
) -> None:
    artifact, place = made(attest=ATTEST), tmp_path / "r"
    told = cli("publish", artifact.path, place, "--tag", "latest")
    assert told.code == 0, told.err
    [ref] = told.out.splitlines()
    assert "MIT" in told.err
    [row] = json.loads(cli("list", place, "--json").out)
    assert row["ref"] == ref
    assert row["tags"] == ["latest"]
    assert row["attested"] == sorted(ATTEST)
    content = artifact.manifest.content
    assert {key: row[key] for key in ("name", "task", "version", "licence", "precision")} == {
        key: content[key] for key in ("name", "task", "version", "licence", "precision")
    }
    table = cli("list", f"folder://{place}").out
    assert ref in table
    assert "(latest)" in table
    back = cli("pull", row["ref"], tmp_path / "out", "--quiet")
    assert (back.code, back.err) == (0, "")
    assert cli("verify", back.path, "--quiet").code == 0
    [local] = json.loads(cli("list", tmp_path / "out", "--json").out)
    assert local["path"] == str(back.path)
    refused = cli("pull", f"{place}:nightly", tmp_path / "out")
    assert (refused.code, refused.out) == (33, "")
    assert "no tag 'nightly'" in refused.err


def test_open_artifact_takes_a_ref(
    artifact: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import jexport

    monkeypatch.setenv("JEXPORT_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "r"
    found = Artifact(path=artifact, manifest=manifest.read(artifact))
    done = publish.run(found, str(place), PublishSpec(tags=("latest",)))
    with jexport.open_artifact(artifact) as model:
        wanted = model.encode(texts)
    for ref in (done.ref, f"folder://{place}:latest"):
        with jexport.open_artifact(ref) as model:
            assert (model.encode(texts) == wanted).all()
    shutil.rmtree(place)  # as good as no network: what is cached is opened by its digest alone
    with jexport.open_artifact(done.ref) as model:
        assert (model.encode(texts) == wanted).all()
    with pytest.raises(RegistryError):
        jexport.open_artifact(f"folder://{place}:latest")
    home = tmp_path / "cache" / "pulled" / done.digest.replace(":", "-")
    graph = home / artifact.name / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="not what was built"):
        jexport.open_artifact(done.ref)
    (home / artifact.name / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not what was pulled"):
        jexport.open_artifact(done.ref, verify=False)
