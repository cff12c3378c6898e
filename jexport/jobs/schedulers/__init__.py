"""What a scheduler is: a system that runs the jobs of a matrix; the folder is the registry.

To add one: a file here that ends with `SCHEDULER = Scheduler(...)`. It writes the steps in that
system's own format and talks to nobody: no cluster is asked, no secret is read or written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jexport import plugins, targets
from jexport.errors import MatrixError
from jexport.jobs.matrix import Job

PHASES = ("build", "compile")
"""A target whose engine needs a GPU is built up to it first, then completed per kind of GPU."""

PRODUCT, GKE = "nvidia.com/gpu.product", "cloud.google.com/gke-accelerator"
GPU_LABELS = (PRODUCT, GKE)
"""Node labels that name the kind of GPU: of NVIDIA's GPU Feature Discovery, and of GKE."""

KIND = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""What the value of a label may be."""

PLACE = re.compile(r"[a-z0-9]+://[^\s@]+\Z|[^\s:@]+\Z")
"""A URL or a folder. No '@': a user's name and password would stand in every log."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of one job, on one machine.

    Args:
        name: unique in the matrix.
        phase: one of PHASES.
        job: that it is a part of.
        words: the command.
        artifact: where it is afterwards, below the working folder.
        needs: the name of the step whose `artifact` the command reads, '' for none.
    """

    name: str
    phase: str
    job: Job
    words: tuple[str, ...]
    artifact: str
    needs: str = ""

    @property
    def gpu(self) -> str:
        """The kind of GPU that the machine must have, '' for none: building up to the engine."""
        return self.job.gpu


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a user may ask of the machines.

    Args:
        phases: those whose steps are written.
        image: a container image that has jexport.
        publish: where artifacts go, '' for nowhere.
        accept_licence: also a non-commercial model to where everybody can read it.
        claim: the volume claim that keeps artifacts.
        secret: what holds the credentials, by name; '' for nothing.
        gpu_label: the node label that names the kind of GPU.
        memory_gib: what a job may take, in GiB.
    """

    phases: Sequence[str] = PHASES
    image: str = ""
    publish: str = ""
    accept_licence: bool = False
    claim: str = "jexport"
    secret: str = ""
    gpu_label: str = PRODUCT
    memory_gib: int = 16

    @property
    def publish_flags(self) -> str:
        """What `jexport publish` is told besides the artifact and the destination."""
        return "--accept-licence" if self.publish and self.accept_licence else ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What all jobs of a matrix share.

    Args:
        name: the recipe's own name, a folder of every artifact.
        words: recipe, checkpoint and other flags of `jexport build`, as they are to be repeated.
    """

    name: str
    words: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """One system.

    Args:
        name: of its module.
        summary: what it is, in a few words.
        write: steps, wishes: the text that the system reads.
    """

    name: str
    summary: str
    write: Callable[[Sequence[Step], Wishes], str]


def names() -> list[str]:
    """The schedulers there are, without importing any."""
    return plugins.names(__name__)


def load(name: str) -> Scheduler:
    """Import one scheduler.

    Args:
        name: one of `names()`.

    Returns:
        Its record.

    Raises:
        MatrixError: there is no such scheduler; names the nearest.
    """
    scheduler: Scheduler = plugins.load(
        __name__, name, record="SCHEDULER", kind="format", error=MatrixError
    )
    return scheduler


def steps(jobs: Sequence[Job], origin: Origin) -> tuple[Step, ...]:
    """The commands of these jobs; a step stands after the one that it needs.

    A job whose engine needs a GPU is built up to the engine once, however many kinds of GPU there
    are, then completed on each; without a kind it stays portable. Each kind has a folder of its
    own: `latest` would otherwise name the engine of whichever machine was last.

    Args:
        jobs: of one matrix.
        origin: what they share.

    Returns:
        The steps, each once.

    Raises:
        MatrixError: a kind of GPU can be neither a folder nor a label.
    """
    by_name: dict[str, Step] = {}
    for job in jobs:
        if targets.load(job.target).compiling.portable is None:
            built = _build(job, origin, out="artifacts")
            by_name[built.name] = built
            continue
        plain = dataclasses.replace(job, gpu="")
        portable = _build(plain, origin, out="portable", until="compile")
        by_name[portable.name] = portable
        if job.gpu:
            check_kind(job.gpu)
            out = f"artifacts-{job.gpu}"
            by_name[job.key] = Step(
                name=job.key,
                phase="compile",
                job=job,
                words=("jexport", "compile", portable.artifact, "--out", out, "--quiet"),
                artifact=_latest(out, origin, job),
                needs=portable.name,
            )
    return tuple(by_name.values())


def _build(job: Job, origin: Origin, *, out: str, until: str = "") -> Step:
    return Step(
        name=f"{job.key}-portable" if until else job.key,
        phase="build",
        job=job,
        words=(
            "jexport",
            "build",
            *origin.words,
            "--task",
            job.task,
            "--target",
            job.target,
            "--precision",
            job.precision,
            *(("--until", until) if until else ()),
            "--out",
            out,
            "--quiet",
        ),
        artifact=_latest(out, origin, job),
    )


def _latest(out: str, origin: Origin, job: Job) -> str:
    return f"{out}/{origin.name}/{job.task_name}/{job.target}-{job.precision}/latest"


def check_kind(kind: str) -> None:
    """Refuse a kind of GPU that can be neither a folder nor a label.

    Args:
        kind: as a user names it.

    Raises:
        MatrixError: it can be neither.
    """
    if not KIND.fullmatch(kind):
        raise MatrixError(
            f"'{kind:.80}' cannot be a kind of GPU",
            evidence="it names nodes and folders: letters, digits, '-', '_' and '.', at most 63",
            fix="give one such as L4, A100 or NVIDIA-A100-SXM4-40GB",
        )


def check_place(publish: str) -> None:
    """Refuse a destination that is none, or that carries a name and password.

    Args:
        publish: a folder or a URL, '' for nowhere.

    Raises:
        MatrixError: it is one of those; the value is not repeated.
    """
    if publish and not PLACE.match(publish):
        raise MatrixError(
            "cannot publish there",
            evidence="a destination is a folder or a URL, without spaces and without '@'"
            " (the value is not repeated here: it may hold a password)",
            fix="give oci://host/name, s3://bucket/folder, hf://owner/name or a folder; credentials"
            " come from the machine that publishes",
        )
