"""The user's cache of pulled releases: what goes first, what stays, and what is found damaged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jexport
from jexport.artifacts import manifest
from jexport.cache import entries
from jexport.errors import ArtifactError, CacheError, RegistryError
from jexport.publishing import pull_cache
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact

SCRIPT = Path(__file__).with_name("opening.py")
PROJECT = Path(str(jexport.__file__)).parents[1]
GIB = 1 << 30


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of all pulled releases, of this test only."""
    monkeypatch.setenv("JEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JEXPORT_CACHE_GIB", raising=False)
    return tmp_path / "cache" / "pulled"


@pytest.fixture
def refs(made: Callable[..., Artifact], tmp_path: Path) -> list[str]:
    """Four published releases of equal size."""
    return [
        publish.run(
            made(seed=seed, attest={"model.sig": b"signed"}),
            f"folder://{tmp_path / 'registry'}",
            PublishSpec(),
        ).ref
        for seed in range(4)
    ]


def name_of(ref: str) -> str:
    return ref.rpartition("@")[2].replace(":", "-")


def kept(place: Path) -> set[str]:
    return {path.name for path in place.glob("sha256-*")}


def open_in_turn(place: Path, refs: list[str]) -> None:
    """Open and close each; the first the longest ago."""
    for age, ref in enumerate(reversed(refs)):
        with pull_cache.opened(ref) as folder:
            assert manifest.verify(folder)
        os.utime(place / name_of(ref) / pull_cache.RELEASE, (1e9 - age, 1e9 - age))


def size_of_one(place: Path) -> int:
    [first, *_] = pull_cache.listed(place)
    return first.size_bytes


def limit(monkeypatch: pytest.MonkeyPatch, size_bytes: float) -> None:
    monkeypatch.setenv("JEXPORT_CACHE_GIB", f"{size_bytes / GIB:.9f}")


def test_the_one_opened_least_recently_goes_first(
    refs: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_in_turn(place, refs[:3])
    assert kept(place) == {name_of(ref) for ref in refs[:3]}
    limit(monkeypatch, 2.5 * size_of_one(place))
    with pull_cache.opened(refs[0]):  # it was the first to go, and is now the last
        assert kept(place) == {name_of(refs[0]), name_of(refs[2])}
    with pull_cache.opened(refs[3]) as folder:
        assert kept(place) == {name_of(refs[0]), name_of(refs[3])}
        assert manifest.verify(folder)
    limit(monkeypatch, 0)
    with pull_cache.opened(
        refs[1]
    ) as folder:  # larger than all that may be, and there all the same
        assert kept(place) == {name_of(refs[1])}
        assert manifest.verify(folder)


def test_what_is_open_stays_until_it_is_closed(
    refs: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_in_turn(place, refs[:2])
    limit(monkeypatch, 0)
    with pull_cache.opened(refs[0]) as folder:
        assert kept(place) == {name_of(refs[0])}
        with pull_cache.opened(refs[2]):
            assert kept(place) == {name_of(refs[0]), name_of(refs[2])}
        assert [one.name for one in pull_cache.shrink(place, 0)] == [name_of(refs[2])]
        assert manifest.verify(folder)
    assert [one.name for one in pull_cache.shrink(place, 0)] == [name_of(refs[0])]
    assert not place.exists()


def test_an_open_artifact_stays_until_it_is_closed(
    artifact: Path, place: Path, tmp_path: Path, texts: list[str]
) -> None:
    found = Artifact(path=artifact, manifest=manifest.read(artifact))
    ref = publish.run(found, f"folder://{tmp_path / 'r'}", PublishSpec()).ref
    model = jexport.open_artifact(ref)
    assert pull_cache.shrink(place, 0) == []
    assert model.encode(texts).shape[0] == len(texts)
    model.close()
    with pytest.raises(TypeError, match="verify"):
        jexport.open_artifact(ref, verify="key.pub")  # type: ignore[arg-type]
    assert [one.name for one in pull_cache.shrink(place, 0)] == [name_of(ref)]  # neither holds it


def test_a_failed_pull_leaves_nothing_behind(refs: list[str], place: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "registry")
    with pytest.raises(RegistryError), pull_cache.opened(refs[0]):
        pass
    assert not place.exists() or list(place.iterdir()) == []


def test_one_that_was_removed_by_hand_is_pulled_again(refs: list[str], place: Path) -> None:
    for _ in range(2):
        with pull_cache.opened(refs[0]) as folder:
            assert manifest.verify(folder)
        shutil.rmtree(place / name_of(refs[0]))


def test_a_cache_that_may_only_be_read(
    refs: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_in_turn(place, refs[:1])
    shutil.rmtree(place / entries.LOCKS, ignore_errors=True)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(entries, "lock", refused)
    monkeypatch.setattr(os, "utime", refused)
    with pull_cache.opened(refs[0]) as folder:
        assert manifest.verify(folder)


@pytest.mark.parametrize("said", ["much", "-1", "1e3", "nan", "inf", "٣"])
def test_a_limit_that_is_none(
    said: str, refs: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEXPORT_CACHE_GIB", said)
    with (
        pytest.raises(CacheError, match="JEXPORT_CACHE_GIB is not a size"),
        pull_cache.opened(refs[0]),
    ):
        pass
    assert not place.exists()


def test_the_usual_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pull_cache.limit_bytes() == 32 * GIB
    monkeypatch.setenv("JEXPORT_CACHE_GIB", "0.5")
    assert pull_cache.limit_bytes() == GIB // 2


def test_many_processes_at_once(refs: list[str], place: Path, tmp_path: Path) -> None:
    # Room for one release: every process removes what the others are about to open.
    open_in_turn(place, refs[:1])
    room = f"{1.5 * size_of_one(place) / GIB:.9f}"
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(seed), "25", *refs],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "JEXPORT_CACHE_GIB": room},
        )
        for seed in range(4)
    ]
    answers = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * 4, answers
    assert sum(int(out.split()[0]) for out, _ in answers) == 100
    assert sum(int(out.split()[1]) for out, _ in answers) > 4  # some were pulled again
    removed = pull_cache.shrink(place, 0)
    assert removed
    assert "damaged" not in {one.about for one in removed}
    assert not place.exists()  # no lock, no room, no half of a release


