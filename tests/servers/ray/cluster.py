"""A local Ray cluster of several nodes, and what becomes of jobs on it; prints JSON.

Runs in the environment `ray`. All nodes are processes of this machine; they differ in resources.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray"),  # short: sockets are in it
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would put this machine's outer address in the place of 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "0",  # the node that says it has a GPU may give it away
}

import ray
from ray.cluster_utils import Cluster

from jexport import recipe
from jexport.artifacts import manifest
from jexport.building import pipeline
from jexport.errors import ClusterError, JexportError, ParityError
from jexport.jobs import ray as cluster
from jexport.jobs.matrix import Job
from jexport.jobs.ray import connection, node, upload
from jexport.jobs.result import JobResult
from jexport.toy import checkpoint as toy
from jexport.types import Artifact
from jexport.workspace.run import Event, Listener

HERE = {"node_ip_address": "127.0.0.1"}
RECIPE = recipe.read("jina-embeddings-v3")


def job(task: str, gpu: str = "") -> Job:
    return Job(task=task, target="hf", precision="fp32", gpu=gpu)


@dataclasses.dataclass(frozen=True)
class Copies:
    """A job's function that takes no minute: a copy of a built artifact, under the job's name.

    gate: a file that is waited for. Its heart beats in `beats`, a file named after the process.
    """

    template: Path
    gate: Path | None = None
    beats: Path | None = None

    def __call__(self, job: Job, place: node.Place, listen: Listener) -> Artifact:
        context = ray.get_runtime_context()
        told = {"node": context.get_node_id(), "resources": context.get_assigned_resources()}
        listen(Event(kind="note", stage="compile", text=json.dumps(told)))
        while self.gate is not None and not self.gate.exists():
            if self.beats is not None:
                with open(self.beats / str(os.getpid()), "a") as stream:
                    stream.write(".")
            listen(Event(kind="progress", stage="compile", done=1, total=2))
            time.sleep(0.1)
        return renamed(self.template, place.out, job)


def renamed(template: Path, out: Path, job: Job) -> Artifact:
    content = json.loads((template / manifest.NAME).read_text(encoding="utf-8"))
    content["task"] = job.task
    content["version"] = f"1.0.0-{job.gpu or 'cpu'}"
    content["sha256"] = manifest.seal(content)
    path = out / content["name"] / job.task / "hf-fp32" / content["version"]
    shutil.copytree(template, path)
    manifest.write_json(path / manifest.NAME, content)
    return Artifact(path=path, manifest=manifest.read(path))


def raises(job: Job, place: node.Place, listen: Listener) -> Artifact:
    """Refused as by a gate, a bug, or killed: by the job's task."""
    if job.task == "refused":
        error = ParityError("validate: a gate failed", evidence="cosine 0.5\nin 'xx'", fix="mend")
        report = place.out / RECIPE.name / job.task / "hf-fp32" / "1.0.0.failed.json"
        report.parent.mkdir(parents=True)
        report.write_text("{}")
        error.add_note(f"  report: {report}")
        raise error
    if job.task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("what nobody foresaw")


@contextlib.contextmanager
def nodes() -> Iterator[Cluster]:
    """A head that works nothing, two nodes with an L4, one with a T4, one without."""
    # The Cluster class notes its address in a folder that it does not make itself.
    room = Path(os.environ["RAY_TMPDIR"], "ray")
    room.mkdir()
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(room), **HERE}
    whole = Cluster(initialize_head=True, head_node_args=head)
    try:
        for resources in ({"L4": 1}, {"L4": 1}, {"accelerator_type:T4": 1}, {}):
            gpus = int("accelerator_type:T4" in resources)
            whole.add_node(num_cpus=1, num_gpus=gpus, resources=resources, memory=2**30, **HERE)
        yield whole
    finally:
        ray.shutdown()
        whole.shutdown()
        shutil.rmtree(room.parent, ignore_errors=True)


def told(results: dict[Job, JobResult]) -> dict[str, Any]:
    """Results as JSON has them; artifacts verified."""
    return {
        one.key: {
            "attempts": result.attempts,
            "artifact": str(result.artifact.path) if result.artifact else "",
            "digest": manifest.verify(result.artifact.path).content["sha256"]
            if result.artifact
            else "",
            "error": type(result.error).__name__ if result.error else "",
            "exit_code": getattr(result.error, "exit_code", 0),
            "text": str(result.error or ""),
        }
        for one, result in results.items()
    }


