"""many: every job is tried, the failed ones are told, and what is shared is done once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jexport import errors, recipe
from jexport.building import estimate, pipeline
from jexport.cache.stages import Cache
from jexport.errors import AdapterError, CheckpointError, JexportError
from jexport.jobs import local, matrix
from jexport.jobs.local import Resources
from jexport.jobs.result import error_from_dict, error_to_dict
from jexport.stages import export as export_stage
from jexport.stages import load as load_stage
from jexport.workspace.run import Event

TASK = "separation"


def made_for(small: Path, **changes: Any) -> recipe.Recipe:
    return dataclasses.replace(recipe.for_model(str(small)), **changes)


def jobs_of(chosen: recipe.Recipe, *targets: str, precisions: tuple[str, ...] = ("fp32",)) -> Any:
    return matrix.jobs(chosen, tasks=[TASK], chosen=targets, precisions=precisions)


def resources(tmp_path: Path, **more: Any) -> Resources:
    return Resources(out=tmp_path / "out", cache=Cache(root=tmp_path / "cache"), **more)


def test_one_failed_job_does_not_stop_the_others(
    canned: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = made_for(small)
    build, asked, told = pipeline.build, [], []

    def some_fail(*words: Any, **options: Any) -> Any:
        asked.append(options["precision"])
        if options["precision"] == "fp16":
            raise AdapterError("it does not fit", evidence="e", fix="f")
        if options["precision"] == "int8":
            raise ZeroDivisionError("a bug")
        return build(*words, **options)

    monkeypatch.setattr(pipeline, "build", some_fail)
    jobs = jobs_of(chosen, "onnx", precisions=("fp16", "int8", "fp32"))
    found = local.build_all(
        chosen, jobs, resources(tmp_path), listen=lambda job, event: told.append((job, event))
    )
    assert [one.job for one in found] == list(jobs)
    assert sorted(asked) == ["fp16", "fp32", "int8"]
    by = {one.job.precision: one for one in found}
    assert isinstance(by["fp16"].error, AdapterError)
    assert isinstance(by["int8"].error, ZeroDivisionError)
    assert by["fp32"].artifact is not None
    assert by["fp32"].artifact.path.is_dir()
    ends = {job.precision: event.text for job, event in told if event.kind == "end"}
    assert ends["fp16"] == "failed: it does not fit"
    assert ends["fp32"] == str(by["fp32"].artifact.path)


def test_load_and_export_are_shared(
    canned: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, exports = [], []
    load, export = load_stage.run, export_stage.run
    monkeypatch.setattr(load_stage, "run", lambda *w, **o: loads.append(o["task"]) or load(*w, **o))
    monkeypatch.setattr(
        export_stage, "run", lambda *w, **o: exports.append(o["precision"]) or export(*w, **o)
    )
    first = made_for(small)
    second = dataclasses.replace(first, compile=recipe.CompileSpec(fuse=False))
    shared = resources(tmp_path)
    for chosen in (first, second):  # another compile, the same graph
        [found] = local.build_all(chosen, jobs_of(chosen, "onnx"), shared)
        assert found.error is None
    assert (loads, exports) == ([TASK], ["fp32"])


def test_plan_says_what_is_built_and_cached_and_writes_nothing(
    canned: Any, small: Path, tmp_path: Path
) -> None:
    chosen, shared = made_for(small), resources(tmp_path)
    jobs = jobs_of(chosen, "onnx", "hf")
    before = local.plan(chosen, jobs, shared)
    assert not shared.out.exists()
    assert not (tmp_path / "cache").exists()
    assert [(one.built, one.cached) for one in before] == [(None, ()), (None, ())]
    assert all(one.need is not None and one.need.memory_bytes > 1 << 29 for one in before)
    [made] = local.build_all(chosen, jobs[:1], shared)
    after = local.plan(chosen, jobs, shared)
    assert made.artifact is not None
    assert [one.built for one in after] == [made.artifact.path, None]
    other = dataclasses.replace(chosen, validate=recipe.ValidateSpec(max_tokens=100))
    [planned] = local.plan(other, jobs[:1], shared)
    assert (planned.built, planned.cached) == (None, ("export", "compile"))
    assert planned.need is not None
    assert before[0].need is not None
    assert planned.need.seconds < before[0].need.seconds
    assert planned.need.disk_bytes < before[0].need.disk_bytes


def test_jobs_are_chosen_to_fit_the_memory() -> None:
    chosen = recipe.read("jina-embeddings-v3")
    jobs = matrix.jobs(chosen, tasks=["a", "b"], chosen=["onnx"], precisions=["fp32"])
    needs = {jobs[0]: 6, jobs[1]: 3}
    assert local._next(jobs, needs, 10, 0) == jobs[0]
    assert local._next(jobs, needs, 10, 6) == jobs[1]  # a smaller one goes first
    assert local._next(jobs[:1], needs, 10, 6) is None
    assert local._next(jobs[:1], needs, 5, 0) == jobs[0]  # alone: the build says what it lacks
    assert local._next(jobs[:1], needs, None, 99) == jobs[0]


@pytest.mark.parametrize(
    "kind",
    [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, JexportError) and one is not JexportError
    ],
)
def test_an_error_comes_through_a_pipe_as_it_is(kind: type[JexportError]) -> None:
    error = kind("what", evidence="one\ntwo", fix="fix")
    error.add_note("  a note")
    back = error_from_dict(error_to_dict(error))
    assert type(back) is kind
    assert str(back) == str(error)
    try:
        raise ValueError("a bug")
    except ValueError as bug:
        told = error_from_dict(error_to_dict(bug))
    assert "ValueError: a bug" in str(told)
    assert "test_local.py" in str(told)


def test_the_memory_that_is_stated(small: Path, tmp_path: Path, canned: Any) -> None:
    count = estimate.weights(str(small))
    assert count is not None
    assert 10_000 < count < 10_000_000
    assert estimate.weights("org/on-a-hub") is None
    assert estimate.weights(str(tmp_path)) is None
    full = 559_000_000  # BENCHMARKS.md: 5.72 GB and 6.39 GB were the measured peaks
    assert 5.72e9 < estimate.memory(full, is_int8=False) < 5.72e9 * 1.25
    assert 6.39e9 < estimate.memory(full, is_int8=True) < 6.39e9 * 1.25
    chosen = made_for(small)
    [found] = local.build_all(
        chosen, jobs_of(chosen, "onnx"), resources(tmp_path, memory_bytes=1 << 20)
    )
    assert isinstance(found.error, errors.MemoryNeedError)
    assert not (tmp_path / "out").exists()


def test_a_broken_checkpoint_is_told_by_who_opens_it(small_copy: Path, tmp_path: Path) -> None:
    (small_copy / "model.safetensors").write_bytes(b"\x00" * 20)
    chosen = made_for(small_copy)
    [found] = local.build_all(chosen, jobs_of(chosen, "hf"), resources(tmp_path))
    assert isinstance(found.error, CheckpointError)


def test_events_are_told_with_their_job(canned: Any, small: Path, tmp_path: Path) -> None:
    chosen, told = made_for(small), list[tuple[matrix.Job, Event]]()
    jobs = jobs_of(chosen, "onnx")
    local.build_all(
        chosen, jobs, resources(tmp_path), listen=lambda job, event: told.append((job, event))
    )
    assert {job for job, _ in told} == set(jobs)
    kinds = [event.kind for _, event in told]
    assert (kinds[0], kinds[-1]) == ("begin", "end")
    assert "load" in {event.stage for _, event in told}
