"""`jexport build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jexport.cli import console, flags

if TYPE_CHECKING:
    from jexport.jobs.local import Resources
    from jexport.jobs.matrix import Job
    from jexport.recipe import Recipe
    from jexport.workspace.run import Event

ALL = "all"


@click.command()
@click.option(
    "--recipe", "recipe_name", metavar="NAME|FILE", help="A shipped recipe or a .toml file."
)
@click.option("--model", metavar="FOLDER|HUB_ID", help="The checkpoint; overrides the recipe's.")
@click.option(
    "--name", metavar="NAME", help="What artifacts are called. Default: as the recipe or the model."
)
@flags.replace
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="retrieval.query, ..., none, or all; may be given several times.",
)
@flags.use
@click.option(
    "--target",
    "chosen_targets",
    multiple=True,
    metavar="TARGET",
    help="onnx, openvino, trt, hf, vllm; may be given several times.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    metavar="P",
    help="fp32 (default), fp16, bf16, int8, int8-weights; or several.",
)
@click.option(
    "--plan", is_flag=True, help="Say what would be built and what it needs; build nothing."
)
@click.option(
    "--jobs", "workers", type=click.IntRange(min=1), metavar="N", help="Build so many at once."
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="KIND",
    help="trt with --executor ray: an engine for this kind; or several.",
)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="ray: on the nodes of an existing Ray cluster.",
)
@click.option("--ray-address", metavar="HOST:PORT", help="Default: the cluster of this machine.")
@click.option(
    "--memory-budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory for all of them. Default: 80 % of what is free.",
)
@flags.path(
    "--out",
    default=Path("artifacts"),
    metavar="DIR",
    help="Where artifacts go. Default: artifacts",
)
@click.option("--revision", metavar="COMMIT", help="40-hex commit of a hub checkpoint.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--code-revision", metavar="COMMIT", help="40-hex commit of that code's repository.")
@click.option(
    "--validate-tokens",
    type=int,
    metavar="N",
    help="Compare texts up to N tokens (default 2048; 8192 takes longer).",
)
@click.option(
    "--calibration",
    metavar="SET|DIR|FILE",
    help="int8: texts to calibrate on. Default: the shipped set everyday.",
)
@click.option("--effort", metavar="fast|full", help="int8: how much to try. Default: fast.")
@click.option(
    "--allow-slower", is_flag=True, help="int8: keep it even when it is not faster than fp32 here."
)
@click.option(
    "--until",
    type=click.Choice(["compile"]),
    help="trt: stop before the engine; `jexport compile` finishes on a GPU machine.",
)
@flags.path(
    "--profile-from",
    metavar="FILE",
    help="trt: choose profiles by the lengths of your texts (.jsonl or .txt).",
)
@flags.path(
    "--timing-cache",
    metavar="DIR",
    help="trt: keep TensorRT's timings there; later builds are faster.",
)
@flags.path(
    "--cache",
    "cache_folder",
    metavar="DIR",
    help="Where finished stages are kept. Default: OUT/.cache",
)
@click.option("--no-cache", is_flag=True, help="Do every stage, and keep none.")
@flags.progress
def build(**options: Any) -> None:
    """Build one artifact: load, merge, export, compile, validate, package.

    Without --recipe and --model the recipe jina-embeddings-v3 is meant; with --model alone,
    sensible defaults. The artifact's path is the last line on stdout.

    With several tasks, targets or precisions, or with --recipe and none of them, all that is
    missing is built: what the recipe ships, where nothing else is asked for.
    """
    options["tasks"] = options["tasks"] or _only_task(options)
    is_single = _is_single(options)
    _check_options(options, is_single=is_single)
    console.tell_as_json(options["json_lines"])
    recipe = _recipe(options)
    jobs = _jobs(recipe, options)
    if options["plan"]:
        from jexport.cli.jobs import show_plan
        from jexport.jobs import local

        planned = local.plan(recipe, jobs, _resources(options))
        show_plan(planned, as_json=options["json_lines"])
    elif is_single:
        _build_single(recipe, jobs, options)
    else:
        _build_all(recipe, jobs, options)


def _only_task(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The task of a recipe that has one, where all else of a build is named; else none."""
    from jexport import recipe

    is_whole = len(options["chosen_targets"]) == len(options["precisions"]) == 1
    if options["recipe_name"] is None or not is_whole:
        return ()
    shipped = recipe.read(options["recipe_name"]).tasks
    return shipped if len(shipped) == 1 else ()


def _asks_for_one(options: Mapping[str, Any]) -> bool:
    """Whether one task, one target and at most one precision are named."""
    tasks, targets = options["tasks"], options["chosen_targets"]
    return len(tasks) == len(targets) == 1 and len(options["precisions"]) < 2 and tasks != (ALL,)


def _is_single(options: Mapping[str, Any]) -> bool:
    """Whether the one build that is named is shown stage by stage, not as a row of a table."""
    for_many = ("plan", "workers", "memory_budget")
    is_local = options["executor"] == "local"
    return _asks_for_one(options) and is_local and not any(options[key] for key in for_many)


def _check_options(options: Mapping[str, Any], *, is_single: bool) -> None:
    """Refuse options that do not go together. Raises click.UsageError."""
    is_local = options["executor"] == "local"
    if is_local and (options["gpus"] or options["ray_address"]):
        raise click.UsageError("--gpu and --ray-address go with --executor ray")
    local_only = ("workers", "memory_budget", "cache_folder", "no_cache")
    if not is_local and any(options[key] for key in local_only):
        raise click.UsageError("--jobs, --memory-budget and --cache are for builds on this machine")
    if not is_single and (options["until"] or options["profile_from"]):
        raise click.UsageError("--until and --profile-from go with one task and one target")