def placed(whole: Cluster, room: Path, template: Path) -> dict[str, Any]:
    """Every kind of job at once: where each ran, and what was told of it."""
    jobs = [job("a"), job("b"), job("a", "L4"), job("b", "L4"), job("c", "L4"), job("a", "T4")]
    heard: dict[str, list[str]] = {one.key: [] for one in jobs}
    spots: dict[str, Any] = {}

    def listen(one: Job, event: Event) -> None:
        heard[one.key].append(f"{event.stage} {event.kind}")
        if event.stage == "compile" and event.kind == "note":
            spots[one.key] = json.loads(event.text)

    results = cluster.run(
        jobs,
        Copies(template),
        out=room / "placed",
        address=whole.address,
        memory=lambda one: 2**28,
        node_dir=room / "scratch",
        listen=listen,
    )
    kinds = {
        one["NodeID"]: [name for name in ("L4", "accelerator_type:T4") if name in one["Resources"]]
        for one in ray.nodes()
    }
    for spot in spots.values():
        spot["kinds"] = kinds[spot["node"]]
    again = cluster.run(
        jobs[:1],
        Copies(template),
        out=room / "placed",
        address=whole.address,
        node_dir=room / "scratch",
    )
    left = [str(path) for path in (room / "scratch").rglob("*") if path.is_file()]
    return {
        "results": told(results),
        "heard": heard,
        "spots": spots,
        "again": told(again),
        "left": left,
        "latest": os.readlink(room / "placed" / RECIPE.name / "a/hf-fp32/latest"),
    }


def refused(whole: Cluster, room: Path) -> dict[str, Any]:
    """Errors of every sort: of the job, of a bug, of a process that dies, of the cluster."""
    jobs = [job("refused"), job("bug"), job("killed")]
    results = cluster.run(
        jobs, raises, out=room / "out", address=whole.address, retries=1, node_dir=room / "scratch1"
    )
    never: dict[str, str] = {}
    for name, words in {
        "kind": {"jobs": [job("a"), job("a", "H100")]},
        "memory": {"jobs": [job("a")], "memory": lambda one: 2**40},
    }.items():
        try:
            cluster.run(build=raises, out=room / "never", address=whole.address, **words)
        except ClusterError as error:
            never[name] = str(error)
    return {
        "results": told(results),
        "never": never,
        "out": sorted(path.name for path in room.iterdir()),
    }


def shipped(whole: Cluster, room: Path, checkpoint: Path) -> dict[str, Any]:
    """The checkpoint on a node that does not have it at the driver's path, twice."""

    def there(sent: upload.Checkpoint, kept: Path) -> list[str]:
        elsewhere = dataclasses.replace(sent, folder=Path("/nowhere") / sent.folder.name)
        found = [upload.there(elsewhere, kept) for _ in range(2)]
        return [str(path) for path in (*found, upload.there(sent, kept))]

    with upload.offered(checkpoint) as sent:
        task = ray.remote(there).options(resources={"L4": 1})
        first, second, own = ray.get(task.remote(sent, room / "kept"))
        try:
            ray.get(sent.source.read.remote("../../etc/hostname", 0))
            stranger = "was read"
        except PermissionError:
            stranger = "refused"
        same = upload.same(Path(first), sent.files)
    return {
        "same": same,
        "once": first == second,
        "own": own == str(checkpoint),
        "name": first,
        "stranger": stranger,
        "left": sorted(path.name for path in Path(first).parent.iterdir()),
    }


def interrupted(whole: Cluster, room: Path, template: Path) -> dict[str, Any]:
    """Ctrl-C while jobs run: afterwards nothing works on, and nothing is left of it."""
    beats, scratch = room / "beats", room / "scratch2"
    beats.mkdir()
    jobs = [job("a"), job("b", "L4")]
    working: set[Job] = set()

    def listen(one: Job, event: Event) -> None:
        if event.kind == "progress":
            working.add(one)
        if len(working) == len(jobs):
            os.kill(os.getpid(), signal.SIGINT)

    begin = time.monotonic()
    try:
        cluster.run(
            jobs,
            Copies(template, gate=room / "never", beats=beats),
            out=room / "cancelled",
            address=whole.address,
            node_dir=scratch,
            listen=listen,
        )
        ended = "by itself"
    except KeyboardInterrupt:
        ended = "interrupted"
    seconds = time.monotonic() - begin
    sizes = [path.stat().st_size for path in sorted(beats.iterdir())]
    time.sleep(1)
    later = [path.stat().st_size for path in sorted(beats.iterdir())]
    return {
        "ended": ended,
        "beats": sizes,
        "later": later,
        "seconds": seconds,
        "left": [str(path) for path in scratch.rglob("*") if path.is_file()],
        "out": (room / "cancelled").exists(),
    }


