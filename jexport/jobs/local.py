"""Many builds of one recipe: one after another in this process, or in several side by side.

Knows how to run jobs and not which to run (matrix.py), nor what a build is (pipeline.py). What
happens is told to `listen`, job by job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from jexport import errors, recipe, targets
from jexport.artifacts import manifest
from jexport.building import estimate, pipeline
from jexport.cache import entries
from jexport.cache.stages import Cache
from jexport.errors import JexportError
from jexport.jobs.matrix import Job
from jexport.recipe import Recipe
from jexport.types import Artifact
from jexport.workspace.memory import available_bytes
from jexport.workspace.run import WORK, Event, cores, sweep

BUDGET_SHARE = 0.8
"""Of the memory that is free: the rest is for the page cache and for being wrong."""

PATIENCE_S = 20.0
"""How long a process may take to clean up after Ctrl-C before it is ended."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one job: an artifact or an error, and the seconds it took."""

    job: Job
    artifact: Artifact | None
    error: Exception | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a job would do. cached: stages it would take from the cache; need: None if unknown."""

    job: Job
    built: Path | None
    cached: tuple[str, ...]
    need: estimate.Estimate | None


Listen = Callable[[Job, Event], None]
"""Also called with kinds 'begin' and 'end' of an Event, stage '': text says how it ended."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """Where and with what jobs run. memory_bytes: None for BUDGET_SHARE of what is free.

    replace: as in `pipeline.build`.
    """

    out: Path
    cache: Cache
    workers: int = 1
    memory_bytes: int | None = None
    replace: bool = False

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
    means: Means,
    *,
    listen: Listen = lambda job, event: None,
) -> tuple[Outcome, ...]:
    """Build every job, the failed ones told among the others; in the order of the jobs.

    Ctrl-C ends all of them, and nothing half-made is left.
    """
    if means.workers == 1 or len(jobs) < 2:
        return tuple(_built_here(chosen, job, means, listen) for job in jobs)
    return _side_by_side(chosen, jobs, means, listen)


def plan(chosen: Recipe, jobs: Sequence[Job], means: Means) -> tuple[Planned, ...]:
    """What each job would find done, and about what the rest needs. Nothing is written."""
    count = estimate.weights(chosen.load.model)
    found = []
    for job in jobs:
        seen = pipeline.foresee(
            chosen,
            task=job.task,
            target=job.target,
            precision=job.precision,
            out=means.out,
            cache=means.cache,
            replace=means.replace,
        )
        need = None
        if count is not None and seen.built is None:
            graph = targets.load(job.target).needs_onnx
            need = estimate.of(count, job.precision, graph=graph, finished=seen.cached)
        found.append(Planned(job=job, built=seen.built, cached=seen.cached, need=need))
    return tuple(found)


def _built_here(chosen: Recipe, job: Job, means: Means, listen: Listen) -> Outcome:
    begin = time.monotonic()
    artifact, trouble = None, None
    listen(job, Event(kind="begin", stage=""))
    try:
        artifact = pipeline.build(
            chosen,
            task=job.task,
            target=job.target,
            precision=job.precision,
            out=means.out,
            cache=means.cache,
            memory_bytes=means.memory_bytes,
            replace=means.replace,
            listen=lambda event: listen(job, event),
        )
    except Exception as error:  # one job's bug must not stop the others; it is shown at the end
        trouble = error
    seconds = time.monotonic() - begin
    said = str(artifact.path) if artifact else f"failed: {_first_line(trouble)}"
    listen(job, Event(kind="end", stage="", text=said, seconds=seconds))
    return Outcome(job=job, artifact=artifact, error=trouble, seconds=seconds)


def _first_line(error: Exception | None) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(eq=False)
class _Worker:
    """A process and what it is at. need_bytes: of its job, by estimate."""

    process: Any
    pipe: Connection
    job: Job | None = None
    begin: float = 0.0
    need_bytes: int = 0


def _side_by_side(
    chosen: Recipe, jobs: Sequence[Job], means: Means, listen: Listen
) -> tuple[Outcome, ...]:
    budget = means.budget_bytes
    # An equal share of the budget where nobody knows better.
    share = (budget or 0) // means.workers
    wanted = needs(chosen, jobs) or dict.fromkeys(jobs, share)
    waiting, done = list(jobs), dict[Job, Outcome]()
    with _workers(chosen, means, budget, min(means.workers, len(jobs))) as workers:
        while len(done) < len(jobs):
            for worker in [one for one in workers if one.job is None]:
                spent = sum(one.need_bytes for one in workers)
                job = _next(waiting, wanted, budget, spent)
                if job is not None:
                    waiting.remove(job)
                    worker.job, worker.begin = job, time.monotonic()
                    worker.need_bytes = wanted[job]
                    worker.pipe.send(dataclasses.asdict(job))
                    listen(job, Event(kind="begin", stage=""))
            busy = [one for one in workers if one.job is not None]
            for ready in wait([one.pipe for one in busy]):
                worker = next(one for one in busy if one.pipe is ready)
                outcome = _heard(worker, listen)
                if outcome is not None:
                    done[outcome.job] = outcome
                    if not worker.process.is_alive():
                        workers[workers.index(worker)] = _started(chosen, means, budget)
    return tuple(done[job] for job in jobs)


def needs(chosen: Recipe, jobs: Sequence[Job]) -> dict[Job, int]:
    """Bytes of memory by job, estimated; empty where the checkpoint is not here."""
    count = estimate.weights(chosen.load.model)
    if count is None:
        return {}
    return {job: estimate.memory(count, is_int8=job.precision.startswith("int8")) for job in jobs}


def _next(
    waiting: Sequence[Job], needs: dict[Job, int], budget: int | None, spent: int
) -> Job | None:
    """The first job that fits beside those running; alone, any (it then says what it lacks)."""
    for job in waiting:
        if budget is None or not spent or spent + needs[job] <= budget:
            return job
    return None


def _heard(worker: _Worker, listen: Listen) -> Outcome | None:
    """Take one message of a worker; its outcome when the job is over."""
    assert worker.job is not None
    job = worker.job
    try:
        kind, said = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(PATIENCE_S)
        code = worker.process.exitcode
        kind, said = "error", {"what": f"the process that built it ended with {code}"}
    if kind == "event":
        listen(job, Event(**said))
        return None
    seconds = time.monotonic() - worker.begin
    artifact = trouble = None
    if kind == "built":
        path = Path(said)
        artifact = Artifact(path=path, manifest=manifest.read(path))
    else:
        trouble = _error(said)
    text = str(artifact.path) if artifact else f"failed: {_first_line(trouble)}"
    listen(job, Event(kind="end", stage="", text=text, seconds=seconds))
    worker.job, worker.need_bytes = None, 0
    return Outcome(job=job, artifact=artifact, error=trouble, seconds=seconds)


@contextlib.contextmanager
def _workers(
    chosen: Recipe, means: Means, budget: int | None, count: int
) -> Iterator[list[_Worker]]:
    workers = [_started(chosen, means, budget) for _ in range(count)]
    try:
        yield workers
    except BaseException:
        # Each cleans up after itself as one build does; whoever cannot is swept after.
        for one in workers:
            if one.process.is_alive():
                os.kill(one.process.pid, signal.SIGINT)
        raise
    finally:
        limit = time.monotonic() + PATIENCE_S
        for one in workers:
            one.pipe.close()
            one.process.join(max(limit - time.monotonic(), 0.1))
            if one.process.is_alive():
                one.process.kill()
                one.process.join()
        with contextlib.suppress(OSError):
            sweep(means.out / WORK)
            (means.out / WORK).rmdir()
        if means.cache.root is not None:
            entries.tidy(means.cache.root)


def _started(chosen: Recipe, means: Means, budget: int | None) -> _Worker:
    # spawn: a process that is warm may hold threads and locks of libraries, which a fork breaks.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    said = {
        "recipe": chosen.resolved(),
        "out": str(means.out),
        "cache": str(means.cache.root) if means.cache.root else "",
        "limit_bytes": means.cache.limit_bytes,
        "memory_bytes": budget,
        "replace": means.replace,
        "threads": max(1, cores() // means.workers),
    }
    process = context.Process(target=_work, args=(theirs, said), daemon=True)
    # Until it can deal with Ctrl-C a process is told later: Python's own start would print a
    # traceback. What tracks its resources is started before, because that lets Ctrl-C in again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process=process, pipe=ours)


def _work(pipe: Connection, said: dict[str, Any]) -> None:
    """A worker process: builds the jobs it is sent until the pipe is closed."""
    os.setpgrp()  # Ctrl-C reaches the parent, which passes it on once
    os.environ.setdefault("OMP_NUM_THREADS", str(said["threads"]))
    chosen = recipe.from_table(said["recipe"], origin="the parent's recipe")
    root = Path(said["cache"]) if said["cache"] else None
    means = Means(
        out=Path(said["out"]),
        cache=Cache(root=root, limit_bytes=said["limit_bytes"]),
        memory_bytes=said["memory_bytes"],
        replace=said["replace"],
    )

    def tell(job: Job, event: Event) -> None:
        if event.kind not in ("begin", "end"):
            pipe.send(("event", dataclasses.asdict(event)))

    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while True:
            outcome = _built_here(chosen, Job(**pipe.recv()), means, tell)
            if outcome.artifact is not None:
                pipe.send(("built", str(outcome.artifact.path)))
            else:
                assert outcome.error is not None
                pipe.send(("error", _told(outcome.error)))


def _told(error: Exception) -> dict[str, Any]:
    """An error as it goes through a pipe."""
    if isinstance(error, JexportError):
        return {
            "kind": type(error).__name__,
            "what": error.what,
            "evidence": error.evidence,
            "fix": error.fix,
            "notes": list(getattr(error, "__notes__", [])),
        }
    return {"what": "".join(traceback.format_exception(error))}


def _error(said: dict[str, Any]) -> Exception:
    kind = getattr(errors, said.get("kind", ""), None)
    if kind is None:
        return RuntimeError(said["what"])
    error: Exception = kind(said["what"], evidence=said["evidence"], fix=said["fix"])
    for note in said["notes"]:
        error.add_note(note)
    return error
