"""Timing caches: whose they are, whether they are whole, and that they are written at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from jexport.targets.trt import timing_cache
from jexport.targets.trt.device import Gpu, Machine

HERE = Machine(
    gpu=Gpu(
        name="NVIDIA GeForce RTX 3090 / x", capability="8.6", driver_cuda="13.0", total_bytes=1
    ),
    tensorrt="11.4.0.106",
    system="linux-x86_64",
)


@pytest.fixture
def where(tmp_path: Path) -> timing_cache.Place:
    return timing_cache.place(tmp_path / "deep" / "down", HERE, {"refit": False})


def test_what_is_kept_is_read(where: timing_cache.Place) -> None:
    assert timing_cache.read(where) == timing_cache.Timings(content=b"", note="timing cache: new")
    content = b"\n{raw}\n\0" * 1000
    assert timing_cache.write(where, content) == ""
    assert timing_cache.read(where).content == content
    assert [path.name for path in where.path.parent.iterdir()] == [where.path.name]


def test_the_name_says_whose_it_is(where: timing_cache.Place) -> None:
    assert where.path.name.startswith("nvidia-geforce-rtx-3090-x-cc8.6-cuda13.0-trt11.4.0.106-")


@pytest.mark.parametrize("what", ["gpu", "capability", "driver", "tensorrt", "system", "options"])
def test_another_machine_or_option_has_another_one(what: str, tmp_path: Path) -> None:
    gpu = HERE.gpu
    machine, options = HERE, {"refit": False}
    if what == "options":
        options = {"refit": True}
    elif what in ("tensorrt", "system"):
        machine = dataclasses.replace(HERE, **{what: "other"})
    else:
        key = {"gpu": "name", "driver": "driver_cuda"}.get(what, what)
        machine = dataclasses.replace(HERE, gpu=dataclasses.replace(gpu, **{key: "9.9"}))
    first = timing_cache.place(tmp_path, HERE, {"refit": False})
    second = timing_cache.place(tmp_path, machine, options)
    assert second.context != first.context
    # a file of the first, found under the second's name, is left out
    timing_cache.write(first, b"timings")
    first.path.rename(second.path)
    found = timing_cache.read(second)
    assert found.content == b""
    assert "another machine" in found.note


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is not one"),
        (b"TensorRT's own format", "is not one"),
        (b"\xff\xfe\x00" * 3000, "is not one"),
        (b"[1, 2]\nabc", "is not one"),
        (b'{"format": 2}\nabc', "is not one"),
        (b"{" * 5000 + b"\n", "is not one"),
    ],
)
def test_a_file_that_is_no_cache(raw: bytes, said: str, where: timing_cache.Place) -> None:
    where.path.parent.mkdir(parents=True)
    where.path.write_bytes(raw)
    found = timing_cache.read(where)
    assert found.content == b""
    assert said in found.note
    assert where.path.name in found.note


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_a_damaged_file(cut: int, where: timing_cache.Place) -> None:
    timing_cache.write(where, b"timings" * 100)
    raw = where.path.read_bytes()
    where.path.write_bytes(raw[:-cut] if cut > 0 else raw + b".")
    found = timing_cache.read(where)
    assert found.content == b""
    assert "damaged" in found.note


def test_a_place_that_cannot_be_used_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    where = timing_cache.place(tmp_path / "file", HERE, {})
    assert timing_cache.write(where, b"x").startswith("timing cache not kept: ")
    assert timing_cache.read(where).note.startswith("timing cache not used: ")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_write_that_fails_leaves_the_old_one(
    where: timing_cache.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing_cache.write(where, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(timing_cache.os, "fsync", full)
    assert timing_cache.write(where, b"new") == "timing cache not kept: No space left on device"
    assert timing_cache.read(where).content == b"old"
    assert [path.name for path in where.path.parent.iterdir()] == [where.path.name]


def test_the_header_names_the_digest(where: timing_cache.Place) -> None:
    timing_cache.write(where, b"abc")
    header = json.loads(where.path.read_bytes().splitlines()[0])
    assert header["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert header["made_for"]["tensorrt"] == "11.4.0.106"
