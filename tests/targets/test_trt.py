"""The trt target, on stand-ins for TensorRT and a GPU: what it builds, refuses and lets go."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport.errors import DependencyError, DeviceError, ProfileError, UnsupportedGraphError
from jexport.recipe import CompileSpec, ProfileSpec
from jexport.targets import trt as target
from jexport.targets.trt import building, device
from jexport.types import OnnxModel

PROFILES = (
    ProfileSpec(batch=(1, 4, 8), tokens=(1, 8, 16)),
    ProfileSpec(batch=(1, 2, 4), tokens=(17, 24, 64)),
)


@pytest.fixture
def bench(stand_in_engine: Callable[[str], Any]) -> Any:
    return stand_in_engine("trt")


@pytest.fixture
def tiny(bench_tools: Any, tmp_path: Path) -> Any:
    return bench_tools.write_tiny(tmp_path / "model.onnx")


@pytest.fixture
def model(tiny: Any) -> OnnxModel:
    return OnnxModel(
        path=tiny.path,
        signature=tiny.signature,
        precision="fp16",
        opset=20,
        sha256="0" * 64,
        max_tokens=64,
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


FEED = {
    "input_ids": np.array([[3, 4, 5], [6, 7, 0]], dtype=np.int64),
    "attention_mask": np.array([[1, 1, 1], [1, 1, 0]], dtype=np.int64),
}


def test_a_build_is_a_plan_with_all_that_a_manifest_needs(
    bench: Any, model: OnnxModel, out: Path
) -> None:
    made = target.build(model, CompileSpec(profiles=PROFILES), out)
    assert made.files == ("model.plan",)
    assert [path.name for path in out.iterdir()] == ["model.plan"]
    assert made.precision == "fp16"
    facts = json.loads(json.dumps(dict(made.facts)))
    assert facts["tensorrt"] == "11.4.0.106"
    assert facts["gpu"] == "Stand-In 3090"
    assert facts["capability"] == "8.6"
    assert facts["profiles"] == [
        {"batch": [1, 4, 8], "tokens": [1, 8, 16]},
        {"batch": [1, 2, 4], "tokens": [17, 24, 64]},
    ]
    assert facts["costs"] == []
    assert facts["weights_bytes"] > 0


def test_the_plan_gives_the_graphs_vectors(
    bench: Any, tiny: Any, model: OnnxModel, out: Path
) -> None:
    made = target.build(model, CompileSpec(), out)
    made = dataclasses.replace(made, facts=json.loads(json.dumps(dict(made.facts))))
    with target.runner(made, "auto", 0) as run:
        found = run(FEED)
    wanted = tiny.run(**{"ids": FEED["input_ids"], "mask": FEED["attention_mask"]})
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)
    assert bench.gpu.leaks() == {"device": 0, "host": 0, "handles": 0}
    with pytest.raises(IndexError):
        run(FEED)


def test_only_outputs_of_the_signature_are_given(bench: Any, model: OnnxModel, out: Path) -> None:
    made = target.build(model, CompileSpec(), out)
    one = dataclasses.replace(made.signature, outputs=made.signature.outputs[1:])
    with target.runner(dataclasses.replace(made, signature=one), "cuda", 3) as run:
        assert list(run(FEED)) == ["sentence_embedding"]


def test_every_recipe_key_reaches_the_builder(
    bench: Any, model: OnnxModel, out: Path, tmp_path: Path
) -> None:
    spec = CompileSpec(
        timing_cache=str(tmp_path / "timings"),
        hardware_compatible="ampere_plus",
        version_compatible=True,
        workspace_gib=1.5,
        weight_stripped=True,
    )
    made = target.build(model, spec, out)
    assert {one["flag"] for one in bench.record.named("set_flag")} == {
        "REFIT",
        "STRIP_PLAN",
        "VERSION_COMPATIBLE",
    }
    (limit,) = bench.record.named("set_memory_pool_limit")
    assert limit["pool_size"] == 3 << 29
    assert list((tmp_path / "timings").glob("*.timings"))
    assert made.files == ("model.plan", "model.stripped.plan")
    assert sorted(path.name for path in out.iterdir()) == sorted(made.files)
    assert len(made.facts["costs"]) == 3
    assert made.facts["hardware_compatible"] == "ampere_plus"


def test_a_stripped_engine_is_refitted_with_its_own_weights(
    bench: Any, tiny: Any, model: OnnxModel, out: Path, bench_tools: Any, tmp_path: Path
) -> None:
    made = target.build(model, CompileSpec(weight_stripped=True), out)
    with target.runner(made, "auto", 0) as run:
        found = run(FEED)
    wanted = tiny.run(FEED["input_ids"], FEED["attention_mask"])
    np.testing.assert_array_equal(found["sentence_embedding"], wanted["sentence_embedding"])
    # the other file takes another task's
    other = bench_tools.write_tiny(tmp_path / "other.onnx", seed=1)
    plan = building.refit((out / "model.stripped.plan").read_bytes(), other.path)
    assert plan != (out / "model.plan").read_bytes()


def test_profiles_are_refused_before_tensorrt_is_asked(
    bench: Any, model: OnnxModel, out: Path
) -> None:
    overlap = (PROFILES[0], ProfileSpec(batch=(1, 2, 4), tokens=(16, 24, 64)))
    with pytest.raises(ProfileError, match="overlap"):
        target.build(model, CompileSpec(profiles=overlap), out)
    long = (ProfileSpec(batch=(1, 2, 4), tokens=(1, 24, 65)),)
    with pytest.raises(ProfileError, match="longer texts"):
        target.build(model, CompileSpec(profiles=long), out)
    assert not bench.record.named("create_network")
    assert not list(out.iterdir())


def test_a_gpu_that_is_too_small_is_told_with_numbers(
    bench: Any, model: OnnxModel, out: Path
) -> None:
    bench.gpu.total_bytes = 100
    with pytest.raises(DeviceError, match="too little free memory") as caught:
        target.build(model, CompileSpec(), out)
    assert "GiB of weights and" in caught.value.evidence
    assert not bench.record.named("create_network")


@pytest.mark.parametrize(
    ("lack", "kind"),
    [
        ("gpu", DeviceError),
        ("driver", DeviceError),
        ("tensorrt", DependencyError),
        ("polygraphy", DependencyError),
    ],
)
def test_a_machine_that_is_not_ready(
    lack: str, kind: Any, bench: Any, model: OnnxModel, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lack == "gpu":
        bench.gpu.count = 0
    elif lack == "driver":
        bench.gpu.driver = 0
    else:
        monkeypatch.setattr(device, "_installed", lambda name: name != lack)
    for call in (target.ready, lambda: target.build(model, CompileSpec(), out)):
        with pytest.raises(kind) as caught:
            call()
        assert "--until compile" in caught.value.fix
        assert "jexport compile ARTIFACT" in caught.value.fix
    assert not bench.record.named("create_network")


def test_the_cpu_is_refused(bench: Any, model: OnnxModel, out: Path) -> None:
    made = target.build(model, CompileSpec(), out)
    with pytest.raises(DeviceError, match="not run on the CPU"), target.runner(made, "cpu", 0):
        pass
    with pytest.raises(ValueError, match="'gpu'"), target.runner(made, "gpu", 0):
        pass


def test_check_refuses_what_the_lint_finds(model: OnnxModel, tmp_path: Path) -> None:
    import onnx

    graph = onnx.load(model.path)
    graph.graph.node[0].op_type, graph.graph.node[0].domain = "FusedLookup", "com.example"
    onnx.save(graph, tmp_path / "odd.onnx")
    target.check(model)
    with pytest.raises(UnsupportedGraphError, match="FusedLookup"):
        target.check(dataclasses.replace(model, path=tmp_path / "odd.onnx"))


def test_an_opset_beyond_tensorrts_is_refused(model: OnnxModel) -> None:
    with pytest.raises(UnsupportedGraphError, match="opset 26") as caught:
        target.check(dataclasses.replace(model, opset=26))
    assert "export.opset" in caught.value.fix


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_installed", lambda name: False)
    assert target.version() == ""
    monkeypatch.setattr(device, "_installed", lambda name: True)
    monkeypatch.setattr(device.metadata, "version", lambda name: "11.4.0.106")
    assert target.version() == "tensorrt 11.4.0.106"
