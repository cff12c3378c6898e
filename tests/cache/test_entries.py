"""entries: whole or not at all, verified when read, the least recently used out first."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jexport.cache import entries
from jexport.cache.entries import CONTENT, MAKE, USE, Damaged


def kept(root: Path, name: str, *, size: int = 10, used_s: float = 0.0) -> Path:
    """An entry of two files, one in a folder."""
    room = root / ".work" / f"room-{name}"
    (room / CONTENT / "inside").mkdir(parents=True)
    (room / CONTENT / "a").write_bytes(b"a" * size)
    (room / CONTENT / "inside" / "b").write_bytes(b"b")
    entries.put(root, name, room, {"said": [1, "two"]}, f"about {name}")
    if used_s:
        os.utime(root / name / entries.RECORD, (used_s, used_s))
    return root / name


def test_what_is_put_is_read(tmp_path: Path) -> None:
    assert entries.read(tmp_path, "x-1") is None
    folder = kept(tmp_path, "x-1", used_s=1.0)
    record = entries.read(tmp_path, "x-1")
    assert record is not None
    assert record["value"] == {"said": [1, "two"]}
    assert [one["path"] for one in record["files"]] == ["a", "inside/b"]
    assert (folder / entries.RECORD).stat().st_mtime > 1e9  # reading is using
    [one] = entries.listed(tmp_path)
    assert (one.name, one.about) == ("x-1", "about x-1")
    assert one.size_bytes > 11


@pytest.mark.parametrize(
    "harm",
    [
        "flip",
        "cut",
        "grow",
        "remove",
        "extra",
        "link",
        "record",
        "value",
        "other name",
        "no record",
    ],
)
def test_any_damage_is_seen(harm: str, tmp_path: Path) -> None:
    folder = kept(tmp_path, "x-1")
    file, record = folder / CONTENT / "a", folder / entries.RECORD
    if harm == "flip":
        file.write_bytes(b"a" * 9 + b"b")
    elif harm in ("cut", "grow"):
        file.write_bytes(b"a" * (9 if harm == "cut" else 11))
    elif harm == "remove":
        file.unlink()
    elif harm == "extra":
        (folder / CONTENT / "c").touch()
    elif harm == "link":
        file.unlink()
        file.symlink_to("inside/b")
    elif harm == "record":
        record.write_text("{")
    elif harm == "value":
        said = json.loads(record.read_text())
        said["value"] = {"said": "another"}
        record.write_text(json.dumps(said))
    elif harm == "other name":
        folder = folder.rename(tmp_path / "x-2")
    else:
        record.unlink()
    with pytest.raises(Damaged):
        entries.read(tmp_path, folder.name)
    [(name, problem)] = entries.verify(tmp_path)
    assert name == folder.name
    assert problem
    assert entries.remove_damaged(tmp_path, name)
    assert list(tmp_path.glob("[!.]*")) == []


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    for number, name in enumerate(("x-1", "x-2", "x-3")):
        kept(tmp_path, name, size=1000, used_s=100.0 + number)
    assert entries.read(tmp_path, "x-1") is not None  # used now
    size = entries.listed(tmp_path)[0].size_bytes
    assert [one.name for one in entries.shrink(tmp_path, 2 * size + 50)] == ["x-2"]
    assert [one.name for one in entries.listed(tmp_path)] == ["x-3", "x-1"]
    assert [one.name for one in entries.shrink(tmp_path, 0)] == ["x-3", "x-1"]
    assert not tmp_path.exists()  # nothing is left of a cache with nothing in it


@pytest.mark.parametrize("kind", [MAKE, USE])
def test_what_is_in_use_stays(kind: str, tmp_path: Path) -> None:
    kept(tmp_path, "x-1", size=1000, used_s=1.0)
    kept(tmp_path, "x-2", size=1000, used_s=2.0)
    held = entries.lock(tmp_path, "x-1", kind, shared=kind == USE, wait=False)
    assert held is not None
    with held:
        assert [one.name for one in entries.shrink(tmp_path, 0)] == ["x-2"]
        assert entries.read(tmp_path, "x-1") is not None
    assert [one.name for one in entries.shrink(tmp_path, 0)] == ["x-1"]


def test_leavings_of_killed_writers_are_swept(tmp_path: Path) -> None:
    kept(tmp_path, "x-1")
    dead = tmp_path / ".work" / "123-dead"
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(b"half")
    (tmp_path / ".work" / "123-dead.lock").touch()
    gone = entries.lock(tmp_path, "x-gone", MAKE, shared=False, wait=False)
    assert gone is not None
    gone.close()
    assert entries.shrink(tmp_path, 1 << 20) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-1"]


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    first = entries.lock(tmp_path, "x-1", MAKE, shared=False, wait=False)
    assert first is not None
    assert entries.lock(tmp_path, "x-1", MAKE, shared=False, wait=False) is None
    (tmp_path / entries.LOCKS / f"x-1{MAKE}").unlink()
    second = entries.lock(tmp_path, "x-1", MAKE, shared=False, wait=False)
    assert second is not None
    assert os.fstat(second.fileno()).st_ino != os.fstat(first.fileno()).st_ino
    first.close()
    second.close()
