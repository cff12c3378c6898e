"""Jobs on an existing Ray cluster: each on a node that has what it needs, artifacts come back.

Knows no stage and no engine: what a job does is a function that is sent along. Every artifact is
compared with its manifest before it gets its name here, so a node is not trusted. A job whose node
is lost runs again elsewhere; one that jexport refuses is not tried again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from jexport.building import cache_keys
from jexport.errors import ArtifactError, ClusterError, JexportError
from jexport.jobs.local import needs
from jexport.jobs.matrix import Job
from jexport.jobs.ray import connection, node, placement, receiver, upload
from jexport.jobs.result import JobListener, JobResult
from jexport.recipe import Recipe
from jexport.types import Artifact
from jexport.workspace.run import Event, Run, open_run

Memory: TypeAlias = Callable[[Job], int]

STAGE = "cluster"
"""The `stage` of events that the cluster has to tell itself."""

POLL_S = 0.5
BACKLOG = 8
"""Pieces that a node may be ahead of us: 32 MiB of the object store a job."""

GRACE_S = 10.0


@dataclass(kw_only=True)
class _Running:
    """A job that was handed to the cluster. stream: what its node says, as it comes."""

    job: Job
    stream: Any
    attempts: int
    node: str = ""
    arriving: receiver.Receiver | None = None
    infeasible_since: float = 0.0
    outcome: Artifact | Exception | None = None


@dataclass(kw_only=True)
class _Work:
    """One call of `run`, and what its parts share."""

    build: node.Build
    run: Run
    out: Path
    checkpoint: Path | None
    memory: Memory
    retries: int
    placement_timeout_s: float
    tell: JobListener
    node_dir: Path | None
    replace: bool
    code: str = field(default_factory=cache_keys.code_digest)
    sent: upload.Checkpoint | None = None
    places: dict[Job, dict[str, Any]] = field(default_factory=dict)
    results: dict[Job, JobResult] = field(default_factory=dict)
    running: list[_Running] = field(default_factory=list)
    begun: dict[Job, float] = field(default_factory=dict)

    def note(self, job: Job, text: str) -> None:
        """Something that the cluster, and no stage, has to tell."""
        self.tell(job, Event(kind="note", stage=STAGE, text=text))

    def end(self, one: _Running, outcome: Artifact | Exception) -> None:
        """Write down what became of a job, which runs no longer."""
        self.running.remove(one)
        if one.arriving is not None:
            one.arriving.drop()
        begin = self.begun.get(one.job)
        self.results[one.job] = JobResult(
            job=one.job,
            artifact=None if isinstance(outcome, Exception) else outcome,
            error=outcome if isinstance(outcome, Exception) else None,
            seconds=time.monotonic() - begin if begin is not None else 0.0,
            attempts=one.attempts,
        ).announce(self.tell)


def no_estimate(job: Job) -> int:
    """The memory of a job that nobody knows: Ray looks at processors only.

    Args:
        job: any.

    Returns:
        0.
    """
    return 0


def nobody(job: Job, event: Event) -> None:
    """The listener that does nothing.

    Args:
        job: any.
        event: any.
    """


def run(
    jobs: Sequence[Job],
    build: node.Build,
    *,
    out: Path,
    address: str = "auto",
    checkpoint: Path | None = None,
    memory: Memory = no_estimate,
    retries: int = 2,
    placement_timeout_s: float = 60.0,
    node_dir: Path | None = None,
    replace: bool = False,
    listen: JobListener = nobody,
) -> dict[Job, JobResult]:
    """Run `build` once a job on the cluster; what a job raises is in its JobResult.

    Args:
        jobs: each once, also where it is given twice.
        build: a job's function.
        out: artifacts are placed below it.
        address: of the cluster, HOST:PORT; 'auto' for that of this machine.
        checkpoint: a folder that jobs read: nodes that have the same files at the same path read
            those, to the others it is sent, once a node.
        memory: bytes that a job takes.
        retries: how often a job is started again whose node or process was lost.
        placement_timeout_s: how long a job waits for a node that could run it.
        node_dir: where nodes work, their own temporary folder unless given.
        replace: a name may go from another checkpoint to the one of these jobs.
        listen: gets every event, with its job.

    Returns:
        A result by job, in their order.

    Raises:
        DependencyError: ray is not installed.
        ClusterError: no cluster, or no node for a job; before any job is started.
        KeyboardInterrupt: on Ctrl-C, after every job was cancelled.
    """
    with connection.connected(address), open_run(out) as work_dir:
        work = _Work(
            build=build,
            run=work_dir,
            out=out,
            checkpoint=checkpoint,
            memory=memory,
            retries=retries,
            placement_timeout_s=placement_timeout_s,
            tell=listen,
            node_dir=node_dir,
            replace=replace,
        )
        known = placement.nodes()
        unique = tuple(dict.fromkeys(jobs))
        work.places.update({job: placement.options(job, memory(job), known) for job in unique})
        with _sent(work), _cancelling(work):
            for job in unique:
                _start(work, job, attempts=1)
            while work.running:
                _advance(work)
        return {job: work.results[job] for job in unique}


@contextlib.contextmanager
def _sent(work: _Work) -> Iterator[None]:
    """The checkpoint's files on offer for as long as jobs run."""
    if work.checkpoint is None:
        yield
        return
    with upload.offered(work.checkpoint) as work.sent:
        yield


