"""Opening a checkpoint: which layout it is, which tasks it has, and one LoadedModel per task.

One file per layout; each has `matches`, `known_tasks` and `read`. Knows no target and no recipe key
beyond [load].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.checkpoints import (
    hub,
    jina_v3_native,
    jina_v3_original,
    native_class,
    remote_code,
    sentence_files,
    sentence_transformer,
    transformer_files,
)
from jexport.checkpoints.embedding import read as how_embedded
from jexport.errors import (
    CheckpointError,
    PrecisionError,
    RecipeError,
    RemoteCodeError,
    UnsupportedCheckpointError,
    nearest,
)
from jexport.flow import FileDigest, LoadedModel, LowRank, Runner, Source, WeightReader
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
    if spec.model and folder.is_dir():
        return folder, ""
    looks_local = spec.model.startswith((".", "/", "~")) or spec.model.count("/") != 1
    if looks_local or not all(spec.model.split("/")):
        raise CheckpointError(
            f"no checkpoint folder '{spec.model}'",
            evidence="it is not a folder, and a hub id has the form owner/name",
            fix="give --model FOLDER or --model OWNER/NAME",
        )
    wanted: tuple[str, ...] = hub.WEIGHTS_AND_CONFIG
    if spec.trust_remote_code:
        hub.check_pinned(spec.revision, what=f"the hub's {spec.model}", key="load.revision")
        wanted += hub.CODE
    return hub.fetch(spec.model, spec.revision, wanted)


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


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A checkpoint whose layout is known, and what [load] says of it."""

    folder: Path
    config: Mapping[str, Any]
    layout: str
    spec: LoadSpec


def _check_float(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that somebody quantized: its vectors are no reference for anything."""
    said = config.get("quantization_config")
    if said:
        method = said.get("quant_method", "unknown") if isinstance(said, Mapping) else said
        raise PrecisionError(
            "the checkpoint is quantized already",
            evidence=f"{folder / 'config.json'}: quantization_config, method {method!r:.80}",
            fix="give the float checkpoint that it was made of",
        )


def open_checkpoint(spec: LoadSpec, task: str) -> LoadedModel:
    """Open a checkpoint for one task; reads headers and configs, no weights yet.

    Raises every error that `load` documents.
    """
    folder, revision = locate(spec)
    config = transformer_files.read_json(folder / "config.json")
    _check_float(config, folder)
    layout = detect(folder, config)
    opened = _Opened(folder=folder, config=config, layout=layout, spec=spec)
    offered = (*LAYOUTS[layout].known_tasks(folder, config), tasks.NONE)
    tasks.check_task(task, offered)
    _check_prompts(spec, offered)
    code: tuple[FileDigest, ...] = ()
    code_revision = ""
    if layout == "remote_code" or spec.trust_remote_code:
        code, code_revision = remote_code.code_files(folder, config, spec)
        _check_authors_code(layout, task)
    weights, adapter, weight_files = LAYOUTS[layout].read(folder, config, task)
    width, rows = _sizes(opened)
    tokenizer_files = transformer_files.tokenizer_files(folder, rows=rows)
    embedding, said = how_embedded(folder, config, spec, task, width=width, jina=layout in JINA)
    licence = transformer_files.licence(folder)
    around = [
        folder / name
        for name in ("config.json", sentence_files.PROMPTS, sentence_files.transformer_file(folder),
                     "README.md" if licence else "")
        if (folder / name).is_file()
    ]  # fmt: skip
    files = sorted({*weight_files, *tokenizer_files, *around, *said})
    return LoadedModel(
        config=config,
        weights=weights,
        adapter=adapter,
        assemble=_assemble(opened),
        tokenize_reference=transformer_files.reference_tokenizer(
            _tokenizer(opened), prompt=embedding.prompt, max_tokens=embedding.max_tokens
        ),
        reference=_reference(opened, weights, adapter, task),
        tokenizer_files=tokenizer_files,
        embedding=embedding,
        source=Source(
            name=spec.model if revision else folder.resolve().name,
            layout=layout,
            revision=revision,
            code_revision=code_revision,
            licence=spec.licence or licence or (JINA_LICENCE if layout in JINA else ""),
            files=tuple(file_digest(path, root=folder) for path in files),
            code=code,
        ),
    )


def _check_prompts(spec: LoadSpec, offered: Sequence[str]) -> None:
    for name in spec.prompts:
        if name not in offered:
            raise RecipeError(
                f"recipe key 'load.prompts.{name}' is of a task that the checkpoint does not have",
                evidence=f"it has: {', '.join(offered)}",
                fix=nearest(name, offered),
            )


def _check_authors_code(layout: str, task: str) -> None:
    """Raise RemoteCodeError where the code beside the weights cannot be the reference."""
    if layout == "jina_v3_native" and task != tasks.NONE:
        raise RemoteCodeError(
            "the code beside this checkpoint does not know its PEFT adapters",
            evidence=f"the layout is {layout}, the task '{task}'",
            fix="build without --trust-remote-code",
        )


def _sizes(opened: _Opened) -> tuple[int, int]:
    """Width of the hidden states and rows of the embedding table. Raises CheckpointError."""
    config = opened.config
    literal = "hidden_size" in config and "vocab_size" in config
    if opened.layout == "remote_code" and not literal:
        config = {**config, **remote_code.sizes(opened.folder, opened.spec)}
    return transformer_files.width_and_rows(config)


def _tokenizer(opened: _Opened) -> Callable[[], Any]:
    """Opens the tokenizer; that of a known layout needs no code, also when code is trusted."""
    if opened.layout == "remote_code":
        return partial(remote_code.open_tokenizer, opened.folder, opened.spec)
    return partial(transformer_files.auto_tokenizer, opened.folder)


def _assemble(opened: _Opened) -> Callable[[Mapping[str, WeightReader]], Any]:
    if opened.layout in JINA:
        return partial(native_class.assemble, opened.config)
    if opened.layout == "remote_code":
        return lambda weights: remote_code.assemble(opened.folder, opened.spec)
    return partial(sentence_transformer.assemble, opened.folder)


def _reference(
    opened: _Opened,
    weights: Mapping[str, WeightReader],
    adapter: Mapping[str, LowRank],
    task: str,
) -> Callable[[], AbstractContextManager[Runner]]:
    if opened.spec.trust_remote_code:
        return partial(remote_code.reference, opened.folder, opened.config, opened.spec, task)
    if opened.layout in JINA:
        return partial(native_class.reference, opened.config, weights, adapter)
    return partial(sentence_transformer.reference, opened.folder, weights)
