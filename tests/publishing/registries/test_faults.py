"""Uploads and downloads that are cut off, repeated, reordered, or whose registry keeps failing."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest, store
from jexport.errors import RegistryError
from jexport.publishing import listing, pull, registries, transfers
from jexport.publishing.registries import Access, folder
from jexport.publishing.retry import ATTEMPTS, TransientError
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact

ATTEST = {"model.sig": b"signed"}
ONE = PublishSpec(tags=("latest",), threads=1)


def refs(place: Path) -> list[str]:
    """What `list` shows, read without the faults: nothing where there is no registry yet."""
    if not folder.is_registry(place):
        return []
    found = listing.read(registries.parse(str(place)), Access())
    assert not found.troubles
    return [row.ref for row in found.rows]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_registry_that_fails_every_third_request(
    threads: int,
    made: Callable[..., Artifact],
    faults: Any,
    kinds_of_fault: Any,
    files_in: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    artifact = made(attest=ATTEST)
    faults.fail = kinds_of_fault["third"]
    spec = PublishSpec(tags=("latest", "one"), threads=threads)
    done = publish.run(artifact, str(tmp_path / "r"), spec)
    [row] = listing.read(registries.parse(str(tmp_path / "r")), Access()).rows
    assert (row.ref, row.tags) == (done.ref, ("latest", "one"))
    back = pull.run(registries.parse(str(tmp_path / "r")), tmp_path / "out", threads=threads)
    assert files_in(back.path) == files_in(artifact.path)
    assert len(faults.log) > 40
    assert len(faults.log) // 3 > 10  # so many of them failed


def test_a_registry_that_is_down_for_good(
    made: Callable[..., Artifact], faults: Any, tmp_path: Path
) -> None:
    def fail(number: int, what: str) -> None:
        raise TransientError("503 Service Unavailable")

    faults.fail = fail
    with pytest.raises(RegistryError, match=f"failed {ATTEMPTS} times") as caught:
        publish.run(made(), str(tmp_path / "r"), PublishSpec(threads=1))
    assert caught.value.evidence == "503 Service Unavailable"
    assert len(faults.log) == ATTEMPTS
    faults.fail = lambda number, what: None
    assert refs(tmp_path / "r") == []


def requests_of(call: Callable[[], object], faults: Any) -> int:
    """How many requests an undisturbed run makes."""
    faults.log.clear()
    call()
    count = len(faults.log)
    assert count > 10
    return count


@pytest.mark.rare
def test_an_upload_killed_at_each_request(
    made: Callable[..., Artifact], faults: Any, kinds_of_fault: Any, tmp_path: Path
) -> None:
    artifact, killed = made(attest=ATTEST), kinds_of_fault["killed"]
    whole = requests_of(lambda: publish.run(artifact, str(tmp_path / "whole"), ONE), faults)
    for last in range(1, whole + 1):
        place = tmp_path / f"r{last}"

        def fail(number: int, what: str, last: int = last) -> None:
            if number == last:
                raise killed

        faults.log.clear()
        faults.fail = fail
        with pytest.raises(killed):
            publish.run(artifact, str(place), ONE)
        committed = "commit done" in faults.log
        faults.fail = lambda number, what: None
        assert len(refs(place)) == int(committed)
        assert not folder.is_registry(place) or not list((place / "uploads").iterdir())
        there = sum(1 for path in (place / "blobs" / "sha256").glob("*"))
        done = publish.run(artifact, str(place), ONE)
        assert done.sent == done.files - there  # what had arrived is not sent again
        assert refs(place) == [done.ref]


@pytest.mark.parametrize("step", ["sync", "replace"])
@pytest.mark.rare
def test_an_upload_killed_at_each_write_of_the_folder(
    step: str,
    made: Callable[..., Artifact],
    kinds_of_fault: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    artifact, killed = made(attest=ATTEST), kinds_of_fault["killed"]
    room = folder if step == "sync" else folder.os
    real = getattr(room, step)
    calls = [0]
    monkeypatch.setattr(room, step, lambda *words: (calls.append(0), real(*words))[1])
    publish.run(artifact, str(tmp_path / "whole"), ONE)
    whole = len(calls) - 1
    assert whole >= 10
    for last in range(1, whole + 1):
        place, count = tmp_path / f"r{last}", [0]

        def call(*words: Any, last: int = last, count: list[int] = count) -> Any:
            count[0] += 1
            if count[0] == last:
                raise killed
            return real(*words)

        monkeypatch.setattr(room, step, call)
        with pytest.raises(killed):
            publish.run(artifact, str(place), ONE)
        monkeypatch.setattr(room, step, real)
        seen = refs(place)
        for ref in seen:  # visible: then whole
            assert manifest.verify(pull.run(registries.parse(ref), tmp_path / f"o{last}").path)
        done = publish.run(artifact, str(place), ONE)
        assert seen in ([], [done.ref])
        assert refs(place) == [done.ref]


@pytest.mark.rare
def test_a_download_killed_at_each_request(
    made: Callable[..., Artifact],
    faults: Any,
    kinds_of_fault: Any,
    files_in: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    artifact, killed = made(attest=ATTEST), kinds_of_fault["killed"]
    ref = registries.parse(publish.run(artifact, str(tmp_path / "r"), ONE).ref)
    whole = requests_of(lambda: pull.run(ref, tmp_path / "whole", threads=1), faults)
    for last in range(1, whole + 1):
        out = tmp_path / f"out{last}"

        def fail(number: int, what: str, last: int = last) -> None:
            if number == last:
                raise killed

        faults.log.clear()
        faults.fail = fail
        with pytest.raises(killed):
            pull.run(ref, out, threads=1)
        faults.fail = lambda number, what: None
        assert not list(store.artifacts(out))
        assert not (out / "m").exists()
        before = len(faults.log)
        back = pull.run(ref, out, threads=1)
        assert files_in(back.path) == files_in(artifact.path)
        again = faults.log[before:]
        assert again.count("read") + faults.log[:before].count("read") <= whole
        assert sorted(path.name for path in out.iterdir()) == ["m"]


def test_a_part_that_an_earlier_pull_left_is_gone_on_with(
    made: Callable[..., Artifact], faults: Any, tmp_path: Path
) -> None:
    artifact = made()
    done = publish.run(artifact, str(tmp_path / "r"), ONE)
    graph = (artifact.path / "model.onnx").read_bytes()
    sha = manifest.file_digest(artifact.path / "model.onnx", root=artifact.path).sha256
    asked: list[int] = []
    for name, left in (("good", graph[:1000]), ("bad", b"x" * 1000), ("long", graph + b"x")):
        room = tmp_path / name / ".pull" / done.digest.replace(":", "-")
        room.mkdir(parents=True)
        (room / f"{sha}.part").write_bytes(left)
        faults.log.clear()
        back = pull.run(registries.parse(done.ref), tmp_path / name)
        assert (back.path / "model.onnx").read_bytes() == graph
        asked.append(faults.log.count("read"))
    assert asked == [asked[0], asked[0] + 1, asked[0]]  # only what was wrong begins anew


def test_uploads_in_any_order(
    made: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact = made(attest=ATTEST)
    real = transfers.run_parallel
    found = set()
    for seed in range(8):

        def shuffled(jobs: Any, seed: int = seed, **options: Any) -> None:
            jobs = list(jobs)
            random.Random(seed).shuffle(jobs)
            real(jobs, **options)

        monkeypatch.setattr(publish, "run_parallel", shuffled)
        done = publish.run(artifact, str(tmp_path / f"r{seed}"), ONE)
        found.add(done.digest)
        assert refs(tmp_path / f"r{seed}") == [done.ref]
    assert len(found) == 1


def test_many_publishers_and_pullers_at_once(
    made: Callable[..., Artifact], files_in: Callable[[Path], Any], tmp_path: Path
) -> None:
    artifacts = [made(seed=seed, attest=ATTEST) for seed in range(3)]
    place, out = tmp_path / "r", tmp_path / "out"
    failures: list[BaseException] = []

    def work(artifact: Artifact) -> None:
        try:
            done = publish.run(artifact, str(place), PublishSpec(tags=("latest",)))
            back = pull.run(registries.parse(done.ref), out)
            assert files_in(back.path) == files_in(artifact.path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(each,)) for each in artifacts * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert len(refs(place)) == 3
    assert not list((place / "uploads").iterdir())
    assert sorted(path.name for path in out.iterdir()) == ["m"]
    pull.run(registries.parse(f"{place}:latest"), tmp_path / "other")


def test_a_full_disk_is_told_and_leaves_nothing_visible(
    made: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import errno

    from jexport.errors import DiskFullError

    def full(*words: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    done = publish.run(made(), str(tmp_path / "r"), ONE)
    monkeypatch.setattr(folder, "_copy", full)
    with pytest.raises(DiskFullError):
        publish.run(made(seed=1), str(tmp_path / "r"), ONE)
    assert refs(tmp_path / "r") == [done.ref]
    monkeypatch.setattr(pull.os, "replace", full)
    with pytest.raises(DiskFullError):
        pull.run(registries.parse(done.ref), tmp_path / "out")
    assert not list(store.artifacts(tmp_path / "out"))
