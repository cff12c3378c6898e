"""What only a GPU can show: TensorRT builds these engines, and their vectors are right."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport.errors import (
    ArtifactError,
    DeviceError,
    EngineError,
    ProfileError,
    QuantizationError,
)
from jexport.recipe import CompileSpec, ExportSpec, LoadSpec, ProfileSpec
from jexport.targets import onnx as onnx_target
from jexport.targets import trt as target
from jexport.targets.trt import building, cuda, device
from jexport.targets.trt.log import Log
from jexport.types import CompiledModel, OnnxModel

LEVELS = {"fp32": 0.99999, "fp16": 0.999}
PROFILES = (
    ProfileSpec(batch=(1, 4, 8), tokens=(1, 16, 32)),
    ProfileSpec(batch=(1, 2, 4), tokens=(33, 64, 128)),
)
SPEC = CompileSpec(profiles=PROFILES)


@pytest.fixture(scope="session")
def exports(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OnnxModel]:
    """`exports("retrieval.query", "fp16")`: that graph of the small checkpoint."""
    from jexport.stages import export, load, merge

    known: dict[tuple[str, str], OnnxModel] = {}

    def make(task: str, precision: str) -> OnnxModel:
        if (task, precision) not in known:
            loaded = load.run(LoadSpec(model=str(small)), task=task)
            merged = merge.run(loaded) if loaded.adapter else loaded
            samples = [[0, *range(5, 40), 2]]
            known[task, precision] = export.run(
                merged,
                ExportSpec(),
                precision=precision,
                samples=samples,
                out_dir=tmp_path_factory.mktemp("export"),
            )
        return known[task, precision]

    return make


@pytest.fixture(scope="session")
def engine(
    exports: Callable[..., OnnxModel], tmp_path_factory: pytest.TempPathFactory
) -> CompiledModel:
    """An fp16 engine that no test may change."""
    return target.build(exports("separation", "fp16"), SPEC, tmp_path_factory.mktemp("engine"))


def feed(lengths: list[int], *, seed: int = 0) -> dict[str, Any]:
    width = max(lengths)
    ids = np.random.default_rng(seed).integers(5, 300, (len(lengths), width))
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def cosines(found: Any, wanted: Any, given: dict[str, Any]) -> float:
    """Lowest cosine of two outputs over all tokens that are there."""
    kept = given["attention_mask"].astype(bool)
    one = found["last_hidden_state"][kept].astype(np.float64)
    two = wanted["last_hidden_state"][kept].astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    return float(((one * two).sum(-1) / lengths).min())


def reference(model: OnnxModel, folder: Path) -> Any:
    """The same graph in onnxruntime."""
    folder.mkdir(exist_ok=True)
    made = onnx_target.build(model, CompileSpec(fuse=False), folder)
    return onnx_target.runner(made, "cpu", 0)


@pytest.mark.parametrize("precision", sorted(LEVELS))
def test_vectors_are_the_graphs(
    precision: str, exports: Callable[..., OnnxModel], tmp_path: Path
) -> None:
    model, truth = exports("separation", precision), exports("separation", "fp32")
    out = tmp_path / "engine"
    out.mkdir()
    made = target.build(model, SPEC, out)
    with target.runner(made, "auto", 0) as run, reference(truth, tmp_path / "r") as right:
        for lengths in ([5], [32] * 8, [33], [128] * 4, [1], [7, 30, 2], [100, 3, 40], [9] * 20):
            for seed in range(3):  # from the second on through a CUDA graph
                given = feed(lengths, seed=seed)
                assert cosines(run(given), right(given), given) > LEVELS[precision]


@pytest.mark.parametrize(
    "lengths", [[1], [1] * 8, [32], [32] * 8, [33], [33] * 4, [128], [128] * 4]
)
def test_the_borders_of_every_profile(
    lengths: list[int], engine: CompiledModel, exports: Callable[..., OnnxModel], tmp_path: Path
) -> None:
    given = feed(lengths)
    with (
        target.runner(engine, "auto", 0) as run,
        reference(exports("separation", "fp32"), tmp_path / "r") as right,
    ):
        assert cosines(run(given), right(given), given) > LEVELS["fp16"]


def test_a_text_outside_every_profile(engine: CompiledModel) -> None:
    with target.runner(engine, "auto", 0) as run, pytest.raises(ProfileError, match="129 tokens"):
        run(feed([129]))


def test_the_same_text_alone_and_in_a_batch(engine: CompiledModel) -> None:
    many = feed([20, 5, 31, 8])
    with target.runner(engine, "auto", 0) as run:
        together = run(many)["last_hidden_state"]
        for row, length in enumerate((20, 5, 31, 8)):
            alone = {name: values[row : row + 1, :length] for name, values in many.items()}
            single = run(alone)["last_hidden_state"][0].astype(np.float64)
            other = together[row, :length].astype(np.float64)
            cosine = (single * other).sum(-1) / (
                np.linalg.norm(single, axis=-1) * np.linalg.norm(other, axis=-1)
            )
            assert cosine.min() > 0.999


def test_memory_comes_back(engine: CompiledModel) -> None:
    def cycle() -> None:
        with target.runner(engine, "auto", 0) as run:
            for seed in range(3):
                run(feed([32] * 8, seed=seed))

    cycle()  # what CUDA and TensorRT keep for the process is kept from here on
    before = device.free_bytes()
    for _ in range(5):
        cycle()
    assert device.free_bytes() >= before - (8 << 20)


def test_a_graph_is_not_slower(engine: CompiledModel) -> None:
    from jexport.targets.trt import engine_info, plan

    given = feed([12])
    made = engine_info.from_facts(engine.facts)
    path = engine.folder / engine.files[0]

    def median_s(graphs: bool) -> float:
        with plan.open_plan(path, made, graphs=graphs) as run:
            for _ in range(20):
                run(given)
            times = []
            for _ in range(200):
                started = time.perf_counter()
                run(given)
                times.append(time.perf_counter() - started)
        return float(np.median(times))

    assert median_s(True) < median_s(False) * 1.1


def test_the_prediction_does_not_refuse_what_fits(engine: CompiledModel) -> None:
    # What TensorRT itself asks for must not be far below the prediction that builds are refused by.
    import tensorrt as trt

    log = Log()
    runtime = trt.Runtime(log.logger)
    opened = runtime.deserialize_cuda_engine((engine.folder / engine.files[0]).read_bytes())
    asked = max(opened.get_device_memory_size_for_profile_v2(n) for n in range(len(PROFILES)))
    assert engine.facts["activations_bytes"] < 4 * asked + (16 << 20)


# --- refit --------------------------------------------------------------------------------------


def test_refit_from_a_to_b_and_back(exports: Callable[..., OnnxModel], tmp_path: Path) -> None:
    tasks = ("retrieval.query", "separation", "retrieval.query")
    models = {task: exports(task, "fp16") for task in tasks}
    out = tmp_path / "engine"
    out.mkdir()
    spec = dataclasses.replace(SPEC, weight_stripped=True)
    made = target.build(models[tasks[0]], spec, out)
    stripped = (out / target.STRIPPED).read_bytes()
    assert len(stripped) < (out / target.PLAN).stat().st_size
    given = feed([12, 30, 3])
    for task in tasks:
        raw = building.refit(stripped, models[task].path)
        (out / target.PLAN).write_bytes(raw)
        facts = dict(made.facts) | {"sha256": hashlib.sha256(raw).hexdigest()}
        fresh = dataclasses.replace(made, facts=facts)
        with (
            target.runner(fresh, "auto", 0) as run,
            reference(exports(task, "fp32"), tmp_path / task) as right,
        ):
            assert cosines(run(given), right(given), given) > LEVELS["fp16"], task


# --- what is refused ----------------------------------------------------------------------------


def test_a_plan_of_another_architecture(engine: CompiledModel) -> None:
    facts = dict(engine.facts) | {"capability": "1.0"}
    other = dataclasses.replace(engine, facts=facts)
    with (
        pytest.raises(DeviceError, match="another GPU architecture"),
        target.runner(other, "auto", 0),
    ):
        pass


def test_a_changed_plan(engine: CompiledModel, tmp_path: Path) -> None:
    raw = bytearray((engine.folder / engine.files[0]).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / engine.files[0]).write_bytes(raw)
    broken = dataclasses.replace(engine, folder=tmp_path)
    with pytest.raises(ArtifactError, match="not the plan"), target.runner(broken, "auto", 0):
        pass


def test_rubbish_with_the_right_digest_is_an_error_and_no_crash(
    engine: CompiledModel, tmp_path: Path
) -> None:
    raw = b"rubbish" * 1000
    (tmp_path / engine.files[0]).write_bytes(raw)
    facts = dict(engine.facts) | {"sha256": hashlib.sha256(raw).hexdigest()}
    broken = dataclasses.replace(engine, folder=tmp_path, facts=facts)
    with pytest.raises(EngineError, match="does not open"), target.runner(broken, "auto", 0):
        pass


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"version_compatible": True},
        {"hardware_compatible": "same_compute_capability"},
        {"hardware_compatible": "ampere_plus"},
        {"workspace_gib": 0.25},
    ],
)
def test_options(more: dict[str, Any], exports: Callable[..., OnnxModel], tmp_path: Path) -> None:
    if more.get("hardware_compatible") == "ampere_plus":
        capability = device.machine().gpu.capability
        if tuple(map(int, capability.split("."))) < (8, 0):
            pytest.skip(f"ampere_plus needs compute capability 8.0, this is {capability}")
    out = tmp_path / "engine"
    out.mkdir()
    made = target.build(exports("separation", "fp16"), dataclasses.replace(SPEC, **more), out)
    given = feed([12, 3])
    with (
        target.runner(made, "auto", 0) as run,
        reference(exports("separation", "fp32"), tmp_path / "r") as right,
    ):
        assert cosines(run(given), right(given), given) > LEVELS["fp16"]


def test_a_timing_cache_makes_the_second_build_faster(
    exports: Callable[..., OnnxModel], tmp_path: Path
) -> None:
    spec = dataclasses.replace(SPEC, timing_cache=str(tmp_path / "timings"))
    seconds = []
    for turn in range(2):
        out = tmp_path / f"engine{turn}"
        out.mkdir()
        started = time.perf_counter()
        made = target.build(exports("separation", "fp16"), spec, out)
        seconds.append(time.perf_counter() - started)
    assert made.facts["notes"][0].endswith(" bytes")
    assert seconds[1] < seconds[0]


# --- int8 ---------------------------------------------------------------------------------------


def texts_a_second(artifact: Path) -> float:
    """Best of five passes over the same texts."""
    from jexport.runtime.open import open_artifact

    texts = [f"text {n} about engines, and how they are measured" for n in range(256)]
    best = float("inf")
    with open_artifact(artifact) as embedder:
        assert np.isfinite(embedder.encode(texts)).all()
        for _ in range(5):
            started = time.perf_counter()
            embedder.encode(texts)
            best = min(best, time.perf_counter() - started)
    return len(texts) / best


def test_int8_is_kept_only_when_it_beats_fp16(minilm: Path, tmp_path: Path) -> None:
    from jexport import recipe
    from jexport.building import pipeline

    made = recipe.for_model(str(minilm)).replace_quantize(samples=64)
    half = pipeline.build(made, task="none", target="trt", precision="fp16", out=tmp_path)
    try:
        whole = pipeline.build(made, task="none", target="trt", precision="int8", out=tmp_path)
    except QuantizationError as error:
        if "fast" not in str(error):  # the gate says that speed was the reason
            raise
        return
    assert texts_a_second(whole.path) > 0.9 * texts_a_second(half.path)


def test_cuda_itself() -> None:
    buffer = cuda.Buffer(staged=True)
    stream = cuda.Stream()
    try:
        buffer.reserve(1000)
        buffer.host(1000)[:] = np.arange(1000) % 251
        stream.upload(buffer, 1000)
        stream.wait()
        buffer.host(1000)[:] = 0
        stream.download(buffer, 1000)
        stream.wait()
        np.testing.assert_array_equal(buffer.host(1000), np.arange(1000) % 251)
    finally:
        stream.free()
        buffer.free()
