"""What runs on a node, in this process: the stream of one job."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest
from jexport.building import cache_keys
from jexport.errors import ClusterError, ParityError
from jexport.jobs.matrix import Job
from jexport.jobs.ray import node
from jexport.jobs.result import error_to_dict
from jexport.types import Artifact
from jexport.workspace.run import Event

JOB = Job(task="a", target="onnx", precision="fp32")


@pytest.fixture(autouse=True)
def name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Ray knows what a node is called."""
    monkeypatch.setattr(node, "_name", lambda: "here (1234)")


@pytest.fixture
def order(tmp_path: Path) -> Callable[..., node.JobRequest]:
    def make(**changes: Any) -> node.JobRequest:
        kept = {"job": JOB, "code": cache_keys.code_digest(), "held": (), "sent": None}
        return node.JobRequest(**{**kept, "node_dir": tmp_path / "scratch", **changes})

    return make


def test_events_come_while_the_job_runs_then_its_files(
    artifact: Path, order: Callable[..., node.JobRequest], tmp_path: Path
) -> None:
    heard_of = threading.Event()

    def build(job: Job, place: node.Place, listen: Any) -> Artifact:
        assert job == JOB
        assert place.out.is_relative_to(tmp_path / "scratch")
        assert (place.kept, place.checkpoint) == (tmp_path / "scratch", None)
        listen(Event(kind="start", stage="load"))
        assert heard_of.wait(20), "events only come when the job has ended"
        for number in range(50):
            listen(Event(kind="progress", stage="load", done=number, total=50))
        listen(Event(kind="progress", stage="load", done=50, total=50))
        return Artifact(path=artifact, manifest=manifest.read(artifact))

    stream = node.work(build, order())
    assert next(stream) == node.Started(node="here (1234)")
    assert next(stream) == node.EventMessage(event=Event(kind="start", stage="load"))
    heard_of.set()
    rest = []
    with contextlib.suppress(StopIteration):
        while True:
            rest.append(stream.send("what Ray sends"))  # type: ignore[attr-defined]
    bars = [one.event.done for one in rest if isinstance(one, node.EventMessage)]
    assert bars[-1] == 50
    assert len(bars) < 10  # the last, and one each half second
    sent = {one.path for one in rest if isinstance(one, node.FileChunk)}
    assert sent == {one["path"] for one in manifest.read(artifact).content["files"]}
    assert isinstance(rest[-1], node.EndOfArtifact)
    assert not list((tmp_path / "scratch").iterdir())


def test_an_artifact_that_is_not_whole_is_not_sent(
    artifact: Path, order: Callable[..., node.JobRequest]
) -> None:
    def build(job: Job, place: node.Place, listen: Any) -> Artifact:
        import shutil

        shutil.copytree(artifact, place.out)
        (place.out / "README.md").write_text("changed")
        return Artifact(path=place.out, manifest=manifest.read(place.out))

    *_, last = node.work(build, order())
    assert isinstance(last, node.Refused)
    assert last.error["kind"] == "ArtifactError"
    assert "README.md" in last.error["evidence"]


def test_a_bug_keeps_its_traceback(order: Callable[..., node.JobRequest], tmp_path: Path) -> None:
    def build(*words: Any) -> Artifact:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        list(node.work(build, order()))
    assert any(entry.name == "build" for entry in caught.traceback)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_job_that_is_not_wanted_ends_at_its_next_event(
    order: Callable[..., node.JobRequest], tmp_path: Path
) -> None:
    ended: list[str] = []

    def build(job: Job, place: node.Place, listen: Any) -> Artifact:
        try:
            while True:
                listen(Event(kind="note", stage="load"))
        finally:
            ended.append("cleaned up")

    stream = node.work(build, order())
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert ended == ["cleaned up"]
    assert not list((tmp_path / "scratch").iterdir())


def test_another_jexport_is_refused(order: Callable[..., node.JobRequest]) -> None:
    [_, last] = node.work(lambda *words: pytest.fail("was started"), order(code="0" * 64))
    assert isinstance(last, node.Refused)
    assert "node here (1234) has another jexport" in str(node.rebuilt(last, Path()))


def test_a_scratch_folder_of_somebody_else_is_refused(
    order: Callable[..., node.JobRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path)
    [_, last] = node.work(lambda *words: pytest.fail("started"), order(node_dir=tmp_path / "link"))
    assert isinstance(last, node.Refused)
    assert (last.error["kind"], last.error["what"][:14]) == ("OutputPathError", "cannot work in")
    own = node._owned_folder(None)
    assert own.parent == tmp_path
    assert own.stat().st_uid == os.getuid()
    assert own.stat().st_mode & 0o077 == 0


def test_an_error_names_files_where_they_are_here() -> None:
    error = ParityError("w", evidence="in /n/a/b", fix="f")
    error.add_note("/n/ab and /n/a/c")
    refused = node.Refused(out="/n/a", error=error_to_dict(error))
    back: Any = node.rebuilt(refused, Path("/here"))
    assert (type(back), back.exit_code) == (ParityError, ParityError.exit_code)
    assert (back.what, back.evidence, back.fix) == ("w", "in /here/b", "f")
    assert back.__notes__ == ["/n/ab and /here/c"]


@pytest.mark.parametrize("kind", ["Path", "TypeVar", "NoSuchError", ""])
def test_a_node_names_no_class_but_an_error(kind: str) -> None:
    parts = {"kind": kind, "what": "w", "evidence": "e", "fix": "f", "notes": []}
    back = node.rebuilt(node.Refused(out="/n/a", error=parts), Path("/here"))
    assert type(back) is RuntimeError


def test_reports_of_a_failed_build_come_before_its_error(
    order: Callable[..., node.JobRequest],
) -> None:
    def build(job: Job, place: node.Place, listen: Any) -> Artifact:
        room = place.out / "model" / "a" / "onnx-fp32"
        (room / "1.0.0").mkdir(parents=True)
        (room / "1.0.0" / "inside.json").write_text("not this")
        (room / "1.0.0.failed.json").write_text("{}")
        raise ParityError("w", evidence="e", fix="f")

    stream: Any = node.work(build, order())
    next(stream)
    report, last = stream.send("what Ray sends"), stream.send("what Ray sends")
    assert report == node.SidecarFile(path="model/a/onnx-fp32/1.0.0.failed.json", content=b"{}")
    assert isinstance(last, node.Refused)


def test_a_node_without_jexport() -> None:
    class Wrapped(Exception):
        cause = ModuleNotFoundError("No module named 'jexport'", name="jexport")

    assert isinstance(node.explained(Wrapped()), ClusterError)
    other = Wrapped()
    other.cause = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert node.explained(other) is other
    plain = ParityError("w", evidence="e", fix="f")
    assert node.explained(plain) is plain
