"""Building through Polygraphy's own code: what a GPU would be asked for, for both majors."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport.errors import EngineError
from jexport.targets.trt import building, device, timing_cache
from jexport.targets.trt.building import Options
from jexport.targets.trt.log import Log
from jexport.targets.trt.profiles import Profile, Range

REMOVED_FLAGS = {
    "FP16",
    "BF16",
    "INT8",
    "FP8",
    "INT4",
    "FP4",
    "OBEY_PRECISION_CONSTRAINTS",
    "PREFER_PRECISION_CONSTRAINTS",
}
REMOVED = {
    "algorithm_selector",
    "set_calibration_profile",
    "int8_calibrator",
    "precision",
    "set_dynamic_range",
    "set_output_type",
}
PROFILES = (
    Profile(batch=Range(min=1, opt=8, max=32), tokens=Range(min=1, opt=64, max=128)),
    Profile(batch=Range(min=1, opt=2, max=8), tokens=Range(min=129, opt=256, max=512)),
)


def build(bench: Any, tiny: Any, **options: Any) -> building.Built:
    return building.build(tiny.path, tiny.signature, PROFILES, Options(**options), device.machine())


def test_the_network_is_strongly_typed(bench: Any, tiny: Any) -> None:
    build(bench, tiny)
    (made,) = bench.record.named("create_network")
    # bit 1 is STRONGLY_TYPED in 10; 11 knows no other networks and ignores the flag
    assert made["flags"] == {10: 1 << 1, 11: 0}[bench.major]
    (parsed,) = bench.record.named("parse_from_file")
    assert parsed["model"] == str(tiny.path)  # by path: weights may lie beside it


def test_every_profile_reaches_every_input(bench: Any, tiny: Any) -> None:
    build(bench, tiny)
    asked = bench.record.named("set_shape")
    found: dict[int, dict[str, Any]] = {}
    for words in asked:
        found.setdefault(id(words["profile"]), {})[words["input"]] = tuple(
            tuple(words[size]) for size in ("min", "opt", "max")
        )
    first, second = ((1, 1), (8, 64), (32, 128)), ((1, 129), (2, 256), (8, 512))
    assert list(found.values()) == [
        {"input_ids": first, "attention_mask": first},
        {"input_ids": second, "attention_mask": second},
    ]
    assert len(asked) == 4


def test_no_flag_unless_asked(bench: Any, tiny: Any) -> None:
    build(bench, tiny)
    assert not bench.record.named("set_flag")
    assert not bench.record.named("set_memory_pool_limit")
    assert [one["flag"] for one in bench.record.named("clear_flag")] == ["TF32"]
    assert not bench.record.named("IBuilderConfig.hardware_compatibility_level")
    (verbosity,) = bench.record.named("IBuilderConfig.profiling_verbosity")
    assert verbosity["value"].name == "LAYER_NAMES_ONLY"


@pytest.mark.parametrize("level", ["ampere_plus", "same_compute_capability"])
def test_every_option_reaches_the_builder(level: str, bench: Any, tiny: Any) -> None:
    built = build(
        bench,
        tiny,
        hardware_compatible=level,
        version_compatible=True,
        workspace_bytes=3 << 30,
        weight_stripped=True,
    )
    assert built.plan
    flags = {one["flag"] for one in bench.record.named("set_flag")}
    assert flags == {"VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN"}
    (asked,) = bench.record.named("IBuilderConfig.hardware_compatibility_level")
    assert asked["value"].name == level.upper()
    assert bench.record.named("set_memory_pool_limit") == [
        {"pool": "WORKSPACE", "pool_size": 3 << 30}
    ]


@pytest.mark.parametrize("more", [{}, {"weight_stripped": True, "version_compatible": True}])
def test_nothing_that_was_removed_is_set(more: dict[str, bool], bench: Any, tiny: Any) -> None:
    build(bench, tiny, **more)
    set_flags = {one["flag"] for one in bench.record.named("set_flag")}
    assert not set_flags & REMOVED_FLAGS
    named = {name for kind, name in bench.record.touched if kind == "BuilderFlag"}
    assert not named & REMOVED_FLAGS
    asked = {name for _, name in bench.record.missing} - {"int8_calibrator", "precision_is_set"}
    assert not asked & REMOVED  # those two Polygraphy looks for, and does without
    assigned = {name for name, _ in bench.record.calls if "." in name}
    assert not {name.split(".")[1] for name in assigned} & REMOVED


def test_a_removed_flag_raises_in_the_stand_in_for_11(install: Any) -> None:
    # Guards the test above: precision flags through Polygraphy fail as on the real module.
    install(11)
    from polygraphy.backend.trt import CreateConfig, create_network
    from polygraphy.exception import PolygraphyException

    builder, network = create_network()
    with pytest.raises(PolygraphyException), contextlib.redirect_stdout(io.StringIO()):
        CreateConfig(fp16=True)(builder, network)


def test_nothing_is_printed(bench: Any, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    build(bench, tiny, version_compatible=True, timings=tiny.path.parent / "timings")
    assert capsys.readouterr() == ("", "")


def test_a_graph_that_does_not_parse(
    bench: Any, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"building an engine of tiny\.onnx") as caught:
        build(bench, tiny)
    assert "cannot parse" in caught.value.evidence
    assert "jexport lint" in caught.value.fix
    assert capsys.readouterr() == ("", "")


def test_tensorrts_own_words_are_the_evidence(
    bench: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, network: Any, config: Any) -> None:
        self._logger.log(bench.trt.ILogger.Severity.ERROR, "no kernel for MatMul_0")
        self._logger.log(bench.trt.ILogger.Severity.VERBOSE, "chatter")

    monkeypatch.setattr(bench.trt.Builder, "build_serialized_network", fails)
    with pytest.raises(EngineError) as caught:
        build(bench, tiny)
    assert "no kernel for MatMul_0" in caught.value.evidence
    assert "chatter" not in caught.value.evidence


def test_a_foreign_exception_passes_through(
    bench: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.trt.Builder, "build_serialized_network", stops)
    with pytest.raises(KeyboardInterrupt):
        build(bench, tiny)


def test_an_input_of_another_rank(bench: Any, tiny: Any) -> None:
    import dataclasses

    task = dataclasses.replace(tiny.signature.inputs[0], name="task_id", shape=())
    wrong = dataclasses.replace(tiny.signature, inputs=(*tiny.signature.inputs, task))
    with pytest.raises(EngineError, match="'task_id'"):
        building.build(tiny.path, wrong, PROFILES, Options(), device.machine())


def test_costs_are_told() -> None:
    assert Options().costs() == []
    told = Options(
        version_compatible=True, hardware_compatible="ampere_plus", weight_stripped=True
    ).costs()
    assert [line.split(":")[0] for line in told] == [
        "version_compatible",
        "ampere_plus",
        "weight_stripped",
    ]
    assert all("slower" in line or "lean runtime" in line for line in told)


# --- timing cache -------------------------------------------------------------------------------


def test_timings_are_kept_and_used_again(bench: Any, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "timings"
    first = build(bench, tiny, timings=folder)
    assert first.notes == ("timing cache: new",)
    (kept,) = folder.glob("*.timings")
    assert "stand-in-3090" in kept.name
    assert bench.trt.__version__ in kept.name
    assert bench.record.named("create_timing_cache")[0]["content"] == b""

    bench.record.calls.clear()
    second = build(bench, tiny, timings=folder)
    assert second.notes[0].startswith("timing cache: ")
    assert second.notes[0].endswith(" bytes")
    loaded = bench.record.named("set_timing_cache")
    assert loaded == [{"content": b"stand-in timings: one more", "ignore_mismatch": False}]


def test_other_options_have_another_cache(bench: Any, tiny: Any, tmp_path: Path) -> None:
    build(bench, tiny, timings=tmp_path / "t")
    build(bench, tiny, timings=tmp_path / "t", version_compatible=True)
    assert len(list((tmp_path / "t").glob("*.timings"))) == 2


def test_a_damaged_cache_is_left_out_and_replaced(bench: Any, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "timings"
    build(bench, tiny, timings=folder)
    (kept,) = folder.glob("*.timings")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + b"X")
    bench.record.calls.clear()
    built = build(bench, tiny, timings=folder)
    assert built.plan
    assert "damaged" in built.notes[0]
    assert bench.record.named("set_timing_cache")[0]["content"] == b""
    assert kept.read_bytes() == whole


def test_without_a_cache_nothing_is_written(bench: Any, tiny: Any, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    assert build(bench, tiny).notes == ()
    assert set(tmp_path.rglob("*")) == before
    assert timing_cache  # what would have written


# --- refit --------------------------------------------------------------------------------------


def vectors(plan: bytes, trt: Any) -> Any:
    """What the stand-in engine of a plan gives for one row."""
    engine = trt.Runtime(Log().logger).deserialize_cuda_engine(plan)
    ids = np.array([[3, 4, 5]], dtype=np.int64)
    return engine._run({"input_ids": ids, "attention_mask": np.ones_like(ids)})


def expected(tiny: Any) -> Any:
    ids = np.array([[3, 4, 5]], dtype=np.int64)
    return tiny.run(ids, np.ones_like(ids))


def test_refit_from_a_to_b_and_back(bench: Any, tiny: Any, other: Any) -> None:
    stripped = build(bench, tiny, weight_stripped=True).plan
    with pytest.raises(AssertionError, match="without weights"):
        vectors(stripped, bench.trt)
    for task in (tiny, other, tiny):
        plan = building.refit(stripped, task.path)
        for name, values in vectors(plan, bench.trt).items():
            np.testing.assert_array_equal(values, expected(task)[name])
    assert [one["model"] for one in bench.record.named("refit_from_file")] == [
        str(task.path) for task in (tiny, other, tiny)
    ]
    assert {tuple(one["flags"]) for one in bench.record.named("serialize_with_config")} == {()}


def test_what_was_refitted_is_not_refitted_again(bench: Any, tiny: Any, other: Any) -> None:
    # A second refit of the same engine may leave a mixture of two tasks.
    plan = building.refit(build(bench, tiny, weight_stripped=True).plan, tiny.path)
    with pytest.raises(EngineError, match="cannot be given other weights"):
        building.refit(plan, other.path)


def test_weights_that_do_not_fill_the_engine(bench: Any, tiny: Any, other: Any) -> None:
    import onnx

    stripped = build(bench, tiny, weight_stripped=True).plan
    model = onnx.load(other.path)
    next(t for t in model.graph.initializer if t.name == "matrix").name = "renamed"
    for node in model.graph.node:
        node.input[:] = ["renamed" if name == "matrix" else name for name in node.input]
    onnx.save(model, other.path)
    with pytest.raises(EngineError, match=r"other\.onnx do not fill") as caught:
        building.refit(stripped, other.path)
    assert "1 without a value: matrix" in caught.value.evidence


def test_the_judge_sees_the_plan_and_may_refuse(bench: Any, tiny: Any) -> None:
    stripped = build(bench, tiny, weight_stripped=True).plan
    seen: list[bytes] = []
    plan = building.refit(stripped, tiny.path, check=seen.append)
    assert seen == [plan]

    def refuses(plan: bytes) -> None:
        raise ValueError("other vectors")

    with pytest.raises(ValueError, match="other vectors"):
        building.refit(stripped, tiny.path, check=refuses)


def test_a_full_plan_cannot_be_refitted(bench: Any, tiny: Any) -> None:
    with pytest.raises(EngineError, match="cannot be given other weights") as caught:
        building.refit(build(bench, tiny).plan, tiny.path)
    assert "weight_stripped" in caught.value.fix
    with pytest.raises(EngineError) as caught:
        building.refit(b"rubbish", tiny.path)
    assert "magic" in caught.value.evidence
