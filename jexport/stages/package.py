"""package: CompiledModel + what is known of it -> a folder that servers load (not yet in place).

Writes the tokenizer as it is, sentence-transformers' files, config.json in the layout that servers
read, parity.json, README.md and manifest.json. Moving the folder into place is `store`'s work.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.artifacts import manifest, model_card
from jexport.artifacts.manifest import write_json
from jexport.checkpoints import JINA_V3, module_writer
from jexport.checkpoints.sentence_files import MODULES
from jexport.types import CompiledModel, Embedding, LoadedModel, ParityReport

QUANTIZATION = "quantization.json"
"""The extra file that the model card quotes."""

PARITY = "parity.json"
FORMER_KEYS = ("stages", "speed")
"""What manifests of format 1 had and later ones have not."""


@dataclass(frozen=True, kw_only=True)
class PackageSpec:
    """What the build knows and no model does.

    What differs from run to run (seconds, memory, speeds) is not among it.

    Args:
        model_name: the artifact's name.
        version: the artifact's; it has the end of the build fingerprint.
        inputs_sha256: the build fingerprint.
        recipe: as resolved.
        tools: versions of the packages that built it.
        runs_on: where it may run, as Target.fingerprint gives it.
        report_path: parity.json.
        extras: files that go into the artifact as they are (quantization.json, report.html).
        inputs: digests of jexport's code and of the texts, as cache_keys.input_digests gives them.
        finalize: adds what the target's servers read to the folder; gives facts for the manifest.
    """

    model_name: str
    version: str
    inputs_sha256: str
    recipe: Mapping[str, Any]
    tools: Mapping[str, str]
    runs_on: Mapping[str, Any]
    report_path: Path
    extras: Sequence[Path] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    finalize: Callable[[Path], Mapping[str, Any]] | None = None


def run(
    model: LoadedModel,
    compiled: CompiledModel,
    report: ParityReport,
    spec: PackageSpec,
    *,
    out_dir: Path,
    transfer: Callable[[Path, Path], object] = shutil.move,
) -> Path:
    """Fill out_dir and return it.

    Args:
        model: the checkpoint as the artifact shows it.
        compiled: its files go into the artifact.
        report: what the manifest says of the validation.
        spec: what else the manifest says, and further files.
        out_dir: an empty folder.
        transfer: puts a compiled file (source, destination) into the artifact.

    Returns:
        out_dir.

    Raises:
        ArtifactError: the folder does not match its own manifest.
    """
    for name in compiled.files:
        (out_dir / name).parent.mkdir(exist_ok=True)
        transfer(compiled.folder / name, out_dir / name)
    _tokenizer(model, out_dir)
    _server_files(model, out_dir)
    if spec.finalize is not None:
        facts = {**compiled.facts, **spec.finalize(out_dir)}
        compiled = dataclasses.replace(compiled, facts=facts)
    for path in (spec.report_path, *spec.extras):
        shutil.copyfile(path, out_dir / path.name)
    content = _content(model, compiled, report, spec)
    return _finish(content, _quantization(spec.extras), out_dir)


@dataclass(frozen=True, kw_only=True)
class PortableSpec:
    """What the build of a portable artifact's engine knows.

    Args:
        version: the new artifact's.
        runs_on: where it may run, as Target.fingerprint gives it.
        report_path: parity.json.
    """

    version: str
    runs_on: Mapping[str, Any]
    report_path: Path


def complete(
    portable: Path,
    content: Mapping[str, Any],
    compiled: CompiledModel,
    report: ParityReport,
    spec: PortableSpec,
    *,
    out_dir: Path,
) -> Path:
    """Fill out_dir with the portable artifact's files, its graph replaced by the compiled engine.

    The manifest keeps what the first machine knew (checkpoint, recipe, tools); `portable_sha256` in
    its facts is the sha256 of the portable artifact's manifest.

    Args:
        portable: the portable artifact.
        content: its manifest.
        compiled: the engine's files, which are moved.
        report: of the validation on this machine.
        spec: what else the manifest says of this machine's build.
        out_dir: an empty folder.

    Returns:
        out_dir.

    Raises:
        ArtifactError: the folder does not match its own manifest.
    """
    report_path = spec.report_path
    graph = set(content["engine"]["files"])
    for entry in content["files"]:
        if entry["path"] not in graph | {report_path.name, "README.md"}:
            destination = out_dir / entry["path"]
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(portable / entry["path"], destination)
    for name in compiled.files:
        shutil.move(compiled.folder / name, out_dir / name)
    shutil.copyfile(report_path, out_dir / report_path.name)
    engine = _engine(compiled, spec.runs_on)
    engine["facts"]["portable_sha256"] = content["sha256"]
    new_content = {
        **{key: value for key, value in content.items() if key not in FORMER_KEYS},
        "format": manifest.FORMAT,
        "version": spec.version,
        "engine": engine,
        "parity": _parity(report),
    }
    quantization = out_dir / QUANTIZATION
    extras = [quantization] if quantization.is_file() else []
    return _finish(new_content, _quantization(extras), out_dir)


def _finish(content: dict[str, Any], quantization: Mapping[str, Any] | None, out_dir: Path) -> Path:
    """Model card and manifest, over the files that are there."""
    card = model_card.text(content, quantization)
    (out_dir / "README.md").write_text(card, encoding="utf-8")
    files = [manifest.file_digest(p, root=out_dir) for p in out_dir.rglob("*") if p.is_file()]
    content["files"] = manifest.listed(files)
    facts = content["engine"]["facts"]
    if facts.get("reproducible") is False:  # another build of the same gives other bytes
        digests = {file.path: file.sha256 for file in files}
        facts["attested_by"] = {
            "parity_sha256": digests[PARITY],
            "graph_sha256": facts["graph_sha256"],
            "inputs_sha256": content["inputs_sha256"],
        }
    content["sha256"] = manifest.seal(content)
    write_json(out_dir / manifest.NAME, content)
    manifest.verify(out_dir)
    return out_dir


def _quantization(extras: Sequence[Path]) -> Mapping[str, Any] | None:
    """quantization.json, where it is among the extra files."""
    for path in extras:
        if path.name == QUANTIZATION:
            content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return content
    return None


def _tokenizer(model: LoadedModel, out_dir: Path) -> None:
    for path in model.tokenizer_files:
        shutil.copyfile(path, out_dir / path.name)
    # Which of these limits is read differs from server to server, and the checkpoint's own may be
    # another one (MiniLM: 512, where its authors' own module cuts at 256; jina: 8194 for 8192).
    limit = model.embedding.max_tokens
    path = out_dir / "tokenizer_config.json"
    named = path.is_file()
    settings = json.loads(path.read_text(encoding="utf-8")) if named else {}
    original = dict(settings)
    settings["model_max_length"] = limit
    if "max_length" in settings:
        settings["max_length"] = limit
    # transformers 5 writes a name that transformers 4, which most servers run, refuses.
    if not named or settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if settings != original:  # the one tokenizer file that may not be copied as it is
        write_json(path, settings)


def _server_files(model: LoadedModel, out_dir: Path) -> None:
    embedding = model.embedding
    if not (out_dir / "config.json").is_file():  # a target whose engine reads it brings its own
        write_json(out_dir / "config.json", server_config(model))
    if not model.embedding.contextual:
        _static_files(model, out_dir)
        return
    if not (out_dir / MODULES).is_file():  # as of a target that writes modules with weights
        width = model.head[0].config["embedding_dimension"] if model.head else embedding.dimension
        # Behind a graph with modules these two say what pools and that vectors have length 1.
        plain = module_writer.plain(embedding, width)
        module_writer.write(out_dir, plain, "", include_prompt=embedding.include_prompt)
    write_json(
        out_dir / "sentence_bert_config.json",
        {"max_seq_length": embedding.max_tokens, "do_lower_case": False},
    )
    _prompt_settings(embedding, out_dir)


def _write_modules(modules: Iterable[tuple[str, str]], out_dir: Path) -> None:
    listing = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(modules)
    ]
    (out_dir / "modules.json").write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")


def _static_files(model: LoadedModel, out_dir: Path) -> None:
    """What SentenceTransformer(FOLDER) reads beside a table; a graph has no module of that kind."""
    if (out_dir / "model.safetensors").is_file():
        kinds = ["StaticEmbedding", *(["Normalize"] if model.embedding.normalize else [])]
        _write_modules(zip(kinds, ("", "1_Normalize"), strict=False), out_dir)
    _prompt_settings(model.embedding, out_dir)


def _prompt_settings(embedding: Embedding, out_dir: Path) -> None:
    settings: dict[str, Any] = {
        "prompts": dict(embedding.prompts),
        "default_prompt_name": embedding.default_prompt_name or None,
        "similarity_fn_name": embedding.similarity,
    }
    if embedding.truncate_dim:
        settings["truncate_dim"] = embedding.truncate_dim
    write_json(out_dir / "config_sentence_transformers.json", settings)


def server_config(model: LoadedModel) -> dict[str, Any]:
    """config.json as servers of an ONNX folder read it.

    jina-embeddings-v3 says `xlm-roberta`: no server of today knows its own type, the graph carries
    the architecture, and servers read only sizes, the length limit and pad_token_id from here.

    Args:
        model: the checkpoint as the artifact shows it.

    Returns:
        The content, JSON-ready.
    """
    limit = {"max_position_embeddings": model.embedding.max_tokens}  # Infinity cuts there
    if model.source.layout not in JINA_V3:
        own = {key: value for key, value in model.config.items() if key != "auto_map"}
        return own | limit
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "type_vocab_size",
        "hidden_act",
        "layer_norm_eps",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "matryoshka_dimensions",
    )
    return {
        "architectures": ["XLMRobertaModel"],
        "model_type": "xlm-roberta",
        **{key: model.config[key] for key in sizes if key in model.config},
        **limit,
        "torch_dtype": "float32",
    }


def _content(
    model: LoadedModel, compiled: CompiledModel, report: ParityReport, spec: PackageSpec
) -> dict[str, Any]:
    """manifest.json without its file list: the keys of manifest.schema.json."""
    source, embedding = model.source, model.embedding
    return {
        "format": manifest.FORMAT,
        "name": spec.model_name,
        "version": spec.version,
        "inputs_sha256": spec.inputs_sha256,
        "task": tasks.with_use(embedding.task, embedding.use),
        "target": compiled.target,
        "precision": compiled.precision,
        "licence": source.licence,
        "checkpoint": {
            "name": source.name,
            "layout": source.layout,
            "revision": source.revision,
            "code_revision": source.code_revision,
            "files": manifest.listed(source.files),
            "code": manifest.listed(source.code),
        },
        "embedding": {
            **manifest.embedding_entry(embedding),
            "space": manifest.embedding_space(weights_digest(model), embedding),
        },
        "engine": _engine(compiled, spec.runs_on),
        "parity": _parity(report),
        "recipe": _without_places(spec.recipe, source.name),
        "tools": dict(spec.tools),
        **({"inputs": dict(spec.inputs)} if spec.inputs else {}),
    }


def _without_places(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The recipe with no path of this machine: the same build elsewhere is the same artifact."""
    load, compiling = dict(recipe["load"]), dict(recipe["compile"])
    return {
        **recipe,
        "load": {**load, "model": name},
        "compile": {**compiling, "timing_cache": ""},
    }


def _engine(compiled: CompiledModel, runs_on: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "files": list(compiled.files),
        "inputs": [_tensor(spec) for spec in compiled.signature.inputs],
        "outputs": [_tensor(spec) for spec in compiled.signature.outputs],
        "runs_on": dict(runs_on),
        "facts": dict(compiled.facts),
    }


def _parity(report: ParityReport) -> dict[str, Any]:
    overall = report.metrics["overall"]
    return {
        "passed": report.passed,
        "texts": report.metrics["texts"],
        **{key: value for key, value in overall.items() if key != "texts"},
        "batch_cosine_min": report.metrics["batch"]["cosine_min"],
    }


def _tensor(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def weights_digest(model: LoadedModel) -> str:
    """SHA-256 over the weight files that were read and the code that ran them.

    Args:
        model: with the digests of its files.

    Returns:
        64 hex digits.
    """
    weights = [f.sha256 for f in model.source.files if f.path.endswith((".safetensors", ".bin"))]
    return manifest.sha256_of([*weights, *(f.sha256 for f in model.source.code)])