def test_on_the_command_line(
    refs: list[str],
    place: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert cli("cache", "ls", "--pulled").out == ""
    open_in_turn(place, refs)
    rows = json.loads(cli("cache", "ls", "--pulled", "--json").out)
    assert [row["name"] for row in rows] == [name_of(ref) for ref in refs]
    assert {row["stage"] for row in rows} == {"pulled"}
    assert rows[0]["about"].startswith("m none onnx fp32 1.0.0-")
    told = cli("cache", "ls", "--pulled")
    assert told.out.splitlines()[0].split()[:2] == ["pulled", name_of(refs[0])[7:19]]
    assert told.err.startswith("4 entries, ")
    assert told.err.endswith(f"in {place}\n")
    assert cli("cache", "verify", "--pulled").out == "4 entries, all as they were kept\n"
    assert cli("cache", "ls", "--out", tmp_path / "out").out == ""  # the other cache
    for words in (("--out", tmp_path), ("--cache", tmp_path)):
        assert cli("cache", "gc", "--pulled", *words).code == 2
    assert cli("cache", "gc", "--pulled").out.startswith("0 entries removed")
    size = rows[0]["size_bytes"]
    answer = cli("cache", "gc", "--pulled", "--limit", f"{2.5 * size / GIB:.9f}")
    assert answer.out.startswith("2 entries removed, ")
    assert kept(place) == {name_of(ref) for ref in refs[2:]}
    limit(monkeypatch, 1.5 * size)
    assert cli("cache", "gc", "--pulled").out.startswith("1 entries removed, ")
    with pull_cache.opened(refs[3]):
        assert cli("cache", "gc", "--pulled", "--limit", 0).out.startswith("0 entries removed")
    assert cli("cache", "gc", "--pulled", "--limit", 0).out.startswith("1 entries removed")
    assert not place.exists()


@pytest.mark.parametrize(
    "harm", ["flip", "gone", "extra", "link", "signature", "record", "no record"]
)
def test_damage_is_shown_and_removed(
    harm: str, refs: list[str], place: Path, cli: Callable[..., Any]
) -> None:
    open_in_turn(place, refs[:2])
    home = place / name_of(refs[0])
    with pull_cache.opened(refs[0]) as folder:
        pass
    graph = folder / "model.onnx"
    if harm == "flip":
        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    elif harm == "gone":
        graph.unlink()
    elif harm == "extra":
        (folder / "evil.py").touch()
    elif harm == "link":
        graph.rename(home.parent.parent / "elsewhere")
        graph.symlink_to(home.parent.parent / "elsewhere")
    elif harm == "signature":
        (folder.with_name(f"{folder.name}.attest") / "model.sig").write_bytes(b"another")
    elif harm == "record":
        (home / pull_cache.RELEASE).write_text("{}")
    else:
        (home / pull_cache.RELEASE).unlink()
    answer = cli("cache", "verify", "--pulled")
    assert (answer.code, answer.out) == (37, "")
    assert f"{home.name}: " in answer.err
    assert "1 of 2" in answer.err
    assert "--pulled --remove" in answer.err
    about = {
        row["name"]: row["about"]
        for row in json.loads(cli("cache", "ls", "--pulled", "--json").out)
    }
    assert (about[home.name] == "damaged") == (harm in ("record", "no record"))
    assert cli("cache", "verify", "--pulled", "--remove").code == 0
    assert kept(place) == {name_of(refs[1])}
    with pull_cache.opened(refs[0]) as folder:
        assert manifest.verify(folder)


def test_what_stopped_pulls_left_goes_with_gc(
    refs: list[str], place: Path, faults: Any, kinds_of_fault: Any, cli: Callable[..., Any]
) -> None:
    def fail(number: int, what: str) -> None:
        if what == "chunk" and faults.log.count("chunk") > 3:
            raise kinds_of_fault["killed"]

    faults.fail = fail
    with contextlib.suppress(kinds_of_fault["killed"]), pull_cache.opened(refs[0]):
        pass
    assert list(place.glob(".pull/sha256-*/*"))
    assert cli("cache", "gc", "--pulled").code == 0
    assert not place.exists()


def test_a_changed_release_is_not_opened(refs: list[str], place: Path) -> None:
    with pull_cache.opened(refs[0]) as folder:
        pass
    (folder / manifest.NAME).write_text("{}")
    with pytest.raises(ArtifactError, match="--pulled --remove"), pull_cache.opened(refs[0]):
        pass
    assert pull_cache.remove_damaged(place, name_of(refs[0]))  # nobody holds it
