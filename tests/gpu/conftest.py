"""Tests for a machine with an NVIDIA GPU and TensorRT (`make test-gpu`); skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

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
