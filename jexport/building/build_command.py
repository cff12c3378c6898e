"""The command line that builds an artifact again."""

from __future__ import annotations

import shlex

from jexport import recipe
from jexport.artifacts import store
from jexport.recipe import Recipe


def build_command(chosen: Recipe, slot: store.Slot, name: str, until: str = "") -> str:
    """What to type to build it again, from the checkpoint's own name: a path is this machine's.

    Other changes to the recipe than the command line offers are in the manifest's recipe.

    Args:
        chosen: the recipe, with the command line's changes.
        slot: names task, target and precision.
        name: the checkpoint's hub id or folder name.
        until: the stage that a portable artifact's build ended after, '' for none.

    Returns:
        One line for a shell, quoted.
    """
    words = ["jexport", "build"]
    shipped = chosen.name in recipe.names()
    if shipped:
        words += ["--recipe", chosen.name]
    if not shipped or recipe.read(chosen.name).load.model != chosen.load.model:
        words += ["--model", name]
        if not shipped and recipe.for_model(name).name != chosen.name:
            words += ["--name", chosen.name]
    use = chosen.load.use
    words += ["--task", slot.task.removesuffix(f".{use}") if use else slot.task]
    words += [
        *(("--use", use) if use else ()),
        "--target",
        slot.target,
        "--precision",
        slot.precision,
    ]
    words += ["--effort", chosen.quantize.effort, "--calibration", chosen.quantize.calibration]
    if chosen.quantize.allow_slower:
        words.append("--allow-slower")
    if until:
        words += ["--until", until]
    return shlex.join(words)
