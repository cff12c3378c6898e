"""The GPU, its driver and the TensorRT of this machine; what is missing, said before any work.

Asks the CUDA runtime (cuda-bindings) and the installed packages' metadata; imports no TensorRT.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from jexport.errors import DependencyError, DeviceError, JexportError
from jexport.targets.trt.cuda import call

MAJORS = (10, 11)
"""Tried: 11 first; in 10 networks are strongly typed on request, before 10 not for ONNX."""

LOWEST_CAPABILITY = (7, 5)
"""Turing (docs.nvidia.com/deeplearning/tensorrt/11.4.0, Prerequisites)."""

DRIVERS: Mapping[int, str] = {12: "r535", 13: "r580"}
"""By CUDA major of the TensorRT wheels, the oldest Linux driver (same page)."""

PACKAGES = ("tensorrt-cu13", "tensorrt-cu12", "tensorrt")
WITHOUT_GPU = (
    "build up to the engine here with `jexport build --target trt --until compile`, then finish it "
    "on a machine with an NVIDIA GPU with `jexport compile ARTIFACT`"
)
INSTALL = 'pip install "jexport[trt]"'


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Args:
        name: as its driver gives it.
        capability: compute capability, like '8.6'.
        driver_cuda: newest CUDA of its driver, like '13.0'.
        total_bytes: of its memory.
    """

    name: str
    capability: str
    driver_cuda: str
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What engines are built and run on.

    Args:
        gpu: the one that CUDA calls 0.
        tensorrt: full version.
        system: like 'linux-x86_64'.
    """

    gpu: Gpu
    tensorrt: str
    system: str


def system() -> str:
    """Operating system and processor: a plan is native code for both."""
    return f"{platform.system()}-{platform.machine()}".lower()


def tensorrt_version() -> str:
    """Version of the installed TensorRT by its packages' metadata, '' when there is none."""
    if not _installed("tensorrt"):
        return ""
    for name in PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def machine() -> Machine:
    """The machine we are on, once it is known to build and run engines.

    Returns:
        The machine; what is missing is said before any work was done.

    Raises:
        DependencyError: no TensorRT or cuda-bindings, or another major.
        DeviceError: no driver, one too old, no GPU, one too old.
    """
    check_installed("tensorrt", "cuda.bindings")
    version = imported_version()
    if int(version.split(".")[0]) not in MAJORS:
        raise DependencyError(
            f"TensorRT {version} is not one that jexport builds with",
            evidence=f"tried majors: {', '.join(map(str, MAJORS))}",
            fix=INSTALL,
        )
    _check_driver()
    return Machine(gpu=_gpu(), tensorrt=version, system=system())


