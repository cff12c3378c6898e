"""Matrix: the jobs that a recipe asks for: tasks x targets x precisions (x GPU kinds).

Who runs them, in which order and where is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jexport import targets
from jexport.building.shipped import check_shipped
from jexport.errors import PrecisionError, UnknownTaskError
from jexport.recipe import Recipe
from jexport.tasks import NONE, with_use

ALL = "all"
"""In the place of a task's name: every task of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One artifact to build.

    Args:
        task: a task's name.
        target: a target's name.
        precision: one that the target takes.
        gpu: the kind of GPU that its engine needs, '' for none.
        use: the recipe's load.use, '' for none.
    """

    task: str
    target: str
    precision: str
    gpu: str = ""
    use: str = ""

    @property
    def task_name(self) -> str:
        """Task and use, as the artifact's folder is named."""
        return with_use(self.task, self.use)

    @property
    def key(self) -> str:
        """Its name in tables, logs and files of other programs: unique in a matrix."""
        kind = f"-{self.gpu}" if self.gpu else ""
        return f"{self.task_name}-{self.target}-{self.precision}{kind}"


def jobs(
    recipe: Recipe,
    *,
    tasks: Sequence[str],
    chosen: Sequence[str],
    precisions: Sequence[str] = (),
    gpus: Sequence[str] = (),
) -> tuple[Job, ...]:
    """Every job of these tasks and targets, in the order given; task by task.

    Args:
        recipe: its precisions count where none is asked for.
        tasks: names of tasks.
        chosen: names of targets.
        precisions: empty for all that the recipe ships and a target takes.
        gpus: kinds, for targets that need one; empty for the machine that builds.

    Returns:
        The jobs; none where no target takes a precision of the recipe.

    Raises:
        UnknownTargetError: there is no such target.
        PrecisionError: one is asked for that no chosen target takes.
    """
    engines = {name: targets.load(name) for name in chosen}
    for precision in precisions:
        if not any(precision in engine.precisions for engine in engines.values()):
            raise PrecisionError(
                f"none of the targets has the precision '{precision}'",
                evidence="; ".join(
                    f"{name}: {', '.join(one.precisions)}" for name, one in engines.items()
                ),
                fix="ask for one of these",
            )
    chosen_precisions = precisions or recipe.precisions
    return tuple(
        Job(task=task, target=name, precision=precision, gpu=gpu, use=recipe.load.use)
        for task in tasks
        for name, engine in engines.items()
        for precision in engine.precisions
        if not chosen_precisions or precision in chosen_precisions
        for gpu in (gpus if engine.compiling.portable and gpus else ("",))
    )


def every_task(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's tasks; where it names none, those of the checkpoint's adapters, else `none`.

    Args:
        recipe: its checkpoint is asked where it names no tasks.

    Returns:
        Names of tasks.

    Raises:
        UnknownTaskError: the checkpoint is not here to be asked.
    """
    if recipe.tasks:
        return recipe.tasks
    folder = Path(recipe.load.model).expanduser()
    if not folder.is_dir():
        raise UnknownTaskError(
            f"the recipe {recipe.name} does not say which tasks there are",
            evidence=f"it has no key 'tasks', and {recipe.load.model} is no folder to look into",
            fix="name the tasks, or list them in the recipe",
        )
    from jexport import checkpoints  # `jexport --help` needs none of it

    return tuple(task for task in checkpoints.known_tasks(folder) if task != NONE) or (NONE,)


def asked(
    recipe: Recipe,
    *,
    tasks: Sequence[str] = (),
    chosen: Sequence[str] = (),
    precisions: Sequence[str] = (),
    gpus: Sequence[str] = (),
) -> tuple[Job, ...]:
    """The jobs of what a user names, all within what the recipe ships; nothing named means all.

    A name given twice counts once.

    Args:
        recipe: what it lists is what it ships.
        tasks: names of tasks; ALL for every one.
        chosen: names of targets.
        precisions: names of precisions.
        gpus: kinds, for targets that need one.

    Returns:
        One job or more.

    Raises:
        UnknownTaskError: a task is not shipped, or there is nothing to name all tasks.
        UnknownTargetError: a target is not shipped, or there is none of that name.
        PrecisionError: one is not shipped, or no target takes it.
    """
    task_names = tuple(dict.fromkeys(tasks)) or (ALL,)
    if ALL in task_names:
        task_names = every_task(recipe)
    names = tuple(dict.fromkeys(chosen)) or recipe.targets or tuple(targets.names())
    check_shipped(recipe, tasks=task_names, targets=names, precisions=precisions)
    once, kinds = tuple(dict.fromkeys(precisions)), tuple(dict.fromkeys(gpus))
    selected = jobs(recipe, tasks=task_names, chosen=names, precisions=once, gpus=kinds)
    if not selected:
        raise PrecisionError(
            f"no target takes a precision of the recipe {recipe.name}",
            evidence=f"targets: {', '.join(names)}; precisions: {', '.join(recipe.precisions)}",
            fix="name another target, or add a precision to the recipe",
        )
    return selected
