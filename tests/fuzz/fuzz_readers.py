"""`make fuzz`: every reader for a minute; what it trips over is kept in the corpus.

Not collected by `make test`, which replays the corpus (test_corpus.py).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
NAMES = sorted(path.name for path in (HERE / "corpus").iterdir() if path.is_dir())
ROUND = 300
"""Examples between two looks at the clock."""


@pytest.mark.parametrize("name", NAMES)
def test_fuzz(
    name: str,
    imported: Callable[[Path], Any],
    tmp_path: Path,
    record_counts: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = imported(HERE / "readers.py")
    reader = tools.readers()[name]
    came_of: Counter[str] = Counter()
    tripped: list[bytes] = []

    @settings(
        max_examples=ROUND,
        deadline=None,
        database=DirectoryBasedExampleDatabase(HERE.parents[1] / ".hypothesis" / "fuzz" / name),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(content=tools.contents(name, reader))
    def one(content: bytes) -> None:
        try:
            came_of[tools.tried(reader, content, tmp_path)] += 1
        except BaseException:
            tripped.append(content)
            raise

    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            one()
    finally:
        if tripped:  # the last one is the smallest that was found
            kept = HERE / "corpus" / name / hashlib.sha256(tripped[-1]).hexdigest()[:12]
            kept.write_bytes(tripped[-1])
    with capsys.disabled():
        print(f"\n{name}: {came_of.total():,} files; read {came_of['']:,}, {dict(came_of)}")
    assert came_of[""], "no file came through: the reader is not reached"
    assert came_of.total() > came_of[""]
    record_counts(f"fuzz: {name}", files=came_of.total(), read=came_of[""], seconds=SECONDS)
