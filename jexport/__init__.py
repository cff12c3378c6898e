"""jexport: one checkpoint and one task become a verified, versioned artifact.

The front door:
    build(recipe, task=..., target=...)   run the pipeline, get an Artifact
    open_artifact(path or ref)            open an artifact and embed text with it
    Recipe                                what a build needs to know; recipe.read("name or file")

The packages, from the ground up; a module imports only from those above it here:
    redact         keeps credentials out of what is printed and kept
    types          what flows between stages: model, compiled model, artifact, events
    errors         every deliberate error, its exit code, its way out
    plugins        the members of a package in which each file is a plugin
    tasks          the names of tasks and their prompts
    gates          thresholds of a comparison
    recipe_schema  TOML tables to dataclasses
    workspace      a run's work folder, locks, memory, threads
    recipe         what a build needs to know
    artifacts      manifest, store, model card, report
    toy            a seeded checkpoint in the shape of jina-embeddings-v3
    datasets       calibration and validation texts
    cache          finished stages, kept by what decided them
    graph          steps on ONNX graphs; graph/lint reads one
    checkpoints    one file per checkpoint layout
    publishing     registries, releases, pull, signing
    targets        one file or package per engine
    runtime        open an artifact, embed text
    evaluation     the reference library's vectors, and what is measured against them
    serving        servers, their layouts, frameworks that embed through jexport
    quantization   int8: scales, roundings, and the search among them
    stages         load, merge, export, quantize, compile, validate, package, publish
    building       the stages in order, from a recipe to an artifact
    jobs           many builds: on this machine, on Ray, as jobs of a scheduler
    cli            click words to library calls; the only code that prints or exits

Importing jexport loads no framework.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jexport.building.pipeline import build
    from jexport.recipe import Recipe
    from jexport.runtime.open import open_artifact

_DOOR = {
    "build": "jexport.building.pipeline",
    "open_artifact": "jexport.runtime.open",
    "Recipe": "jexport.recipe",
}

__all__ = ["Recipe", "__version__", "build", "open_artifact"]

try:
    __version__ = metadata.version("jexport")
except metadata.PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _DOOR:
        import importlib

        return getattr(importlib.import_module(_DOOR[name]), name)
    raise AttributeError(f"module 'jexport' has no attribute '{name}'")
