"""A recording stand-in for the `tensorrt` module, for both majors; engines run in onnxruntime.

It has what jexport and Polygraphy touch and nothing else; what 11 removed is not there in 11, so
touching it raises as in the real module. tests/contract compares every name, parameter and enum
number here with the real bindings. `touched` and `missing` say what was asked of it.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

VERSIONS = {10: "10.16.1.11", 11: "11.4.0.106"}
MAGIC = b"stand-in plan\n"
CACHE = b"stand-in timings:"
ACTIVATIONS_BYTES = 4096

FLAGS = {
    10: {
        "FP16": 0,
        "INT8": 1,
        "REFIT": 4,
        "TF32": 6,
        "OBEY_PRECISION_CONSTRAINTS": 9,
        "PREFER_PRECISION_CONSTRAINTS": 10,
        "VERSION_COMPATIBLE": 13,
        "FP8": 15,
        "BF16": 17,
        "STRIP_PLAN": 19,
    },
    11: {"REFIT": 4, "TF32": 6, "VERSION_COMPATIBLE": 12, "STRIP_PLAN": 18},
}
OF_ONE_MAJOR: dict[int, dict[str, dict[str, int]]] = {
    10: {
        "TacticSource": {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2, "EDGE_MASK_CONVOLUTIONS": 3},
        "PreviewFeature": {"PROFILE_SHARING_0806": 0},
        "QuantizationFlag": {"CALIBRATE_BEFORE_FUSION": 0},
    },
    11: {
        "TacticSource": {"EDGE_MASK_CONVOLUTIONS": 0, "JIT_CONVOLUTIONS": 1},
        "PreviewFeature": {"ALIASED_PLUGIN_IO_10_03": 0},
    },
}
NETWORK_FLAGS = {10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 11: {"STRONGLY_TYPED": 0}}
SEVERITY = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
ENUMS: dict[str, dict[str, int]] = {
    "HardwareCompatibilityLevel": {"NONE": 0, "AMPERE_PLUS": 1, "SAME_COMPUTE_CAPABILITY": 2},
    "MemoryPoolType": {"WORKSPACE": 0},
    "ProfilingVerbosity": {"LAYER_NAMES_ONLY": 0, "NONE": 1, "DETAILED": 2},
    "ExecutionContextAllocationStrategy": {"STATIC": 0, "ON_PROFILE_CHANGE": 1, "USER_MANAGED": 2},
    "TensorIOMode": {"NONE": 0, "INPUT": 1, "OUTPUT": 2},
    "SerializationFlag": {"EXCLUDE_WEIGHTS": 0, "EXCLUDE_LEAN_RUNTIME": 1, "INCLUDE_REFIT": 2},
    "DeviceType": {"GPU": 0, "DLA": 1},
    "DataType": {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "INT64": 8},
    "EngineCapability": {"STANDARD": 0},
}
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}


class Record:
    """What was asked of one stand-in module."""

    def __init__(self) -> None:
        self.touched: set[tuple[str, str]] = set()
        self.missing: set[tuple[str, str]] = set()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def named(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of that name."""
        return [words for called, words in self.calls if called == name]


class Names:
    """An enum whose members are asked for by name, and recorded."""

    def __init__(self, record: Record, name: str, numbers: dict[str, int]) -> None:
        self._record, self._name = record, name
        self._enum: Any = enum.IntEnum(name.split(".")[-1], numbers)

    @property
    def __members__(self) -> Any:
        return self._enum.__members__

    def __getattr__(self, key: str) -> Any:
        kept = self._record.touched if key in self._enum.__members__ else self._record.missing
        kept.add((self._name, key))
        return getattr(self._enum, key)


class Kind(type):
    """Of every class of the stand-in: records what is asked of the class itself."""

    record: Record

    def __getattribute__(cls, key: str) -> Any:
        if not key.startswith("_") and key not in ("record", "mro"):
            record = type.__getattribute__(cls, "record")
            name = type.__getattribute__(cls, "__name__")
            record.touched.add((name, key))
        return type.__getattribute__(cls, key)


def make(major: int, gpu: Any = None) -> tuple[types.ModuleType, Record]:
    """A new stand-in for one major. gpu: where its engines run (fake_cuda.FakeGpu)."""
    record = Record()
    module = _Module(record)
    module.__version__ = VERSIONS[major]  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    names = (
        ENUMS
        | OF_ONE_MAJOR[major]
        | {
            "BuilderFlag": FLAGS[major],
            "NetworkDefinitionCreationFlag": NETWORK_FLAGS[major],
        }
    )
    for name, numbers in names.items():
        setattr(module, name, Names(record, name, numbers))
    for thing in _classes(major, record, module, gpu):
        setattr(module, thing.__name__, thing)

    def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
        return True

    def nptype(trt_type: Any) -> Any:
        return np.dtype(NUMPY[trt_type.name]).type

    module.init_libnvinfer_plugins = init_libnvinfer_plugins  # type: ignore[attr-defined]
    module.nptype = nptype  # type: ignore[attr-defined]
    record.touched.clear()
    return module, record


