"""`jexport build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jexport.cli import console


@click.command()
@click.option(
    "--recipe", "recipe_name", metavar="NAME|FILE", help="A shipped recipe or a .toml file."
)
@click.option("--model", metavar="FOLDER|HUB_ID", help="The checkpoint; overrides the recipe's.")
@click.option("--task", required=True, metavar="TASK", help="retrieval.query, ..., or none.")
@click.option("--target", required=True, metavar="TARGET", help="onnx, openvino, trt, hf, vllm.")
@click.option("--precision", metavar="P", help="fp32 (default), fp16, bf16, int8 or int8-weights.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("artifacts"), metavar="DIR",
              help="Where artifacts go. Default: artifacts")  # fmt: skip
@click.option("--revision", metavar="COMMIT", help="40-hex commit of a hub checkpoint.")
@click.option("--trust-remote-code", is_flag=True, help="Run the checkpoint's own Python code.")
@click.option("--code-revision", metavar="COMMIT", help="40-hex commit of that code's repository.")
@click.option("--validate-tokens", type=int, metavar="N",
              help="Compare texts up to N tokens (default 2048; 8192 takes longer).")  # fmt: skip
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
@click.option("--cache", "cache_folder", type=click.Path(path_type=Path), metavar="DIR",
              help="Where finished stages are kept. Default: OUT/.cache")  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Do every stage, and keep none.")
@click.option("--quiet", is_flag=True, help="Only the artifact's path, on stdout.")
@click.option("--json", "json_lines", is_flag=True, help="Progress as JSON lines on stderr.")
def build(
    recipe_name: str | None,
    model: str | None,
    task: str,
    target: str,
    precision: str | None,
    out: Path,
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
    """
    listen = console.listener(quiet=quiet, json_lines=json_lines)
    from jexport import calibration, pipeline, targets
    from jexport.cache import FOLDER, Cache

    engine = targets.load(target)
    chosen = _chosen(recipe_name, model, options)
    wanted = (*chosen.precisions, *engine.precisions)[0] if precision is None else precision
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
        cache=Cache(root=None if no_cache else cache_folder or out / FOLDER),
        listen=listen,
    )
    click.echo(artifact.path)


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
    return recipe.checked(chosen, origin="the command line")


COMMANDS = {"build": build}
