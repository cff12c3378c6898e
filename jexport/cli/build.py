"""`jexport build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jexport.cli import console

ALL = "all"


@click.command()
@click.option(
    "--recipe", "recipe_name", metavar="NAME|FILE", help="A shipped recipe or a .toml file."
)
@click.option("--model", metavar="FOLDER|HUB_ID", help="The checkpoint; overrides the recipe's.")
@click.option(
    "--name", metavar="NAME", help="What artifacts are called. Default: as the recipe or the model."
)
@click.option("--replace", is_flag=True, help=console.REPLACE)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="retrieval.query, ..., none, or all; may be given several times.",
)
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
@click.option(
    "--out",
    type=click.Path(path_type=Path),
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
@click.option(
    "--profile-from",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="trt: choose profiles by the lengths of your texts (.jsonl or .txt).",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="trt: keep TensorRT's timings there; later builds are faster.",
)
@click.option(
    "--cache",
    "cache_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where finished stages are kept. Default: OUT/.cache",
)
@click.option("--no-cache", is_flag=True, help="Do every stage, and keep none.")
@click.option("--quiet", is_flag=True, help="Only the artifact's path, on stdout.")
@click.option("--json", "json_lines", is_flag=True, help="Progress as JSON lines on stderr.")
def build(
    recipe_name: str | None,
    model: str | None,
    tasks: tuple[str, ...],
    chosen_targets: tuple[str, ...],
    precisions: tuple[str, ...],
    plan: bool,
    workers: int | None,
    gpus: tuple[str, ...],
    executor: str,
    ray_address: str | None,
    memory_budget: float | None,
    out: Path,
    replace: bool,
    until: str | None,
    profile_from: Path | None,
    cache_folder: Path | None,
    no_cache: bool,
    quiet: bool,
    json_lines: bool,
    **options: Any,
) -> None:
    """Build one artifact: load, merge, export, compile, validate, package.

    Without --recipe and --model the recipe jina-embeddings-v3 is meant; with --model alone,
    sensible defaults. The artifact's path is the last line on stdout.

    With several tasks, targets or precisions, or with --recipe and none of them, all that is
    missing is built: what the recipe ships, where nothing else is asked for.
    """
    from jexport.cache.stages import FOLDER, Cache

    cache = Cache(root=None if no_cache else cache_folder or out / FOLDER)
    on_ray = executor == "ray"
    if (gpus or ray_address) and not on_ray:
        raise click.UsageError("--gpu and --ray-address go with --executor ray")
    if on_ray and (workers or memory_budget or cache_folder or no_cache):
        raise click.UsageError("--jobs, --memory-budget and --cache are for builds on this machine")
    one = _is_one(tasks, chosen_targets, precisions)
    if not one or plan or workers or memory_budget or on_ray:
        if until or profile_from:
            raise click.UsageError("--until and --profile-from go with one task and one target")
        asked = (tasks, chosen_targets, precisions)
        budget_bytes = int(memory_budget * (1 << 30)) if memory_budget else None
        means = {
            "out": out,
            "cache": cache,
            "workers": workers or 1,
            "memory_bytes": budget_bytes,
            "replace": replace,
        }
        console.tell_as_json(json_lines)
        recipe = _chosen(recipe_name, model, options)
        jobs = _jobs(recipe, asked, gpus, named=recipe_name is not None)
        address = (ray_address or "auto") if on_ray else ""
        _build_all(
            recipe, jobs, means, plan=plan, address=address, quiet=quiet, json_lines=json_lines
        )
        return
    listen = console.listener(quiet=quiet, json_lines=json_lines)
    from jexport import targets
    from jexport.building import pipeline
    from jexport.datasets import calibration

    [task], [target] = tasks, chosen_targets
    engine = targets.load(target)
    chosen = _chosen(recipe_name, model, options)
    wanted = precisions[0] if precisions else _usual(chosen, engine)
    if not quiet and not json_lines:
        console.say(f"jexport build: {chosen.load.model}, {task}, {target} {wanted}")
    artifact = pipeline.build(
        chosen,
        task=task,
        target=target,
        precision=wanted,
        until=until or "",
        lengths_of=calibration.texts(profile_from) if profile_from else (),
        out=out,
        cache=cache,
        replace=replace,
        listen=listen,
    )
    click.echo(artifact.path)


def _is_one(tasks: tuple[str, ...], targets: tuple[str, ...], precisions: tuple[str, ...]) -> bool:
    return len(tasks) == len(targets) == 1 and len(precisions) < 2 and tasks != (ALL,)


def _usual(chosen: Any, engine: Any) -> str:
    """The precision that is meant when none is asked for."""
    return str((*chosen.precisions, *engine.precisions)[0])


def _jobs(
    chosen: Any, asked: tuple[tuple[str, ...], ...], gpus: tuple[str, ...], *, named: bool
) -> Any:
    """The jobs asked for; what is not asked for is what the recipe ships, if one was named."""
    from jexport import targets as engines
    from jexport.jobs import matrix

    tasks, targets, precisions = asked
    if _is_one(*asked) and not precisions:  # the same one as without --plan and the like
        precisions = (_usual(chosen, engines.load(targets[0])),)
    if tasks == (ALL,):
        tasks = matrix.every_task(chosen)
    elif named:
        tasks = tasks or chosen.tasks
    targets = targets or (chosen.targets if named else ())
    for option, values in (("--task", tasks), ("--target", targets)):
        if not values:
            raise click.UsageError(
                f"Missing option '{option}'; the recipe {chosen.name} lists none to take them all"
                if named
                else f"Missing option '{option}'."
            )
    return matrix.jobs(chosen, tasks=tasks, chosen=targets, precisions=precisions, gpus=gpus)


def _build_all(
    chosen: Any,
    jobs: Any,
    means: dict[str, Any],
    *,
    plan: bool,
    address: str,
    quiet: bool,
    json_lines: bool,
) -> None:
    from jexport.cli import jobs as board
    from jexport.jobs import local

    if plan:
        board.show_plan(local.plan(chosen, jobs, local.Means(**means)), as_json=json_lines)
        return
    with board.Board(jobs, quiet=quiet, json_lines=json_lines) as listen:
        if address:
            from jexport.jobs import ray

            out = means["out"]
            found = ray.build_all(
                chosen, jobs, out=out, address=address, replace=means["replace"], listen=listen
            )
        else:
            found = local.build_all(chosen, jobs, local.Means(**means), listen=listen)
    code = board.report(found)
    if code:
        raise click.exceptions.Exit(code)


def _chosen(recipe_name: str | None, model: str | None, options: dict[str, Any]) -> Any:
    """The recipe with the command line's words put over it."""
    import dataclasses

    from jexport import recipe

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
        "trust_remote_code": options["trust_remote_code"] or None,
    }
    if model is not None and recipe_name is not None and options["revision"] is None:
        changes["revision"] = ""  # the recipe's revision belongs to the recipe's model
    given = {key: value for key, value in changes.items() if value is not None}
    chosen = chosen.replace_load(**given)
    if options["validate_tokens"] is not None:
        spec = dataclasses.replace(chosen.validate, max_tokens=options["validate_tokens"])
        chosen = dataclasses.replace(chosen, validate=spec)
    said = {
        "calibration": options["calibration"],
        "effort": options["effort"],
        "allow_slower": options["allow_slower"] or None,
    }
    if options["timing_cache"] is not None:
        chosen = chosen.replace_compile(timing_cache=str(options["timing_cache"]))
    chosen = chosen.replace_quantize(**{key: v for key, v in said.items() if v is not None})
    if options["name"] is not None:
        chosen = dataclasses.replace(chosen, name=options["name"])
    return recipe.checked(chosen, origin="the command line")


COMMANDS = {"build": build}