class _Module(types.ModuleType):
    def __init__(self, record: Record) -> None:
        super().__init__("tensorrt")
        self.__dict__["_record"] = record

    def __getattribute__(self, key: str) -> Any:
        if not key.startswith("_"):
            types.ModuleType.__getattribute__(self, "__dict__")["_record"].touched.add(("", key))
        return types.ModuleType.__getattribute__(self, key)

    def __getattr__(self, key: str) -> Any:
        record = self.__dict__["_record"]
        record.touched.discard(("", key))
        record.missing.add(("", key))
        raise AttributeError(f"module 'tensorrt' has no attribute {key!r}")


def _classes(major: int, record: Record, trt: Any, gpu: Any) -> list[type]:
    """The classes of one module; they share its record."""
    kind = type("Kind", (Kind,), {"record": record})

    def call(name: str, /, **words: Any) -> None:
        record.calls.append((name, words))

    class Thing(metaclass=kind):
        def __getattribute__(self, key: str) -> Any:
            found = object.__getattribute__(self, key)
            if not key.startswith("_"):
                record.touched.add((type(self).__name__, key))
            return found

        def __getattr__(self, key: str) -> Any:
            if not key.startswith("_"):
                record.missing.add((type(self).__name__, key))
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {key!r}")

        def __setattr__(self, key: str, value: Any) -> None:
            if not key.startswith("_"):
                assert hasattr(type(self), key), f"{type(self).__name__} has no {key}"
                record.touched.add((type(self).__name__, key))
                call(f"{type(self).__name__}.{key}", value=value)
            object.__setattr__(self, key, value)

    class ILogger(metaclass=kind):
        Severity = Names(record, "ILogger.Severity", SEVERITY)

        def __init__(self) -> None:
            self._made = True

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class Logger(ILogger):
        pass

    for name, number in SEVERITY.items():
        setattr(Logger, name, ILogger.Severity._enum(number))

    class IHostMemory(bytes):
        def __enter__(self) -> IHostMemory:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    class ITensor(Thing):
        is_shape_tensor = False
        name, shape, dtype = "", (), None

    class ILayer(Thing):
        name, type = "MatMul_0", None
        if major == 10:
            precision_is_set = False
            precision = None

    class INetworkDefinition(Thing):
        num_inputs = 0

        def __init__(self) -> None:
            self._inputs: list[Any] = []
            self._flags = 0
            self._model: Any = None

        def __iter__(self) -> Iterator[Any]:
            return iter([ILayer()])

        def get_input(self, index: int) -> Any:
            return self._inputs[index]

        def get_flag(self, flag: Any) -> bool:
            return bool(self._flags & 1 << int(flag))

    class IOptimizationProfile(Thing):
        def __init__(self) -> None:
            self._shapes: dict[str, list[list[int]]] = {}

        def __bool__(self) -> bool:
            return bool(self._shapes)

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            call("set_shape", profile=self, input=input, min=min, opt=opt, max=max)
            self._shapes[input] = [list(min), list(opt), list(max)]

    class ITimingCache(Thing):
        def __init__(self, content: bytes) -> None:
            self._content = content

        def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
            return True

        def serialize(self) -> Any:
            return IHostMemory(CACHE + b" one more")

    class IBuilderConfig(Thing):
        profiling_verbosity: Any = None
        hardware_compatibility_level: Any = None
        engine_capability: Any = "STANDARD"
        default_device_type: Any = None
        DLA_core = -1
        num_optimization_profiles = 0
        if major == 10:
            int8_calibrator: Any = None

        def __init__(self) -> None:
            self._profiles: list[Any] = []
            self._flags: set[str] = {"TF32"}
            self._cache: Any = None
            self._pools: dict[Any, int] = {}

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            object.__setattr__(self, "num_optimization_profiles", len(self._profiles))
            return len(self._profiles) - 1

        def set_flag(self, flag: Any) -> None:
            call("set_flag", flag=flag.name)
            self._flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            call("clear_flag", flag=flag.name)
            self._flags.discard(flag.name)

        def get_flag(self, flag: Any) -> bool:
            return flag.name in self._flags

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            call("set_memory_pool_limit", pool=pool.name, pool_size=pool_size)

        def get_memory_pool_limit(self, pool: Any) -> int:
            return 0

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            call("create_timing_cache", content=bytes(serialized_timing_cache))
            content = bytes(serialized_timing_cache)
            return ITimingCache(content) if not content or content.startswith(CACHE) else None

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            call("set_timing_cache", content=cache._content, ignore_mismatch=ignore_mismatch)
            object.__setattr__(self, "_cache", cache)
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

        def get_tactic_sources(self) -> int:
            return 0

        def get_preview_feature(self, feature: Any) -> bool:
            return False

        if major == 10:

            def get_quantization_flag(self, flag: Any) -> bool:
                return False

    class Builder(Thing):
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, ILogger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> Any:
            call("create_network", flags=flags)
            network = INetworkDefinition()
            network._flags = flags
            return network

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            call("build_serialized_network", flags=sorted(config._flags))
            if network._model is None:
                self._logger.log(trt.ILogger.Severity.ERROR, "the network is empty")
                return None
            stripped = "STRIP_PLAN" in config._flags
            said = {
                "profiles": [profile._shapes for profile in config._profiles],
                "refittable": "REFIT" in config._flags,
                "host_code": "VERSION_COMPATIBLE" in config._flags,
                "missing": sorted(_weights(network._model)) if stripped else [],
            }
            return IHostMemory(_plan(said, network._model))

    class OnnxParser(Thing):
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network
            self._errors: list[str] = []

        def parse_from_file(self, model: str) -> bool:
            call("parse_from_file", model=model)
            try:
                found = onnx.load(model)
            except Exception as error:
                self._errors = [f"cannot parse: {type(error).__name__}"]
                object.__setattr__(self, "num_errors", 1)
                return False
            self._network._model = found
            for value in found.graph.input:
                tensor = ITensor()
                dims = value.type.tensor_type.shape.dim
                object.__setattr__(tensor, "name", value.name)
                object.__setattr__(tensor, "shape", tuple(d.dim_value or -1 for d in dims))
                self._network._inputs.append(tensor)
            object.__setattr__(self._network, "num_inputs", len(self._network._inputs))
            return True

        def get_error(self, index: int) -> str:
            return self._errors[index]

    class ISerializationConfig(Thing):
        def __init__(self) -> None:
            self._flags = {"EXCLUDE_WEIGHTS", "INCLUDE_REFIT"}

        def clear_flag(self, flag: Any) -> bool:
            self._flags.discard(flag.name)
            return True

        def set_flag(self, flag: Any) -> bool:
            self._flags.add(flag.name)
            return True

    class Runtime(Thing):
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            call("deserialize_cuda_engine", size=len(serialized_engine))
            if not serialized_engine.startswith(MAGIC):
                self._logger.log(trt.ILogger.Severity.ERROR, "magic tag does not match")
                return None
            line, _, content = serialized_engine[len(MAGIC) :].partition(b"\n")
            said = json.loads(line)
            if said["host_code"] and not self.engine_host_code_allowed:
                self._logger.log(trt.ILogger.Severity.ERROR, "host code is not allowed")
                return None
            return ICudaEngine(said, onnx.load_from_string(content))

    class ICudaEngine(Thing):
        num_io_tensors = num_optimization_profiles = 0
        refittable = False

        def __init__(self, said: dict[str, Any], model: Any) -> None:
            self._said, self._model = said, model
            graph = model.graph
            self._io = [(value, "INPUT") for value in graph.input]
            self._io += [(value, "OUTPUT") for value in graph.output]
            self._session: Any = None
            object.__setattr__(self, "num_io_tensors", len(self._io))
            object.__setattr__(self, "num_optimization_profiles", len(said["profiles"]))
            object.__setattr__(self, "refittable", said["refittable"])

        def _run(self, feed: dict[str, Any]) -> dict[str, Any]:
            assert not self._said["missing"], "an engine without weights was run"
            if self._session is None:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 1
                options.log_severity_level = 3
                self._session = onnxruntime.InferenceSession(
                    self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            names = [value.name for value in self._session.get_outputs()]
            return dict(zip(names, self._session.run(names, feed), strict=True))

        def get_tensor_name(self, index: int) -> str:
            name: str = self._io[index][0].name
            return name

        def _value(self, name: str) -> Any:
            return next(pair for pair in self._io if pair[0].name == name)

        def get_tensor_mode(self, name: str) -> Any:
            return getattr(trt.TensorIOMode, self._value(name)[1])

        def get_tensor_dtype(self, name: str) -> Any:
            kind = self._value(name)[0].type.tensor_type.elem_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind).name
            return getattr(trt.DataType, next(k for k, v in NUMPY.items() if v == dtype))

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            return [tuple(shape) for shape in self._said["profiles"][profile_index][name]]

        def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
            return ACTIVATIONS_BYTES * (profile_index + 1)

        def create_execution_context(self, strategy: Any = None) -> Any:
            call("create_execution_context", strategy=strategy.name)
            return IExecutionContext(self)

        def create_serialization_config(self) -> Any:
            return ISerializationConfig()

        def serialize_with_config(self, arg0: Any) -> Any:
            call("serialize_with_config", flags=sorted(arg0._flags))
            said = self._said | {"refittable": "INCLUDE_REFIT" in arg0._flags}
            if "EXCLUDE_WEIGHTS" in arg0._flags:
                said["missing"] = sorted(_weights(self._model))
            return IHostMemory(_plan(said, self._model))

    class IExecutionContext(Thing):
        def __init__(self, engine: Any) -> None:
            self._engine, self._profile = engine, 0
            self._memory = (0, 0)
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._ran_with: Any = None

        def set_device_memory(self, memory: int, size: int) -> None:
            gpu.view(memory, size)
            self._memory = (memory, size)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            call("set_optimization_profile_async", index=profile_index)
            gpu.stream(stream_handle)
            if profile_index >= len(self._engine._said["profiles"]):
                return False
            self._profile = profile_index
            self._shapes = {}
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            call("set_input_shape", profile=self._profile, name=name, shape=tuple(shape))
            low, _, high = self._engine._said["profiles"][self._profile][name]
            if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return False
            self._shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            batch, tokens = self._shapes.get("input_ids", (-1, -1))
            value = self._engine._value(name)[0]
            dims = value.type.tensor_type.shape.dim
            known = {"batch": batch, "sequence": tokens}
            return tuple(d.dim_value or known[d.dim_param] for d in dims)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def _state(self) -> Any:
            return dict(self._shapes), dict(self._addresses), self._memory, self._profile

        def execute_async_v3(self, stream_handle: int) -> bool:
            engine, state = self._engine, self._state()
            captured = stream_handle in gpu.capturing
            call("execute_async_v3", profile=self._profile, captured=captured)
            if captured and self._ran_with != state:
                return False  # work that is done once for a shape cannot be captured
            needed = engine.get_device_memory_size_for_profile_v2(self._profile)
            if self._memory[1] < needed or len(self._addresses) != len(engine._io):
                return False
            self._ran_with = state

            def work() -> None:
                assert self._state() == state, "a context changed under a captured graph"
                gpu.view(*self._memory)
                feed = {}
                for name, shape in state[0].items():
                    dtype = NUMPY[engine.get_tensor_dtype(name).name]
                    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                    raw = gpu.view(state[1][name], size)
                    feed[name] = np.frombuffer(raw, dtype=dtype).reshape(shape).copy()
                for name, values in engine._run(feed).items():
                    raw = gpu.view(state[1][name], values.nbytes)
                    np.frombuffer(raw, dtype=np.uint8)[:] = np.frombuffer(
                        values.tobytes(), dtype=np.uint8
                    )

            gpu.put(stream_handle, work)
            return True

    class Refitter(Thing):
        def __init__(self, engine: Any, logger: Any) -> None:
            self._engine = engine

        def get_missing_weights(self) -> list[str]:
            return list(self._engine._said["missing"])

        def refit_cuda_engine(self) -> bool:
            return not self._engine._said["missing"]

    class OnnxParserRefitter(Thing):
        num_errors = 0

        def __init__(self, refitter: Any, logger: Any) -> None:
            self._engine = refitter._engine
            self._errors: list[str] = []

        def refit_from_file(self, model: str) -> bool:
            call("refit_from_file", model=model)
            given, held = _weights(onnx.load(model)), _weights(self._engine._model)
            missing = []
            for name, tensor in held.items():
                if name in given and given[name].dims == tensor.dims:
                    tensor.CopyFrom(given[name])
                else:
                    missing.append(name)
            self._engine._said["missing"] = missing
            return not missing

        def get_error(self, index: int) -> str:
            return self._errors[index]

    return [
        ILogger,
        Logger,
        IHostMemory,
        ITensor,
        ILayer,
        INetworkDefinition,
        IOptimizationProfile,
        ITimingCache,
        IBuilderConfig,
        Builder,
        OnnxParser,
        ISerializationConfig,
        Runtime,
        ICudaEngine,
        IExecutionContext,
        Refitter,
        OnnxParserRefitter,
    ]


def _weights(model: Any) -> dict[str, Any]:
    """Float matrices and vectors by name: what a refit replaces."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return {t.name: t for t in model.graph.initializer if t.data_type in kinds and len(t.dims)}


def _plan(said: dict[str, Any], model: Any) -> bytes:
    """A plan's bytes; weights without a value are written as zeros."""
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    for name, tensor in _weights(kept).items():
        if name in said["missing"]:
            zeros = np.zeros(tuple(tensor.dims), numpy_helper.to_array(tensor).dtype)
            tensor.CopyFrom(numpy_helper.from_array(zeros, name))
    return MAGIC + json.dumps(said).encode() + b"\n" + kept.SerializeToString()


FILE = Path(__file__)
