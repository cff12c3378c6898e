"""The build, from a recipe to an artifact: the stages in order, to be read aloud.

What is cheap to refuse is refused before the first weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jexport.artifacts import identity, store
from jexport.building.plan import BuildPlan, BuildRequest
from jexport.building.session import BuildSession
from jexport.cache.stages import FOLDER, Cache
from jexport.errors import ArtifactError
from jexport.recipe import Recipe
from jexport.types import Artifact, MergedModel, OnnxModel
from jexport.workspace.run import Event, Listener, open_run, silent


def build(  # the front door: one keyword for each thing that a user may ask for
    recipe: Recipe,
    *,
    task: str,
    target: str,
    precision: str = "fp32",
    until: str = "",
    lengths_of: Sequence[str] = (),
    out: Path = Path("artifacts"),
    cache: Cache | None = None,
    memory_bytes: int | None = None,
    replace: bool = False,
    listen: Listener = silent,
) -> Artifact:
    """Turn the recipe's checkpoint and one task into a verified artifact below `out`.

    An artifact that was built of the same inputs before is verified and returned as it is.

    Args:
        recipe: what to build from, and how.
        task: name of a task of the checkpoint, 'none' for the base model.
        target: name of the engine.
        precision: 'fp32', 'fp16', 'bf16', 'int8', ...: one that the target has.
        until: 'compile' ends before an engine that this machine cannot make, with a portable
            artifact for `portable.compile_portable`; '' for a whole build.
        lengths_of: texts like those to come, for engines that are tuned to lengths.
        out: the folder of all artifacts.
        cache: keeps the results of finished stages, so that a killed build goes on from there;
            None for `out`/.cache.
        memory_bytes: what the build may use; None for what this machine has.
        replace: the recipe's name may go from another checkpoint to this one.
        listen: is told of every stage.

    Returns:
        The artifact, in place.

    Raises:
        JexportError: all that is foreseen, from an unknown name to a gate that was not passed.
    """
    request = BuildRequest.of(recipe, task=task, target=target, precision=precision, until=until)
    request.check_machine(memory_bytes)
    cache = cache or Cache(root=out / FOLDER)
    with open_run(out, listen) as run, cache.lease() as lease:
        with run.stage("load") as note:
            plan = BuildPlan.open(request, cache=cache, out=out, profile_texts=lengths_of)
            for line in plan.model.notes:
                note(line)
        store.check_name(plan.slot, identity.of_loaded(plan.model), replace=replace)
        existing = _existing(plan.slot)
        if existing is not None:
            store.point_latest(plan.slot, work_dir=run.folder, replace=replace)
            listen(Event(kind="note", stage="package", text="already built of the same inputs"))
            return existing
        session = BuildSession(
            plan=plan, run=run, lease=lease, cache=cache, listen=listen, replace=replace
        )
        merged = session.merge()
        exported = session.export(merged)
        model, compiled, accepted = session.accepted_model(exported)
        return session.package(compiled, accepted, model)


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a build would find done.

    Args:
        built: its artifact (not verified), None where there is none.
        cached: stages whose results are in the cache, in their order.
    """

    built: Path | None
    cached: tuple[str, ...]


def foresee(request: BuildRequest, *, out: Path, cache: Cache, replace: bool = False) -> Foreseen:
    """What `build` would find done. The checkpoint is opened, and nothing is written.

    Args:
        request: what would be built.
        out: the folder of all artifacts.
        cache: where results of stages are looked for.
        replace: the recipe's name may go from another checkpoint to this one.

    Returns:
        The artifact, or the stages that are in the cache.

    Raises:
        JexportError: what `build` would raise before its first stage after load.
    """
    plan = BuildPlan.open(request, cache=cache, out=out)
    store.check_name(plan.slot, identity.of_loaded(plan.model), replace=replace)
    if plan.slot.path.is_dir():
        return Foreseen(built=plan.slot.path, cached=())
    return Foreseen(built=None, cached=tuple(_cached_stages(plan, cache)))


def _cached_stages(plan: BuildPlan, cache: Cache) -> list[str]:
    """The stages whose results are in the cache, up to the first that is not."""
    stages: list[str] = []
    model: OnnxModel | MergedModel = MergedModel(model=plan.model, precision=plan.precision)
    graph_stages = ["export", *(["quantize"] if plan.is_int8 else [])]
    for stage in graph_stages if plan.target.needs_onnx else []:
        graph = cache.peek(plan.key(stage, model))
        if not isinstance(graph, OnnxModel):
            return stages
        stages.append(stage)
        model = graph
    if cache.peek(plan.key("compile", model)) is not None:
        stages.append("compile")
    return stages


def _existing(slot: store.Slot) -> Artifact | None:
    """The artifact that is in its place already, verified. Raises ArtifactError if changed."""
    try:
        return store.find(slot)
    except ArtifactError as error:
        raise store.explain(error, slot) from None