def _resources(options: Mapping[str, Any]) -> Resources:
    """Where and with what the builds run."""
    from jexport.cache.stages import FOLDER, Cache
    from jexport.datasets import calibration
    from jexport.jobs.local import Resources

    out, budget_gib = options["out"], options["memory_budget"]
    root = None if options["no_cache"] else options["cache_folder"] or out / FOLDER
    profile_from = options["profile_from"]
    return Resources(
        out=out,
        cache=Cache(root=root),
        workers=options["workers"] or 1,
        memory_bytes=int(budget_gib * (1 << 30)) if budget_gib else None,
        replace=options["replace"],
        until=options["until"] or "",
        lengths_of=calibration.texts(profile_from) if profile_from else (),
    )


def _jobs(recipe: Recipe, options: Mapping[str, Any]) -> tuple[Job, ...]:
    """The jobs asked for; what is not asked for is what the recipe ships, if one was named."""
    from jexport import targets as engines
    from jexport.jobs import matrix

    tasks, targets = options["tasks"], options["chosen_targets"]
    precisions, is_named = options["precisions"], options["recipe_name"] is not None
    if _asks_for_one(options) and not precisions:
        precisions = (*recipe.precisions, *engines.load(targets[0]).precisions)[:1]
    if _is_single(options):
        return (
            matrix.Job(
                task=tasks[0], target=targets[0], precision=precisions[0], use=recipe.load.use
            ),
        )
    if tasks == (ALL,):
        tasks = matrix.every_task(recipe)
    elif is_named:
        tasks = tasks or recipe.tasks
    targets = targets or (recipe.targets if is_named else ())
    for option, values in (("--task", tasks), ("--target", targets)):
        if not values:
            raise click.UsageError(
                f"Missing option '{option}'; the recipe {recipe.name} lists none to take them all"
                if is_named
                else f"Missing option '{option}'."
            )
    gpus = options["gpus"]
    return matrix.jobs(recipe, tasks=tasks, chosen=targets, precisions=precisions, gpus=gpus)


def _build_single(recipe: Recipe, jobs: Sequence[Job], options: Mapping[str, Any]) -> None:
    """A matrix of one: its stages on stderr as they run, what stops it raised as it is."""
    quiet, json_lines = options["quiet"], options["json_lines"]
    listen = console.listener(quiet=quiet, json_lines=json_lines)
    from jexport.jobs import local

    [job] = jobs
    if not quiet and not json_lines:
        console.say(
            f"jexport build: {recipe.load.model}, {job.task_name}, {job.target} {job.precision}"
        )

    def listen_to_stages(_: Job, event: Event) -> None:
        if event.kind not in ("begin", "end"):
            listen(event)

    [result] = local.build_all(recipe, jobs, _resources(options), listen=listen_to_stages)
    if result.error is not None:
        raise result.error
    assert result.artifact is not None
    click.echo(result.artifact.path)


def _build_all(recipe: Recipe, jobs: Sequence[Job], options: Mapping[str, Any]) -> None:
    """A row for each job; exits with the first failure's code once all have ended."""
    from jexport.cli.jobs import Board, report

    with Board(jobs, quiet=options["quiet"], json_lines=options["json_lines"]) as listen:
        if options["executor"] == "ray":
            from jexport.jobs import ray

            results = ray.build_all(
                recipe,
                jobs,
                out=options["out"],
                address=options["ray_address"] or "auto",
                replace=options["replace"],
                listen=listen,
            )
        else:
            from jexport.jobs import local

            results = local.build_all(recipe, jobs, _resources(options), listen=listen)
    code = report(results)
    if code:
        raise click.exceptions.Exit(code)


def _recipe(options: Mapping[str, Any]) -> Recipe:
    """The recipe with the command line's options put over it."""
    import dataclasses

    from jexport import recipe

    recipe_name, model = options["recipe_name"], options["model"]
    if recipe_name is None and model is not None:
        chosen = recipe.for_model(model)
    else:
        chosen = recipe.read(recipe_name or recipe.DEFAULT_RECIPE)
    if options["revision"] and Path(model or chosen.load.model).expanduser().is_dir():
        raise click.BadParameter(
            f"a commit of a hub; {model or chosen.load.model} is a folder here",
            param_hint="--revision",
        )
    changes = {
        "model": model,
        "revision": options["revision"],
        "code_revision": options["code_revision"],
        "use": options["use"],
        "trust_remote_code": options["trust_remote_code"] or None,
    }
    if model is not None and recipe_name is not None and options["revision"] is None:
        changes["revision"] = ""  # the recipe's revision belongs to the recipe's model
    given = {key: value for key, value in changes.items() if value is not None}
    chosen = chosen.replace_load(**given)
    if options["validate_tokens"] is not None:
        spec = dataclasses.replace(chosen.validate, max_tokens=options["validate_tokens"])
        chosen = dataclasses.replace(chosen, validate=spec)
    quantize = {
        "calibration": options["calibration"],
        "effort": options["effort"],
        "allow_slower": options["allow_slower"] or None,
    }
    if options["timing_cache"] is not None:
        chosen = chosen.replace_compile(timing_cache=str(options["timing_cache"]))
    chosen = chosen.replace_quantize(**{key: v for key, v in quantize.items() if v is not None})
    if options["name"] is not None:
        chosen = dataclasses.replace(chosen, name=options["name"])
    return recipe.checked(chosen, origin="the command line")


COMMANDS = {"build": build}
