"""siblings: members are files, one is imported at a time, and each room has its own error."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from jexport import plugins, targets
from jexport.errors import (
    JexportError,
    LayoutError,
    MatrixError,
    RegistryError,
    UnknownTargetError,
)
from jexport.jobs import schedulers
from jexport.publishing import registries
from jexport.serving import layouts

ROOM = "orchard_of_the_tests"
ROOMS: tuple[tuple[ModuleType, type[JexportError]], ...] = (
    (layouts, LayoutError),
    (registries, RegistryError),
    (schedulers, MatrixError),
    (targets, UnknownTargetError),
)


@pytest.fixture
def orchard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An imported package of two members, beside files that are none."""
    folder = tmp_path / ROOM
    (folder / "press").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "pear.py").write_text('TREE = "a pear tree"\n')
    (folder / "apple.py").write_text('TREE = "an apple tree"\n')
    (folder / "_ladder.py").write_text('raise AssertionError("nobody asked for it")\n')
    (folder / "harvest.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(ROOM)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == ROOM]:
        del sys.modules[name]


def imported() -> set[str]:
    return {name for name in sys.modules if name.startswith(f"{ROOM}.")}


def test_members_are_the_files_and_only_the_one_asked_for_is_imported(orchard: Path) -> None:
    assert plugins.names(ROOM) == ["apple", "pear"]
    assert imported() == set()
    made = plugins.load(ROOM, "pear", record="TREE", kind="tree", error=LayoutError)
    assert made == "a pear tree"
    assert imported() == {f"{ROOM}.pear"}
    (orchard / "plum.py").write_text('TREE = "a plum tree"\n')
    assert plugins.names(ROOM) == ["apple", "pear", "plum"]


@pytest.mark.parametrize("name", ["peer", "_ladder", "__init__", "harvest", "press", "", "../pear"])
def test_what_is_no_member_is_refused_and_not_imported(name: str, orchard: Path) -> None:
    with pytest.raises(MatrixError) as caught:
        plugins.load(ROOM, name, record="TREE", kind="tree", error=MatrixError)
    assert caught.value.what == f"unknown tree '{name}'"
    assert caught.value.evidence == "there are: apple, pear"
    assert imported() == set()
    if name == "peer":
        assert caught.value.fix == "did you mean 'pear'?"


def test_a_member_without_its_record_is_a_bug_that_says_so(orchard: Path) -> None:
    with pytest.raises(AttributeError, match="HEDGE"):
        plugins.load(ROOM, "pear", record="HEDGE", kind="hedge", error=LayoutError)


@pytest.mark.parametrize(("room", "error"), ROOMS)
def test_each_room_has_its_members_and_its_own_error(
    room: ModuleType, error: type[JexportError]
) -> None:
    members = room.names()
    assert members == plugins.names(room.__name__)
    assert members
    for name in members:
        assert room.load(name).name == name
    with pytest.raises(error, match=r"unknown .* 'nobody'") as caught:
        room.load("nobody")
    assert all(name in caught.value.evidence for name in members)


def test_listing_the_members_of_every_room_imports_none() -> None:
    program = (
        "import sys\n"
        "from jexport import targets\n"
        "from jexport.publishing import registries\n"
        "from jexport.serving import layouts\n"
        "known = {f'{room.__name__}.{name}' for room in (layouts, registries, targets)"
        " for name in room.names()}\n"
        "assert len(known) > 8, known\n"
        "print(sorted(known & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
