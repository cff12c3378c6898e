"""From an ONNX graph to a TensorRT plan, through Polygraphy; and refitting a plan without weights.

Networks are strongly typed: precision is in the graph, as casts and Q/DQ pairs. In TensorRT 11
every network is; in 10 the flag is set. What 11 took away (precision flags, calibrators, layer
precisions, dynamic ranges, algorithm selectors) is never touched. Knows no recipe file, no folder
of artifacts and no reference vectors.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.errors import EngineError
from jexport.targets.trt import timing_cache
from jexport.targets.trt.device import Machine
from jexport.targets.trt.log import Log
from jexport.targets.trt.profiles import Profile
from jexport.types import Signature

COSTS = {
    "version_compatible": "carries its own lean runtime (tens of MB) and runs without the kernels "
    "that only this version has; loading it runs code from the plan",
    "ampere_plus": "48 KiB of shared memory a kernel, fewer kernels and fusions: slower",
    "same_compute_capability": "no cuDNN, cuBLAS or cuBLASLt kernels: may be slower",
    "weight_stripped": "weights that may change cannot be folded into kernels, slower; 11.3 "
    "may drop a bias, so parity is checked after every refit",
}
"""What an option costs, for the manifest (TensorRT's own documentation of each)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to build.

    Args:
        hardware_compatible: '', 'ampere_plus' or 'same_compute_capability'.
        version_compatible: run with later TensorRT versions of the same major.
        workspace_bytes: most scratch memory a kernel may use; 0 leaves it to TensorRT (all of it).
        timings: a folder for timing caches, or None.
        weight_stripped: without weights, to be refitted.
    """

    hardware_compatible: str = ""
    version_compatible: bool = False
    workspace_bytes: int = 0
    timings: Path | None = None
    weight_stripped: bool = False

    def costs(self) -> list[str]:
        """What these options cost, a line each."""
        asked = {
            "version_compatible": self.version_compatible,
            self.hardware_compatible: bool(self.hardware_compatible),
            "weight_stripped": self.weight_stripped,
        }
        return [f"{name}: {COSTS[name]}" for name, is_on in asked.items() if is_on]


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build gave.

    Args:
        plan: its bytes.
        seconds: that the build took.
        notes: for the user (a timing cache that was not used).
    """

    plan: bytes
    seconds: float
    notes: tuple[str, ...]


def build(
    path: Path,
    signature: Signature,
    profiles: Sequence[Profile],
    options: Options,
    machine: Machine,
) -> Built:
    """Build the plan of an ONNX graph.

    Args:
        path: of the graph, its weights beside it.
        signature: whose inputs are all [batch, sequence].
        profiles: at least one, apart from each other.
        options: with `weight_stripped` the plan has no weights: `refit` gives it a task's.
        machine: this one.

    Returns:
        The plan.

    Raises:
        EngineError: an input of another shape, or TensorRT failed, with its own words.
    """
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path

    started = time.perf_counter()
    kept = _kept_timings(options, machine)
    notes = [kept.read.note] if kept else []
    # Polygraphy asks a file-like object for its mode and file number: no BytesIO.
    with (
        _captured_messages(f"building an engine of {path.name}"),
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as file,
    ):
        given.write(kept.read.content if kept else b"")
        network = network_from_onnx_path(str(path), **_strongly_typed(machine))
        config = _config(
            signature, profiles, options, given if kept and kept.read.content else None
        )
        raw = engine_bytes_from_network(
            network, config=config, save_timing_cache=file if kept else None
        )
        plan = bytes(memoryview(raw))
        if kept:
            file.seek(0)
            notes.append(timing_cache.write(kept.place, file.read()))
    return Built(plan=plan, seconds=time.perf_counter() - started, notes=tuple(filter(None, notes)))


def _strongly_typed(machine: Machine) -> dict[str, bool]:
    """TensorRT 11 ignores the flag and may drop it; in 10 it must be set."""
    return {"strongly_typed": True} if machine.tensorrt.startswith("10.") else {}


@dataclass(frozen=True, kw_only=True)
class _Kept:
    place: timing_cache.Place
    read: timing_cache.Timings


def _kept_timings(options: Options, machine: Machine) -> _Kept | None:
    if options.timings is None:
        return None
    flags = {
        "hardware_compatible": options.hardware_compatible,
        "version_compatible": options.version_compatible,
        "weight_stripped": options.weight_stripped,
        "workspace_bytes": options.workspace_bytes,
    }
    place = timing_cache.place(options.timings, machine, flags)
    return _Kept(place=place, read=timing_cache.read(place))


def _config(
    signature: Signature, profiles: Sequence[Profile], options: Options, timings: Any
) -> Any:
    """Polygraphy's CreateConfig for these options, with nothing of what TensorRT 11 removed."""
    import tensorrt as trt
    from polygraphy.backend.trt import CreateConfig

    more: dict[str, Any] = {}
    if options.hardware_compatible == "ampere_plus":
        more["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatible:
        more["hardware_compatibility_level"] = (
            trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        )
    if options.workspace_bytes:
        more["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace_bytes}
    if timings is not None:
        more["load_timing_cache"] = timings
    return CreateConfig(
        profiles=_polygraphy_profiles(signature, profiles),
        # Polygraphy's own default writes every detail of every layer into the plan.
        profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        version_compatible=options.version_compatible,
        refittable=options.weight_stripped,
        strip_plan=options.weight_stripped,
        **more,
    )


def _polygraphy_profiles(signature: Signature, profiles: Sequence[Profile]) -> list[Any]:
    """Each profile's shapes for every input of the graph, all of which are [batch, sequence]."""
    from polygraphy.backend.trt import Profile as TrtProfile

    strange = [spec for spec in signature.inputs if len(spec.shape) != 2]
    if strange:
        raise EngineError(
            f"input '{strange[0].name}' is not [batch, sequence]",
            evidence=f"its shape is {list(strange[0].shape)}",
            fix="export the model with jexport, whose graphs take token ids and a mask",
        )
    polygraphy = []
    for profile in profiles:
        shapes = TrtProfile()
        for spec in signature.inputs:
            shapes.add(
                spec.name,
                min=(profile.batch.min, profile.tokens.min),
                opt=(profile.batch.opt, profile.tokens.opt),
                max=(profile.batch.max, profile.tokens.max),
            )
        polygraphy.append(shapes)
    return polygraphy


@contextlib.contextmanager
def _captured_messages(doing: str) -> Iterator[None]:
    """Polygraphy prints nothing meanwhile; what it and TensorRT had to say goes into an error."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage().strip())

    listener = Listener(logging.ERROR)
    python_log = logging.getLogger("Polygraphy")
    before, passed_on = G_LOGGER.use_python_logging_system, python_log.propagate
    coloured, G_LOGGER.colors = G_LOGGER.colors, False  # it prints when it has no colours
    G_LOGGER.use_python_logging_system = True
    python_log.addHandler(listener)
    python_log.propagate = False
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            yield
    except PolygraphyException as error:
        raise EngineError(
            f"TensorRT failed at {doing}",
            evidence="\n".join(dict.fromkeys(messages[-12:])) or str(error),
            fix="look at the first line above; `jexport lint MODEL.onnx --target trt` checks a "
            "graph without a GPU",
        ) from error
    finally:
        python_log.removeHandler(listener)
        python_log.propagate = passed_on
        G_LOGGER.use_python_logging_system = before
        G_LOGGER.colors = coloured


def refit(
    plan: bytes,
    path: Path,
    *,
    version_compatible: bool = False,
    check: Callable[[bytes], None] | None = None,
) -> bytes:
    """A plan with the weights of this ONNX graph, from a plan built with `weight_stripped`.

    Always give the stripped plan itself, never what an earlier refit gave: every switch is then a
    full refit of an engine without weights, and no weight of another task can stay behind. The
    result is not refittable. version_compatible: whether the plan was built so; it then carries
    code that runs on the host, which no other plan may. check: called with the plan before it is
    returned; it raises when the vectors are not the task's.

    Raises:
        EngineError: the plan is not refittable, or the weights do not fill it.
    """
    import tensorrt as trt

    log = Log()
    runtime = trt.Runtime(log.logger)
    runtime.engine_host_code_allowed = version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None or not engine.refittable:
        raise EngineError(
            "this plan cannot be given other weights",
            evidence=log.text() or "it was not built for refitting",
            fix="build it with compile.weight_stripped = true",
        )
    refitter = trt.Refitter(engine, log.logger)
    parser_refitter = trt.OnnxParserRefitter(refitter, log.logger)
    done = parser_refitter.refit_from_file(str(path))
    missing = list(refitter.get_missing_weights())
    if missing or not done:
        troubles = [str(parser_refitter.get_error(n)) for n in range(parser_refitter.num_errors)]
        raise EngineError(
            f"the weights of {path.name} do not fill this engine",
            evidence="\n".join(
                [f"{len(missing)} without a value: {', '.join(missing[:5])}", *troubles]
            ),
            fix="refit with a graph of the same model and precision, exported by the same jexport",
        )
    if not refitter.refit_cuda_engine():
        raise EngineError(
            f"TensorRT could not put the weights of {path.name} into the engine",
            evidence=log.text() or "refit_cuda_engine gave False",
            fix="build a full engine instead (compile.weight_stripped = false)",
        )
    settings = engine.create_serialization_config()
    # A stripped engine is written without weights again unless told otherwise, and leaving
    # INCLUDE_REFIT out makes it a plan that nobody can refit a second time.
    settings.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    stay_refittable = getattr(trt.SerializationFlag, "INCLUDE_REFIT", None)  # later 10.x have it
    if stay_refittable is not None:
        settings.clear_flag(stay_refittable)
    whole = bytes(memoryview(engine.serialize_with_config(settings)))
    if check is not None:
        check(whole)
    return whole