@contextlib.contextmanager
def _cancelling(work: _Work) -> Iterator[None]:
    """Whatever ends this early, Ctrl-C too, ends the jobs on the nodes."""
    try:
        yield
    finally:
        streams = [one.stream for one in work.running]
        for stream in streams:
            _cancel(stream, force=False)
        # A node cleans up by itself; one that cannot is stopped.
        deadline = time.monotonic() + GRACE_S
        for stream in streams:
            if not _drained(stream, deadline):
                _cancel(stream, force=True)


def _cancel(stream: Any, *, force: bool) -> None:
    """Ask for a job's end, which may have come already."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.cancel(stream, force=force)


def _drained(stream: Any, deadline: float) -> bool:
    """Read a cancelled job's stream to its end; whether that came before the deadline."""
    import ray

    while (left := deadline - time.monotonic()) > 0:
        ready, _ = ray.wait([stream], timeout=left)
        if not ready:
            return False
        try:
            ray.get(next(stream))
        except StopIteration:
            return True
        except ray.exceptions.RayError:
            continue
    return False


def _start(work: _Work, job: Job, *, attempts: int) -> None:
    """Hand a job to Ray, which waits for a node that is free."""
    import ray

    task = ray.remote(node.work).options(
        # Ray's own retries would mix two attempts in one stream.
        num_returns="streaming",
        max_retries=0,
        _generator_backpressure_num_objects=BACKLOG,
        name=f"jexport {job.key}",
        **work.places[job],
    )
    order = node.JobRequest(
        job=job,
        code=work.code,
        held=receiver.versions(work.out, job),
        node_dir=work.node_dir,
        sent=work.sent,
    )
    work.running.append(_Running(job=job, stream=task.remote(work.build, order), attempts=attempts))


def _advance(work: _Work) -> None:
    """Take what one job has to say, or see whether those that wait still can run."""
    import ray

    ready, _ = ray.wait([one.stream for one in work.running], num_returns=1, timeout=POLL_S)
    _check_waiting(work)
    for one in [one for one in work.running if one.stream in ready]:
        try:
            heard = ray.get(next(one.stream))
            if one.outcome is None:
                one.outcome = _handle_message(work, one, heard)
                if isinstance(one.outcome, ArtifactError):
                    _cancel(one.stream, force=False)  # what is still to come would be dropped
        except (StopIteration, ray.exceptions.RayError) as error:
            _ended(work, one, error)


def _ended(work: _Work, one: _Running, how: Exception) -> None:
    """A stream is at its end: only now the node has nothing left to tidy up."""
    import ray

    if one.outcome is None and isinstance(how, ray.exceptions.RayTaskError):
        one.outcome = node.explained(how)
    elif one.outcome is None and isinstance(how, StopIteration):
        one.outcome = receiver.refused(f"{one.job.key} ended without one, on {one.node}")
    elif one.outcome is None:
        _lost(work, one, how)
        return
    work.end(one, one.outcome)


