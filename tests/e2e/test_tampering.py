"""Nothing but what was built is accepted: not one changed byte, in any kind of artifact.

10,000 single-byte changes a kind (JEXPORT_CHANGES sets another number), half of them over all
bytes, half over all files, so that small ones have their share; each is undone. `make reliability`
writes the counts into RELIABILITY.md. The kind trt is a portable artifact (no GPU here), which
`open_artifact` refuses in any case: for it `verify` is the test.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jexport
from jexport.artifacts import manifest
from jexport.errors import ArtifactError

CHANGES = int(os.environ.get("JEXPORT_CHANGES", "1000"))
OPENED_EVERY = 10
"""`open_artifact` verifies in the same way before all else: one change in ten goes through it."""

KINDS = ("onnx", "openvino", "hf", "vllm", "trt")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def built(
    kind: str,
    builds: Callable[..., Any],
    cli: Callable[..., Any],
    small: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small artifact of a kind, in a folder of its own; every test leaves it as it was."""
    place = tmp_path_factory.mktemp(kind)
    if kind == "onnx":
        return Path(shutil.copytree(builds("separation").path, place / "artifact"))
    recipe = place / "r.toml"
    recipe.write_text('name = "small"\n[validate]\nbudget_tokens = 1\nmax_tokens = 64\n')
    words = ("--until", "compile") if kind == "trt" else ()
    answer = cli(
        "build",
        "--recipe",
        recipe,
        "--model",
        small,
        "--task",
        "separation",
        "--target",
        kind,
        "--out",
        place / "out",
        *words,
    )
    assert answer.code == 0, answer.err
    return Path(answer.path)


@pytest.fixture(autouse=True)
def left_as_it_was(built: Path) -> Iterator[None]:
    manifest.verify(built)
    yield
    manifest.verify(built)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refuse(folder: Path) -> None:
    with pytest.raises(ArtifactError):
        manifest.verify(folder)
    with pytest.raises(ArtifactError):
        jexport.open_artifact(folder)


def test_single_bytes(built: Path, kind: str, record_counts: Callable[..., None]) -> None:
    chance = random.Random(f"{kind} 1")
    paths = files(built)
    sizes = [path.stat().st_size for path in paths]
    accepted = []
    for number in range(CHANGES):
        if number % 2:
            path = chance.choice([p for p, size in zip(paths, sizes, strict=True) if size])
        else:
            [path] = chance.choices(paths, sizes)
        spot, flip = chance.randrange(path.stat().st_size), chance.randrange(1, 256)
        with path.open("r+b", buffering=0) as stream:
            stream.seek(spot)
            was = stream.read(1)
            stream.seek(spot)
            stream.write(bytes([was[0] ^ flip]))
            try:
                manifest.verify(built)
                accepted.append((path.name, spot, flip))
            except ArtifactError:
                pass
            if number % OPENED_EVERY == 0:
                with pytest.raises(ArtifactError):
                    jexport.open_artifact(built)
            stream.seek(spot)
            stream.write(was)
    assert not accepted, accepted[:10]
    record_counts(f"tampering: {kind}", single_bytes=CHANGES, accepted=len(accepted))


def test_each_file_gone(built: Path, kind: str, record_counts: Callable[..., None]) -> None:
    away = built.with_name("away")
    paths = files(built)
    for path in paths:
        os.rename(path, away)
        refuse(built)
        os.rename(away, path)
    record_counts(f"tampering: {kind}", files_removed=len(paths))


def test_each_file_emptied_or_longer(built: Path) -> None:
    for path in files(built):
        was = path.read_bytes()
        for changed in (b"", was + b"\n", was[:-1]):
            if changed != was:
                path.write_bytes(changed)
                refuse(built)
        path.write_bytes(was)


def test_every_two_swapped(built: Path, kind: str, record_counts: Callable[..., None]) -> None:
    away = built.with_name("away")
    pairs = [
        (one, other)
        for one, other in itertools.combinations(files(built), 2)
        if one.read_bytes() != other.read_bytes()
    ]

    def swap(one: Path, other: Path) -> None:
        os.rename(one, away)
        os.rename(other, one)
        os.rename(away, other)

    for one, other in pairs:
        swap(one, other)
        refuse(built)
        swap(one, other)
    assert len(pairs) > 20
    record_counts(f"tampering: {kind}", pairs_swapped=len(pairs))


def test_one_more(built: Path, kind: str, record_counts: Callable[..., None]) -> None:
    names = ("x", ".hidden", "1_Pooling/x.json", "model.bin", "__init__.py", "manifest.json.bak")
    for name in names:
        (built / name).touch()
        refuse(built)
        (built / name).unlink()
    (built / "empty").mkdir()
    refuse(built)
    (built / "empty").rmdir()
    (built / "link").symlink_to("config.json")
    refuse(built)
    (built / "link").unlink()
    record_counts(f"tampering: {kind}", files_added=len(names) + 2)


def test_a_link_to_the_same_bytes(built: Path) -> None:
    away = built.with_name("away")
    path = built / "config.json"
    os.rename(path, away)
    path.symlink_to(away)
    refuse(built)
    path.unlink()
    os.rename(away, path)


def test_the_manifest_of_another_build(
    built: Path, builds: Callable[..., Any], kind: str, record_counts: Callable[..., None]
) -> None:
    path = built / manifest.NAME
    was = path.read_bytes()
    for task in ("retrieval.query", "retrieval.passage"):
        path.write_bytes((builds(task).path / manifest.NAME).read_bytes())
        refuse(built)
        path.write_bytes(was)
    record_counts(f"tampering: {kind}", foreign_manifests=2)
