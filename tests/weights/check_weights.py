"""`make test-weights`: the real models. Skipped, and why is said, where one cannot be had."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import real

PINS = real.pins()


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def had() -> Callable[[real.Pin], None]:
    """Skips a test whose model is not here, and cannot be fetched."""
    known: dict[str, str] = {}

    def check(pin: real.Pin) -> None:
        if pin.name not in known:  # without a network the hub's client tries for half a minute
            known[pin.name] = real.why_not(pin)
        if known[pin.name]:
            pytest.skip(known[pin.name])

    return check


@pytest.mark.parametrize(
    ("pin", "task"), [(pin, task) for pin in PINS for task in pin.tasks], ids=str
)
def test_real(pin: real.Pin, task: str, had: Callable[[real.Pin], None], out: Path) -> None:
    had(pin)
    artifact = real.build(pin, task, out)
    said = real.golden()
    if pin.name == said["model"]:
        tokens, corner = real.corner(artifact, said["sentence"])
        assert tokens == said["tokens"]
        assert np.abs(corner - said["values"][task]).max() <= real.CLOSE
