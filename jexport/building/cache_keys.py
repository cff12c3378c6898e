"""What a build is made of: all that decides its result, in one digest that is in the version.

Knows where an artifact and the journal of its search belong, and writes neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jexport.artifacts import manifest, store
from jexport.cache.stages import Wanted
from jexport.datasets import calibration
from jexport.recipe import Recipe
from jexport.stages import quantize
from jexport.targets import Target
from jexport.types import CalibrationSet, LoadedModel, MergedModel, OnnxModel

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

LARGE_BYTES = 64 << 20


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


def of_export(
    recipe: Recipe, loaded: LoadedModel, *, precision: str, samples: Sequence[Sequence[int]]
) -> Wanted:
    """What decides a graph. samples: token ids that are checked before it is made, if any are."""
    decided = {
        **of_weights(loaded),
        "spec": recipe.resolved()["export"],
        "precision": precision,
        "samples": manifest.sha256_of([list(one) for one in samples]),
    }
    return Wanted(stage="export", decided_by=decided, about=about(recipe, loaded, precision))


def of_quantize(
    recipe: Recipe,
    loaded: LoadedModel,
    engine: Target,
    precision: str,
    graph: OnnxModel,
    parts: calibration.Parts,
) -> Wanted:
    """What decides an int8 graph made of `graph`."""
    said = recipe.resolved()
    decided = {
        **of_weights(loaded),  # its tokenizer, prompt and pooling
        "graph": graph.sha256,
        "precision": precision,
        "spec": said["quantize"],
        "keep_fp32": said["export"]["keep_fp32"],
        "gates": said["validate"]["gates"].get(precision, {}),
        "engine": [engine.scheme, engine.wide, engine.int8_tables, engine.float_rest],
        "texts": [[one.name, one.sha256] for one in (parts.calibration, parts.held_out)],
    }
    return Wanted(stage="quantize", decided_by=decided, about=about(recipe, loaded, precision))


def of_compile(
    recipe: Recipe,
    loaded: LoadedModel,
    engine: Target,
    precision: str,
    model: OnnxModel | MergedModel,
) -> Wanted:
    """What decides an engine's files; not kept where an artifact outside of this build does."""
    spec, refitted = _compiling(recipe)
    of = {"graph": model.sha256} if isinstance(model, OnnxModel) else {}
    decided = {
        **of_weights(loaded),
        **of,
        "target": engine.name,
        "runs_on": engine.fingerprint(),
        "precision": precision,
        "spec": spec,
    }
    return Wanted(
        stage="compile",
        decided_by=None if refitted else decided,
        about=about(recipe, loaded, f"{engine.name}-{precision}"),
        taken=True,
    )


def of_completion(content: Mapping[str, Any], recipe: Recipe, engine: Target) -> Wanted:
    """What decides the engine of a portable artifact with this manifest, on this machine.

    Not kept where the engine is another artifact's with these weights: that one may change.
    """
    spec, refitted = _compiling(recipe)
    decided = {
        "portable": content["sha256"],
        "runs_on": engine.fingerprint(),
        "spec": spec,
        "tools": tools(),
        "jexport": code_digest(),
    }
    what = f"{content['name']} {content['task']} {content['target']}-{content['precision']}"
    return Wanted(stage="compile", decided_by=None if refitted else decided, about=what, taken=True)


def _compiling(recipe: Recipe) -> tuple[dict[str, Any], bool]:
    """[compile] without what decides no byte, and whether another artifact's engine is taken."""
    spec = recipe.resolved()["compile"]
    refitted = bool(spec.pop("refit_from"))
    del spec["timing_cache"]  # a path; it changes how long a build takes
    return spec, refitted


def about(recipe: Recipe, loaded: LoadedModel, what: str) -> str:
    """What a stage's result is, for people."""
    return f"{recipe.name} {loaded.embedding.task} {what}"


def of_weights(loaded: LoadedModel) -> dict[str, Any]:
    """The checkpoint as opened for one task, and the code and libraries that read it."""
    return {
        "embedding": dataclasses.asdict(loaded.embedding),
        "layout": loaded.source.layout,
        "checkpoint": manifest.listed(loaded.source.files),
        "code": manifest.listed(loaded.source.code),
        "tools": tools(),
        "jexport": code_digest(),
    }


def of_folder(loaded: LoadedModel) -> list[list[Any]]:
    """Every file of the checkpoint's folder: a library may read one that jexport does not.

    By digest; a large one that jexport did not read by its size and time.
    """
    known = {one.path: one.sha256 for one in loaded.source.files}
    found: list[list[Any]] = []
    for path in sorted(loaded.folder.rglob("*")):
        name = path.relative_to(loaded.folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        about = path.stat()
        if name in known:
            found.append([name, known[name]])
        elif about.st_size > LARGE_BYTES:
            found.append([name, about.st_size, about.st_mtime_ns])
        else:
            found.append([name, manifest.file_digest(path, root=loaded.folder).sha256])
    return found


def tools() -> dict[str, str]:
    """Versions of Python, jexport and the libraries that a build goes through, as installed."""
    found = {"python": platform.python_version()}
    for name in ("jexport", *TOOLS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest() -> str:
    """SHA-256 over jexport's own sources: another jexport is another input."""
    root = Path(__file__).parents[1]
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
