"""What runs on a node: one job's function in a thread, and a stream of what happens to the driver.

Knows no other job and no store but its own: a folder for this job, gone when it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jexport.artifacts import manifest
from jexport.building import cache_keys
from jexport.errors import ClusterError, JexportError, OutputPathError
from jexport.jobs.matrix import Job
from jexport.jobs.ray import upload
from jexport.jobs.result import error_from_dict, error_to_dict
from jexport.types import Artifact
from jexport.workspace.run import Event, Listener, open_run

BESIDE_BYTES = 1 << 24
"""The largest file beside an artifact that is sent."""

PROGRESS_S = 0.5
"""Bars are not news more often than this."""

WAIT_S = 0.2
STOP_S = 5.0
"""How long a cancelled job may take to its next event."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job works on its node.

    Args:
        out: for artifacts, gone when the job ends.
        kept: what outlives jobs, such as finished stages.
        checkpoint: the folder on the node that has what was sent; None where nothing was.
    """

    out: Path
    kept: Path
    checkpoint: Path | None


Build: TypeAlias = Callable[[Job, Place, Listener], Artifact]
"""A job's function. It is pickled, so it holds plain values only."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """One job for one node.

    Args:
        job: of the matrix.
        code: SHA-256 of the driver's jexport, which must be the node's.
        held: versions of the job's artifact that the driver's store has: their files need not
            travel.
        node_dir: where the node works, None for its own temporary folder.
        sent: the checkpoint on offer, None for none.
    """

    job: Job
    code: str
    held: tuple[str, ...]
    node_dir: Path | None
    sent: upload.Checkpoint | None


@dataclass(frozen=True, kw_only=True)
class Started:
    """The first message: a node took the job.

    Args:
        node: its address and the start of its id.
    """

    node: str


@dataclass(frozen=True, kw_only=True)
class EventMessage:
    """An event of the job's run.

    Args:
        event: as a listener on the node got it.
    """

    event: Event


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A JexportError ended the job.

    Args:
        out: the folder for artifacts on the node, which is gone: its files come as SidecarFile.
        error: as `error_to_dict` gives it: a class need not travel.
    """

    out: str
    error: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ArtifactHeader:
    """An artifact is ready.

    Args:
        manifest: the bytes of its manifest.json.
        sha256: of these bytes.
        is_held: the driver has that version already, so nothing follows.
    """

    manifest: bytes
    sha256: str
    is_held: bool


@dataclass(frozen=True, kw_only=True)
class FileChunk:
    """Some bytes of one file, in order.

    Args:
        path: in the artifact's folder.
        content: up to PIECE_BYTES.
    """

    path: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class SidecarFile:
    """A file beside the versions of an artifact: a failed build's report, what was measured.

    Args:
        path: model/task/target-precision/FILE.
        content: all of it, up to BESIDE_BYTES.
    """

    path: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class EndOfArtifact:
    """The last message: every file was sent."""


Message: TypeAlias = (
    Started | EventMessage | Refused | ArtifactHeader | FileChunk | SidecarFile | EndOfArtifact
)


@dataclass(frozen=True, kw_only=True)
class PipelineBuild:
    """The function of a job that builds it as `jexport build` does.

    Args:
        recipe: as `Recipe.resolved()` gives it.
    """

    recipe: dict[str, Any]

    def __call__(self, job: Job, place: Place, listen: Listener) -> Artifact:
        """Build below `place.out`. Raises what `pipeline.build` raises."""
        from jexport import recipe as recipes
        from jexport.building import pipeline
        from jexport.cache.stages import FOLDER, Cache

        chosen = recipes.from_table(self.recipe, origin="the recipe that was sent")
        if place.checkpoint is not None:
            chosen = chosen.replace_load(model=str(place.checkpoint))
        return pipeline.build(
            chosen,
            task=job.task,
            target=job.target,
            precision=job.precision,
            out=place.out,
            cache=Cache(root=place.kept / FOLDER),
            listen=listen,
        )


def work(build: Build, order: JobRequest) -> Iterator[Message]:
    """Do one job on a node. A JexportError is a message.

    Args:
        build: the job's function.
        order: the job, and what the driver has.

    Yields:
        Started, the job's events, then its artifact or the error.
    """
    yield Started(node=_name())
    out, beside = Path(), list[SidecarFile]()
    try:
        _check_code(order.code)
        node_dir = _owned_folder(order.node_dir)
        with open_run(node_dir) as work_dir:
            out = work_dir.folder / "artifacts"
            try:
                result = yield from _built(build, order, out, node_dir)
            finally:
                beside += _beside(out)
            yield from _sent(result.path, order.held, beside)
    except JexportError as error:
        for one in beside:  # noqa: UP028 (Ray sends values into the stream; a list takes none)
            yield one
        yield Refused(out=str(out), error=error_to_dict(error))


