"""A machine with a GPU and TensorRT that are both stand-ins; see stand_in.py and fake_cuda.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def module(name: str) -> Any:
    """A file beside this one, imported once."""
    full = f"jexport_tests_trt_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


@dataclass(kw_only=True)
class Bench:
    """The stand-ins of one test: `trt` the module, `record` what was asked of it, `gpu`."""

    trt: Any
    record: Any
    gpu: Any
    major: int


def forget_polygraphy() -> None:
    """Polygraphy keeps the TensorRT that it saw first."""
    for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
        del sys.modules[name]


def put_in_place(major: int, patch: pytest.MonkeyPatch, **gpu_options: Any) -> Bench:
    """TensorRT of that major and a GPU, until the patch is undone."""
    import cuda.bindings

    gpu = module("fake_cuda").FakeGpu(**gpu_options)
    trt, record = module("stand_in").make(major, gpu)
    patch.setitem(sys.modules, "tensorrt", trt)
    patch.setitem(sys.modules, "cuda.bindings.runtime", gpu.runtime)
    patch.setattr(cuda.bindings, "runtime", gpu.runtime)
    forget_polygraphy()
    return Bench(trt=trt, record=record, gpu=gpu, major=major)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """`install(11)`: put_in_place for one test."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is for Linux and Windows")
    yield lambda major, **options: put_in_place(major, monkeypatch, **options)
    forget_polygraphy()


@pytest.fixture(params=[11, 10], ids=["TensorRT 11", "TensorRT 10"])
def bench(request: Any, install: Callable[..., Bench]) -> Bench:
    """A machine with the one major, then with the other."""
    return install(request.param)


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A graph with a table and a matrix, whose every vector depends on its row's mask."""

    path: Path
    signature: Any

    def run(self, ids: Any, mask: Any) -> dict[str, Any]:
        """What onnxruntime gives for it."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        found = session.run(names, {"input_ids": ids, "attention_mask": mask})
        return dict(zip(names, found, strict=True))


def write_tiny(path: Path, *, seed: int = 0) -> Tiny:
    """Write such a graph; another seed has other weights of the same names and sizes."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from jexport.types import Signature, TensorSpec

    rng = np.random.default_rng(seed)
    weights = {
        "table": rng.normal(size=(50, 4)).astype(np.float32),
        "matrix": rng.normal(size=(4, 4)).astype(np.float32),
        "last": np.array([-1], dtype=np.int64),
        "tokens": np.array([1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("Cast", ["attention_mask"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "last"], ["wide"]),
        helper.make_node("Mul", ["vectors", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["sums"], keepdims=0),
        helper.make_node("ReduceSum", ["floats", "tokens"], ["counts"], keepdims=1),
        helper.make_node("Div", ["sums", "counts"], ["sentence_embedding"]),
        helper.make_node("Unsqueeze", ["sentence_embedding", "tokens"], ["means"]),
        helper.make_node("MatMul", ["vectors", "matrix"], ["turned"]),
        helper.make_node("Add", ["turned", "means"], ["last_hidden_state"]),
    ]
    ints = [(name, ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
    floats = [("last_hidden_state", ("batch", "sequence", 4)), ("sentence_embedding", ("batch", 4))]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name, dims in ints],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in floats],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return Tiny(
        path=path,
        signature=Signature(
            inputs=tuple(TensorSpec(name=n, dtype="int64", shape=dims) for n, dims in ints),
            outputs=tuple(TensorSpec(name=n, dtype="float32", shape=dims) for n, dims in floats),
        ),
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """Such a graph on disk."""
    return write_tiny(tmp_path / "tiny.onnx")


@pytest.fixture
def other(tmp_path: Path) -> Tiny:
    """The same graph with the weights of another task."""
    return write_tiny(tmp_path / "other.onnx", seed=1)
