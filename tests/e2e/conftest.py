"""A second machine for the tests of whole builds: TensorRT 11 and a GPU that are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def bench(bench_tools: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Both in place for one test; `record` is what TensorRT was asked, `gpu` the GPU."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is for Linux and Windows")
    yield bench_tools.put_in_place(11, monkeypatch)
    bench_tools.forget_polygraphy()
