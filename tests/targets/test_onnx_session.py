"""The onnx target on a GPU, as far as it goes without one: the CPU provider, bound as a GPU's is.

What only a GPU shows is in tests/gpu. Stand-ins here have names of the real bindings alone, which
the last tests hold against the installed onnxruntime.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as bindings

from jexport.errors import (
    DependencyError,
    DeviceError,
    DeviceMemoryError,
    UnsupportedGraphError,
)
from jexport.runtime.embedder import Embedder
from jexport.runtime.tokenise import TextTokenizer
from jexport.targets import onnx as target
from jexport.targets.onnx import capture, devices
from jexport.targets.onnx import session as _onnx_session
from jexport.targets.onnx.devices import CPU, CUDA, Device
from jexport.targets.onnx.session import Choice
from jexport.types import Batching, CompiledModel, Embedding

HIDDEN, POOLED = "last_hidden_state", "sentence_embedding"


def feed(lengths: list[int], width: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(width).integers(5, 60, (len(lengths), width)).astype(np.int64)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": np.where(mask == 1, ids, 1), "attention_mask": mask}


FEEDS = (feed([3], 3), feed([9, 4, 1], 9), feed([16] * 5, 16), feed([1, 30], 32))


@pytest.fixture
def plain(compiled: CompiledModel) -> Iterator[Any]:
    """The runner of the CPU, as it is opened by default."""
    with target.runner(compiled, "cpu", 1) as run:
        yield run


def bound(compiled: CompiledModel, **choice: Any) -> _onnx_session.SessionRunner:
    """The way of a GPU on the CPU provider."""
    return _onnx_session._open(
        compiled, Choice(device=Device(kind="cpu"), threads=1, bound=True, **choice)
    )


# --- one pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(FEEDS)))
def test_a_bound_pass_gives_the_bits_of_a_plain_one(
    number: int, compiled: CompiledModel, plain: Any
) -> None:
    wanted, found = plain(FEEDS[number]), bound(compiled)(FEEDS[number])
    assert list(found) == [HIDDEN, POOLED]
    for name in wanted:
        np.testing.assert_array_equal(wanted[name], found[name])
        assert found[name].flags.writeable  # its own memory, not the session's


@pytest.mark.parametrize("is_bound", [False, True])
def test_one_output_alone_has_the_same_bits(
    is_bound: bool, compiled: CompiledModel, plain: Any
) -> None:
    runner = bound(compiled) if is_bound else plain
    for name in (HIDDEN, POOLED):
        found = runner.only((name,))(FEEDS[1])
        assert list(found) == [name]
        np.testing.assert_array_equal(found[name], plain(FEEDS[1])[name])


def test_several_threads_share_one_session(compiled: CompiledModel, plain: Any) -> None:
    wanted = [plain(one)[POOLED] for one in FEEDS]
    for runner in (bound(compiled), plain):
        pooled = runner.only((POOLED,))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(pooled, FEEDS * 8))
        for number, one in enumerate(found):
            np.testing.assert_array_equal(one[POOLED], wanted[number % len(FEEDS)])


def embedder(compiled: CompiledModel, folder: Path, runner: Any, batching: Batching) -> Embedder:
    """The small checkpoint's tokenizer with a runner of its graph."""
    return Embedder(
        tokenizer=TextTokenizer.open(folder, max_tokens=8192),
        runner=runner,
        embedding=Embedding(
            task="none",
            prompt="",
            pooling="mean",
            normalize=True,
            dimension=64,
            matryoshka=(16, 32, 64),
            max_tokens=8192,
        ),
        outputs=[spec.name for spec in compiled.signature.outputs],
        batching=batching,
    )


ON_GPU = Batching(tokens=4096, length_multiple=1, in_flight=2, pooled=True)


