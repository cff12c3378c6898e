"""One warm process for all tests of this folder, and harness.py as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def harness(imported: Callable[[Path], Any]) -> Any:
    """harness.py."""
    return imported(Path(__file__).with_name("harness.py"))


@pytest.fixture(scope="session")
def nursery(harness: Any, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Builds on a disk that fails when told to."""
    try:
        made = harness.Nursery(tmp_path_factory.mktemp("nursery") / "disk", small)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield made
    made.close()
