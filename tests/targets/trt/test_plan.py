"""Running a plan: an engine of onnxruntime on a GPU of host memory.

A vector is right only when profile, shapes, addresses and copies are.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport.errors import ArtifactError, DeviceError, EngineError, ProfileError
from jexport.targets.trt import building, device, engine_info, plan
from jexport.targets.trt.engine_info import EngineInfo
from jexport.targets.trt.profiles import Profile, Range

PROFILES = (
    Profile(batch=Range(min=1, opt=4, max=8), tokens=Range(min=1, opt=8, max=16)),
    Profile(batch=Range(min=2, opt=2, max=3), tokens=Range(min=20, opt=30, max=40)),
)
NOTHING = {"device": 0, "host": 0, "handles": 0}


def compile_tiny(
    tiny: Any, folder: Path, *, profiles: Any = PROFILES, version_compatible: bool = False
) -> tuple[Path, EngineInfo]:
    machine = device.machine()
    options = building.Options(version_compatible=version_compatible)
    built = building.build(tiny.path, tiny.signature, profiles, options, machine)
    path = folder / "model.plan"
    path.write_bytes(built.plan)
    return path, EngineInfo(
        tensorrt=machine.tensorrt,
        gpu=machine.gpu.name,
        capability=machine.gpu.capability,
        system=machine.system,
        hardware_compatible="",
        version_compatible=version_compatible,
        profiles=profiles,
        sha256=hashlib.sha256(built.plan).hexdigest(),
    )


def feed(lengths: list[int], tokens: int = 0, *, seed: int = 0) -> dict[str, Any]:
    """Rows of these lengths, padded to the longest or to `tokens`."""
    width = max(tokens, *lengths)
    ids = np.random.default_rng(seed).integers(1, 50, (len(lengths), width))
    mask = np.arange(width) < np.array(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.astype(np.int64)}


def same(found: Any, tiny: Any, given: dict[str, Any]) -> None:
    """Both outputs are onnxruntime's; token vectors only where there are tokens."""
    wanted = tiny.run(given["input_ids"], given["attention_mask"])
    np.testing.assert_allclose(
        found["sentence_embedding"], wanted["sentence_embedding"], rtol=1e-5, atol=1e-6
    )
    real = given["attention_mask"].astype(bool)
    assert found["last_hidden_state"].shape == wanted["last_hidden_state"].shape
    np.testing.assert_allclose(
        found["last_hidden_state"][real], wanted["last_hidden_state"][real], rtol=1e-5, atol=1e-6
    )


@pytest.fixture
def made(bench: Any, tiny: Any, tmp_path: Path) -> tuple[Path, EngineInfo]:
    found = compile_tiny(tiny, tmp_path)
    bench.record.calls.clear()
    bench.gpu.calls.clear()
    return found


def chosen(bench: Any) -> list[int]:
    """Profiles of the runs so far, in order; capturing itself is not a run."""
    return [one["profile"] for one in bench.record.named("execute_async_v3") if not one["captured"]]


# --- vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    ("lengths", "tokens", "profiles"),
    [
        ([5], 0, [0]),
        ([1], 0, [0]),
        ([16] * 8, 0, [0]),
        ([3, 16, 1], 16, [0]),
        ([20, 20], 0, [1]),
        ([40, 21, 7], 0, [1]),
        ([3] * 9, 0, [0, 0]),  # one text more than the largest batch
        ([40] * 4, 0, [1, 1]),
        ([40], 0, [1]),  # fewer than the smallest batch: padded to two rows
        ([18], 0, [1]),  # between the profiles: padded to 20 tokens
        ([3, 3, 3, 3, 40], 0, [0, 1]),  # too many for the long profile: by length
        ([3, 18, 40, 5, 9, 12, 16], 60, [0, 1]),  # padded wider than every profile
    ],
)
def test_every_batch_gives_the_graphs_own_vectors(
    lengths: list[int],
    tokens: int,
    profiles: list[int],
    graphs: bool,
    bench: Any,
    tiny: Any,
    made: tuple[Path, EngineInfo],
) -> None:
    given = feed(lengths, tokens)
    with plan.open_plan(*made, graphs=graphs) as run:
        bench.record.calls.clear()
        same(run(given), tiny, given)
        assert chosen(bench) == profiles
        for seed in range(1, 4):  # the same shape again, other texts: graphs take over
            given = feed(lengths, tokens, seed=seed)
            same(run(given), tiny, given)
    assert bench.gpu.leaks() == NOTHING


