"""The stages in order, as one function to be read aloud.

load, merge (when the task has an adapter), export, quantize (when int8 is asked for), compile,
validate, package. What is cheap to refuse is refused before the first weight is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jexport import calibration, manifest, quantization_report, speed, store, targets
from jexport.errors import (
    ArtifactError,
    ParityError,
    PrecisionError,
    QuantizationError,
    UnknownTargetError,
    UnknownTaskError,
    nearest,
)
from jexport.flow import Artifact, CompiledModel, LoadedModel, OnnxModel
from jexport.recipe import PRECISIONS, Recipe
from jexport.run import Event, Listener, open_run, silent
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import compile as compile_stage
from jexport.stages import export, load, merge, package, quantize, validate
from jexport.targets import Target
from jexport.tasks import NONE

TOOLS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnx", "onnx-ir",
         "onnxscript", "onnxruntime", "onnxruntime-gpu")  # fmt: skip
INT8, INT8_WEIGHTS = "int8", "int8-weights"
JUDGE = "onnx"
"""The target that runs graphs while quantize works: it needs no device."""
RANGE_TEXTS = 40
"""Texts whose activations are checked against float16's range: one a language, and long ones."""


def build(
    recipe: Recipe,
    *,
    task: str,
    target: str,
    precision: str = "fp32",
    out: Path = Path("artifacts"),
    listen: Listener = silent,
) -> Artifact:
    """Turn the recipe's checkpoint and one task into a verified artifact below `out`.

    An artifact that was built of the same inputs before is verified and returned; nothing is
    touched then. Raises a JexportError for everything that is foreseen.
    """
    _check_shipped(recipe, task, target, precision)
    engine = targets.load(target)
    targets.check_precision(engine, precision)
    targets.check_installed(engine.build_needs, extra="build", purpose=f"building for {target}")
    engine.ready()
    texts = calibration.read(recipe.validate.texts, task)
    quantized = precision in (INT8, INT8_WEIGHTS)
    parts = calibration.parts(recipe.quantize.calibration, task) if quantized else None
    with open_run(out, listen) as run:
        with run.stage("load"):
            loaded = load.run(recipe.load, task=task)
            export.check_dimension(recipe.export, loaded)
        inputs = _inputs(recipe, loaded, engine, precision, texts.sha256)
        if parts is None:
            del inputs["recipe"]["quantize"]
        else:
            inputs["calibration"] = [parts.calibration.sha256, parts.held_out.sha256]
        slot = _slot(recipe, loaded, engine, precision, out, inputs)
        with _explained(slot):
            done = store.find(slot)
        if done is not None:
            store.point_latest(slot, scratch=run.folder)
            listen(Event(kind="note", stage="package", text="already built of the same inputs"))
            return done
        tokenizer = TextTokenizer.open(
            loaded.tokenizer_files[0].parent, max_tokens=loaded.embedding.max_tokens
        )
        candidate_ids = _candidate_tokens(tokenizer, loaded)

        if loaded.adapter:
            with run.stage("merge") as note:
                merged = merge.run(loaded)
                note(f"{len(loaded.adapter)} matrices, merged as they are read")
        else:
            merged = loaded
        with run.stage("export"):
            samples = calibration.within_budget(
                texts, candidate_ids, budget_tokens=1, max_tokens=loaded.embedding.max_tokens
            )[:RANGE_TEXTS]
            exported = export.run(
                merged,
                recipe.export,
                precision="fp32" if quantized else precision,
                samples=candidate_ids([sample.text for sample in samples]),
                out_dir=run.room("export"),
            )
        plain = exported
        if parts is not None:
            with run.stage("quantize") as note:
                exported = quantize.run(
                    plain,
                    _material(parts, recipe, tokenizer, loaded),
                    recipe.quantize,
                    scheme=engine.scheme,
                    precision=precision,
                    judge=targets.load(JUDGE),
                    out_dir=run.room("quantize"),
                    ways=quantize.Ways(
                        progress=lambda done, total: run.progress("quantize", done, total),
                        tell=lambda text: listen(Event(kind="note", stage="quantize", text=text)),
                    ),
                )
                note(_treated(exported))
        with run.stage("compile") as note:
            compiled = compile_stage.run(
                exported, engine, recipe.compile, out_dir=run.room("compile")
            )
            note(_fused(compiled))
        with run.stage("validate") as note, _kept_report(slot, room := run.room("validate")):
            report = validate.run(
                validate.Side(tokenize=loaded.tokenize_reference, open=loaded.reference),
                validate.Side(
                    tokenize=candidate_ids,
                    open=lambda: engine.runner(compiled, engine.devices[0], 0),
                ),
                embedding=loaded.embedding,
                signature=compiled.signature,
                pad_id=tokenizer.pad_id,
                texts=texts,
                spec=recipe.validate,
                precision=precision,
                out_dir=room,
                progress=lambda done, total: run.progress("validate", done, total),
            )
            overall = report.metrics["overall"]
            note(f"{report.metrics['texts']} texts, lowest cosine {overall['cosine_min']:.8f}")
            speeds: list[dict[str, Any]] = []
            if parts is not None:
                speeds = _speeds(engine, plain, compiled, recipe, candidate_ids(
                    [sample.text for sample in parts.held_out.samples]
                ), run.room("speed"))  # fmt: skip
                note(_faster(speeds, precision, allowed=recipe.quantize.allow_slower))
        with run.stage("package"):
            facts = package.Facts(
                model_name=recipe.name,
                version=slot.version,
                inputs_sha256=manifest.sha256_of(inputs),
                recipe=recipe.resolved(),
                tools=inputs["tools"],
                runs_on=engine.fingerprint(),
                records=tuple(run.records),
                speed=speeds,
                extras=_reports(exported, room / validate.REPORT, speeds, recipe, slot)
                if parts is not None
                else (),
            )
            staged = package.run(
                _as_shipped(loaded, recipe), compiled, report, facts,
                report_path=room / validate.REPORT, out_dir=run.room("package"),
            )  # fmt: skip
            return store.place(staged, slot)


