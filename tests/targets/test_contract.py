"""Every file in targets/ is a whole target; names are found without importing any."""

from __future__ import annotations

import contextlib
import inspect
import json
import operator
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport import targets
from jexport.errors import (
    DependencyError,
    DeviceError,
    JexportError,
    PrecisionError,
    UnknownTargetError,
)
from jexport.quantization import quant_params
from jexport.quantization.config import LAYER_PRECISIONS
from jexport.recipe import INT8_PRECISIONS, PRECISIONS, CompileSpec
from jexport.stages import compile as compile_stage
from jexport.targets import Target, load, names
from jexport.types import MergedModel, OnnxModel

FOLDER = Path(targets.__file__).parent
EXTRAS = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]["optional-dependencies"]
PARAMETERS = {
    "ready": [],
    "fingerprint": [],
    "check": ["model"],
    "build": ["model", "spec", "out_dir"],
    "runner": ["compiled", "device", "threads"],
    "runtime.streams": ["compiled", "device", "threads"],
    "runtime.cuda_graphs": ["compiled", "device", "threads"],
    "runtime.batching": ["compiled", "device"],
    "compiling.accept": ["spec", "max_tokens"],
    "compiling.profiles_for": ["spec", "lengths", "max_tokens"],
    "compiling.variant": ["spec"],
    "lint": ["path", "max_tokens"],
    "finalize_package": ["package"],
}

OPTIONAL = {
    "runtime.streams",
    "runtime.cuda_graphs",
    "compiling.profiles_for",
    "compiling.variant",
    "lint",
    "finalize_package",
}


@pytest.fixture(params=names())
def target(request: Any) -> Target:
    return load(request.param)


def test_there_is_a_file_a_name() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    files |= {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert set(names()) == files
    assert "onnx" in files


def test_the_record_is_complete(target: Target) -> None:
    assert type(target) is Target
    assert target.name in names()
    assert target.summary
    assert target.precisions
    assert set(target.precisions) <= set(PRECISIONS)
    assert isinstance(target.needs_onnx, bool)
    assert target.devices
    assert set(target.devices) <= {"cpu", "cuda"}
    for modules in (target.requirements.build, target.requirements.run):
        assert modules
        assert all(isinstance(name, str) and name.isidentifier() for name in modules)
    assert target.requirements.extra in EXTRAS
    assert (target.int8 is not None) == any(name in INT8_PRECISIONS for name in target.precisions)
    if target.int8 is not None:
        assert target.int8.scheme in quant_params.SCHEMES
        assert target.int8.fallback in LAYER_PRECISIONS
    portable = target.compiling.portable
    if portable is not None:  # the same target as far as an artifact says
        assert portable.name == target.name
        assert portable.precisions == target.precisions
        assert portable.int8 == target.int8
        assert portable.compiling.portable is None


def test_name_is_the_file_and_the_file_says_so_first(target: Target) -> None:
    module = sys.modules[f"jexport.targets.{target.name}"]
    assert module.TARGET is target
    assert (module.__doc__ or "").startswith(f"{target.name}: ")


@pytest.mark.parametrize("function", PARAMETERS)
def test_functions_take_what_the_record_promises(function: str, target: Target) -> None:
    called = operator.attrgetter(function)(target)
    if called is None:
        assert function in OPTIONAL
        return
    signature = inspect.signature(called)
    assert list(signature.parameters) == PARAMETERS[function]
    annotations = [p.annotation for p in signature.parameters.values()]
    assert inspect.Signature.empty not in (*annotations, signature.return_annotation)
    assert called.__doc__


def test_fingerprint_is_plain(target: Target) -> None:
    found = target.fingerprint()
    assert found
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in found.items())


def test_a_target_is_given_the_model_it_needs(
    target: Target, standard: OnnxModel, merged: MergedModel, tmp_path: Path
) -> None:
    other = merged if target.needs_onnx else standard
    with pytest.raises(AssertionError, match="takes another model"):
        compile_stage.run(other, target, CompileSpec(), out_dir=tmp_path)


def test_names_and_load_import_no_engine() -> None:
    code = """
import sys
from jexport import targets
assert targets.names()
assert not [name for name in sys.modules if name.startswith("jexport.targets.")]
for name in targets.names():
    targets.load(name).fingerprint()
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt",
         "polygraphy", "openvino", "tokenizers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_machine_that_is_not_ready_is_told_before_any_work(target: Target) -> None:
    told: JexportError | None = None
    try:
        target.ready()
    except JexportError as error:
        told = error
    if told is not None:
        assert isinstance(told, DependencyError | DeviceError)
        assert told.fix


def test_build_then_run_gives_the_signature(
    target: Target,
    standard: OnnxModel,
    merged: MergedModel,
    tmp_path: Path,
    stand_in_engine: Callable[[str], None],
) -> None:
    try:
        target.ready()
    except JexportError:
        stand_in_engine(target.name)
        target.ready()
    given = standard if target.needs_onnx else merged
    made = compile_stage.run(given, target, CompileSpec(), out_dir=tmp_path)
    assert made.target == target.name
    assert made.precision == given.precision
    assert made.folder == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(made.files)
    ids = np.full((3, 7), 5, dtype=np.int64)
    opened = target.runner(made, "auto", 1)
    assert isinstance(opened, contextlib.AbstractContextManager)
    json.dumps(dict(made.facts))  # a manifest takes them
    with opened as run:
        found = run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    for spec in made.signature.outputs:
        sizes: Any = {"batch": 3, "sequence": 7}
        assert found[spec.name].shape == tuple(sizes.get(size, size) for size in spec.shape)
        assert found[spec.name].dtype == spec.dtype
    if target.runtime.streams is not None:
        with target.runtime.streams(made, "auto", 2) as streams:
            assert len(streams) != 1  # that would be the runner again
            for stream in streams:
                again = stream({"input_ids": ids, "attention_mask": np.ones_like(ids)})
                assert all(np.array_equal(again[name], found[name]) for name in found)


# --- asking for one -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("onx", "'onnx'"),
        ("ONNX", "onnx"),
        ("tensorrt", "trt"),
        ("../onnx", "onnx"),
        ("", "known"),
        ("__init__", "known"),
        ("_private", "known"),
    ],
)
def test_an_unknown_target_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownTargetError) as caught:
        load(name)
    assert hint in caught.value.fix


def test_a_precision_a_target_lacks(target: Target) -> None:
    for precision in target.precisions:
        targets.check_precision(target, precision)
    with pytest.raises(PrecisionError, match="fp33") as caught:
        targets.check_precision(target, "fp33")
    assert caught.value.exit_code == 17
    assert any(f"'{precision}'" in caught.value.fix for precision in target.precisions)


def test_a_missing_module_names_the_extra() -> None:
    targets.check_installed(("json", "numpy"), extra="onnx", purpose="this")
    with pytest.raises(DependencyError, match="this needs no_such_engine") as caught:
        targets.check_installed(("json", "no_such_engine"), extra="trt", purpose="this")
    assert 'pip install "jexport[trt]"' in caught.value.fix
