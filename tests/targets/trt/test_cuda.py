"""CUDA calls are checked, buffers grow and let go, captures end whatever happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jexport.errors import DeviceError
from jexport.targets.trt import cuda

NOTHING = {"device": 0, "host": 0, "handles": 0}


def test_a_round_trip_waits(bench: Any) -> None:
    buffer, stream = cuda.Buffer(staged=True), cuda.Stream()
    buffer.reserve(100)
    buffer.host(100)[:] = np.arange(100)
    stream.upload(buffer, 100)
    stream.wait()
    buffer.host(100)[:] = 0
    stream.download(buffer, 100)
    assert not buffer.host(100).any()  # nothing has happened yet, as on a GPU
    stream.wait()
    np.testing.assert_array_equal(buffer.host(100), np.arange(100))
    buffer.free()
    stream.free()
    assert bench.gpu.leaks() == NOTHING


def test_a_buffer_grows_and_never_shrinks(bench: Any) -> None:
    buffer = cuda.Buffer(staged=True)
    buffer.reserve(10)
    assert (buffer.size_bytes, buffer.moved) == (256, 1)
    for size in (256, 5, 0):
        buffer.reserve(size)
    assert buffer.moved == 1
    buffer.reserve(257)
    assert (buffer.size_bytes, buffer.moved) == (512, 2)
    assert bench.gpu.leaks() == {"device": 1, "host": 1, "handles": 0}
    buffer.free()
    buffer.free()
    assert bench.gpu.leaks() == NOTHING


def test_a_buffer_without_a_pinned_copy(bench: Any) -> None:
    buffer = cuda.Buffer(staged=False)
    buffer.reserve(10)
    assert bench.gpu.leaks() == {"device": 1, "host": 0, "handles": 0}
    buffer.free()


def test_a_buffer_whose_second_half_fails_can_be_freed(bench: Any) -> None:
    buffer = cuda.Buffer(staged=True)
    bench.gpu.fail["cudaMallocHost"] = 0
    with pytest.raises(DeviceError, match="cudaMallocHost failed"):
        buffer.reserve(10)
    buffer.free()
    assert bench.gpu.leaks() == NOTHING


def test_the_pinned_copy_goes_even_when_the_other_does_not(bench: Any) -> None:
    buffer = cuda.Buffer(staged=True)
    buffer.reserve(10)
    bench.gpu.fail["cudaFree"] = 0
    with pytest.raises(DeviceError, match="cudaFree failed"):
        buffer.free()
    assert bench.gpu.leaks()["host"] == 0


def test_work_is_recorded_and_not_run(bench: Any) -> None:
    buffer, stream = cuda.Buffer(staged=True), cuda.Stream()
    buffer.reserve(8)
    graph = stream.capture(lambda: stream.upload(buffer, 8))
    stream.wait()
    assert bytes(bench.gpu.view(buffer.pointer, 8)) == b"\xab" * 8
    for value in (1, 2):
        buffer.host(8)[:] = value
        stream.launch(graph)
        stream.wait()
        assert bytes(bench.gpu.view(buffer.pointer, 8)) == bytes([value] * 8)
    graph.free()
    graph.free()
    buffer.free()
    stream.free()
    stream.free()
    assert bench.gpu.leaks() == NOTHING


def test_a_capture_ends_when_the_work_fails(bench: Any) -> None:
    stream = cuda.Stream()

    def fails() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        stream.capture(fails)
    stream.wait()  # would raise while a capture is going on
    stream.free()
    assert bench.gpu.leaks() == NOTHING


def test_out_of_memory_names_the_size(bench: Any) -> None:
    with pytest.raises(DeviceError, match="out of memory") as caught:
        cuda.Buffer(staged=True).reserve(1 << 31)
    assert str(1 << 31) in caught.value.evidence
    assert "compile.profiles" in caught.value.fix
