"""cache: one builder for a key, the others wait; a cache that fails costs time and nothing else."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jexport.cache import entries, stages
from jexport.cache.stages import Cache, StageKey
from jexport.types import CompiledModel, OnnxModel, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
    outputs=(TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", 4)),),
)
BUILDERS = 32


def wanted(key: object = 1, **more: object) -> StageKey:
    return StageKey(stage="compile", inputs={"key": key}, description="a thing", **more)  # type: ignore[arg-type]


def compiled(folder: Path, content: bytes = b"engine") -> CompiledModel:
    (folder / "model.bin").write_bytes(content)
    return CompiledModel(
        target="t",
        precision="fp32",
        folder=folder,
        files=("model.bin",),
        signature=SIGNATURE,
        facts={"sizes": (1, 2), "fused": {"a": 1}},
    )


class Maker:
    """Counts how often it was asked to make something."""

    def __init__(self, content: bytes = b"engine", wait_s: float = 0.0) -> None:
        self.calls, self.content, self.wait_s = 0, content, wait_s

    def __call__(self, folder: Path) -> CompiledModel:
        self.calls += 1
        time.sleep(self.wait_s)
        return compiled(folder, self.content)


@pytest.fixture
def spare(tmp_path: Path) -> Callable[[], Path]:
    def make() -> Path:
        folder = tmp_path / "spare"
        folder.mkdir()
        return folder

    return make


def never() -> Path:
    raise AssertionError("the cache was not used")


def test_made_once_and_the_same_for_all_who_ask(tmp_path: Path) -> None:
    store, maker, told = Cache(root=tmp_path / "c"), Maker(), []
    with store.lease() as lease:
        first = lease.get_or_build(wanted(), maker, work_dir=never, notify=told.append)
        assert told == []
        assert first.folder.parent.parent == tmp_path / "c"
    with Cache(root=tmp_path / "c").lease() as lease:
        second = lease.get_or_build(wanted(), maker, work_dir=never, notify=told.append)
    assert (maker.calls, told) == (1, ["from the cache"])
    assert first == second  # facts went through JSON for both
    assert second.facts["sizes"] == [1, 2]
    assert second.signature == SIGNATURE
    assert store.peek(wanted()) is not None
    assert store.peek(wanted(2)) is None


def test_a_graph_too(tmp_path: Path) -> None:
    def make(folder: Path) -> OnnxModel:
        (folder / "model.onnx").write_bytes(b"graph")
        return OnnxModel(
            path=folder / "model.onnx",
            signature=SIGNATURE,
            precision="fp32",
            opset=20,
            sha256="0" * 64,
            max_tokens=9,
        )

    with Cache(root=tmp_path).lease() as lease:
        made = lease.get_or_build(wanted(), make, work_dir=never)
        again = lease.get_or_build(wanted(), make, work_dir=never)
        assert made == again
        assert made.path.read_bytes() == b"graph"


@pytest.mark.parametrize("off", ["no cache", "nothing decides it"])
def test_without_a_cache(off: str, tmp_path: Path, spare: Callable[[], Path]) -> None:
    root = None if off == "no cache" else tmp_path / "c"
    asked = StageKey(stage="compile", inputs=None) if root else wanted()
    with Cache(root=root).lease() as lease:
        made = lease.get_or_build(asked, Maker(), work_dir=spare)
        assert made.folder == tmp_path / "spare"
        lease.copy_or_move(made.folder / "model.bin", tmp_path / "taken")
        assert not (made.folder / "model.bin").exists()  # moved
    assert [p.name for p in tmp_path.iterdir()] == ["spare", "taken"] or root is None


def test_taking_leaves_the_cache_whole_and_links_nothing(tmp_path: Path) -> None:
    with Cache(root=tmp_path / "c").lease() as lease:
        made = lease.get_or_build(wanted(), Maker(bytes(3 << 20)), work_dir=never)
        lease.copy_or_move(made.folder / "model.bin", tmp_path / "taken")
    assert (tmp_path / "taken").read_bytes() == bytes(3 << 20)
    assert (tmp_path / "taken").stat().st_nlink == 1
    assert [problem for _, problem in entries.verify(tmp_path / "c")] == [""]


def test_a_copy_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(5000)
    (tmp_path / "a").write_bytes(content)
    real, calls = os.copy_file_range, []

    def some_then_refuse(source: int, place: int, count: int) -> int:
        calls.append(count)
        if len(calls) > 1:
            raise OSError(22, "Invalid argument")
        return real(source, place, 1234)  # a short write

    monkeypatch.setattr(os, "copy_file_range", some_then_refuse)
    stages.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content
    assert calls == [5000, 5000 - 1234]


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    told: list[str] = []
    with Cache(root=tmp_path).lease() as lease:
        made = lease.get_or_build(wanted(), Maker(), work_dir=never)
    (made.folder / "model.bin").write_bytes(b"enginf")
    maker = Maker()
    with Cache(root=tmp_path).lease() as lease:
        again = lease.get_or_build(wanted(), maker, work_dir=never, notify=told.append)
        assert (again.folder / "model.bin").read_bytes() == b"engine"
    assert maker.calls == 1
    assert "model.bin was changed" in told[0]
    assert not (tmp_path / ".work").exists()


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> CompiledModel:
        (folder / "half").touch()
        raise ValueError("no")

    with Cache(root=tmp_path / "c").lease() as lease, pytest.raises(ValueError, match="no"):
        lease.get_or_build(wanted(), fail, work_dir=never)
    assert not (tmp_path / "c").exists()


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, spare: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").write_text("a file in its place")
    told: list[str] = []
    with Cache(root=tmp_path / "c").lease() as lease:
        made = lease.get_or_build(wanted(), Maker(), work_dir=spare, notify=told.append)
    assert made.folder == tmp_path / "spare"
    assert told[0].startswith("without the cache: ")
    assert (tmp_path / "c").read_text() == "a file in its place"


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_what_cannot_be_kept_is_used_by_this_build(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    told: list[str] = []
    with Cache(root=tmp_path / "c").lease() as lease:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            made = lease.get_or_build(wanted(), Maker(), work_dir=never, notify=told.append)
        lease.copy_or_move(made.folder / "model.bin", tmp_path / "taken")
        assert not (made.folder / "model.bin").exists()
    assert told == ["not kept in the cache: [Errno 28] No space left on device"]
    assert not (tmp_path / "c").exists()


def test_no_second_copy_on_a_disk_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    told: list[str] = []
    with Cache(root=tmp_path / "c").lease() as lease:
        lease.get_or_build(wanted(1, copied=True), Maker(), work_dir=never, notify=told.append)
        assert told == ["not kept in the cache: 0 MiB are free"]
        lease.get_or_build(wanted(2), Maker(), work_dir=never, notify=told.append)
    assert len(entries.listed(tmp_path / "c")) == 1


def test_bounded_and_never_what_this_build_uses(tmp_path: Path) -> None:
    store = Cache(root=tmp_path, limit_bytes=2500)
    for number in range(5):
        with store.lease() as lease:
            for place in (number, number + 100):
                made = lease.get_or_build(wanted(place), Maker(bytes(500)), work_dir=never)
                assert (made.folder / "model.bin").is_file()
    assert 1 <= len(entries.listed(tmp_path)) <= 3
    assert store.peek(wanted(104))


@pytest.mark.parametrize("keys", [1, BUILDERS])
def test_many_builders_at_once(keys: int, tmp_path: Path) -> None:
    """Of one key and of as many as there are builders, in threads that share nothing."""
    makers = [Maker(b"%d" % key, wait_s=0.05) for key in range(keys)]
    together, found, trouble = threading.Barrier(BUILDERS, timeout=60), [], []

    def build(number: int) -> None:
        key = number % keys
        try:
            with Cache(root=tmp_path).lease() as lease:
                together.wait()
                made = lease.get_or_build(wanted(key), makers[key], work_dir=never)
                found.append((key, (made.folder / "model.bin").read_bytes()))
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=build, args=(number,)) for number in range(BUILDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trouble == []
    assert sorted(found) == sorted((n % keys, b"%d" % (n % keys)) for n in range(BUILDERS))
    assert [maker.calls for maker in makers] == [1] * keys
    assert len(entries.listed(tmp_path)) == keys
    assert all(not problem for _, problem in entries.verify(tmp_path))
    assert not (tmp_path / ".work").exists()


def test_builders_while_others_remove_and_damage(tmp_path: Path) -> None:
    stop, trouble = threading.Event(), []

    def remove() -> None:
        while not stop.is_set():
            entries.shrink(tmp_path, 0)

    def build(number: int) -> None:
        try:
            for turn in range(20):
                with Cache(root=tmp_path).lease() as lease:
                    made = lease.get_or_build(wanted((number + turn) % 3), Maker(), work_dir=never)
                    assert (made.folder / "model.bin").read_bytes() == b"engine"
        except BaseException as error:
            trouble.append(error)

    remover = threading.Thread(target=remove)
    remover.start()
    builders = [threading.Thread(target=build, args=(number,)) for number in range(6)]
    for thread in builders:
        thread.start()
    for thread in builders:
        thread.join()
    stop.set()
    remover.join()
    assert trouble == []


def test_opened_once(tmp_path: Path) -> None:
    store, made = Cache(), []
    for _ in range(2):
        assert (
            store.memoize(["load", {"b": 1, "a": 2}], lambda: made.append(1) or "model") == "model"
        )  # type: ignore[func-returns-value]
    assert made == [1]
