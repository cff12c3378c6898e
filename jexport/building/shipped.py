"""Whether a recipe ships what is asked for: the one place that asks.

Opens no checkpoint and imports no target.
"""

from __future__ import annotations

from collections.abc import Sequence

from jexport import targets as engines
from jexport.errors import PrecisionError, UnknownTargetError, UnknownTaskError, nearest
from jexport.recipe import PRECISIONS, Recipe
from jexport.tasks import NONE


def check_shipped(
    recipe: Recipe,
    *,
    tasks: Sequence[str] = (),
    targets: Sequence[str] = (),
    precisions: Sequence[str] = (),
) -> None:
    """Refuse what the recipe does not list; a list that it leaves empty refuses nothing.

    The task `none` (the base model) always passes. A target or precision that jexport does not
    have passes too: whoever loads it names the nearest that there is.

    Args:
        recipe: lists tasks, targets and precisions.
        tasks: names asked for.
        targets: names asked for.
        precisions: names asked for.

    Raises:
        UnknownTaskError: a task is not listed; the error names the nearest that is.
        UnknownTargetError: a target is not listed.
        PrecisionError: a precision is not listed.
    """
    known_tasks = (*recipe.tasks, NONE)
    for task in tasks:
        if recipe.tasks and task not in known_tasks:
            raise UnknownTaskError(
                f"unknown task '{task:.80}'",
                evidence=f"the recipe {recipe.name} has: {', '.join(known_tasks)}",
                fix=nearest(task, known_tasks),
            )
    for target in targets:
        if recipe.targets and target in engines.names() and target not in recipe.targets:
            raise UnknownTargetError(
                f"the recipe {recipe.name} does not ship the target '{target}'",
                evidence=f"it lists: {', '.join(recipe.targets)}",
                fix="add it to the recipe's targets, or use one of those",
            )
    for precision in precisions:
        if recipe.precisions and precision in PRECISIONS and precision not in recipe.precisions:
            raise PrecisionError(
                f"the recipe {recipe.name} does not ship the precision '{precision}'",
                evidence=f"it lists: {', '.join(recipe.precisions)}",
                fix="add it to the recipe's precisions, or use one of those",
            )
