"""What decides the result of a build and of its stages, as JSON-ready values to be digested.

A digest of all of them is in an artifact's version; parts of them name entries of the stage cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jexport.artifacts import manifest
from jexport.cache.stages import StageKey
from jexport.datasets import calibration
from jexport.recipe import Recipe
from jexport.targets import Target
from jexport.types import CalibrationSet, LoadedModel

TOOLS = (
    "torch",
    "transformers",
    "sentence-transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "polygraphy",
    "cuda-bindings",
    "openvino",
    "openvino-tokenizers",
)

LARGE_FILE_BYTES = 64 << 20
PROCESSOR = Path("/proc/cpuinfo")


def build_inputs(
    recipe: Recipe,
    model: LoadedModel,
    target: Target,
    precision: str,
    validation: CalibrationSet,
    calibration_texts: calibration.Parts | None,
) -> dict[str, Any]:
    """Everything that decides what is built; its digest is in the artifact's version.

    Where the checkpoint lies, and what else the recipe ships, decides nothing.

    Args:
        recipe: with the command line's changes.
        model: the checkpoint, opened for one task.
        target: as it is built here.
        precision: of the artifact.
        validation: texts that it is validated with.
        calibration_texts: texts that int8 is calibrated on; None for another precision.

    Returns:
        JSON-ready values by name.
    """
    recipe_values = recipe.resolved()
    for key in ("tasks", "uses", "targets", "precisions", "model"):
        del recipe_values[key]
    del recipe_values["load"]["model"]
    recipe_values["compile"].pop("timing_cache", None)  # a path; it changes the build time only
    if calibration_texts is None:
        del recipe_values["quantize"]
    if not target.needs_onnx:
        del recipe_values["export"], recipe_values["compile"]
    inputs = {
        "recipe": recipe_values,
        "embedding": dataclasses.asdict(model.embedding),
        "licence": model.source.licence,
        "target": target.name,
        "runs_on": target.fingerprint(),
        "precision": precision,
        "checkpoint": manifest.listed(model.source.files),
        "revision": model.source.revision,
        "code": manifest.listed(model.source.code),
        "texts": validation.sha256,
        "tools": tools(),
        "jexport": code_digest(),
        "format": manifest.FORMAT,
    }
    if calibration_texts is not None:
        both = (calibration_texts.calibration, calibration_texts.held_out)
        inputs["calibration"] = [one.sha256 for one in both]
    return inputs


def input_digests(inputs: Mapping[str, Any]) -> dict[str, str]:
    """The inputs that nothing else in the manifest names: SHA-256 by name.

    Args:
        inputs: as `build_inputs` gives them.

    Returns:
        jexport: its own code; texts: those of the validation; for int8 calibration and held_out.
    """
    texts = zip(("calibration", "held_out"), inputs.get("calibration", ()), strict=False)
    return {"jexport": inputs["jexport"], "texts": inputs["texts"], **dict(texts)}


def portable_build_key(content: Mapping[str, Any], recipe: Recipe, target: Target) -> StageKey:
    """The key of the engine that is compiled from a portable artifact on this machine.

    An engine that is refitted from another artifact's is not kept: that artifact may change.

    Args:
        content: the portable artifact's manifest.
        recipe: its recipe, with this machine's changes.
        target: the engine.

    Returns:
        The key; its inputs are None where the engine is refitted.
    """
    settings, is_refitted = compile_settings(recipe)
    inputs = {
        "portable": content["sha256"],
        "runs_on": target.fingerprint(),
        "spec": settings,
        "tools": tools(),
        "jexport": code_digest(),
    }
    name = f"{content['name']} {content['task']} {content['target']}-{content['precision']}"
    return StageKey(
        stage="compile",
        inputs=None if is_refitted else inputs,
        description=name,
        copied=True,
    )


def compile_settings(recipe: Recipe) -> tuple[dict[str, Any], bool]:
    """What decides a compiled model of the recipe's [compile].

    Args:
        recipe: with the command line's changes.

    Returns:
        [compile] without what decides no byte; whether another artifact's engine is refitted.
    """
    settings = recipe.resolved()["compile"]
    is_refitted = bool(settings.pop("refit_from"))
    del settings["timing_cache"]  # a path; it changes the build time only
    return settings, is_refitted


def checkpoint_inputs(model: LoadedModel) -> dict[str, Any]:
    """The checkpoint as opened for one task, and the code and libraries that read it.

    Args:
        model: the checkpoint, opened for the task.

    Returns:
        JSON-ready values by name.
    """
    return {
        "embedding": dataclasses.asdict(model.embedding),
        "layout": model.source.layout,
        "checkpoint": manifest.listed(model.source.files),
        "code": manifest.listed(model.source.code),
        "tools": tools(),
        "jexport": code_digest(),
    }


def folder_inputs(model: LoadedModel) -> list[list[Any]]:
    """Every file of the checkpoint's folder: a library may read one that jexport does not.

    Args:
        model: the checkpoint.

    Returns:
        Name and SHA-256 of each; of a large file that jexport did not read: name, size, mtime.
    """
    read_digests = {one.path: one.sha256 for one in model.source.files}
    files: list[list[Any]] = []
    for path in sorted(model.folder.rglob("*")):
        name = path.relative_to(model.folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        stat = path.stat()
        if name in read_digests:
            files.append([name, read_digests[name]])
        elif stat.st_size > LARGE_FILE_BYTES:
            files.append([name, stat.st_size, stat.st_mtime_ns])
        else:
            files.append([name, manifest.file_digest(path, root=model.folder).sha256])
    return files


def processor() -> str:
    """What decides a CPU's last bits and speeds, in one digest: its model and instructions."""
    try:
        lines = PROCESSOR.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    prefixes = ("model name", "flags", "Features", "CPU ")
    features = {line for line in lines if line.startswith(prefixes)}
    return manifest.sha256_of([platform.machine(), *sorted(features)])


def tools() -> dict[str, str]:
    """Versions of Python, jexport and the libraries that a build goes through, as installed."""
    versions = {"python": platform.python_version()}
    for name in ("jexport", *TOOLS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def code_digest() -> str:
    """SHA-256 over jexport's own sources: another jexport is another input."""
    root = Path(__file__).parents[1]
    sources = [path for path in root.rglob("*") if path.suffix in (".py", ".j2")]
    files = [manifest.file_digest(path, root=root) for path in sources]
    return manifest.sha256_of(manifest.listed(files))