def _check_shipped(recipe: Recipe, task: str, target: str, precision: str) -> None:
    """Refuse what the recipe does not list, naming the nearest that it does; `none` always goes."""
    whose = f"the recipe {recipe.name}"
    if recipe.tasks and task not in (*recipe.tasks, NONE):
        raise UnknownTaskError(
            f"unknown task '{task}'",
            evidence=f"{whose} has: {', '.join((*recipe.tasks, NONE))}",
            fix=nearest(task, (*recipe.tasks, NONE)),
        )
    if recipe.targets and target in targets.names() and target not in recipe.targets:
        raise UnknownTargetError(
            f"{whose} does not ship the target '{target}'",
            evidence=f"it lists: {', '.join(recipe.targets)}",
            fix="add it to the recipe's targets, or use one of those",
        )
    if recipe.precisions and precision in PRECISIONS and precision not in recipe.precisions:
        raise PrecisionError(
            f"{whose} does not ship the precision '{precision}'",
            evidence=f"it lists: {', '.join(recipe.precisions)}",
            fix="add it to the recipe's precisions, or use one of those",
        )


def _material(
    parts: calibration.Parts, recipe: Recipe, tokenizer: TextTokenizer, loaded: LoadedModel
) -> quantize.Material:
    """Texts of both parts as token ids, prompt included, cut to the recipe's length."""
    limit = min(recipe.quantize.max_tokens, loaded.embedding.max_tokens)
    tokens = _candidate_tokens(tokenizer, loaded)
    calibrated, cut = calibration.sample(
        parts.calibration, tokens, count=recipe.quantize.samples, max_tokens=limit
    )
    calibrated += [ids for ids in tokens([""]) if ids]  # users send empty texts too
    held = [
        (ids, sample.language)
        for sample, ids in zip(
            parts.held_out.samples,
            tokens([sample.text for sample in parts.held_out.samples]),
            strict=True,
        )
        if ids
    ]
    held_ids = [tokenizer.truncate(ids)[:limit] for ids, _ in held]
    about = {
        "calibration": {
            "name": parts.calibration.name, "sha256": parts.calibration.sha256,
            "texts": len(calibrated), "tokens": sum(map(len, calibrated)), "cut": cut,
        },
        "held_out": {
            "name": parts.held_out.name, "sha256": parts.held_out.sha256,
            "texts": len(held_ids), "tokens": sum(map(len, held_ids)),
        },
    }  # fmt: skip
    return quantize.Material(
        calibration=calibrated,
        held_out=held_ids,
        languages=[language for _, language in held],
        pad=tokenizer.pad,
        embedding=loaded.embedding,
        about=about,
    )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _treated(model: OnnxModel) -> str:
    """Which treatment how many products got."""
    report = _read(model.path.with_name(quantize.REPORT))
    kinds = [matrix["treatment"] for matrix in report["matrices"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{counts}; held-out top-10 {report['chosen']['top10_overlap']:.3f}"


def _speeds(
    engine: Target,
    plain: OnnxModel,
    compiled: CompiledModel,
    recipe: Recipe,
    ids: list[list[int]],
    room: Path,
) -> list[dict[str, Any]]:
    """Texts a second of the float graph and of the quantized one, in turn on this machine."""
    batch = speed.feeds(ids, plain.max_tokens)
    whole = engine.build(plain, recipe.compile, room)
    device = engine.devices[0]
    with engine.runner(whole, device, 0) as first, engine.runner(compiled, device, 0) as second:
        rates = speed.compare({"fp32": first, compiled.precision: second}, batch)
    for name in whole.files:
        (room / name).unlink()
    return [{"precision": name, "texts_per_second": rate} for name, rate in rates.items()]


def _faster(speeds: list[dict[str, Any]], precision: str, *, allowed: bool) -> str:
    """How much faster int8 is. Raises QuantizationError when it is not and may not be slower."""
    slow, fast = (one["texts_per_second"] for one in speeds)
    if precision == INT8 and fast <= slow and not allowed:
        raise QuantizationError(
            "int8 is not faster than fp32 on this machine",
            evidence=f"{fast:.1f} texts a second against {slow:.1f}, one batch of {speed.TEXTS}",
            fix="build where the processor has int8 instructions (VNNI, AMX), use fp32, or add "
            "--allow-slower",
        )
    return f"{fast / slow:.2f} times the speed of fp32"


def _reports(
    model: OnnxModel,
    parity_path: Path,
    speeds: list[dict[str, Any]],
    recipe: Recipe,
    slot: store.Slot,
) -> tuple[Path, Path]:
    """quantization.json with what only the pipeline knows, and report.html made of it."""
    path = model.path.with_name(quantize.REPORT)
    content = _read(path)
    content["command"] = (
        f"jexport build --recipe {recipe.name} --task {slot.task} --target {slot.target} "
        f"--precision {slot.precision} --effort {recipe.quantize.effort} "
        f"--calibration {recipe.quantize.calibration}"
    )
    manifest.write_json(path, content)
    facts = {"name": slot.model, "task": slot.task, "target": slot.target, "speed": speeds,
             "precision": slot.precision, "version": slot.version}  # fmt: skip
    page = path.with_name(quantize.PAGE)
    page.write_text(quantization_report.page(content, _read(parity_path), facts), encoding="utf-8")
    return path, page


def _candidate_tokens(tokenizer: TextTokenizer, loaded: LoadedModel) -> Any:
    """Token ids as the runtime will make them: tokenizer.json, prompt, truncation."""

    def tokens(texts: list[str]) -> list[list[int]]:
        ids = tokenizer.token_ids([loaded.embedding.prompt + text for text in texts])
        return [tokenizer.truncate(one) for one in ids]

    return tokens


def _inputs(
    recipe: Recipe, loaded: LoadedModel, engine: Target, precision: str, texts_sha256: str
) -> dict[str, Any]:
    """Everything that decides what is built; its digest is in the version.

    Where the checkpoint lies, and what else the recipe ships, decides nothing.
    """
    said = recipe.resolved()
    for key in ("tasks", "targets", "precisions"):
        del said[key]
    del said["load"]["model"]
    return {
        "recipe": said,
        "embedding": dataclasses.asdict(loaded.embedding),
        "licence": loaded.source.licence,
        "target": engine.name,
        "precision": precision,
        "checkpoint": manifest.listed(loaded.source.files),
        "revision": loaded.source.revision,
        "code": manifest.listed(loaded.source.code),
        "texts": texts_sha256,
        "tools": tools(),
        "jexport": code_digest(),
        "format": manifest.FORMAT,
    }


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


def _slot(
    recipe: Recipe,
    loaded: LoadedModel,
    engine: Target,
    precision: str,
    out: Path,
    inputs: Mapping[str, Any],
) -> store.Slot:
    return store.Slot(
        out=out,
        model=recipe.name,
        task=loaded.embedding.task,
        target=engine.name,
        precision=precision,
        version=f"{recipe.version}-{manifest.sha256_of(inputs)[:12]}",
    )


def _as_shipped(loaded: LoadedModel, recipe: Recipe) -> LoadedModel:
    """The model as its artifact shows it: a graph that gives cut vectors only has their size."""
    size = recipe.export.dimension
    if not size or "last_hidden_state" in recipe.export.outputs:
        return loaded
    embedding = dataclasses.replace(
        loaded.embedding,
        dimension=size,
        matryoshka=tuple(d for d in loaded.embedding.matryoshka if d <= size),
    )
    return dataclasses.replace(loaded, embedding=embedding)


def _fused(compiled: CompiledModel) -> str:
    fused = compiled.facts.get("fused") or {}
    return ", ".join(f"{count} {name}" for name, count in fused.items() if count)


@contextlib.contextmanager
def _explained(slot: store.Slot) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise store.explain(error, slot) from None


@contextlib.contextmanager
def _kept_report(slot: store.Slot, room: Path) -> Iterator[None]:
    """When validation fails, keep its report beside the versions and say where it is."""
    try:
        yield
    except ParityError as error:
        try:
            kept = store.keep_report(room / validate.REPORT, slot)
            if kept is not None:
                error.add_note(f"  report: {kept}")
        except OSError as trouble:
            error.add_note(f"  its report could not be kept: {trouble}")
        raise