@pytest.mark.parametrize("multiple", [1, 16])
def test_an_embedder_on_the_way_of_a_gpu_gives_the_vectors_of_the_cpu(
    multiple: int, compiled: CompiledModel, plain: Any, small: Path
) -> None:
    """Pooled in the graph, bound, two batches in flight, lengths in buckets."""
    asked: list[tuple[str, ...]] = []
    runner = bound(compiled)
    run = runner._run

    def noting(outputs: tuple[str, ...], feed: Any) -> Any:
        asked.append(outputs)
        return run(outputs, feed)

    runner._run = noting  # type: ignore[method-assign]
    wishes = dataclasses.replace(ON_GPU, length_multiple=multiple)
    ours = embedder(compiled, small, runner, wishes)
    theirs = embedder(compiled, small, plain, Batching())
    texts = [
        "",
        "a",
        *(f"the {word} of {word}s " * (n % 40) for n, word in enumerate("abcdef" * 9)),
    ]
    for dimensions in (None, 16, 32):
        np.testing.assert_allclose(
            ours.encode(texts, dimensions=dimensions),
            theirs.encode(texts, dimensions=dimensions),
            rtol=1e-4,
            atol=2e-6,
        )
    assert set(asked) == {(POOLED,)}  # no token vector leaves the device
    asked.clear()
    chunks = ["First comes this. ", "Then that. ", "And an end."]
    np.testing.assert_allclose(
        ours.late_chunking(chunks), theirs.late_chunking(chunks), rtol=1e-4, atol=2e-6
    )
    np.testing.assert_allclose(
        ours.encode(texts[:3], normalize=False),
        theirs.encode(texts[:3], normalize=False),
        rtol=1e-4,
        atol=2e-6,
    )
    assert set(asked) == {(HIDDEN,)}


def test_a_text_of_8192_tokens(compiled: CompiledModel, plain: Any, small: Path) -> None:
    text = "word " * 9000
    ours = embedder(compiled, small, bound(compiled), ON_GPU)
    found = ours.encode([text, "a short one"])
    assert ours.truncated == 1
    wanted = embedder(compiled, small, plain, Batching()).encode([text, "a short one"])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-6)


# --- CUDA graphs: the bookkeeping, without a capture --------------------------------------------


@pytest.fixture
def captured(compiled: CompiledModel) -> Iterator[tuple[Any, list[str]]]:
    """A Captured on the CPU provider, and the gpu_graph_id of every run."""
    numbers: list[str] = []
    make = capture.graph_options

    def graph_options(number: str) -> Any:
        numbers.append(number)
        return make(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "graph_options", graph_options)
        choice = Choice(device=Device(kind="cpu"), threads=1)
        session = _onnx_session._session(compiled, choice)
        names = [spec.name for spec in compiled.signature.inputs]
        skip = capture.graph_options(capture.SKIP)
        assert numbers.pop() == "-1"
        whole = _onnx_session._bound(session, names, skip)
        made = capture.Captured(session, whole, compiled.signature, choice.device)
        yield made, numbers


def test_a_shape_is_one_graph_with_its_own_memory(
    captured: tuple[Any, list[str]], compiled: CompiledModel, plain: Any
) -> None:
    made, numbers = captured
    runner = _onnx_session.SessionRunner(made.run, (HIDDEN, POOLED), "cuda")
    kept = []
    for one in (*FEEDS, *FEEDS):
        found = runner.only((POOLED,))(one)[POOLED]
        kept.append((found, plain(one)[POOLED]))
        assert found.shape == (len(one["input_ids"]), 64)
    for found, wanted in kept:  # a replay writes over no vector that was given away
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert numbers == ["1", "2", "3", "4"] * 2
    assert made.shapes == 4
    # Three rows are filled up to four, five to eight: another number of them is the same graph.
    np.testing.assert_allclose(
        runner.only((POOLED,))(feed([9, 4, 1, 7], 9))[POOLED],
        plain(feed([9, 4, 1, 7], 9))[POOLED],
        rtol=1e-5,
        atol=1e-6,
    )
    assert made.shapes == 4
    runner.only((HIDDEN,))(FEEDS[0])  # other outputs are another graph
    assert made.shapes == 5


