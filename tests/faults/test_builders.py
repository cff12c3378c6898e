"""Thirty-two processes that want the same result, or each another, from one cache at once."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from jexport.cache import entries

BUILDERS = 32


@pytest.fixture
def run_builders(tmp_path: Path) -> Callable[..., Counter[str]]:
    """Run them; how often each key was made."""

    def run(keys: int, *, kill: int = 0) -> Counter[str]:
        tally = tmp_path / "tally"
        tally.touch()
        program = str(Path(__file__).with_name("cache_builder.py"))
        processes = [
            subprocess.Popen(
                [sys.executable, program, str(tmp_path / "cache"), f"k{number % keys}", str(tally)],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for number in range(BUILDERS)
        ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        if kill:
            while not tally.stat().st_size:  # somebody makes it: whoever that is, is among these
                pass
        for process in processes[:kill]:
            process.kill()
        ends = [(process.communicate()[1].decode(), process.returncode) for process in processes]
        assert all(code == 0 or number < kill for number, (_, code) in enumerate(ends)), ends
        return Counter(tally.read_text().split())

    return run


@pytest.mark.parametrize("keys", [1, BUILDERS])
def test_builders_at_once(
    keys: int, run_builders: Callable[..., Counter[str]], tmp_path: Path
) -> None:
    assert run_builders(keys) == Counter({f"k{number}": 1 for number in range(keys)})
    found = dict(entries.verify(tmp_path / "cache"))
    assert len(found) == keys
    assert set(found.values()) == {""}
    entries.shrink(tmp_path / "cache", 1 << 30)
    assert len([p for p in (tmp_path / "cache").iterdir() if p.name != entries.LOCKS]) == keys


def test_half_of_them_killed(run_builders: Callable[..., Counter[str]], tmp_path: Path) -> None:
    """Whoever waits for one that was killed makes it instead."""
    made = run_builders(1, kill=BUILDERS // 2)
    assert 1 <= made["k0"] <= BUILDERS // 2 + 1
    [(_, problem)] = entries.verify(tmp_path / "cache")
    assert problem == ""
    entries.shrink(tmp_path / "cache", 0)
    assert not (tmp_path / "cache").exists()