def check_installed(*modules: str) -> None:
    """Refuse an environment that lacks a module.

    Args:
        *modules: names to import.

    Raises:
        DependencyError: one is missing; names both ways out.
    """
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise DependencyError(
            f"TensorRT engines need {' and '.join(missing)}",
            evidence="not installed in this environment",
            fix=f"{INSTALL}; without a GPU, {WITHOUT_GPU}",
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that is not there either
        return False


def imported_version() -> str:
    """Version that the imported TensorRT gives itself.

    Returns:
        Like '11.4.0.106'.

    Raises:
        DependencyError: it cannot be loaded, or is an empty package of that name.
    """
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        raise DependencyError(
            "TensorRT is installed but cannot be loaded",
            evidence=f"{type(error).__name__}: {error}",
            fix=f"install its libraries too ({INSTALL}); without a GPU, {WITHOUT_GPU}",
        ) from error
    version = getattr(trt, "__version__", "")
    if not version:  # PyPI's own `tensorrt` may be an empty package
        raise DependencyError(
            "the installed `tensorrt` is not TensorRT",
            evidence="it has no __version__",
            fix=INSTALL,
        )
    return str(version)


def _check_driver() -> None:
    """Refuse a machine without a driver, or with one older than TensorRT's CUDA."""
    from cuda.bindings import runtime

    driver = int(call(runtime.cudaDriverGetVersion))
    if driver == 0:
        raise DeviceError(
            "this machine has no NVIDIA driver, so TensorRT cannot build or run an engine",
            evidence="the CUDA runtime finds no driver",
            fix=WITHOUT_GPU,
        )
    needed = _cuda_major()
    if driver // 1000 < needed:
        raise DeviceError(
            "the NVIDIA driver is too old for the installed TensorRT",
            evidence=f"the driver knows CUDA {_cuda(driver)}; this TensorRT is for CUDA {needed}",
            fix=f"install driver {DRIVERS.get(needed, 'of that CUDA')} or newer, or TensorRT's "
            f"cu{driver // 1000} packages",
        )


def _cuda_major() -> int:
    """CUDA major that TensorRT's wheels are for; 0 when it came in another way than by pip."""
    for major in sorted(DRIVERS, reverse=True):
        for name in (f"tensorrt-cu{major}", f"tensorrt-cu{major}-bindings"):
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            return major
    return 0


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _gpu() -> Gpu:
    """The GPU that CUDA calls 0 (CUDA_VISIBLE_DEVICES chooses)."""
    from cuda.bindings import runtime

    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
        driver = int(call(runtime.cudaDriverGetVersion))
        raise DeviceError(
            "the NVIDIA driver is too old for the installed cuda-bindings",
            evidence=f"the driver knows CUDA {_cuda(driver)}",
            fix=f'pip install "cuda-bindings<{driver // 1000 + 1}", or install a newer driver',
        )
    if status != runtime.cudaError_t.cudaSuccess or not count:
        _, text = runtime.cudaGetErrorString(status)
        raise DeviceError(
            "this machine has no NVIDIA GPU that CUDA can use",
            evidence=f"cudaGetDeviceCount: {text.decode()}, {count or 0} GPUs",
            fix=WITHOUT_GPU,
        )
    call(runtime.cudaSetDevice, 0)
    properties = call(runtime.cudaGetDeviceProperties, 0)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    gpu = Gpu(
        name=name.rstrip("\0"),
        capability=f"{properties.major}.{properties.minor}",
        driver_cuda=_cuda(int(call(runtime.cudaDriverGetVersion))),
        total_bytes=int(properties.totalGlobalMem),
    )
    if (properties.major, properties.minor) < LOWEST_CAPABILITY:
        lowest = ".".join(map(str, LOWEST_CAPABILITY))
        raise DeviceError(
            f"TensorRT does not take the GPU {gpu.name}",
            evidence=f"its compute capability is {gpu.capability}; {lowest} (Turing) is the lowest",
            fix=f"use a newer GPU; {WITHOUT_GPU}",
        )
    return gpu


def free_bytes() -> int:
    """Free memory of the GPU, as its driver says."""
    from cuda.bindings import runtime

    return int(call(runtime.cudaMemGetInfo)[0])


def check_memory(needed_bytes: int, *, what: str) -> None:
    """Refuse, with numbers, what will not fit.

    Args:
        needed_bytes: of the GPU's memory.
        what: needs them, for the message.

    Raises:
        DeviceError: less is free.
    """
    free = free_bytes()
    if needed_bytes > free:
        raise DeviceError(
            "the GPU has too little free memory",
            evidence=f"{what}; {_gib(free)} are free",
            fix="free GPU memory (nvidia-smi shows who has it), or use smaller profiles "
            "(compile.profiles) or a lower precision",
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def fingerprint() -> dict[str, str]:
    """What an engine made here may run on, as far as this machine can say; never raises."""
    try:
        check_installed("cuda.bindings")
        _check_driver()
        gpu = _gpu()
        device = f"{gpu.name}, compute capability {gpu.capability}"
    except JexportError:
        device = "an NVIDIA GPU; there is none here"
    return {
        "tensorrt": tensorrt_version() or "10 or 11; not installed here",
        "device": device,
        "system": system(),
    }
