"""Matrix: the jobs that a recipe asks for: tasks x targets x precisions (x GPU kinds).

Who runs them, in which order and where is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jexport import targets
from jexport.errors import PrecisionError
from jexport.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """One artifact to build. gpu: the kind of GPU that its engine needs, '' for none."""

    task: str
    target: str
    precision: str
    gpu: str = ""

    @property
    def key(self) -> str:
        """Its name in tables, logs and files of other programs: unique in a matrix."""
        kind = f"-{self.gpu}" if self.gpu else ""
        return f"{self.task}-{self.target}-{self.precision}{kind}"


def jobs(
    recipe: Recipe,
    *,
    tasks: Sequence[str],
    chosen: Sequence[str],
    precisions: Sequence[str] = (),
    gpus: Sequence[str] = (),
) -> tuple[Job, ...]:
    """Every job of these tasks and targets, in the order given; task by task.

    chosen: targets. precisions: empty for all that the recipe ships and a target takes; one that is
    asked for and that no chosen target takes is an error. gpus: kinds, for targets that need one;
    empty for the machine that builds. Raises UnknownTargetError, PrecisionError.
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
    wanted = precisions or recipe.precisions
    return tuple(
        Job(task=task, target=name, precision=precision, gpu=gpu)
        for task in tasks
        for name, engine in engines.items()
        for precision in engine.precisions
        if not wanted or precision in wanted
        for gpu in (gpus if engine.portable and gpus else ("",))
    )
