"""Tests for a machine with an NVIDIA GPU and TensorRT (`make test-gpu`); skipped elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from jexport.errors import JexportError
from jexport.trt import device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all of this folder, and skip it with what the machine lacks."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not here:
        return
    lack = ""
    try:
        device.check_installed("polygraphy")
        device.machine()
    except JexportError as error:
        lack = error.what
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if lack:
            item.add_marker(pytest.mark.skip(reason=lack))


@pytest.fixture(scope="session")
def bench_tools() -> Any:
    """tests/trt/conftest.py as a module, for `write_tiny`."""
    path = Path(__file__).parents[1] / "trt" / "conftest.py"
    spec = importlib.util.spec_from_file_location("jexport_tests_trt_for_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