def test_shapes_in_any_order_do_not_mix(
    bench: Any, tiny: Any, made: tuple[Path, EngineInfo]
) -> None:
    rng = np.random.default_rng(7)
    with plan.open_plan(*made) as run:
        for seed in range(60):
            lengths = [int(n) for n in rng.integers(1, 41, rng.integers(1, 6))]
            given = feed(lengths, seed=seed)
            same(run(given), tiny, given)
    assert bench.gpu.leaks() == NOTHING


def test_a_row_of_padding_only_is_no_trouble(
    bench: Any, tiny: Any, made: tuple[Path, EngineInfo]
) -> None:
    given = feed([5, 3])
    given["attention_mask"][1] = 0
    with plan.open_plan(*made) as run:
        found = run(given)
    alone = {name: rows[:1] for name, rows in given.items()}
    wanted = tiny.run(alone["input_ids"], alone["attention_mask"])
    np.testing.assert_allclose(found["sentence_embedding"][:1], wanted["sentence_embedding"])


def test_a_text_longer_than_every_profile(bench: Any, made: tuple[Path, EngineInfo]) -> None:
    with plan.open_plan(*made) as run:
        with pytest.raises(ProfileError, match="text 1 of a batch") as caught:
            run(feed([5, 41]))
        assert "41 tokens; the longest profile ends at 40" in caught.value.evidence
        given = feed([5, 5])
        assert run(given)  # it goes on
    assert bench.gpu.leaks() == NOTHING


def test_inputs_of_another_kind_are_converted(
    bench: Any, tiny: Any, made: tuple[Path, EngineInfo]
) -> None:
    given = feed([5, 4])
    narrow = {name: np.asfortranarray(rows.astype(np.int32)) for name, rows in given.items()}
    with plan.open_plan(*made) as run:
        same(run(narrow), tiny, given)


# --- CUDA graphs --------------------------------------------------------------------------------


def launches(bench: Any) -> int:
    found: int = bench.gpu.calls.count("cudaGraphLaunch")
    return found


def test_a_shape_that_comes_again_gets_a_graph(
    bench: Any, tiny: Any, made: tuple[Path, EngineInfo]
) -> None:
    given = feed([5, 4])
    with plan.open_plan(*made) as run:
        for expected in (0, 1, 2, 3):
            same(run(given), tiny, given)
            assert launches(bench) == expected
        captured = [one for one in bench.record.named("execute_async_v3") if one["captured"]]
        assert len(captured) == 1
        # its own context, beside one a profile
        assert len(bench.record.named("create_execution_context")) == len(PROFILES) + 1
    assert {one["strategy"] for one in bench.record.named("create_execution_context")} == {
        "USER_MANAGED"
    }


def test_graphs_can_be_left_out(bench: Any, tiny: Any, made: tuple[Path, EngineInfo]) -> None:
    given = feed([5, 4])
    with plan.open_plan(*made, graphs=False) as run:
        for _ in range(4):
            same(run(given), tiny, given)
    assert "cudaStreamBeginCapture" not in bench.gpu.calls


