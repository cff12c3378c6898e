"""Which node may run a job: the kind of GPU that it needs, and memory. Starts nothing.

A node has a kind of GPU when Ray found one (its resource `accelerator_type:L4`), or when it was
started with a resource of that name: `ray start --resources '{"L4": 1}'`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jexport.errors import ClusterError
from jexport.jobs.matrix import Job

Node: TypeAlias = Mapping[str, Any]

DETECTED = "accelerator_type:"
"""What Ray's own resource of a kind of GPU is called with the kind behind it."""

MARK = 0.001
"""As much of it as Ray's option accelerator_type takes: it marks a node, nothing is used up."""


def nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def options(job: Job, memory_bytes: int, known: Sequence[Node]) -> dict[str, Any]:
    """What Ray is to reserve for a job.

    Args:
        job: its kind of GPU counts.
        memory_bytes: that it takes, 0 if unknown.
        known: the nodes that are alive.

    Returns:
        Options of a Ray task.

    Raises:
        ClusterError: no node has it at all.
    """
    chosen: dict[str, Any] = {"num_cpus": 1}
    if memory_bytes:
        chosen["memory"] = memory_bytes
    fitting = [one for one in known if one["Resources"].get("CPU", 0) >= 1]
    if job.gpu:
        mark = DETECTED + job.gpu
        suitable = [one for one in fitting if mark in one["Resources"]]
        if suitable:
            chosen.update(num_gpus=1, resources={mark: MARK})
        else:
            suitable = [one for one in fitting if one["Resources"].get(job.gpu, 0) >= 1]
            chosen.update(resources={job.gpu: 1})
        if not suitable:
            raise ClusterError(
                f"no node has a GPU of the kind {job.gpu} for {job.key}",
                evidence=_kinds(known),
                fix="add a node: Ray finds its GPUs itself, or is told of them by `ray start"
                f" --resources '{{\"{job.gpu}\": 1}}'`; or leave that kind out",
            )
        fitting = suitable
    largest = max((one["Resources"].get("memory", 0) for one in fitting), default=0)
    if memory_bytes > largest or not fitting:
        raise ClusterError(
            f"no node has room for {job.key}",
            evidence=f"it takes {memory_bytes / 2**30:.1f} GiB of memory and a processor; the"
            f" largest of {len(fitting)} nodes that could run it offers {largest / 2**30:.1f} GiB",
            fix="add a larger node, or start Ray there with more --memory",
        )
    return chosen


def _kinds(known: Sequence[Node]) -> str:
    """What the nodes say of GPUs, for an error."""
    plain = ("CPU", "GPU", "memory", "object_store_memory")
    kinds = {
        name.removeprefix(DETECTED)
        for one in known
        for name in one["Resources"]
        if name not in plain and not name.startswith("node:")
    }
    return f"{len(known)} nodes, which name: {', '.join(sorted(kinds)) or 'no kind'}"
