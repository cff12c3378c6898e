"""What the onnx target makes of the small checkpoint, merged checkpoints, and stand-in engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jexport.recipe import CompileSpec, LoadSpec
from jexport.stages import load, merge
from jexport.targets import onnx
from jexport.types import CompiledModel, MergedModel, OnnxModel


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small are many times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiled(standard: OnnxModel, tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """`standard`, compiled for onnxruntime."""
    return onnx.build(standard, CompileSpec(), tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def merged(small: Path) -> MergedModel:
    """The small checkpoint with its `separation` merged, for targets that take no graph."""
    loaded = merge.run(load.run(LoadSpec(model=str(small)), task="separation"))
    return MergedModel(model=loaded, precision="fp32")


@pytest.fixture(scope="session")
def minilm_merged(minilm: Path) -> MergedModel:
    """all-MiniLM-L6-v2, which has nothing to merge."""
    loaded = load.run(LoadSpec(model=str(minilm)), task="none")
    return MergedModel(model=loaded, precision="fp32")


@pytest.fixture
def stand_in_engine(
    bench_tools: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Any]]:
    """`stand_in_engine("trt")`: what that target lacks on this machine, as a recording stand-in."""

    def install(name: str) -> Any:
        assert name == "trt", f"target {name} is not ready here and has no stand-in"
        pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings: Linux and Windows")
        return bench_tools.put_in_place(11, monkeypatch)

    yield install
    bench_tools.forget_polygraphy()
