"""Every TensorRT name that jexport, and Polygraphy on its paths, uses is in the real bindings.

The real ones: the wheels tensorrt-cu13-bindings 11.4 and tensorrt-cu12-bindings 10.16 from PyPI,
loaded without NVIDIA's libraries (surface.py). What they do is for a GPU machine to show; that
they exist, with these parameters and numbers, is shown here.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from jexport.targets.trt import building, device, profiles

PACKAGE = Path(str(jexport.__file__)).parent
TRT = PACKAGE / "targets" / "trt"
SOURCES = sorted(TRT.glob("*.py"))
INTERNAL = {"record", "mro"}


def test_the_wheels_are_the_pinned_ones(real: dict[str, Any], major: int) -> None:
    assert real["version"] == {11: "11.4.0.106", 10: "10.16.1.11"}[major]
    assert len(real["classes"]) > 150
    assert len(real["enums"]) > 50


# --- what jexport's own source says -------------------------------------------------------------


def test_every_name_in_jexport_is_real(names_used: Any, real: dict[str, Any]) -> None:
    found = {path: names_used.uses(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert sum(map(len, found.values())) > 40
    wrong = [
        f"{path.name}:{use.line}: {trouble}"
        for path, used in found.items()
        for use in used
        if (trouble := names_used.wrong(use, real))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_names_that_matter_are_among_them(names_used: Any) -> None:
    # Guards the test above: a walk that sees nothing would pass.
    chains = {u.chain for path in SOURCES for u in names_used.uses(path.read_text("utf-8"))}
    for chain in (
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_tensor_address"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("OnnxParserRefitter", "refit_from_file"),
        ("trt", "HardwareCompatibilityLevel", "AMPERE_PLUS"),
        ("trt", "ILogger", "Severity", "ERROR"),
        ("trt", "Runtime"),
        ("trt", "nptype"),
    ):
        assert chain in chains
    assert ("Runtime", "cudaMalloc") not in chains  # CUDA's own `runtime` is told apart


@pytest.mark.parametrize(
    ("line", "majors"),
    [
        ("trt.MadeUp()", (10, 11)),
        ("trt.BuilderFlag.MADE_UP", (10, 11)),
        ("trt.BuilderFlag.FP16", (11,)),
        ("trt.BuilderFlag.INT8", (11,)),
        ("trt.IInt8Calibrator", (11,)),
        ("trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH", (11,)),
        ("engine.device_memory_size", (11,)),
        ("engine.create_execution_context_without_device_memory()", (11,)),
        ("self._engine.get_binding_name(0)", (10, 11)),
        ("context.set_binding_shape(0, (1, 2))", (10, 11)),
        ("context.execute_async_v3(stream=1)", (10, 11)),
        ("context.set_input_shape('x')", (10, 11)),
        ("trt.Runtime()", (10, 11)),
        ("trt.nptype()", (10, 11)),
        ("trt.ILogger.Severity.FATAL", (10, 11)),
        ("context.execute_async_v3(stream_handle=1)", ()),
        ("trt.BuilderFlag.REFIT", ()),
        ("trt.Runtime(log)", ()),
        ("getattr(trt.SerializationFlag, 'MADE_UP', None)", ()),
    ],
)
def test_a_name_that_is_not_real_is_found(
    line: str, majors: tuple[int, ...], names_used: Any, surfaces: Callable[[int], Any]
) -> None:
    found = tuple(
        number
        for number in (10, 11)
        if any(names_used.wrong(use, surfaces(number)) for use in names_used.uses(line))
    )
    assert found == majors


# --- what the stand-in claims -------------------------------------------------------------------


def _own(kind: type) -> Iterator[str]:
    for name in type.__getattribute__(kind, "__dict__"):
        if not name.startswith("_") and name not in INTERNAL:
            yield name


def test_every_name_of_the_stand_in_is_real(
    major: int, real: dict[str, Any], bench_tools: Any, names_used: Any
) -> None:
    trt, _ = bench_tools.module("stand_in").make(major)
    wrong, compared = [], 0
    for name, thing in vars(trt).items():
        if name.startswith("_"):
            continue
        if hasattr(thing, "_enum"):
            numbers = {key: int(value) for key, value in thing.__members__.items()}
            wrong += [
                f"{name}.{key} is {number}, really {real['enums'].get(name, {}).get(key)}"
                for key, number in numbers.items()
                if real["enums"].get(name, {}).get(key) != number
            ]
            compared += len(numbers)
        elif isinstance(thing, type):
            for key in _own(thing):
                compared += 1
                doc = real["classes"].get(name, {}).get(key)
                if doc is None:
                    wrong.append(f"{name} has no {key}")
                elif inspect.isfunction(member := type.__getattribute__(thing, "__dict__")[key]):
                    wrong += _parameters(f"{name}.{key}", member, doc, names_used)
        elif callable(thing):
            assert name in real["functions"]
    assert compared > 80
    assert not wrong, "\n".join(wrong)
    severity = trt.ILogger.Severity
    assert real["enums"]["ILogger.Severity"] == {k: int(v) for k, v in severity.__members__.items()}


def _parameters(name: str, member: Any, doc: str, names_used: Any) -> list[str]:
    ours = [key for key in inspect.signature(member).parameters if key != "self"]
    theirs = names_used.overloads(name.split(".")[-1], doc)
    if not theirs or ours in [list(one) for one in theirs]:
        return []
    return [f"{name}{ours}, really {theirs}"]


def test_a_stand_in_with_a_made_up_name_is_found(
    major: int, real: dict[str, Any], bench_tools: Any, names_used: Any
) -> None:
    # Guards the test above.
    trt, _ = bench_tools.module("stand_in").make(major)
    assert "make_faster" not in real["classes"]["Builder"]
    method = trt.IExecutionContext.set_tensor_address
    doc = real["classes"]["IExecutionContext"]["set_input_shape"]
    assert _parameters("IExecutionContext.set_input_shape", method, doc, names_used)


# --- what Polygraphy asks for on jexport's paths ------------------------------------------------


@pytest.fixture
def record(
    major: int, bench_tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Any]:
    """All of a build, a refit and a run with the stand-in; what was asked of it."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is for Linux and Windows")
    import cuda.bindings

    gpu = bench_tools.module("fake_cuda").FakeGpu()
    trt, record = bench_tools.module("stand_in").make(major, gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(cuda.bindings, "runtime", gpu.runtime)
    bench_tools.forget_polygraphy()
    tiny = bench_tools.write_tiny(tmp_path / "tiny.onnx")
    options = building.Options(
        hardware_compatible="ampere_plus",
        version_compatible=True,
        workspace_bytes=1 << 30,
        timings=tmp_path / "timings",
        weight_stripped=True,
    )
    shapes = profiles.standard(512)
    for _ in range(2):  # the second time there is a timing cache
        built = building.build(tiny.path, tiny.signature, shapes, options, device.machine())
    building.refit(built.plan, tiny.path, version_compatible=True)
    with contextlib.suppress(jexport.errors.EngineError):
        tiny.path.write_bytes(b"no graph")
        building.build(tiny.path, tiny.signature, shapes, options, device.machine())
    yield record
    bench_tools.forget_polygraphy()


def test_what_polygraphy_touches_is_real_and_what_it_misses_is_not(
    record: Any, real: dict[str, Any]
) -> None:
    touched = {(kind, name) for kind, name in record.touched if kind}
    assert {
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "set_timing_cache"),
        ("IBuilderConfig", "get_tactic_sources"),
        ("INetworkDefinition", "get_flag"),
        ("OnnxParser", "get_error"),
        ("ITimingCache", "combine"),
        ("BuilderFlag", "STRIP_PLAN"),
    } <= touched
    unreal = {pair for pair in touched if not _is_real(*pair, real)}
    assert not unreal
    # What the stand-in lacks, the real module must lack too: else it would go another way there.
    wrongly_missing = {pair for pair in record.missing if _is_real(*pair, real)}
    assert not wrongly_missing