def test_large_batches_and_too_many_shapes_are_not_captured(
    captured: tuple[Any, list[str]], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, numbers = captured
    monkeypatch.setattr(capture, "SMALL_TOKENS", 32)
    monkeypatch.setattr(capture, "MOST_SHAPES", 2)
    for one in (FEEDS[1], FEEDS[2], FEEDS[0], feed([4], 4), feed([5], 5)):
        found = made.run([POOLED], one)[0]
        np.testing.assert_allclose(found, plain(one)[POOLED], rtol=1e-5, atol=1e-6)
    assert made.shapes == 2
    assert numbers == ["1", "2"]


def test_a_capture_that_fails_is_tried_again(
    captured: tuple[Any, list[str]], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, numbers = captured
    made.run([POOLED], FEEDS[0])
    with monkeypatch.context() as patch:
        patch.setattr(made._session, "run_with_iobinding", fail_with(RuntimeError("capture")))
        with pytest.raises(RuntimeError, match="capture"):
            made.run([POOLED], FEEDS[1])
    assert made.shapes == 1
    found = made.run([POOLED], FEEDS[1])[0]
    np.testing.assert_allclose(found, plain(FEEDS[1])[POOLED], rtol=1e-5, atol=1e-6)
    assert numbers == ["1", "2", "2"]


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*words: Any) -> Any:
        raise error

    return fail


def test_threads_take_turns_at_one_graph(captured: tuple[Any, list[str]], plain: Any) -> None:
    made, _ = captured
    wanted = [plain(one)[POOLED] for one in FEEDS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: made.run([POOLED], one)[0], FEEDS * 8))
    for number, one in enumerate(found):
        np.testing.assert_allclose(one, wanted[number % len(FEEDS)], rtol=1e-5, atol=1e-6)
    assert threading.active_count() >= 1


def test_cuda_graphs_are_refused_where_they_cannot_be(
    compiled: CompiledModel, onnxruntime_with_cuda: Callable[..., Any]
) -> None:
    onnxruntime_with_cuda()
    with pytest.raises(UnsupportedGraphError, match="CUDA graph") as caught:
        target.cuda_graph_runner(compiled, "cuda", 1).__enter__()  # 8,192 tokens: it has branches
    assert "If" in caught.value.evidence
    with pytest.raises(DeviceError, match="of a GPU"):
        target.cuda_graph_runner(compiled, "cpu", 1).__enter__()


# --- devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "index"),
    [
        ("auto", "auto", 0),
        ("cpu", "cpu", 0),
        ("cuda", "cuda", 0),
        ("cuda:0", "cuda", 0),
        ("cuda:1", "cuda", 1),
        ("cuda:12", "cuda", 12),
    ],
)
def test_a_device_is_read(text: str, kind: str, index: int) -> None:
    assert devices.parse(text) == Device(kind=kind, index=index)
    assert devices.parse(str(devices.parse(text))) == devices.parse(text)


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:1:2", "cuda:x", "cpu:0", "CUDA"])
def test_another_device_is_refused(text: str, compiled: CompiledModel) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        target.runner(compiled, text, 0).__enter__()


@pytest.fixture
def onnxruntime_with_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """`onnxruntime_with_cuda(starts=True)`: a CUDA provider is listed; what sessions were given.

    The session is a real one on the CPU; `starts` lets it claim that CUDA runs it.
    """
    make = onnxruntime.InferenceSession
    asked: list[Any] = []

    def install(*, starts: bool = True, error: Exception | None = None) -> list[Any]:
        def session(path: str, options: Any, *, providers: list[Any], **more: Any) -> Any:
            asked.append((providers, options.intra_op_num_threads, more))
            if providers == [CPU]:
                return make(path, options, providers=providers, **more)
            if error is not None:
                raise error
            real = make(path, options, providers=[CPU])
            if starts:
                monkeypatch.setattr(real, "get_providers", lambda: [CUDA, CPU])
            return real

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        monkeypatch.setattr(devices, "_driver", lambda: None)
        return asked

    return install


