"""A second machine for the tests of whole builds: TensorRT 11 and a GPU that are stand-ins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(bench_tools: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Both in place for one test; `record` is what TensorRT was asked, `gpu` the GPU."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is for Linux and Windows")
    yield bench_tools.put_in_place(11, monkeypatch)
    bench_tools.forget_polygraphy()


@pytest.fixture
def vouching() -> Callable[[Path, Path], dict[str, str]]:
    """What must vouch for an artifact whose bytes no other build gives again.

    `vouching(artifact, graph)`: read from the bytes of its parity report and of the graph's files,
    and from its version, which ends with digits of the digest of all inputs.
    """

    def sha256(raw: bytes) -> str:
        return hashlib.sha256(raw).hexdigest()

    def found(artifact: Path, graph: Path) -> dict[str, str]:
        files = {
            name: sha256((graph / name).read_bytes()) for name in ("model.onnx", "model.onnx_data")
        }
        content = json.loads((artifact / "manifest.json").read_bytes())
        assert content["inputs_sha256"][:12] in content["version"].split("-")
        return {
            "parity_sha256": sha256((artifact / "parity.json").read_bytes()),
            "graph_sha256": sha256(json.dumps(files, separators=(",", ":")).encode()),
            "inputs_sha256": content["inputs_sha256"],
        }

    return found