def _handle_message(work: _Work, one: _Running, heard: node.Message) -> Artifact | Exception | None:
    """Act on one message; what it says of the job's end, None while it goes on."""
    match heard:
        case node.Started():
            one.node = heard.node
            if one.job not in work.begun:  # else again, on another node
                work.begun[one.job] = time.monotonic()
                work.tell(one.job, Event(kind="begin", stage=""))
            work.note(one.job, f"on {heard.node}")
        case node.EventMessage():
            work.tell(one.job, heard.event)
        case node.Refused():
            return node.rebuilt(heard, work.out)
        case _:
            try:
                return _received(work, one, heard)
            except JexportError as error:
                return error
    return None


def _received(
    work: _Work,
    one: _Running,
    heard: node.ArtifactHeader | node.FileChunk | node.SidecarFile | node.EndOfArtifact,
) -> Artifact | None:
    """Take a part of an artifact; the artifact itself with the last one. Raises ArtifactError."""
    if isinstance(heard, node.ArtifactHeader):
        one.arriving = receiver.Receiver(heard, work.run.folder, work.out, replace=work.replace)
        return one.arriving.held() if heard.is_held else None
    if isinstance(heard, node.SidecarFile):
        receiver.keep_beside(heard, one.job, work.run.folder, work.out)
        return None
    if one.arriving is None:
        raise receiver.refused("its files came before its manifest")
    if isinstance(heard, node.EndOfArtifact):
        return one.arriving.place()
    one.arriving.write(heard)
    return None


def _lost(work: _Work, one: _Running, error: Exception) -> None:
    """The node, or the process on it, is gone: start again, but not for ever."""
    where = one.node or "a node"
    if one.attempts > work.retries:
        work.end(
            one,
            ClusterError(
                f"{one.job.key} was lost {one.attempts} times",
                evidence=f"last on {where}: {_first_line(error)}",
                fix="see Ray's logs of that node; a job that is killed each time may need more"
                " memory than its estimate",
            ),
        )
        return
    work.running.remove(one)
    if one.arriving is not None:
        one.arriving.drop()
    work.note(one.job, f"{where} was lost ({type(error).__name__}); again elsewhere")
    _start(work, one.job, attempts=one.attempts + 1)


def _check_waiting(work: _Work) -> None:
    """End jobs for which there has been no node for too long: Ray would wait for ever."""
    waiting = [one for one in work.running if not one.node]
    if not waiting:
        return
    known, now = placement.nodes(), time.monotonic()
    for one in waiting:
        try:
            placement.options(one.job, work.memory(one.job), known)
            one.infeasible_since = 0.0
        except ClusterError as error:
            one.infeasible_since = one.infeasible_since or now
            if now - one.infeasible_since >= work.placement_timeout_s:
                _cancel(one.stream, force=True)
                work.end(one, error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_all(
    chosen: Recipe,
    jobs: Sequence[Job],
    *,
    out: Path,
    address: str,
    listen: JobListener,
    replace: bool = False,
) -> tuple[JobResult, ...]:
    """What `local.build_all` does, on a cluster: every job of a recipe, artifacts below `out`.

    A checkpoint in a folder is sent to the nodes; one on a hub is fetched by each.

    Args:
        chosen: the recipe.
        jobs: what to build of it.
        out: the folder of all artifacts, on this machine.
        address: of the cluster, as in `run`.
        listen: gets every event, with its job.
        replace: a name may go from another checkpoint to the one of these jobs.

    Returns:
        A result for each job, in their order.

    Raises:
        DependencyError: ray is not installed.
        ClusterError: no cluster, or no node for a job; before any job has begun.
    """
    folder = Path(chosen.load.model).expanduser()
    memory = needs(chosen, jobs)
    results = run(
        jobs,
        pipeline_build(chosen.resolved()),
        out=out,
        address=address,
        checkpoint=folder if folder.is_dir() else None,
        memory=lambda job: memory.get(job, 0),
        replace=replace,
        listen=listen,
    )
    return tuple(results.values())


def pipeline_build(recipe: Mapping[str, Any]) -> node.Build:
    """What one job calls: `jexport.building.pipeline.build`.

    Args:
        recipe: as `Recipe.resolved()` gives it.

    Returns:
        A function that can be pickled.
    """
    return node.PipelineBuild(recipe=dict(recipe))
