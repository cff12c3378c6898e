"""An onnx artifact that is made for CUDA: refused where it cannot be validated or run, and says so.

There is no GPU here. Where a CUDA provider must be there, a stand-in reports one and runs on the
CPU: what is tested is who is asked what, and only steps that the CPU has kernels for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from jexport import recipe, targets
from jexport.artifacts import manifest
from jexport.building import pipeline
from jexport.errors import (
    DependencyError,
    DeviceError,
    LayoutError,
    PrecisionError,
    RecipeError,
    ServingError,
)
from jexport.recipe import CompileSpec
from jexport.runtime.open import open_artifact
from jexport.serving import layouts, servers
from jexport.targets import onnx as target
from jexport.targets.onnx import devices
from jexport.types import OnnxModel

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
STEPS = ("efficient_attention", "skip_layer_norm")
SPEC = CompileSpec(cuda=STEPS)
STRICT = {"enable_skip_layer_norm_strict_mode": "1"}
FEED = {
    "input_ids": np.full((1, 3), 5, dtype=np.int64),
    "attention_mask": np.ones((1, 3), dtype=np.int64),
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An onnxruntime that says it has CUDA; returns the providers that sessions asked for."""
    asked: list[Any] = []
    real = onnxruntime.InferenceSession

    def opened(path: Any, options: Any, *, providers: list[Any], **_: Any) -> Any:
        asked.append(providers)
        names = [one if isinstance(one, str) else one[0] for one in providers]
        session = real(path, options, providers=[CPU])
        return SimpleNamespace(
            run_with_iobinding=session.run_with_iobinding,
            io_binding=session.io_binding,
            run=session.run,
            get_outputs=session.get_outputs,
            get_providers=lambda: names,
        )

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    return asked


def no_cuda() -> None:
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has a CUDA provider")


def chosen(small: Path, **changes: Any) -> recipe.Recipe:
    spec = dataclasses.replace(recipe.ValidateSpec(), budget_tokens=500, max_tokens=64)
    made = recipe.Recipe(name="small", load=recipe.LoadSpec(model=str(small)), validate=spec)
    return made.replace_compile(**changes)


# --- where it is built ----------------------------------------------------------------------------