@pytest.mark.parametrize(
    ("device", "index"), [("auto", "0"), ("cuda", "0"), ("cuda:0", "0"), ("cuda:1", "1")]
)
def test_what_the_cuda_provider_is_told(
    device: str,
    index: str,
    compiled: CompiledModel,
    onnxruntime_with_cuda: Callable[..., Any],
    plain: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = plain(FEEDS[1])
    asked = onnxruntime_with_cuda()
    monkeypatch.setattr(devices, "free_memory", lambda number: 10_000_000_000)
    with target.runner(compiled, device, 3) as run:
        assert run.device == ("cuda:1" if index == "1" else "cuda")
        np.testing.assert_allclose(run(FEEDS[1])[POOLED], wanted[POOLED], rtol=1e-4, atol=1e-6)
    ((providers, threads, more),) = asked
    assert providers == [
        (
            CUDA,
            {
                "device_id": index,
                "arena_extend_strategy": "kSameAsRequested",
                "use_tf32": "0",
                "gpu_mem_limit": "9000000000",
            },
        ),
        CPU,
    ]
    assert (threads, more) == (3, {"enable_fallback": 0})


def test_tf32_is_used_only_where_it_was_asked_for_by_name(compiled: CompiledModel) -> None:
    told = {
        precision: devices.provider_options(
            dataclasses.replace(compiled, precision=precision), 0, None, cuda_graphs=False
        )
        for precision in target.TARGET.precisions
    }
    assert {name: one["use_tf32"] for name, one in told.items()} == {
        name: "1" if name == "tf32" else "0" for name in target.TARGET.precisions
    }
    assert not any("gpu_mem_limit" in one or "enable_cuda_graph" in one for one in told.values())


def test_what_an_artifact_that_is_made_for_cuda_needs_is_told(compiled: CompiledModel) -> None:
    facts = {**compiled.facts, "cuda": {"steps": {}, "provider_options": {"sdpa_kernel": "2"}}}
    made = dataclasses.replace(compiled, facts=facts)
    told = devices.provider_options(made, 0, None, cuda_graphs=True)
    assert (told["sdpa_kernel"], told["enable_cuda_graph"]) == ("2", "1")
    with pytest.raises(DeviceError, match="CUDA alone"):
        target.runner(made, "cpu", 1).__enter__()
    with pytest.raises(DependencyError, match="no CUDA provider"):
        target.runner(made, "auto", 1).__enter__()


def test_the_cpu_is_told_nothing_of_cuda(
    compiled: CompiledModel, onnxruntime_with_cuda: Callable[..., Any]
) -> None:
    asked = onnxruntime_with_cuda()
    with target.runner(compiled, "cpu", 2) as run:
        assert run.device == "cpu"
    assert asked == [([CPU], 2, {"disabled_optimizers": ["SkipLayerNormFusion"]})]


def test_no_cuda_provider(compiled: CompiledModel) -> None:
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has one")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(DependencyError, match="no CUDA provider") as caught:
            target.runner(compiled, device, 0).__enter__()
        assert caught.value.exit_code == 15
        assert "jexport[gpu]" in caught.value.fix
    with target.runner(compiled, "auto", 0) as run:
        assert run.device == "cpu"


@pytest.mark.parametrize("error", [None, bindings.EPFail("CUDA failure 100: no device")])
def test_a_cuda_provider_that_does_not_start(
    error: Exception | None, compiled: CompiledModel, onnxruntime_with_cuda: Callable[..., Any]
) -> None:
    onnxruntime_with_cuda(starts=False, error=error)
    with pytest.raises(DependencyError, match="does not start") as caught:
        target.runner(compiled, "cuda", 0).__enter__()
    assert "driver" in caught.value.evidence
    if error is not None:
        assert "no device" in caught.value.evidence
    opening = target.runner(compiled, "auto", 1)
    with pytest.warns(RuntimeWarning, match=r"does not start.*runs on the CPU.*driver"):
        run: Any = opening.__enter__()
    assert run.device == "cpu"
    assert run(FEEDS[0])
    assert target.TARGET.runtime.batching(compiled, run.device) == Batching()


def test_another_error_of_a_session_is_not_hidden(
    compiled: CompiledModel, onnxruntime_with_cuda: Callable[..., Any]
) -> None:
    onnxruntime_with_cuda(error=bindings.InvalidGraph("node 3 is broken"))
    for device in ("cuda", "auto"):
        with pytest.raises(bindings.InvalidGraph):
            target.runner(compiled, device, 0).__enter__()


def test_int8_stays_on_the_cpu_and_says_so(
    compiled: CompiledModel, onnxruntime_with_cuda: Callable[..., Any]
) -> None:
    operators = {**compiled.facts["operators"], "com.microsoft.MatMulIntegerToFloat": 4}
    int8 = dataclasses.replace(compiled, facts={**compiled.facts, "operators": operators})
    onnxruntime_with_cuda()
    opening = target.runner(int8, "auto", 1)
    with pytest.warns(RuntimeWarning, match="MatMulIntegerToFloat"):
        run: Any = opening.__enter__()
    assert run.device == "cpu"
    with pytest.raises(UnsupportedGraphError, match="not run on the GPU") as caught:
        target.runner(int8, "cuda", 1).__enter__()
    assert "fp16" in caught.value.fix


def test_evidence_names_the_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """One GPU, and a driver that works."""

        def cuInit(self, flags: int) -> int:
            return flags

        def cuDeviceGetCount(self, count: Any) -> int:
            ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = 1
            return 0

    monkeypatch.setattr(devices, "_driver", Driver)
    assert "libonnxruntime_providers" in devices.why_not(0)
    assert "there are 1 GPUs" in devices.why_not(1)


# --- memory -------------------------------------------------------------------------------------

FULL = [
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
    "MatMul node. Name:'m' Status Message: bfc_arena.cc:376 void* onnxruntime::BFCArena::"
    "AllocateRawInternal Failed to allocate memory for requested buffer of size 8388608000",
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
]


@pytest.mark.parametrize("text", FULL)
@pytest.mark.parametrize("kind", [bindings.RuntimeException, bindings.EPFail, RuntimeError])
def test_a_full_memory_is_an_error_of_its_own(text: str, kind: type[Exception]) -> None:
    def fail(outputs: Any, feed: Any) -> Any:
        raise kind(text)

    runner = _onnx_session.SessionRunner(fail, (POOLED,), "cuda:1")
    with pytest.raises(DeviceMemoryError, match="cuda:1") as caught:
        runner(FEEDS[0])
    assert caught.value.exit_code == 40
    assert "batch" in caught.value.fix
    with pytest.raises(DeviceMemoryError):
        runner.only((POOLED,))(FEEDS[0])


@pytest.mark.parametrize(
    "error", [bindings.Fail("shapes do not match"), MemoryError("out of memory"), KeyError("x")]
)
def test_other_errors_pass(error: Exception) -> None:
    def fail(outputs: Any, feed: Any) -> Any:
        raise error

    with pytest.raises(type(error)):
        _onnx_session.SessionRunner(fail, (POOLED,), "cuda")(FEEDS[0])


def test_a_memory_that_is_full_when_it_opens(
    compiled: CompiledModel, onnxruntime_with_cuda: Callable[..., Any]
) -> None:
    onnxruntime_with_cuda(error=bindings.RuntimeException(FULL[0]))
    for device in ("cuda", "auto"):
        with pytest.raises(DeviceMemoryError):
            target.runner(compiled, device, 0).__enter__()


def test_a_real_arena_that_is_full_is_recognised(compiled: CompiledModel, tmp_path: Path) -> None:
    """What onnxruntime itself says of a tensor that is larger than any memory."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
        huge (int64[n] input_ids, int64[n] attention_mask) => (float[] last_hidden_state)
        { last_hidden_state = ConstantOfShape (input_ids) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    huge = dataclasses.replace(compiled, folder=tmp_path)
    ids = np.array([1 << 40, 1 << 10], np.int64)
    feed = {"input_ids": ids, "attention_mask": ids}
    with target.runner(huge, "cpu", 1) as run, pytest.raises(DeviceMemoryError):
        run(feed)
    with pytest.raises(DeviceMemoryError) as caught:
        bound(huge)(feed)
    assert type(caught.value.__cause__) is RuntimeError


def batch(compiled: CompiledModel, free: float, **facts: Any) -> int:
    made = dataclasses.replace(compiled, facts={**compiled.facts, **facts})
    return devices.batch_tokens(made, int(free * 1024**3))


def test_batches_are_as_large_as_what_is_free(compiled: CompiledModel) -> None:
    assert batch(compiled, 139) == devices.LARGEST_BATCH
    assert batch(compiled, 0.001) == devices.SMALLEST_BATCH
    sizes = [batch(compiled, free, max_tokens=8192) for free in (0.1, 1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2
    assert all(size & (size - 1) == 0 for size in sizes)
    assert batch(compiled, 1, max_tokens=512) > batch(compiled, 1, max_tokens=8192)
    half = dataclasses.replace(compiled, precision="fp16")
    assert batch(half, 1, max_tokens=8192) >= batch(compiled, 1, max_tokens=8192)


def test_how_each_device_wants_its_batches(
    compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "free_memory", lambda index: 64 * 1024**3)
    wants = target.TARGET.runtime.batching
    assert wants(compiled, "cpu") == wants(compiled, "auto") == Batching()
    on_gpu = wants(compiled, "cuda:1")
    assert (on_gpu.in_flight, on_gpu.pooled, on_gpu.length_multiple) == (2, True, 1)
    operators = {k: n for k, n in compiled.facts["operators"].items() if k != "If"}
    whole = dataclasses.replace(compiled, facts={**compiled.facts, "operators": operators})
    assert wants(whole, "cuda").length_multiple == devices.LENGTH_MULTIPLE
    monkeypatch.setattr(devices, "free_memory", lambda index: None)
    assert wants(compiled, "cuda").tokens == devices.UNKNOWN_BATCH


def test_free_memory_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Driver:
        """cuMemGetInfo with 7 of 9 bytes free; every call is noted."""

        def __getattr__(self, name: str) -> Any:
            def call(*words: Any) -> int:
                calls.append(name)
                if name == "cuMemGetInfo_v2":
                    for word, number in zip(words, (7, 9), strict=True):
                        ctypes.cast(word, ctypes.POINTER(ctypes.c_size_t))[0] = number
                return 0

            return call

    monkeypatch.setattr(devices, "_driver", Driver)
    assert devices.free_memory(0) == 7
    assert calls[-3:] == ["cuMemGetInfo_v2", "cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]
    monkeypatch.setattr(devices, "_driver", lambda: None)
    assert devices.free_memory(0) is None


# --- the real bindings --------------------------------------------------------------------------


def test_every_name_that_is_used_is_one_of_the_real_bindings() -> None:
    for owner, names in {
        onnxruntime.SessionOptions: (
            "intra_op_num_threads",
            "log_severity_level",
            "enable_mem_pattern",
        ),
        onnxruntime.RunOptions: ("add_run_config_entry",),
        onnxruntime.InferenceSession: ("io_binding", "run_with_iobinding", "get_providers", "run"),
        onnxruntime.IOBinding: (
            "bind_cpu_input",
            "bind_output",
            "bind_ortvalue_input",
            "bind_ortvalue_output",
            "copy_outputs_to_cpu",
            "synchronize_outputs",
        ),
        onnxruntime.OrtValue: ("ortvalue_from_shape_and_type", "update_inplace", "numpy"),
        onnxruntime: ("preload_dlls", "get_available_providers"),
    }.items():
        assert [name for name in names if not hasattr(owner, name)] == []


def test_run_options_that_are_set_can_be_read_back() -> None:
    assert capture.graph_options("3").get_run_config_entry("gpu_graph_id") == "3"


DOCUMENTED = {
    # onnxruntime 1.30.0: names in libonnxruntime_providers_cuda.so, in the order they stand there
    "device_id",
    "has_user_compute_stream",
    "gpu_mem_limit",
    "gpu_external_alloc",
    "gpu_external_free",
    "gpu_external_empty_cache",
    "arena_extend_strategy",
    "cudnn_conv_algo_search",
    "do_copy_in_default_stream",
    "cudnn_conv_use_max_workspace",
    "enable_cuda_graph",
    "cudnn_conv1d_pad_to_nc1d",
    "enable_cudnn",
    "tunable_op_enable",
    "tunable_op_tuning_enable",
    "prefer_nhwc",
    "use_ep_level_unified_stream",
    "use_tf32",
    "sdpa_kernel",
    "fuse_conv_bias",
}


def test_every_provider_option_is_one_of_the_cuda_providers(compiled: CompiledModel) -> None:
    told = devices.provider_options(compiled, 1, 1 << 30, cuda_graphs=True)
    assert set(told) <= DOCUMENTED
    assert all(isinstance(value, str) for value in told.values())
