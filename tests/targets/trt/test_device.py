"""What is missing on a machine is one clear error, before any work."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

from jexport.errors import DependencyError, DeviceError
from jexport.targets.trt import device

TWO_MACHINES = ("jexport build --target trt --until compile", "jexport compile ARTIFACT")


def says_the_way_out(fix: str) -> None:
    for words in TWO_MACHINES:
        assert words in fix


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`wheels("tensorrt-cu13", "11.4")`: the only TensorRT package that pip knows of."""

    def install(*known: str) -> None:
        versions = dict(zip(known[::2], known[1::2], strict=True))

        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(device.metadata, "version", version)

    return install


def test_a_machine_that_has_everything(bench: Any, wheels: Callable[..., None]) -> None:
    wheels("tensorrt-cu13", "11.4.0.106")
    found = device.machine()
    assert found.tensorrt == bench.trt.__version__
    assert found.gpu == device.Gpu(
        name="Stand-In 3090", capability="8.6", driver_cuda="13.0", total_bytes=1 << 30
    )
    assert found.system == device.system()
    assert "-" in found.system


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(device, "_installed", lambda name: name != "tensorrt")
    with pytest.raises(DependencyError, match="need tensorrt") as caught:
        device.machine()
    assert 'pip install "jexport[trt]"' in caught.value.fix
    says_the_way_out(caught.value.fix)


def test_a_tensorrt_without_its_libraries(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def no_library(name: str, *words: Any, **more: Any) -> Any:
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.11: cannot open shared object file")
        return real(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", no_library)
    with pytest.raises(DependencyError, match="cannot be loaded") as caught:
        device.machine()
    assert "libnvinfer.so.11" in caught.value.evidence


@pytest.mark.parametrize("version", ["9.3.0", "12.0.1", "8.6.1.6"])
def test_a_tensorrt_of_another_major(version: str, bench: Any) -> None:
    bench.trt.__version__ = version
    with pytest.raises(DependencyError, match=f"TensorRT {version}") as caught:
        device.machine()
    assert "10, 11" in caught.value.evidence
    assert not bench.gpu.calls  # the GPU was not even asked


def test_an_empty_package_called_tensorrt(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = types.ModuleType("tensorrt")
    empty.__spec__ = bench.trt.__spec__
    monkeypatch.setitem(sys.modules, "tensorrt", empty)
    with pytest.raises(DependencyError, match="is not TensorRT"):
        device.machine()


def test_no_driver(bench: Any) -> None:
    bench.gpu.driver = 0
    with pytest.raises(DeviceError, match="no NVIDIA driver") as caught:
        device.machine()
    says_the_way_out(caught.value.fix)
    assert caught.value.exit_code == 28


@pytest.mark.parametrize(
    ("wheel", "driver", "good"),
    [
        ("tensorrt-cu13", 12080, False),
        ("tensorrt-cu13", 13000, True),
        ("tensorrt-cu13-bindings", 12090, False),
        ("tensorrt-cu12", 12020, True),
        ("tensorrt-cu12", 11080, False),
        ("something", 11080, True),
    ],
)
def test_a_driver_older_than_tensorrts_cuda(
    wheel: str, driver: int, good: bool, bench: Any, wheels: Callable[..., None]
) -> None:
    wheels(wheel, "11.4.0.106")
    bench.gpu.driver = driver
    if good:
        assert device.machine()
        return
    with pytest.raises(DeviceError, match="driver is too old") as caught:
        device.machine()
    assert f"CUDA {driver // 1000}.{driver % 1000 // 10}" in caught.value.evidence
    assert "r5" in caught.value.fix


def test_no_gpu(bench: Any) -> None:
    bench.gpu.count = 0
    with pytest.raises(DeviceError, match="no NVIDIA GPU") as caught:
        device.machine()
    says_the_way_out(caught.value.fix)


def test_a_driver_older_than_cuda_bindings(bench: Any) -> None:
    bench.gpu.driver, bench.gpu.old_driver = 12020, True
    with pytest.raises(DeviceError, match="too old for the installed cuda-bindings") as caught:
        device.machine()
    assert "CUDA 12.2" in caught.value.evidence
    assert "cuda-bindings<13" in caught.value.fix


@pytest.mark.parametrize(("major", "minor", "good"), [(7, 0, False), (7, 5, True), (12, 0, True)])
def test_the_lowest_gpu_is_turing(major: int, minor: int, good: bool, bench: Any) -> None:
    bench.gpu.major, bench.gpu.minor = major, minor
    if good:
        assert device.machine().gpu.capability == f"{major}.{minor}"
        return
    with pytest.raises(DeviceError, match="does not take the GPU Stand-In 3090") as caught:
        device.machine()
    assert "7.0; 7.5 (Turing)" in caught.value.evidence


def test_too_little_memory_has_numbers(bench: Any) -> None:
    device.check_memory(1 << 30, what="all of it")
    with pytest.raises(DeviceError, match="too little free memory") as caught:
        device.check_memory((1 << 30) + 1, what="needed: 1.00 GiB of weights")
    assert "needed: 1.00 GiB of weights; 1.00 GiB are free" in caught.value.evidence


def test_this_machine_is_told_the_truth() -> None:
    # The real cuda-bindings: with a GPU all is well, without one it is a DeviceError.
    pytest.importorskip("cuda.bindings.runtime")
    from cuda.bindings import runtime

    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaSuccess and count:
        assert device.free_bytes() > 0
        return
    with pytest.raises(DeviceError):
        (device._check_driver(), device._gpu())


def test_a_fingerprint_never_fails(
    bench: Any, wheels: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels("tensorrt-cu13", "11.4.0.106")
    assert device.fingerprint() == {
        "tensorrt": "11.4.0.106",
        "device": "Stand-In 3090, compute capability 8.6",
        "system": device.system(),
    }
    bench.gpu.count = 0
    assert "none here" in device.fingerprint()["device"]
    wheels()
    monkeypatch.setattr(device, "_installed", lambda name: False)
    found = device.fingerprint()
    assert "not installed here" in found["tensorrt"]
    assert "none here" in found["device"]
