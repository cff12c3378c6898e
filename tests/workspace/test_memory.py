"""memory: what is left is the least of the machine, every control group above, and ulimit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jexport.workspace import memory

GIB = 1 << 30
Group = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 24 GiB without groups; files to change."""
    for name in ("MEMINFO", "OWN_GROUPS", "GROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    (tmp_path / "MEMINFO").write_text(f"MemTotal: 99 kB\nMemAvailable:   {24 * GIB >> 10} kB\n")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (-1, -1))
    return tmp_path


def second(folder: Path, limit: object, used: int, file: int = 0) -> None:
    """A group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {file}\nactive_file {file}\n")


def first(folder: Path, limit: int, used: int, file: int = 0) -> None:
    """A group of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {file}\ntotal_active_file 0\n"
    (folder / "memory.stat").write_text(stat)


def test_without_groups_the_machine_decides(machine: Path) -> None:
    assert memory.available_bytes() == 24 * GIB


def test_nothing_said_is_nothing_known(machine: Path) -> None:
    (machine / "MEMINFO").unlink()
    assert memory.available_bytes() is None


def test_a_group_above_the_own_one_counts(machine: Path) -> None:
    (machine / "OWN_GROUPS").write_text("0::/slice/job\n")
    second(machine / "GROUPS" / "slice", 8 * GIB, GIB)
    second(machine / "GROUPS" / "slice" / "job", "max", GIB)
    assert memory.available_bytes() == 7 * GIB


def test_files_that_were_read_are_given_back(machine: Path) -> None:
    (machine / "OWN_GROUPS").write_text("0::/\n")
    second(machine / "GROUPS", 8 * GIB, 7 * GIB, file=2 * GIB)
    assert memory.available_bytes() == 5 * GIB


def test_a_group_of_version_1_whose_path_is_the_hosts(machine: Path) -> None:
    (machine / "OWN_GROUPS").write_text("5:cpu:/x\n4:memory,hugetlb:/docker/abc\n0::/\n")
    first(machine / "GROUPS" / "memory", 6 * GIB, 2 * GIB, file=GIB)
    assert memory.available_bytes() == 5 * GIB


def test_version_1_writes_a_number_for_no_limit(machine: Path) -> None:
    (machine / "OWN_GROUPS").write_text("4:memory:/\n")
    first(machine / "GROUPS" / "memory", 9223372036854771712, 2 * GIB)
    assert memory.available_bytes() == 24 * GIB


def test_addresses_are_limited_too(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (1 << 50, -1))
    assert memory.available_bytes() == 24 * GIB
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (GIB, -1))
    found = memory.available_bytes()
    assert found is not None
    assert found < GIB


def test_this_machine_says_something() -> None:
    found = memory.available_bytes()
    assert found is None or 0 <= found < 1 << 50
