"""What tests of layouts share: a stand-in for Triton, made trt artifacts, the client example."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jexport.artifacts import manifest
from jexport.types import Artifact

EXAMPLES = Path(__file__).parents[3] / "examples"
PROFILES = [
    {"batch": [1, 8, 32], "tokens": [1, 32, 64]},
    {"batch": [1, 8, 16], "tokens": [65, 128, 512]},
]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change an artifact's manifest and make the folder whole again."""
    path = folder / manifest.NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    files = [manifest.file_digest(p, root=folder) for p in folder.rglob("*") if p.is_file()]
    content["files"] = manifest.listed(f for f in files if f.path != manifest.NAME)
    content["sha256"] = manifest.seal(content)
    manifest.write_json(path, content)
    manifest.verify(folder)
    return folder


@pytest.fixture(scope="session")
def triton() -> Any:
    """tests/serving/layouts/triton_server.py: parsed(), versions(), serving()."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("triton_server.py"))))


@pytest.fixture(scope="session")
def client() -> Any:
    """examples/triton_client.py: embedder(), TritonRunner."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "triton_client.py")))


@pytest.fixture(scope="session")
def open_manifest() -> Callable[[Path], Artifact]:
    return lambda path: Artifact(path=path, manifest=manifest.read(path))


@pytest.fixture(scope="session")
def changed() -> Callable[..., Path]:
    return rewrite


@pytest.fixture
def trt(artifact: Path, tmp_path: Path) -> Callable[..., Path]:
    """`trt(profiles)`: an artifact of target trt, with bytes that are no engine."""

    def make(profiles: Any = PROFILES, name: str = "trt") -> Path:
        folder = Path(shutil.copytree(artifact, tmp_path / name))
        (folder / "model.onnx").unlink()
        (folder / "model.onnx_data").rename(folder / "model.plan")

        def change(content: dict[str, Any]) -> None:
            content["target"] = "trt"
            content["engine"] |= {"files": ["model.plan"], "facts": {"profiles": profiles}}

        return rewrite(folder, change)

    return make