def test_a_large_batch_gets_no_graph(
    bench: Any, made: tuple[Path, EngineInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "GRAPH_TOKENS", 9)
    with plan.open_plan(*made) as run:
        for _ in range(3):
            run(feed([5, 5]))
        assert launches(bench) == 0
        for _ in range(3):
            run(feed([3, 3, 3]))
        assert launches(bench) == 2


def test_graphs_are_captured_again_when_buffers_move(
    bench: Any, tiny: Any, made: tuple[Path, EngineInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "jexport.targets.trt.cuda.ALIGNMENT", 1
    )  # so that every larger batch moves them
    short, long = feed([3]), feed([40, 40, 40])
    with plan.open_plan(*made) as run:
        for _ in range(3):
            same(run(short), tiny, short)
        before = bench.gpu.calls.count("cudaStreamBeginCapture")
        assert before == 1
        same(run(long), tiny, long)
        for seed in range(3):
            given = feed([3], seed=seed)
            same(run(given), tiny, given)
        assert bench.gpu.calls.count("cudaStreamBeginCapture") == 2
    assert bench.gpu.leaks() == NOTHING


def test_the_number_of_graphs_is_bounded(
    bench: Any, tiny: Any, made: tuple[Path, EngineInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "GRAPHS", 2)
    with plan.open_plan(*made) as run:
        run(feed([16] * 8))  # the largest first: nothing moves afterwards
        for length in (1, 2, 3, 4):
            for seed in range(3):
                given = feed([length], seed=seed)
                same(run(given), tiny, given)
        made_graphs = bench.gpu.calls.count("cudaGraphInstantiate")
        gone = bench.gpu.calls.count("cudaGraphExecDestroy")
        assert made_graphs == 4
        assert made_graphs - gone == 2
        given = feed([4])
        before = launches(bench)
        same(run(given), tiny, given)
        assert launches(bench) == before + 1  # the newest was kept
    assert bench.gpu.leaks() == NOTHING


def test_the_graph_that_was_not_used_for_longest_goes_first(
    bench: Any, made: tuple[Path, EngineInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "GRAPHS", 2)
    with plan.open_plan(*made) as run:
        run(feed([16] * 8))
        for length in (1, 2, 1, 2, 1, 3, 3):  # 3 takes the place of 2
            run(feed([length]))
        before = launches(bench), bench.gpu.calls.count("cudaGraphInstantiate")
        run(feed([1]))
        run(feed([3]))
        after = launches(bench), bench.gpu.calls.count("cudaGraphInstantiate")
        assert after == (before[0] + 2, before[1])


# --- memory -------------------------------------------------------------------------------------


def test_memory_is_reused(bench: Any, made: tuple[Path, EngineInfo]) -> None:
    with plan.open_plan(*made) as run:
        run(feed([40, 40, 40]))
        before = bench.gpu.calls.count("cudaMalloc")
        for seed in range(5):
            run(feed([40 - seed, 20], seed=seed))
        assert bench.gpu.calls.count("cudaMalloc") == before
        run(feed([16] * 8))
        assert bench.gpu.leaks()["device"] == 5  # activations, two inputs, two outputs


def test_everything_is_freed_after_an_error(bench: Any, made: tuple[Path, EngineInfo]) -> None:
    def stop() -> None:
        with plan.open_plan(*made) as run:
            run(feed([5]))
            run(feed([5]))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        stop()
    assert bench.gpu.leaks() == NOTHING


@pytest.mark.parametrize(
    ("function", "after"),
    [
        ("cudaStreamCreateWithFlags", 0),
        ("cudaMalloc", 0),
        ("cudaMalloc", 1),
        ("cudaMalloc", 3),
        ("cudaMallocHost", 0),
        ("cudaMallocHost", 2),
        ("cudaMemcpyAsync", 0),
        ("cudaMemcpyAsync", 2),
        ("cudaStreamBeginCapture", 0),
        ("cudaStreamEndCapture", 0),
        ("cudaGraphInstantiate", 0),
        ("cudaGraphLaunch", 0),
    ],
)
def test_everything_is_freed_when_a_call_fails(
    function: str, after: int, bench: Any, made: tuple[Path, EngineInfo]
) -> None:
    def run_thrice() -> None:
        with plan.open_plan(*made) as run:
            for _ in range(3):
                run(feed([5, 4]))

    bench.gpu.fail[function] = after
    with pytest.raises(DeviceError) as caught:
        run_thrice()
    assert function in str(caught.value)
    assert bench.gpu.leaks() == NOTHING


def test_a_failing_free_does_not_keep_the_rest(bench: Any, made: tuple[Path, EngineInfo]) -> None:
    def fail_while_closing() -> None:
        with plan.open_plan(*made) as run:
            run(feed([5]))
            bench.gpu.fail["cudaFree"] = 2  # calls that still work

    with pytest.raises(DeviceError, match="cudaFree"):
        fail_while_closing()
    left = bench.gpu.leaks()
    assert left["device"] == 3  # of five, as many as failed
    assert left["host"] == 0
    assert left["handles"] == 0


def test_a_closed_plan_refuses(bench: Any, made: tuple[Path, EngineInfo]) -> None:
    with plan.open_plan(*made) as run:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        run(feed([5]))


def test_a_gpu_that_is_too_small(install: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    bench = install(11)
    path, made = compile_tiny(tiny, tmp_path)
    bench.gpu.total_bytes = path.stat().st_size - 1
    with (
        pytest.raises(DeviceError, match="too little free memory") as caught,
        plan.open_plan(path, made),
    ):
        pass
    assert "weights" in caught.value.evidence
    bench.gpu.total_bytes = path.stat().st_size + 100
    with (
        pytest.raises(DeviceError, match="too little free memory") as caught,
        plan.open_plan(path, made),
    ):
        pass
    assert "activations at profile 1" in caught.value.evidence
    assert bench.gpu.leaks() == NOTHING


def test_memory_that_runs_out_names_what_to_do(bench: Any, made: tuple[Path, EngineInfo]) -> None:
    with plan.open_plan(*made) as run:
        bench.gpu.total_bytes = bench.gpu._used() + 100
        with pytest.raises(DeviceError, match="out of memory") as caught:
            run(feed([5]))
        assert "compile.profiles" in caught.value.fix
        bench.gpu.total_bytes = 1 << 30
        assert run(feed([5]))
    assert bench.gpu.leaks() == NOTHING


def test_two_threads_take_turns(
    bench: Any, tiny: Any, made: tuple[Path, EngineInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles: list[BaseException] = []
    copy = bench.gpu.runtime.cudaMemcpyAsync

    def slowly(*words: Any) -> Any:
        time.sleep(0.0003)  # lets another thread in, were there no lock
        return copy(*words)

    monkeypatch.setattr(bench.gpu.runtime, "cudaMemcpyAsync", slowly)
    with plan.open_plan(*made) as run:

        def work(seed: int) -> None:
            try:
                for turn in range(10):
                    given = feed([seed + 1] * (turn % 3 + 1), seed=seed)
                    same(run(given), tiny, given)
            except BaseException as error:
                troubles.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not troubles


# --- before TensorRT sees it --------------------------------------------------------------------


def test_a_changed_plan_never_reaches_tensorrt(bench: Any, made: tuple[Path, EngineInfo]) -> None:
    path, said = made
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(ArtifactError, match="not the plan") as caught, plan.open_plan(path, said):
        pass
    assert "jexport compile" in caught.value.fix
    assert not bench.record.named("deserialize_cuda_engine")


def test_a_plan_of_another_gpu_never_reaches_tensorrt(
    bench: Any, made: tuple[Path, EngineInfo]
) -> None:
    bench.gpu.major, bench.gpu.minor = 9, 0
    with pytest.raises(DeviceError, match="another GPU architecture"), plan.open_plan(*made):
        pass
    assert not bench.record.named("deserialize_cuda_engine")


def test_what_tensorrt_refuses_is_said_in_its_words(
    bench: Any, made: tuple[Path, EngineInfo]
) -> None:
    import dataclasses

    path, said = made
    path.write_bytes(b"not a plan")
    said = dataclasses.replace(said, sha256=hashlib.sha256(b"not a plan").hexdigest())
    with (
        pytest.raises(EngineError, match=r"does not open model\.plan") as caught,
        plan.open_plan(path, said),
    ):
        pass
    assert "magic tag" in caught.value.evidence
    assert bench.gpu.leaks() == NOTHING


def test_profiles_that_the_manifest_does_not_name(
    bench: Any, made: tuple[Path, EngineInfo]
) -> None:
    import dataclasses

    path, said = made
    with (
        pytest.raises(EngineError, match="not those of its manifest"),
        plan.open_plan(path, dataclasses.replace(said, profiles=PROFILES[:1])),
    ):
        pass


def test_host_code_is_allowed_only_where_it_was_asked_for(
    bench: Any, tiny: Any, tmp_path: Path
) -> None:
    import dataclasses

    path, said = compile_tiny(tiny, tmp_path, version_compatible=True)
    with plan.open_plan(path, said) as run:
        assert run(feed([5]))
    lying = dataclasses.replace(said, version_compatible=False)
    with pytest.raises(EngineError) as caught, plan.open_plan(path, lying):
        pass
    assert "host code" in caught.value.evidence


@pytest.mark.parametrize("method", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_a_call_that_tensorrt_refuses(
    method: str, bench: Any, made: tuple[Path, EngineInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.trt.IExecutionContext, method, lambda *_: False)
    with pytest.raises(EngineError, match="TensorRT failed at"), plan.open_plan(*made) as run:
        run(feed([5]))
    assert bench.gpu.leaks() == NOTHING


@pytest.mark.parametrize("answer", ["profile", "context"])
def test_opening_that_tensorrt_refuses(
    answer: str, bench: Any, made: tuple[Path, EngineInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer == "profile":
        monkeypatch.setattr(
            bench.trt.IExecutionContext, "set_optimization_profile_async", lambda *_: False
        )
    else:
        monkeypatch.setattr(bench.trt.ICudaEngine, "create_execution_context", lambda *_: None)
    with pytest.raises(EngineError, match="TensorRT failed at"), plan.open_plan(*made):
        pass
    assert bench.gpu.leaks() == NOTHING


def test_origin_is_what_was_compiled(made: tuple[Path, EngineInfo]) -> None:
    assert engine_info.from_facts(made[1].to_dict()) == made[1]
