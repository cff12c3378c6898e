"""jexport: one checkpoint and one task become a verified, versioned artifact.

The front door:
    build(recipe, task=..., target=...)   run the pipeline, get an Artifact
    open_artifact(path or ref)            open an artifact and embed text with it
    Recipe                                what a build needs to know; recipe.read("name or file")

The house, from the ground up; a line imports only downward:
    redact       what must not be said: credentials
    errors       every deliberate error, its exit code, its way out
    flow, findings                                   what flows between stages; what a lint found
    siblings     the members of a folder that is its own registry
    tasks, tables, servers, memory, threads, parity, gates, manifest, run, selection
    identity     which checkpoint an artifact was made of
    calibration, recipe, store, report
    release      what is published of an artifact
    registries   one file per kind of place that artifacts are published to
    signing      signatures and provenance beside an artifact
    pull         from a ref to an artifact's folder  catalogue  what is published in a place
    pulled       those that open_artifact fetched, in the user's cache folder
    cache        what stages made, kept by what decided it
    graph        steps on ONNX graphs                 trt      what TensorRT engines need
    checkpoints  one file per checkpoint layout
    targets      one file per engine                  runtime  open an artifact, embed text
    evaluation   the judge: sentence-transformers' own vectors of the validation texts
    stages       load, merge, export, quantize, compile, validate, package, publish
    layouts      one file per server that artifacts are laid out for
    integrations  one file per framework that embeds through jexport
    inputs       what a build is made of: what decides its version
    verdict      whether a compiled model may become an artifact
    pipeline     the stages in order                  schedulers  one file per system that runs jobs
    many         the jobs of a recipe, on this machine
    cluster      jobs on an existing Ray cluster
    cli          click words -> library calls; the only code that prints or exits

Importing jexport loads no framework.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jexport.pipeline import build
    from jexport.recipe import Recipe
    from jexport.runtime.open import open_artifact

_DOOR = {
    "build": "jexport.pipeline",
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
