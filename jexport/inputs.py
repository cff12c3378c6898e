"""What a build is made of: all that decides its result, in one digest that is in the version.

Knows where an artifact and the journal of its search belong, and writes neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jexport import calibration, manifest, store
from jexport.flow import CalibrationSet, LoadedModel
from jexport.recipe import Recipe
from jexport.stages import quantize
from jexport.targets import Target

TOOLS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnx", "onnx-ir",
         "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt", "polygraphy",
         "cuda-bindings", "openvino", "openvino-tokenizers")  # fmt: skip


def of(
    recipe: Recipe,
    loaded: LoadedModel,
    engine: Target,
    precision: str,
    texts: CalibrationSet,
    parts: calibration.Parts | None,
) -> dict[str, Any]:
    """Everything that decides what is built; its digest is in the version.

    Where the checkpoint lies, and what else the recipe ships, decides nothing.
    """
    said = recipe.resolved()
    for key in ("tasks", "targets", "precisions"):
        del said[key]
    del said["load"]["model"]
    said["compile"].pop("timing_cache", None)  # a path; it changes how long a build takes
    if parts is None:
        del said["quantize"]
    if not engine.needs_onnx:
        del said["export"], said["compile"]
    return {
        "recipe": said,
        "embedding": dataclasses.asdict(loaded.embedding),
        "licence": loaded.source.licence,
        "target": engine.name,
        "runs_on": engine.fingerprint(),
        "precision": precision,
        "checkpoint": manifest.listed(loaded.source.files),
        "revision": loaded.source.revision,
        "code": manifest.listed(loaded.source.code),
        "texts": texts.sha256,
        **({"calibration": [parts.calibration.sha256, parts.held_out.sha256]} if parts else {}),
        "tools": tools(),
        "jexport": code_digest(),
        "format": manifest.FORMAT,
    }


def digests(made_of: Mapping[str, Any]) -> dict[str, str]:
    """What the manifest says of the inputs that nothing else in it names: SHA-256 by name.

    jexport: its own code. texts: those that judged. calibration, held_out: for int8.
    """
    parts = zip(("calibration", "held_out"), made_of.get("calibration", ()), strict=False)
    return {"jexport": made_of["jexport"], "texts": made_of["texts"], **dict(parts)}


def tools() -> dict[str, str]:
    """Versions of Python, jexport and the libraries that a build goes through, as installed."""
    found = {"python": platform.python_version()}
    for name in ("jexport", *TOOLS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest() -> str:
    """SHA-256 over jexport's own sources: another jexport is another input."""
    root = Path(__file__).parent
    files = [manifest.file_digest(path, root=root) for path in root.rglob("*.py")]
    return manifest.sha256_of(manifest.listed(files))


def slot(
    recipe: Recipe,
    loaded: LoadedModel,
    engine: Target,
    precision: str,
    out: Path,
    made_of: Mapping[str, Any],
) -> store.Slot:
    """Where an artifact made of such inputs belongs below `out`."""
    return store.Slot(
        out=out,
        model=recipe.name,
        task=loaded.embedding.task,
        target=engine.name,
        precision=precision,
        version=f"{recipe.version}-{manifest.sha256_of(made_of)[:12]}",
    )


def journal_path(place: store.Slot, made_of: Mapping[str, Any]) -> Path:
    """Beside the versions, named after what decides a trial's numbers: goals do not."""
    said = dict(made_of["recipe"])
    for key in ("name", "version", "validate", "compile"):
        said.pop(key, None)
    said["quantize"] = {
        key: value for key, value in said["quantize"].items() if key not in quantize.GOALS
    }
    gates = made_of["recipe"]["validate"]["gates"].get(place.precision, {})
    digest = manifest.sha256_of({**made_of, "recipe": said, "texts": "", "gates": gates})
    return place.parent / f".search-{digest[:12]}.jsonl"