def _beside(out: Path) -> Iterator[SidecarFile]:
    """The small files beside the versions: model/task/target-precision/FILE."""
    for path in sorted(out.glob("*/*/*/*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= BESIDE_BYTES:
            yield SidecarFile(path=path.relative_to(out).as_posix(), content=path.read_bytes())


def _built(
    build: Build, order: JobRequest, out: Path, node_dir: Path
) -> Generator[Message, None, Artifact]:
    """Run the function in a thread, and pass on its events; its artifact is the value.

    A thread, since a generator can only speak between two steps of its own.
    """
    heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
    stop = threading.Event()
    outcome: list[Artifact | BaseException] = []

    def body() -> None:
        try:
            kept = None
            if order.sent is not None:
                kept = upload.there(order.sent, node_dir / "checkpoints")
            place = Place(out=out, kept=node_dir, checkpoint=kept)
            outcome.append(build(order.job, place, _throttled(heard, stop)))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    try:
        while thread.is_alive() or not heard.empty():
            with contextlib.suppress(queue.Empty):
                yield EventMessage(event=heard.get(timeout=WAIT_S))
    finally:
        stop.set()
        thread.join(STOP_S)
        if thread.is_alive():
            # In the middle of somebody's C code: a process that Ray uses again would go on with it.
            signal.raise_signal(signal.SIGKILL)
    [ended] = outcome
    if isinstance(ended, BaseException):
        raise ended
    return ended


def _throttled(heard: queue.SimpleQueue[Event], stop: threading.Event) -> Listener:
    """Hand events on, bars now and then; a job that is no longer wanted ends at its next event."""
    last = 0.0

    def listen(event: Event) -> None:
        nonlocal last
        if stop.is_set():
            raise KeyboardInterrupt
        now = time.monotonic()
        bar = event.kind == "progress" and event.done < event.total
        if bar and now - last < PROGRESS_S:
            return
        last = now if event.kind == "progress" else last
        heard.put(event)

    return listen


def _sent(
    folder: Path, held: tuple[str, ...], beside: Sequence[SidecarFile] = ()
) -> Iterator[Message]:
    """An artifact's manifest, then its files as the manifest lists them, unless they are held."""
    content = manifest.verify(folder).content
    text = (folder / manifest.NAME).read_bytes()
    is_held = content["version"] in held
    yield ArtifactHeader(manifest=text, sha256=hashlib.sha256(text).hexdigest(), is_held=is_held)
    if is_held:
        return
    for entry in content["files"]:
        with open(folder / entry["path"], "rb") as stream:
            # At least one piece, so that an empty file is made, too.
            piece = stream.read(upload.PIECE_BYTES)
            yield FileChunk(path=entry["path"], content=piece)
            while piece := stream.read(upload.PIECE_BYTES):
                yield FileChunk(path=entry["path"], content=piece)
    for one in beside:  # noqa: UP028
        yield one
    yield EndOfArtifact()


def rebuilt(refused: Refused, out: Path) -> Exception:
    """The error as it was raised on the node, exit code and notes included.

    Args:
        refused: the node's message.
        out: files that the error names below the node's folder for artifacts are named below this.

    Returns:
        The error, not raised.
    """

    def here(text: str) -> str:
        return text.replace(f"{refused.out}{os.sep}", f"{out}{os.sep}")

    return error_from_dict(
        {
            key: here(part) if isinstance(part, str) else [here(note) for note in part]
            for key, part in refused.error.items()
        }
    )


def explained(error: Any) -> Exception:
    """What a job's exception means, where that is known.

    Args:
        error: a RayTaskError.

    Returns:
        A ClusterError for a node without jexport; else itself, with the node's traceback.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, ModuleNotFoundError) and (cause.name or "").split(".")[0] == "jexport":
        return ClusterError(
            "a node has no jexport",
            evidence=str(cause),
            fix='pip install "jexport[build]" on every node, the same version as here',
        )
    underlying: Exception = error
    return underlying


def _check_code(code: str) -> None:
    own = cache_keys.code_digest()
    if own != code:
        raise ClusterError(
            f"node {_name()} has another jexport",
            evidence=f"its sources have the SHA-256 {own[:12]}, here it is {code[:12]}: it would"
            " build another version",
            fix="install the same jexport on every node",
        )


def _owned_folder(given: Path | None) -> Path:
    """The folder to work in: nobody else's, since what is in it is run."""
    folder = given or Path(tempfile.gettempdir()) / f"jexport-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise OutputPathError(
            f"cannot work in {folder} on node {_name()}",
            evidence="it is a link, or another user's",
            fix="remove it, or give another folder",
        )
    return folder


def _name() -> str:
    """A node as errors and tables call it: its address and the start of its id."""
    import ray

    context = ray.get_runtime_context()
    return f"{ray.util.get_node_ip_address()} ({context.get_node_id()[:8]})"