def lost(whole: Cluster, room: Path, template: Path) -> dict[str, Any]:
    """Two jobs of one kind on two nodes; one node is killed while they run, and not replaced."""
    gate = room / "gate"
    jobs = [job("a", "L4"), job("b", "L4")]
    at: dict[str, list[str]] = {one.key: [] for one in jobs}
    notes: list[str] = []
    killers: list[threading.Thread] = []

    def kill(node_id: str) -> None:
        [victim] = [one for one in whole.worker_nodes if one.node_id == node_id]
        whole.remove_node(victim, allow_graceful=False)
        gate.touch()

    def listen(one: Job, event: Event) -> None:
        if event.stage == cluster.STAGE:
            notes.append(event.text)
        if event.stage == "compile" and event.kind == "note":
            at[one.key].append(json.loads(event.text)["node"])
        if all(at.values()) and not killers:
            killers.append(threading.Thread(target=kill, args=(at[jobs[1].key][0],)))
            killers[0].start()

    results = cluster.run(
        jobs,
        Copies(template, gate=gate),
        out=room / "lost",
        address=whole.address,
        node_dir=room / "scratch3",
        listen=listen,
    )
    killers[0].join()
    return {"results": told(results), "at": at, "notes": notes}


def gone(whole: Cluster, room: Path, template: Path) -> dict[str, Any]:
    """The last node of a kind is killed: its job does not wait for ever, others are not kept."""
    jobs = [job("a", "T4"), job("b")]
    killers: list[threading.Thread] = []

    def kill() -> None:
        having = [n["NodeID"] for n in ray.nodes() if "accelerator_type:T4" in n["Resources"]]
        [victim] = [one for one in whole.worker_nodes if one.node_id in having]
        whole.remove_node(victim, allow_graceful=False)
        (room / "gate2").touch()

    def listen(one: Job, event: Event) -> None:
        if one.gpu and event.stage == "compile" and not killers:
            killers.append(threading.Thread(target=kill))
            killers[0].start()

    results = cluster.run(
        jobs,
        Copies(template, gate=room / "gate2"),
        out=room / "gone",
        address=whole.address,
        placement_timeout_s=2,
        node_dir=room / "scratch4",
        listen=listen,
    )
    killers[0].join()
    return {"results": told(results)}


def built(whole: Cluster, room: Path, checkpoint: Path, chosen: recipe.Recipe) -> dict[str, Any]:
    """A real build on the cluster: its files and its events."""
    one = job("separation")
    stages: list[str] = []

    def listen(job: Job, event: Event) -> None:
        if event.kind == "done":
            stages.append(event.stage)

    kinds: list[str] = []
    [outcome] = cluster.build_all(
        chosen,
        [one],
        out=room / "built",
        address=whole.address,
        listen=lambda job, event: (kinds.append(event.kind), listen(job, event)),
    )
    if outcome.error is not None:
        raise outcome.error
    assert outcome.artifact is not None
    return {
        "stages": stages,
        "ends": [kinds[0], kinds[-1], outcome.seconds > 0],
        "sha256": outcome.artifact.manifest.content["sha256"],
        "path": str(outcome.artifact.path),
    }


def main(room: Path) -> None:
    checkpoint = toy.write(room / "toy")
    few = dataclasses.replace(RECIPE.validate, budget_tokens=1000, max_tokens=64)
    chosen = dataclasses.replace(RECIPE, validate=few).replace_load(model=str(checkpoint))
    template = pipeline.build(
        chosen, task="separation", target="hf", precision="fp32", out=room / "local"
    )
    told: dict[str, Any] = {"local": template.manifest.content["sha256"]}
    parts: dict[str, Callable[[Cluster], dict[str, Any]]] = {
        "placed": lambda whole: placed(whole, room, template.path),
        "refused": lambda whole: refused(whole, room),
        "shipped": lambda whole: shipped(whole, room, checkpoint),
        "built": lambda whole: built(whole, room, checkpoint, chosen),
        "interrupted": lambda whole: interrupted(whole, room, template.path),
        "lost": lambda whole: lost(whole, room, template.path),
        "gone": lambda whole: gone(whole, room, template.path),
    }
    nowhere = "127.0.0.1:9"
    try:
        cluster.run([job("a")], raises, out=room / "out", address=nowhere)
    except ClusterError as error:
        told["nowhere"] = str(error)
    with nodes() as whole, connection.connected(whole.address):
        for name, part in parts.items():
            begin = time.monotonic()
            try:
                told[name] = part(whole)
            except JexportError as error:
                told[name] = {"raised": str(error)}
            print(f"{name}: {time.monotonic() - begin:.1f} s", file=sys.stderr)
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
