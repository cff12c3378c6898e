"""What the real TensorRT bindings offer, per major; the stand-in is compared with them."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WHEELS = Path(sys.prefix) / "wheels"
PINS = {
    11: "tensorrt_cu13_bindings-11.4.0.106-*.whl",
    10: "tensorrt_cu12_bindings-10.16.1.11-*.whl",
}
"""As `make setup` downloads them: both put the same package in place, so neither is installed."""


@pytest.fixture(scope="session")
def surfaces() -> Callable[[int], dict[str, Any]]:
    """`surfaces(11)`: every name, enum member and signature of the real bindings of that major."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("TensorRT's wheels are read on Linux")
    known: dict[int, dict[str, Any]] = {}

    def read(major: int) -> dict[str, Any]:
        if major not in known:
            found = sorted(WHEELS.glob(PINS[major]))
            assert found, f"no {PINS[major]} in {WHEELS}; run `make setup`"
            program = Path(__file__).with_name("surface.py")
            done = subprocess.run(
                [sys.executable, program, found[-1]], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            known[major] = json.loads(done.stdout)
        return known[major]

    return read


@pytest.fixture(params=[11, 10], ids=["TensorRT 11", "TensorRT 10"])
def major(request: Any) -> int:
    """The one major, then the other."""
    number: int = request.param
    return number


@pytest.fixture
def real(major: int, surfaces: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """The surface of that major."""
    return surfaces(major)


@pytest.fixture(scope="session")
def names_used(imported: Callable[[Path], Any]) -> Any:
    """names_used.py as a module."""
    return imported(Path(__file__).with_name("names_used.py"))