def test_a_machine_without_cuda_is_refused_before_any_work(tmp_path: Path) -> None:
    no_cuda()
    nowhere = chosen(tmp_path / "no-such-checkpoint", cuda=STEPS)
    with pytest.raises(DependencyError, match="validated on CUDA") as caught:
        pipeline.build(nowhere, task="none", target="onnx", out=tmp_path / "out")
    assert "leave compile.cuda out" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_provider_that_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    fallen_back = SimpleNamespace(get_providers=lambda: [CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: fallen_back)
    with pytest.raises(DependencyError, match="does not start") as caught:
        target.variant(SPEC).ready()
    assert CPU in caught.value.evidence


def test_a_machine_with_cuda_is_taken(stand_in: list[Any]) -> None:
    target.variant(SPEC).ready()
    assert stand_in == [[CUDA]]


def test_other_targets_ignore_the_key() -> None:
    for name in targets.names():
        engine = targets.load(name)
        assert targets.with_settings(engine, CompileSpec()) is engine
        assert (targets.with_settings(engine, SPEC) is engine) == (name != "onnx")


def test_it_is_judged_on_cuda_and_its_version_says_so() -> None:
    engine = target.variant(SPEC)
    assert engine.devices == ("cuda",)
    assert engine.fingerprint()["device"] == "cuda"
    assert target.TARGET.fingerprint()["device"] == "any"


@pytest.mark.parametrize("precision", ["int8", "int8-weights"])
def test_int8_is_for_the_cpu(precision: str, small: Path, tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match=precision):
        pipeline.build(
            chosen(small, cuda=STEPS),
            task="none",
            target="onnx",
            precision=precision,
            out=tmp_path,
        )


@pytest.mark.parametrize(
    ("compiling", "told"),
    [
        ({"cuda": ["fast_gelo"]}, "fast_gelu"),
        ({"cuda": ["fast_gelu", "fast_gelu"]}, "some of"),
        ({"cuda": ["fast_gelu"], "fuse": False}, "compile.fuse"),
        ({"cuda": "all"}, "a list"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(compiling: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=r"compile\.cuda") as caught:
        recipe.from_table({"name": "x", "compile": compiling}, origin="x.toml")
    assert told in str(caught.value)


def test_a_recipe_lists_steps_or_all() -> None:
    read = recipe.from_table({"name": "x", "compile": {"cuda": ["all"]}}, origin="x.toml")
    assert read.compile.cuda == ("all",)
    assert recipe.from_table({"name": "x"}, origin="x.toml").compile.cuda == ()


def test_a_portable_artifact_says_nothing_of_it(standard: OnnxModel, tmp_path: Path) -> None:
    assert "cuda" not in target.build(standard, CompileSpec(), tmp_path).facts


# --- where it is opened ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def for_cuda(standard: OnnxModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return target.build(standard, SPEC, tmp_path_factory.mktemp("for-cuda"))


def test_the_cpu_is_refused_by_name(for_cuda: Any) -> None:
    with (
        pytest.raises(DeviceError, match="made for CUDA") as caught,
        target.runner(for_cuda, "cpu", 1),
    ):
        pass
    assert "without compile.cuda" in caught.value.fix


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_without_cuda_nothing_falls_back_to_the_cpu(device: str, for_cuda: Any) -> None:
    no_cuda()
    with pytest.raises(DependencyError, match="CUDA"), target.runner(for_cuda, device, 1):
        pass


def test_the_provider_is_told_what_the_graph_needs(for_cuda: Any, stand_in: list[Any]) -> None:
    with target.runner(for_cuda, "auto", 1) as run:
        assert run(FEED)
    [providers] = stand_in
    name, options = providers[0]
    assert name == CUDA
    assert options.items() >= STRICT.items()


def test_lengths_need_no_square_of_memory_and_packing_no_cuda_graph(
    standard: OnnxModel, for_cuda: Any, tmp_path: Path
) -> None:
    made = {}
    for step in ("skip_layer_norm", "packed_attention"):
        (tmp_path / step).mkdir()
        made[step] = target.build(standard, CompileSpec(cuda=(step,)), tmp_path / step)
    free = 1 << 28
    tokens = {name: devices.batch_tokens(one, free) for name, one in made.items()}
    assert tokens["skip_layer_norm"] < devices.batch_tokens(for_cuda, free)
    assert tokens["packed_attention"] == devices.batch_tokens(for_cuda, free)
    assert devices.capturable(for_cuda)
    assert not devices.capturable(made["packed_attention"])


# --- a whole build, and what tells of it ----------------------------------------------------------


@pytest.fixture
def artifact(small: Path, tmp_path: Path, stand_in: list[Any]) -> Any:
    return pipeline.build(chosen(small, cuda=STEPS), task="none", target="onnx", out=tmp_path)


def test_an_artifact_for_cuda_from_end_to_end(
    artifact: Any, tmp_path: Path, small: Path, cli: Callable[..., Any]
) -> None:
    content = manifest.verify(artifact.path).content
    engine = content["engine"]
    assert engine["runs_on"]["device"] == "cuda"
    assert engine["facts"]["cuda"]["steps"] == {"skip_layer_norm": 4, "efficient_attention": 2}
    assert content["recipe"]["compile"]["cuda"] == list(STEPS)
    assert "made for | CUDA alone" in (artifact.path / "README.md").read_text(encoding="utf-8")

    shown = cli("inspect", artifact.path).out
    assert "CUDA alone (skip_layer_norm, efficient_attention)" in shown

    line = cli("serve-with", "onnxruntime", artifact.path).out
    assert CUDA in line
    assert json.dumps(STRICT) in line
    with pytest.raises(ServingError, match="this one is for CUDA"):
        servers.way("fastembed", content)
    with pytest.raises(LayoutError, match="made for CUDA"):
        layouts.load("triton").write([artifact], tmp_path / "models", layouts.Wishes())

    with pytest.raises(DeviceError, match="made for CUDA"):
        open_artifact(artifact.path, device="cpu")
    with open_artifact(artifact.path) as model:
        assert model.encode(["a text"]).shape[0] == 1

    portable = pipeline.build(chosen(small), task="none", target="onnx", out=tmp_path)
    assert portable.path != artifact.path
