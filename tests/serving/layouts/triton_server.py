"""A small stand-in for Triton: its real gRPC service and ModelConfig, onnxruntime behind.

It reads a repository as Triton's core does (folders that begin with a number are versions, the
newest is served), opens the engine's file that config.pbtxt names, runs the warm-ups that it lists,
and refuses a request whose names, types or shapes are not the config's: a wrong config fails here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

WARMUP = "warmup"


def parsed(config: Path) -> Any:
    """config.pbtxt as Triton's own protobuf."""
    return text_format.Parse(config.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


def kserve(kind: int) -> str:
    return model_config_pb2.DataType.Name(kind).removeprefix("TYPE_")


def versions(model: Path) -> dict[int, Path]:
    """Version folders as std::stoll finds them: what begins with a number, but not with 0."""
    found = {}
    for path in model.iterdir():
        number = re.match(r"\s*\d+", path.name)
        if path.is_dir() and path.name != WARMUP and number and path.name[0] != "0":
            found[int(number[0])] = path
    return found


class Refused(Exception):
    """What Triton answers INVALID_ARGUMENT to."""


class Served:
    """One model, its newest version open."""

    def __init__(self, folder: Path) -> None:
        self.config = parsed(folder / "config.pbtxt")
        assert self.config.name == folder.name
        assert self.config.platform == "onnxruntime_onnx"
        self.version = max(versions(folder))
        path = folder / str(self.version) / self.config.default_model_filename
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        if self.config.optimization.graph.level == -1:
            level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.graph_optimization_level = level
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.batches: list[tuple[int, ...]] = []
        for warmup in self.config.model_warmup:
            self.run(self.warmup_inputs(folder / WARMUP, warmup))

    def warmup_inputs(self, folder: Path, warmup: Any) -> dict[str, np.ndarray]:
        feeds = {}
        for name, one in warmup.inputs.items():
            dtype = triton_to_np_dtype(kserve(one.data_type))
            row = np.zeros(list(one.dims), dtype=dtype)
            if one.WhichOneof("input_data_type") == "input_data_file":
                content = (folder / one.input_data_file).read_bytes()
                row = np.frombuffer(content, dtype=dtype).reshape(list(one.dims))
            feeds[name] = np.repeat(row[None], warmup.batch_size, axis=0)
        return feeds

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.check(self.config.input, feeds)
        names = [one.name for one in self.config.output]
        values = dict(zip(names, self.session.run(names, feeds), strict=True))
        self.check(self.config.output, values)
        self.batches.append(feeds["input_ids"].shape)
        return values

    def check(self, specs: Any, values: dict[str, np.ndarray]) -> None:
        """Refuse tensors that are not as the config says, batch axis added."""
        if {spec.name for spec in specs} != set(values):
            raise Refused(f"tensors {sorted(values)}")
        for spec in specs:
            value = values[spec.name]
            if value.dtype != triton_to_np_dtype(kserve(spec.data_type)):
                raise Refused(f"{spec.name} is {value.dtype}")
            dims = list(spec.dims)
            fits = [want in (-1, got) for want, got in zip(dims, value.shape[1:], strict=False)]
            if len(value.shape) != len(dims) + 1 or not all(fits):
                raise Refused(f"{spec.name} is {value.shape}, config says {dims}")
            if not 1 <= len(value) <= self.config.max_batch_size:
                raise Refused(f"{len(value)} rows, max_batch_size {self.config.max_batch_size}")


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The calls that a client makes."""

    def __init__(self, models: dict[str, Served]) -> None:
        self.models = models

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self.found(request, context).config)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        model = self.found(request, context)
        feeds = {}
        for one, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            dtype = triton_to_np_dtype(one.datatype)
            feeds[one.name] = np.frombuffer(raw, dtype=dtype).reshape(list(one.shape))
        try:
            values = model.run(feeds)
        except Refused as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        answer = service_pb2.ModelInferResponse(
            model_name=request.model_name, model_version=str(model.version)
        )
        kinds = {one.name: kserve(one.data_type) for one in model.config.output}
        for asked in request.outputs:
            value = values[asked.name]
            answer.outputs.add(name=asked.name, datatype=kinds[asked.name], shape=value.shape)
            answer.raw_output_contents.append(value.tobytes())
        return answer

    def found(self, request: Any, context: Any) -> Served:
        name = getattr(request, "name", "") or request.model_name
        version = getattr(request, "version", "") or getattr(request, "model_version", "")
        model = self.models.get(name)
        if model is None or version not in ("", str(model.version)):
            context.abort(grpc.StatusCode.NOT_FOUND, f"{name}, version {version or 'any'}")
        return model


@contextlib.contextmanager
def serving(repository: Path) -> Iterator[tuple[str, dict[str, Served]]]:
    """Serve a repository on a free port of this machine: its address and the models behind."""
    models = {path.name: Served(path) for path in sorted(repository.iterdir()) if path.is_dir()}
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=2),
        options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)],
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(models), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", models
    finally:
        server.stop(grace=None).wait()
