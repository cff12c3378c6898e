"""What a TensorRT wheel from PyPI offers: every name, enum member, method and signature, as JSON.

Run as a program in a process of its own (two majors cannot be loaded in one): surface.py WHEEL.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import inspect
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import empty_library

FUNCTIONS = {
    "libnvinfer": [
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ],
    "libnvinfer_plugin": ["initLibNvInferPlugins"],
    "libnvonnxparser": [
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ],
}


def load(wheel: Path, folder: Path) -> Any:
    """Import the bindings in a wheel, with empty libraries in place of NVIDIA's."""
    major = wheel.name.split("-")[1].split(".")[0]
    for stem, functions in FUNCTIONS.items():
        name = f"{stem}.so.{major}"
        (folder / name).write_bytes(empty_library.library(name, functions))
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    sys.path.insert(0, str(folder))
    return importlib.import_module("tensorrt_bindings")


def members(kind: Any) -> dict[str, int] | None:
    """Names and numbers of an enum's members; None for what is no enum."""
    found = getattr(kind, "__members__", None)
    if not isinstance(found, dict) and not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        return None
    return {name: int(value) for name, value in found.items()} if found else None


def signature(name: str, function: Any) -> str:
    """A Python function's parameters the way pybind11 writes them; '' for the extension's own."""
    if not inspect.isfunction(function):
        return ""
    words = inspect.signature(function).parameters.values()
    return f"{name}({', '.join(f'{word.name}: Any' for word in words)}) -> Any"


def surface(trt: Any) -> dict[str, Any]:
    """{'version', 'classes': {name: {attribute: doc}}, 'enums', 'functions': {name: doc}}."""
    classes: dict[str, dict[str, str]] = {}
    enums: dict[str, dict[str, int]] = {}
    functions: dict[str, str] = {}
    bases: dict[str, list[str]] = {}
    for name in dir(trt):
        thing = getattr(trt, name)
        if isinstance(thing, type):
            classes[name] = {key: getattr(thing, key).__doc__ or "" for key in dir(thing)}
            bases[name] = [base.__name__ for base in thing.__mro__]
            if (found := members(thing)) is not None:
                enums[name] = found
            inner = {k: members(getattr(thing, k)) for k in dir(thing) if k[0].isupper()}
            enums |= {f"{name}.{k}": found for k, found in inner.items() if found}
        elif callable(thing):
            functions[name] = signature(name, thing) or thing.__doc__ or ""
    return {
        "version": trt.__version__,
        "classes": classes,
        "bases": bases,
        "enums": enums,
        "functions": functions,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        json.dump(surface(load(Path(sys.argv[1]), Path(scratch))), sys.stdout)
        sys.stdout.flush()
