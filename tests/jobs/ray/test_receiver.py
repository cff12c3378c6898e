"""An artifact that comes in pieces: placed when it is what its manifest says, else refused."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest
from jexport.errors import ArtifactError
from jexport.jobs.matrix import Job
from jexport.jobs.ray import node, receiver
from jexport.workspace import run


def messages(folder: Path, held: tuple[str, ...] = ()) -> list[Any]:
    """What a node sends of an artifact, by the code that runs there."""
    return list(node._sent(folder, held))


@pytest.fixture
def take(tmp_path: Path) -> Iterator[Callable[[list[Any]], Any]]:
    """Take messages as the driver does; afterwards nothing half-made may be left."""
    out = tmp_path / "out"

    def heed(heard: list[Any]) -> Any:
        with run.open_run(out) as room:
            first, *rest = heard
            arriving = receiver.Receiver(first, room.folder, out)
            try:
                if first.is_held:
                    return arriving.held()
                for one in rest:
                    if isinstance(one, node.EndOfArtifact):
                        return arriving.place()
                    arriving.write(one)
            finally:
                arriving.drop()
            return None

    yield heed
    assert not (out / run.WORK).exists()


def test_what_was_sent_is_placed(artifact: Path, take: Any, tmp_path: Path) -> None:
    heard = messages(artifact)
    assert isinstance(heard[-1], node.EndOfArtifact)
    made = take(heard)
    assert made.path.is_relative_to(tmp_path / "out")
    assert manifest.verify(made.path).content == manifest.read(artifact).content
    assert (made.path.parent / "latest").resolve() == made.path.resolve()


def test_a_version_that_is_here_is_not_sent(artifact: Path, take: Any, tmp_path: Path) -> None:
    made = take(messages(artifact))
    content = made.manifest.content
    job = Job(task=content["task"], target=content["target"], precision=content["precision"])
    held = receiver.versions(tmp_path / "out", job)
    assert held == (content["version"],)
    assert receiver.versions(tmp_path / "out", Job(task="*", target="onnx", precision="fp32")) == ()
    [only] = messages(artifact, held)
    assert take([only]).path == made.path
    shutil.rmtree(made.path)
    with pytest.raises(ArtifactError, match="refused"):
        take([only])


@pytest.mark.parametrize("how", ["changed", "longer", "missing", "unlisted", "twice", "escaping"])
def test_pieces_that_are_not_the_artifact(
    how: str, artifact: Path, take: Any, tmp_path: Path
) -> None:
    heard = messages(artifact)
    at = next(n for n, one in enumerate(heard) if isinstance(one, node.FileChunk) and one.content)
    piece = heard[at]
    spoilt = {
        "changed": [
            node.FileChunk(
                path=piece.path, content=bytes([piece.content[0] ^ 1]) + piece.content[1:]
            )
        ],
        "longer": [node.FileChunk(path=piece.path, content=piece.content + b"!" * 2**20)],
        "missing": [],
        "unlisted": [piece, node.FileChunk(path="more.bin", content=b"x")],
        "twice": [piece, heard[at + 1], piece],
        "escaping": [node.FileChunk(path="../../../evil", content=b"x")],
    }
    with pytest.raises(ArtifactError):
        take([*heard[:at], *spoilt[how], *heard[at + 1 :]])
    assert not list((tmp_path).rglob("evil"))
    assert not list((tmp_path / "out").rglob(manifest.NAME))


def test_a_manifest_that_is_not_the_announced_one(artifact: Path, take: Any) -> None:
    first, *rest = messages(artifact)
    wrong = node.ArtifactHeader(manifest=first.manifest + b" ", sha256=first.sha256, is_held=False)
    with pytest.raises(ArtifactError, match="refused"):
        take([wrong, *rest])
    other = first.manifest.replace(b'"fp32"', b'"fp16"')
    sealed_wrong = node.ArtifactHeader(
        manifest=other, sha256=hashlib.sha256(other).hexdigest(), is_held=False
    )
    with pytest.raises(ArtifactError, match="is not what was built"):
        take([sealed_wrong, *rest])


def test_a_report_is_put_beside_the_versions(tmp_path: Path) -> None:
    job = Job(task="a", target="hf", precision="fp32")
    room, out = tmp_path / "room", tmp_path / "out"
    room.mkdir()
    for content in (b"{}", b"[]"):
        sent = node.SidecarFile(path="model/a/hf-fp32/1.failed.json", content=content)
        receiver.keep_beside(sent, job, room, out)
        assert (out / sent.path).read_bytes() == content
    (out / "model/a/hf-fp32/1.json").mkdir()
    for path in (
        "../a/hf-fp32/x.json",
        "model/b/hf-fp32/x.json",
        "model/a/hf-bf16/x.json",
        "x.json",
        "model/a/hf-fp32/x.sh",
        "model/a/hf-fp32/1.0/x.json",
        "/etc/a/hf-fp32/x.json",
        "model/a/hf-fp32/1.json",
        "model/a/hf-fp32/latest",
    ):
        with pytest.raises(ArtifactError):
            receiver.keep_beside(node.SidecarFile(path=path, content=b"x"), job, room, out)
    assert not list(room.iterdir())
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["1.failed.json"]
