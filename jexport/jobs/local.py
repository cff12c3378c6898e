"""The local executor: builds of one recipe, one after another or in parallel processes.

Knows how to run jobs and not which to run (matrix.py), nor what a build is (pipeline.py). Events
go to `listen`, job by job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from jexport import recipe, targets
from jexport.artifacts import manifest
from jexport.building import estimate, pipeline
from jexport.building.plan import BuildRequest
from jexport.cache import entries
from jexport.cache.stages import Cache
from jexport.jobs.matrix import Job
from jexport.jobs.result import JobListener, JobResult, error_from_dict, error_to_dict
from jexport.recipe import Recipe
from jexport.types import Artifact
from jexport.workspace.memory import available_bytes
from jexport.workspace.run import WORK, Event, cores, sweep

BUDGET_SHARE = 0.8
"""Of the memory that is free: the rest is for the page cache and for being wrong."""

SHUTDOWN_TIMEOUT_S = 20.0
"""How long a process may take to clean up after Ctrl-C before it is ended."""


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """What a job would do.

    Args:
        job: of the matrix.
        built: its artifact (not verified), None where there is none.
        cached: stages it would take from the cache, in their order.
        need: what the rest needs, by estimate; None if unknown, or nothing is left to build.
    """

    job: Job
    built: Path | None
    cached: tuple[str, ...]
    need: estimate.Estimate | None


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where and with what jobs run.

    Args:
        out: the folder of all artifacts.
        cache: keeps the results of finished stages.
        workers: processes at a time.
        memory_bytes: of all jobs at one time, None for BUDGET_SHARE of what is free.
        replace: as in `pipeline.build`.
        until: as in `pipeline.build`; parallel processes do not get it.
        lengths_of: as in `pipeline.build`; parallel processes do not get it.
    """

    out: Path
    cache: Cache
    workers: int = 1
    memory_bytes: int | None = None
    replace: bool = False
    until: str = ""
    lengths_of: Sequence[str] = ()

    @property
    def budget_bytes(self) -> int | None:
        """What all jobs at one time may use; None where nobody knows what there is."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        free = available_bytes()
        return None if free is None else int(free * BUDGET_SHARE)


def build_all(
    chosen: Recipe,
    jobs: Sequence[Job],
    resources: Resources,
    *,
    listen: JobListener = lambda job, event: None,
) -> tuple[JobResult, ...]:
    """Build every job; one that fails does not stop the others.

    Ctrl-C ends all of them, and nothing half-made is left.

    Args:
        chosen: the recipe.
        jobs: what to build of it.
        resources: where, and how many at a time.
        listen: is told of every event, with its job.

    Returns:
        A result for each job, in their order.
    """
    if resources.workers == 1 or len(jobs) < 2:
        return tuple(_build_here(chosen, job, resources, listen) for job in jobs)
    return _build_in_parallel(chosen, jobs, resources, listen)


def plan(chosen: Recipe, jobs: Sequence[Job], resources: Resources) -> tuple[PlannedJob, ...]:
    """What each job would find done, and about what the rest needs. Nothing is written.

    Args:
        chosen: the recipe.
        jobs: what to build of it.
        resources: where, and with which cache.

    Returns:
        A plan for each job, in their order.
    """
    count = estimate.weights(chosen.load.model)
    planned = []
    for job in jobs:
        request = BuildRequest.of(chosen, task=job.task, target=job.target, precision=job.precision)
        seen = pipeline.foresee(
            request, out=resources.out, cache=resources.cache, replace=resources.replace
        )
        need = None
        if count is not None and seen.built is None:
            graph = targets.load(job.target).needs_onnx
            need = estimate.of(count, job.precision, graph=graph, finished=seen.cached)
        planned.append(PlannedJob(job=job, built=seen.built, cached=seen.cached, need=need))
    return tuple(planned)


def _build_here(chosen: Recipe, job: Job, resources: Resources, listen: JobListener) -> JobResult:
    begin = time.monotonic()
    artifact, failure = None, None
    listen(job, Event(kind="begin", stage=""))
    try:
        artifact = pipeline.build(
            chosen,
            task=job.task,
            target=job.target,
            precision=job.precision,
            until=resources.until,
            lengths_of=resources.lengths_of,
            out=resources.out,
            cache=resources.cache,
            memory_bytes=resources.memory_bytes,
            replace=resources.replace,
            listen=lambda event: listen(job, event),
        )
    except Exception as error:  # one job's bug must not stop the others; it is shown at the end
        failure = error
    seconds = time.monotonic() - begin
    return JobResult(job=job, artifact=artifact, error=failure, seconds=seconds).announce(listen)


@dataclass(eq=False)
class _Worker:
    """A process and the job that it runs. need_bytes: of its job, by estimate."""

    process: Any
    pipe: Connection
    job: Job | None = None
    begin: float = 0.0
    need_bytes: int = 0


def _build_in_parallel(
    chosen: Recipe, jobs: Sequence[Job], resources: Resources, listen: JobListener
) -> tuple[JobResult, ...]:
    budget = resources.budget_bytes
    # An equal share of the budget where nobody knows better.
    share = (budget or 0) // resources.workers
    need_bytes = needs(chosen, jobs) or dict.fromkeys(jobs, share)
    waiting, done = list(jobs), dict[Job, JobResult]()
    with _workers(chosen, resources, budget, min(resources.workers, len(jobs))) as workers:
        while len(done) < len(jobs):
            for worker in [one for one in workers if one.job is None]:
                reserved = sum(one.need_bytes for one in workers)
                job = _next(waiting, need_bytes, budget, reserved)
                if job is not None:
                    waiting.remove(job)
                    worker.job, worker.begin = job, time.monotonic()
                    worker.need_bytes = need_bytes[job]
                    worker.pipe.send(dataclasses.asdict(job))
                    listen(job, Event(kind="begin", stage=""))
            busy = [one for one in workers if one.job is not None]
            for ready in wait([one.pipe for one in busy]):
                worker = next(one for one in busy if one.pipe is ready)
                result = _receive(worker, listen)
                if result is not None:
                    done[result.job] = result
                    if not worker.process.is_alive():
                        workers[workers.index(worker)] = _start_worker(chosen, resources, budget)
    return tuple(done[job] for job in jobs)


def needs(chosen: Recipe, jobs: Sequence[Job]) -> dict[Job, int]:
    """Memory that jobs take, by estimate.

    Args:
        chosen: the recipe.
        jobs: what to build of it.

    Returns:
        Bytes by job; empty where the checkpoint is not here.
    """
    count = estimate.weights(chosen.load.model)
    if count is None:
        return {}
    return {job: estimate.memory(count, is_int8=job.precision.startswith("int8")) for job in jobs}


def _next(
    waiting: Sequence[Job], needs: dict[Job, int], budget: int | None, reserved: int
) -> Job | None:
    """The first job that fits beside those running; any where none runs (its build refuses it)."""
    for job in waiting:
        if budget is None or not reserved or reserved + needs[job] <= budget:
            return job
    return None


def _receive(worker: _Worker, listen: JobListener) -> JobResult | None:
    """Take one message of a worker; its result when the job is over."""
    assert worker.job is not None
    job = worker.job
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(SHUTDOWN_TIMEOUT_S)
        code = worker.process.exitcode
        kind, value = "error", {"what": f"the process that built it ended with {code}"}
    if kind == "event":
        listen(job, Event(**value))
        return None
    artifact = error = None
    if kind == "built":
        artifact = Artifact(path=Path(value), manifest=manifest.read(Path(value)))
    else:
        error = error_from_dict(value)
    worker.job, worker.need_bytes = None, 0
    seconds = time.monotonic() - worker.begin
    return JobResult(job=job, artifact=artifact, error=error, seconds=seconds).announce(listen)


@contextlib.contextmanager
def _workers(
    chosen: Recipe, resources: Resources, budget: int | None, count: int
) -> Iterator[list[_Worker]]:
    workers = [_start_worker(chosen, resources, budget) for _ in range(count)]
    try:
        yield workers
    except BaseException:
        # Each cleans up after itself as one build does; whoever cannot is swept after.
        for one in workers:
            if one.process.is_alive():
                os.kill(one.process.pid, signal.SIGINT)
        raise
    finally:
        limit = time.monotonic() + SHUTDOWN_TIMEOUT_S
        for one in workers:
            one.pipe.close()
            one.process.join(max(limit - time.monotonic(), 0.1))
            if one.process.is_alive():
                one.process.kill()
                one.process.join()
        with contextlib.suppress(OSError):
            sweep(resources.out / WORK)
            (resources.out / WORK).rmdir()
        if resources.cache.root is not None:
            entries.tidy(resources.cache.root)


def _start_worker(chosen: Recipe, resources: Resources, budget: int | None) -> _Worker:
    # spawn: a process that is warm may hold threads and locks of libraries, which a fork breaks.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    settings = {
        "recipe": chosen.resolved(),
        "out": str(resources.out),
        "cache": str(resources.cache.root) if resources.cache.root else "",
        "limit_bytes": resources.cache.limit_bytes,
        "memory_bytes": budget,
        "replace": resources.replace,
        "threads": max(1, cores() // resources.workers),
    }
    process = context.Process(target=_work, args=(theirs, settings), daemon=True)
    # A process hears of Ctrl-C once it can deal with it: Python's own start would print a
    # traceback. What tracks its resources is started before, because that lets Ctrl-C in again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process=process, pipe=ours)


def _work(pipe: Connection, settings: dict[str, Any]) -> None:
    """A worker process: builds the jobs it is sent until the pipe is closed."""
    os.setpgrp()  # Ctrl-C reaches the parent, which passes it on once
    os.environ.setdefault("OMP_NUM_THREADS", str(settings["threads"]))
    chosen = recipe.from_table(settings["recipe"], origin="the parent's recipe")
    root = Path(settings["cache"]) if settings["cache"] else None
    resources = Resources(
        out=Path(settings["out"]),
        cache=Cache(root=root, limit_bytes=settings["limit_bytes"]),
        memory_bytes=settings["memory_bytes"],
        replace=settings["replace"],
    )

    def send(job: Job, event: Event) -> None:
        if event.kind not in ("begin", "end"):
            pipe.send(("event", dataclasses.asdict(event)))

    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while True:
            result = _build_here(chosen, Job(**pipe.recv()), resources, send)
            if result.artifact is not None:
                pipe.send(("built", str(result.artifact.path)))
            else:
                assert result.error is not None
                pipe.send(("error", error_to_dict(result.error)))
