"""Graphs that the tests here share: each exported once a session."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from jexport.recipe import CompileSpec, ExportSpec, LoadSpec
from jexport.stages import export, load, merge
from jexport.targets import onnx as onnx_target
from jexport.types import LoadedModel, OnnxModel

BOTH = ("last_hidden_state", "sentence_embedding")
REAL = ("minilm", "small", "unknown")
TEXT = [0, *range(5, 45), 2]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A graph on disk with what it was made from."""

    model: OnnxModel
    loaded: LoadedModel

    @property
    def proto(self) -> onnx.ModelProto:
        """The graph, its weights read."""
        return onnx.load(self.model.path)

    def module(self) -> Any:
        """A fresh torch module with the same weights."""
        return self.loaded.assemble(self.loaded.weights)


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small are many times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def seeded() -> Any:
    """tests/graph/seeded.py: small models, inputs, onnxruntime."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("seeded.py"))))


@pytest.fixture(scope="session")
def opened(
    seeded: Any,
    small: Path,
    minilm: Path,
    write_unknown: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., LoadedModel]:
    """`opened("minilm")`: a checkpoint ready for export, by name or architecture."""

    def open_model(name: str, *, layers: int = 2, **changes: Any) -> LoadedModel:
        if name == "minilm":
            return load.run(LoadSpec(model=str(minilm)), task="none")
        if name == "small":
            return merge.run(load.run(LoadSpec(model=str(small)), task="retrieval.passage"))
        if name == "unknown":
            folder = write_unknown(tmp_path_factory.mktemp("remote") / "graph_tests_unknown")
            return load.run(LoadSpec(model=str(folder), trust_remote_code=True), task="none")
        make = functools.partial(seeded.build, name)
        if layers != 2:
            make = functools.partial(make, num_hidden_layers=layers)
        made: LoadedModel = seeded.as_loaded(make, **changes)
        return made

    return open_model


@pytest.fixture(scope="session")
def exports(
    opened: Callable[..., LoadedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    """`exports("small", "fp16", opset=18)`: that graph with both outputs, exported once."""
    made: dict[Any, Exported] = {}

    def export_once(name: str, precision: str = "fp32", **spec: Any) -> Exported:
        key = (name, precision, tuple(sorted(spec.items())))
        if key not in made:
            own = ("pooling", "matryoshka", "layers")
            changes = {k: spec.pop(k) for k in own if k in spec}
            loaded = opened(name, **changes)
            made[key] = Exported(
                model=export.run(
                    loaded,
                    ExportSpec(**{"outputs": BOTH, **spec}),
                    precision=precision,
                    samples=[TEXT],
                    out_dir=tmp_path_factory.mktemp(f"{name}-{precision}"),
                ),
                loaded=loaded,
            )
        return made[key]

    return export_once


@pytest.fixture(scope="session")
def fusions(
    exports: Callable[..., Exported], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`fusions("small")`: the same graph with onnxruntime's own operators, made once."""
    made: dict[Any, Any] = {}

    def fuse_once(
        name: str, precision: str = "fp32", *, max_tokens: int = 8192, **spec: Any
    ) -> Any:
        key = (name, precision, max_tokens, tuple(sorted(spec.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{precision}-fused")
            model = replace(exports(name, precision, **spec).model, max_tokens=max_tokens)
            made[key] = onnx_target.build(model, CompileSpec(skip_layer_norm=True), folder)
        return made[key]

    return fuse_once