def _is_real(kind: str, name: str, real: dict[str, Any]) -> bool:
    if not kind:
        return name in real["classes"] or name in real["functions"]
    return name in real["enums"].get(kind, {}) or name in real["classes"].get(kind, {})


# --- CUDA ---------------------------------------------------------------------------------------


def test_every_cuda_function_is_real(bench_tools: Any) -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    fake = bench_tools.module("fake_cuda").FakeGpu
    names = [name for name in dir(fake) if name.startswith("cuda")]
    assert len(names) >= 20
    for name in names:
        ours = [key for key in inspect.signature(getattr(fake, name)).parameters if key != "self"]
        first = (getattr(real, name).__doc__ or "").strip().splitlines()[0]
        words = re.search(r"\((.*)\)", first)
        assert words is not None, first
        theirs = [re.split(r"[:=]", word)[0].split()[-1] for word in words[1].split(", ") if word]
        assert ours == theirs, name


def test_every_cuda_name_in_jexport_is_in_the_stand_in(bench_tools: Any) -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    fake = bench_tools.module("fake_cuda").FakeGpu().runtime
    text = "".join((TRT / name).read_text("utf-8") for name in ("cuda.py", "device.py"))
    names = set(re.findall(r"\bruntime\.(cuda\w+)", text))
    assert len(names) > 15
    for name in names:
        assert hasattr(real, name), name
        assert hasattr(fake, name), name


def test_handles_are_numbers_as_jexport_takes_them() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    assert int(real.cudaStream_t(5)) == 5
    status, text = real.cudaGetErrorString(real.cudaError_t.cudaErrorMemoryAllocation)
    assert status == real.cudaError_t.cudaSuccess
    assert text == b"out of memory"
    assert np.dtype(np.int64).itemsize == 8
