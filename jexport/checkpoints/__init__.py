"""Opening a checkpoint: which layout it is, which tasks it has, and one LoadedModel per task.

One file per layout; each has `matches`, `known_tasks` and `read`. Knows no target and no recipe key
beyond [load].
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.checkpoints import (
    hub,
    jina_v3_native,
    jina_v3_original,
    native_class,
    remote_code,
    sentence_transformer,
    transformer_files,
)
from jexport.errors import CheckpointError, UnsupportedCheckpointError
from jexport.flow import Embedding, FileDigest, LoadedModel, Runner, Source, WeightReader
from jexport.manifest import file_digest
from jexport.recipe import LoadSpec

LAYOUTS: Mapping[str, Any] = {
    "jina_v3_original": jina_v3_original,
    "jina_v3_native": jina_v3_native,
    "remote_code": remote_code,
    "sentence_transformer": sentence_transformer,
}
JINA = ("jina_v3_original", "jina_v3_native")
JINA_LICENCE = "CC-BY-NC-4.0"
"""Licence of the published weights (formats of the model card); a README's own line wins."""


def locate(spec: LoadSpec) -> tuple[Path, str]:
    """The checkpoint's local folder and, from a hub, its commit ('' for a folder).

    Raises CheckpointError (no such folder), HubError, RemoteCodeError (code without a pin).
    """
    folder = Path(spec.model).expanduser()
    if folder.is_dir():
        return folder, ""
    looks_local = spec.model.startswith((".", "/", "~")) or spec.model.count("/") != 1
    if looks_local or not spec.model:
        raise CheckpointError(
            f"no checkpoint folder '{spec.model}'",
            evidence="it is not a folder, and a hub id has the form owner/name",
            fix="give --model FOLDER or --model OWNER/NAME",
        )
    remote_code.check_pinned(spec, from_hub=True)
    return hub.fetch(spec.model, spec.revision, hub.WEIGHTS_AND_CONFIG)


def detect(folder: Path, config: Mapping[str, Any]) -> str:
    """The name of the layout a folder holds. Raises UnsupportedCheckpointError."""
    for name, layout in LAYOUTS.items():
        if layout.matches(folder, config):
            return name
    raise UnsupportedCheckpointError(
        "this checkpoint's layout is not known",
        evidence=f"{folder}: model_type {config.get('model_type')!r}, no modules.json",
        fix="give a jina-embeddings-v3 checkpoint or a sentence-transformers folder "
        "(modules.json with a Pooling module)",
    )


def known_tasks(folder: Path) -> tuple[str, ...]:
    """The tasks a checkpoint folder offers; `none` is always one."""
    config = transformer_files.read_json(folder / "config.json")
    layout = LAYOUTS[detect(folder, config)]
    return (*layout.known_tasks(folder, config), tasks.NONE)


def open_checkpoint(spec: LoadSpec, task: str) -> LoadedModel:
    """Open a checkpoint for one task; reads headers and configs, no weights yet.

    Raises every error that `load` documents.
    """
    folder, revision = locate(spec)
    config = transformer_files.read_json(folder / "config.json")
    layout = detect(folder, config)
    tasks.check_task(task, known_tasks(folder))
    code: tuple[FileDigest, ...] = ()
    code_revision = ""
    if layout == "remote_code" or spec.trust_remote_code:
        code, code_revision = remote_code.code_files(folder, config, spec)
    weights, adapter, weight_files = LAYOUTS[layout].read(folder, config, task)
    tokenizer_files = transformer_files.tokenizer_files(folder, rows=int(config["vocab_size"]))
    embedding = _embedding(folder, config, spec, layout, task)
    around = [
        folder / name
        for name in ("config.json", "modules.json", "1_Pooling/config.json",
                     "sentence_bert_config.json", "config_sentence_transformers.json")
        if (folder / name).is_file()
    ]  # fmt: skip
    files = sorted({*weight_files, *tokenizer_files, *around})
    return LoadedModel(
        config=config,
        weights=weights,
        adapter=adapter,
        assemble=_assemble(layout, folder, config, spec),
        tokenize_reference=transformer_files.reference_tokenizer(
            folder,
            prompt=embedding.prompt,
            max_tokens=embedding.max_tokens,
            trust_remote_code=spec.trust_remote_code,
        ),
        reference=_reference(layout, folder, config, spec, weights, adapter, task),
        tokenizer_files=tokenizer_files,
        embedding=embedding,
        source=Source(
            name=spec.model if revision else folder.resolve().name,
            layout=layout,
            revision=revision,
            code_revision=code_revision,
            licence=spec.licence
            or transformer_files.licence(folder)
            or (JINA_LICENCE if layout in JINA else ""),
            files=tuple(file_digest(path, root=folder) for path in files),
            code=code,
        ),
    )


def _embedding(
    folder: Path, config: Mapping[str, Any], spec: LoadSpec, layout: str, task: str
) -> Embedding:
    pooling = transformer_files.pooling(folder) if layout not in JINA else _jina_pooling(config)
    if pooling is None:
        raise UnsupportedCheckpointError(
            "the checkpoint does not say how its vectors are pooled",
            evidence=f"{folder} has no modules.json",
            fix="add modules.json and 1_Pooling/config.json as sentence-transformers writes them",
        )
    limit = transformer_files.length_limit(folder, config)
    if spec.max_tokens > limit:
        raise UnsupportedCheckpointError(
            f"load.max_tokens = {spec.max_tokens} is more than the checkpoint takes",
            evidence=f"its own files allow {limit}",
            fix=f"set load.max_tokens to {limit} or less",
        )
    instructions = {**tasks.JINA_V3_PROMPTS, **(config.get("task_instructions") or {})}
    prompt = instructions[task] if task != tasks.NONE else ""
    if layout not in JINA:
        prompt = transformer_files.default_prompt(folder)
    return Embedding(
        task=task,
        prompt=spec.prompts.get(task, prompt),
        pooling=pooling[0],
        normalize=pooling[1],
        dimension=int(config["hidden_size"]),
        matryoshka=tuple(sorted(int(d) for d in config.get("matryoshka_dimensions") or ())),
        max_tokens=spec.max_tokens or limit,
    )


def _jina_pooling(config: Mapping[str, Any]) -> tuple[str, bool]:
    # The authors' encode() pools over the mask unless emb_pooler says cls, and normalises.
    return ("cls" if config.get("emb_pooler") == "cls" else "mean"), True


def _assemble(layout: str, folder: Path, config: Mapping[str, Any], spec: LoadSpec) -> Any:
    def assemble(weights: Mapping[str, WeightReader]) -> Any:
        if layout in JINA:
            return native_class.assemble(config, weights)
        if layout == "remote_code":
            return remote_code.assemble(folder, spec)
        return sentence_transformer.assemble(folder, weights)

    return assemble


def _reference(
    layout: str,
    folder: Path,
    config: Mapping[str, Any],
    spec: LoadSpec,
    weights: Mapping[str, WeightReader],
    adapter: Mapping[str, Any],
    task: str,
) -> Any:
    def reference() -> AbstractContextManager[Runner]:
        if spec.trust_remote_code and (layout == "remote_code" or config.get("auto_map")):
            return remote_code.reference(folder, config, spec, task)
        if layout in JINA:
            return native_class.reference(config, weights, adapter)
        return sentence_transformer.reference(folder, weights)

    return reference
