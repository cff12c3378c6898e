"""`jexport matrix`."""

from __future__ import annotations

import dataclasses

import click

from jexport.cli import console, flags
from jexport.jobs import schedulers


def _listed(
    context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """`--task a --task b` and `--task a,b` alike."""
    return tuple(word for value in given for word in value.split(",") if word)


@click.command()
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME|FILE",
    help="A shipped recipe or a .toml file. Default: jina-embeddings-v3",
)
@click.option(
    "--model",
    metavar="FOLDER|HUB_ID",
    help="The checkpoint, where the jobs run; overrides the recipe's.",
)
@click.option(
    "--name", metavar="NAME", help="What artifacts are called. Default: the recipe's name"
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    callback=_listed,
    metavar="T,..|all",
    help="Default: all of the recipe.",
)
@flags.use
@click.option(
    "--target",
    "chosen",
    multiple=True,
    callback=_listed,
    metavar="T,..",
    help="Default: all of the recipe.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    callback=_listed,
    metavar="P,..",
    help="Default: all of the recipe that a target takes.",
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    callback=_listed,
    metavar="KIND,..",
    help="trt: build an engine for each, such as L4,A100.",
)
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(schedulers.names()),
    help="What is to run the jobs.",
)
@click.option(
    "--phase",
    "phases",
    multiple=True,
    type=click.Choice(schedulers.PHASES),
    help="Only what builds, or only what completes on GPUs.",
)
@click.option("--publish", default="", metavar="DEST", help="Publish each artifact there.")
@flags.accept_licence
@click.option("--image", default="", metavar="IMAGE", help="kubernetes: an image with jexport.")
@click.option(
    "--claim",
    default="jexport",
    metavar="NAME",
    help="kubernetes: the volume claim for artifacts. Default: jexport",
)
@click.option(
    "--secret",
    default="",
    metavar="NAME",
    help="kubernetes: the Secret with the credentials for --publish.",
)
@click.option(
    "--gpu-label",
    type=click.Choice(schedulers.GPU_LABELS),
    default=schedulers.PRODUCT,
    help="kubernetes: the node label that says the kind of GPU.",
)
@click.option(
    "--memory",
    "memory_gib",
    type=click.IntRange(min=1),
    default=16,
    metavar="GIB",
    help="kubernetes: what a job may take. Default: 16",
)
def matrix(
    recipe_name: str | None,
    model: str | None,
    name: str | None,
    use: str | None,
    tasks: tuple[str, ...],
    chosen: tuple[str, ...],
    precisions: tuple[str, ...],
    gpus: tuple[str, ...],
    form: str,
    phases: tuple[str, ...],
    **options: str | int,
) -> None:
    """Print the jobs of a recipe for a system that runs them: tasks x targets x precisions.

    A target that needs a GPU is built up to its engine on any machine, then completed by `jexport
    compile` on each kind of GPU that is named.
    """
    from jexport import recipe
    from jexport.jobs import matrix as jobs

    chosen_recipe = recipe.read(recipe_name or recipe.DEFAULT_RECIPE)
    words = ["--recipe", recipe_name or recipe.DEFAULT_RECIPE]
    if use is not None:
        chosen_recipe = chosen_recipe.replace_load(use=use)
        words += ("--use", use)
    chosen_jobs = jobs.asked(
        chosen_recipe, tasks=tasks, chosen=chosen, precisions=precisions, gpus=gpus
    )
    words += ("--model", model) if model else ()
    if name is not None:
        renamed = dataclasses.replace(chosen_recipe, name=name)
        chosen_recipe = recipe.checked(renamed, origin="the command line")
        words += ("--name", name)
    origin = schedulers.Origin(name=chosen_recipe.name, words=words)
    wishes = schedulers.Wishes(phases=phases or schedulers.PHASES, **options)  # type: ignore[arg-type]
    schedulers.check_place(wishes.publish)
    steps = schedulers.steps(chosen_jobs, origin)
    click.echo(schedulers.load(form).write(steps, wishes), nl=False)
    for note in _notes(steps, form, gpus):
        console.say(note)


def _notes(steps: tuple[schedulers.Step, ...], form: str, gpus: tuple[str, ...]) -> list[str]:
    """What to know that is not in the text itself."""
    portable = any("--until" in step.words for step in steps)
    if portable and not gpus:
        return ["engines are left to a machine with a GPU: name its kind with --gpu"]
    if portable and form == "kubernetes":
        return [
            "Jobs of the phase 'compile' are suspended until what they need is built. Then:",
            "  kubectl wait job -l jexport/phase=build --for=condition=complete --timeout=12h",
            "  kubectl get job -l jexport/phase=compile -o name |"
            ' xargs -I{} kubectl patch {} -p \'{"spec":{"suspend":false}}\'',
        ]
    return []


COMMANDS = {"matrix": matrix}
