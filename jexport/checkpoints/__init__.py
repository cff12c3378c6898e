"""Opening a checkpoint: which layout it is, which tasks it has, and one LoadedModel per task.

What each layout does in its own way, its class says (see layout.py). Knows no target and no recipe
key beyond [load].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.artifacts.manifest import file_digest
from jexport.checkpoints import (
    embedding,
    hub,
    peft_adapter,
    remote_code,
    routes,
    sentence_files,
    shards,
    transformer_files,
    uses,
)
from jexport.checkpoints.jina_v3_native import JinaV3Native
from jexport.checkpoints.jina_v3_original import JinaV3Original
from jexport.checkpoints.jina_v5 import JinaV5
from jexport.checkpoints.layout import Layout, Opened, SentenceTransformers
from jexport.checkpoints.remote_code_layout import RemoteCode
from jexport.checkpoints.static_embedding import StaticEmbedding
from jexport.errors import (
    CheckpointError,
    PrecisionError,
    RecipeError,
    UnsupportedCheckpointError,
    nearest,
)
from jexport.recipe import LoadSpec
from jexport.types import FileDigest, LoadedModel, Source

LAYOUTS: tuple[Layout, ...] = (
    StaticEmbedding(),
    JinaV3Original(),
    JinaV3Native(),
    JinaV5(),
    RemoteCode(),
    SentenceTransformers(),
)
"""In the order in which a folder is tried."""

JINA_V3 = tuple(layout.name for layout in LAYOUTS if layout.is_jina_v3)


def locate(spec: LoadSpec) -> tuple[Path, str]:
    """Where the checkpoint's files are; one on a hub is downloaded.

    Args:
        spec: its model and revision; .py files are fetched only with trust_remote_code.

    Returns:
        The local folder and, from a hub, its 40-hex commit ('' for a folder).

    Raises:
        CheckpointError: no such folder, and no hub id.
        HubError, DependencyError: the hub cannot be reached, or huggingface_hub is missing.
        RemoteCodeError: code from a hub without a pinned revision.
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
    patterns: tuple[str, ...] = hub.WEIGHTS_AND_CONFIG
    if spec.trust_remote_code:
        hub.check_pinned(spec.revision, what=f"the hub's {spec.model}", key="load.revision")
        patterns += hub.CODE
    return hub.fetch(spec.model, spec.revision, patterns)


def _layout(folder: Path, base: Path, *, trust_code: bool = False) -> Layout:
    """The first of LAYOUTS that matches. Raises UnsupportedCheckpointError, CheckpointError."""
    path = base / "config.json"
    config = transformer_files.optional_json(path)
    for layout in LAYOUTS:
        if layout.matches(folder, config, trust_code=trust_code):
            return layout
    config = transformer_files.read_json(path)  # raises where there is none
    raise UnsupportedCheckpointError(
        "this checkpoint's layout is not known",
        evidence=f"{folder}: model_type {config.get('model_type')!r}, no modules.json",
        fix="give a jina-embeddings-v3 checkpoint or a sentence-transformers folder "
        "(modules.json with a Pooling module)",
    )


def known_tasks(folder: Path) -> tuple[str, ...]:
    """The tasks that a checkpoint can be opened for.

    Args:
        folder: the checkpoint's, where modules.json is if it has one.

    Returns:
        Those with an adapter, and `none`, always the last.

    Raises:
        CheckpointError: a config or weight file is missing or broken.
        UnsupportedCheckpointError: a layout, modules or an adapter that jexport does not have.
        AdapterError: the adapter at its root was not saved whole.
        HubError: that adapter's base is on a hub that cannot be reached.
    """
    if routes.has_router(folder):
        return (tasks.NONE,)
    home = sentence_files.transformer_home(folder)
    adapter = peft_adapter.find(home)
    base = adapter.base if adapter else home
    layout = _layout(folder, base)
    return (*layout.known_tasks(home, layout.stated_config(base)), tasks.NONE)


def _check_float(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that somebody quantized: its vectors are no reference for anything."""
    stated = config.get("quantization_config")
    if stated:
        method = stated.get("quant_method", "unknown") if isinstance(stated, Mapping) else stated
        raise PrecisionError(
            "the checkpoint is quantized already",
            evidence=f"{folder / 'config.json'}: quantization_config, method {method!r:.80}",
            fix="give the float checkpoint that it was made of",
        )


def open_checkpoint(spec: LoadSpec, task: str) -> LoadedModel:
    """Open a checkpoint for one task; reads headers and configs, no weights yet.

    Args:
        spec: [load] of the recipe; its prompts, max_tokens and licence go before the checkpoint's.
        task: whose adapter and prompt are opened; 'none' for the base model.

    Returns:
        The model, with the digest of every file that decides something.

    Raises:
        RecipeError: a prompt of a task that the checkpoint does not have.
        PrecisionError: the checkpoint is quantized already.
        JexportError: every other error that `stages.load.run` documents.
    """
    folder, revision = locate(spec)
    routed = routes.resolve(folder, spec.use)
    layout, opened = _open(routed.folder, spec)
    _check_asked(layout, opened, task)
    is_code = layout.needs_code or (spec.trust_remote_code and layout.takes_code)
    code, code_revision = (
        remote_code.code_files(opened.base, opened.config, spec) if is_code else ((), "")
    )
    weights, adapter, weight_files = layout.read(opened.base, opened.config, task)
    if opened.peft is not None:
        adapter = peft_adapter.matrices(opened.peft, shards.shapes(opened.base))
    encoder = _encoder(layout, opened)
    tokenizing = encoder.tokenizing
    stated, head, stack_files = embedding.read(opened.folder, encoder, spec, task)
    used = uses.chosen(stated, spec.use, routed.routes)
    how = replace(used, side=routed.side, contextual=layout.contextual)
    licence = transformer_files.licence(folder)
    files = {*weight_files, *tokenizing.read, *_around(opened, licence), *stack_files}
    return LoadedModel(
        folder=folder,
        config=opened.config,
        weights=weights,
        adapter=adapter,
        assemble=partial(layout.assemble, opened),
        tokenize_reference=transformer_files.reference_tokenizer(
            tokenizing.open, prompt=how.prompt, max_tokens=how.max_tokens
        ),
        reference=partial(remote_code.reference, opened.base, opened.config, spec, task)
        if is_code
        else partial(layout.reference, opened, weights, adapter),
        tokenizer_files=tokenizing.files,
        embedding=how,
        source=Source(
            name=spec.model if revision else folder.resolve().name,
            layout=layout.name,
            revision=revision,
            code_revision=code_revision,
            licence=spec.licence or licence or layout.licence,
            files=_digests(sorted(files), opened, routed),
            code=code,
        ),
        notes=_notes(weight_files, spec, revision),
        head=head,
    )


def _notes(weight_files: Sequence[Path], spec: LoadSpec, revision: str) -> tuple[str, ...]:
    """What there is instead of pickled weights, where such were read."""
    if not any(path.suffix == ".bin" for path in weight_files):
        return ()
    conversion = hub.conversion(spec.model, revision) if revision else None
    way_out = (
        f"the hub has the same as safetensors: --revision {conversion.commit} "
        f"({conversion.reference}, by {hub.CONVERTER})"
        if conversion
        else "`jexport convert-weights FOLDER` writes safetensors"
    )
    return (f"pickled weights, read with weights_only; {way_out}",)


def _check_asked(layout: Layout, opened: Opened, task: str) -> None:
    """Refuse a task, prompts of tasks, or code that the checkpoint does not have or need."""
    layout.check(opened, task)
    offered = (*layout.known_tasks(opened.base, opened.stated), tasks.NONE)
    tasks.check_task(task, offered)
    by_name = layout.own.prompts if layout.own else ()
    for name in opened.spec.prompts:  # where there are no tasks, it is a prompt by its name
        if name not in (*offered, *by_name) and len(offered) > 1:
            raise RecipeError(
                f"recipe key 'load.prompts.{name}' is of a task that the checkpoint does not have",
                evidence=f"it has: {', '.join(offered)}",
                fix=nearest(name, offered),
            )


def _encoder(layout: Layout, opened: Opened) -> embedding.Encoder:
    """The tokenizer and the sizes of the model that it feeds."""
    sizes = layout.sizes(opened)
    return embedding.Encoder(
        config=opened.config,
        width=sizes.width,
        positions=sizes.positions,
        table=sizes.table,
        tokenizing=layout.tokenizing(opened, sizes.rows),
        transformer=opened.transformer,
        jina=layout.is_jina_v3,
        own=layout.own,
    )


def _open(folder: Path, spec: LoadSpec) -> tuple[Layout, Opened]:
    """The layout, where its parts are, and what its Transformer module's file says."""
    home = sentence_files.transformer_home(folder)
    peft = peft_adapter.find(home)
    base = peft.base if peft else home
    layout = _layout(folder, base, trust_code=spec.trust_remote_code)
    stated = layout.stated_config(base)
    _check_float(stated, base)
    if peft and not layout.merges_adapter:
        raise UnsupportedCheckpointError(
            "an adapter at the root of a checkpoint of this layout is not merged",
            evidence=f"{home / peft_adapter.CONFIG}; the layout is {layout.name}",
            fix="merge it with peft (merge_and_unload), and save the model whole",
        )
    transformer = sentence_files.TransformerSettings()
    if layout.contextual and (folder / sentence_files.MODULES).is_file():
        # Without modules.json sentence-transformers does not read it, nor for a StaticEmbedding.
        transformer = sentence_files.transformer(home)
    return layout, Opened(
        folder=folder,
        home=home,
        base=base,
        stated=stated,
        config=layout.model_config(base, stated, transformer),
        spec=spec,
        peft=peft,
        transformer=transformer,
    )


def _around(opened: Opened, licence: str) -> list[Path]:
    """The files around weights, tokenizer and pooling that decide something, or say the licence."""
    named = [
        opened.base / "config.json",
        opened.folder / sentence_files.PROMPTS,
        *([opened.transformer.file] if opened.transformer.file else []),
        *(opened.peft.files if opened.peft else ()),
        *([opened.folder / "README.md"] if licence else []),
    ]
    return [path for path in named if path.is_file()]


def _digest(path: Path, opened: Opened) -> FileDigest:
    """A file's digest, named relative to the checkpoint; below `base/` where it is elsewhere."""
    if path.is_relative_to(opened.folder):
        return file_digest(path, root=opened.folder)
    digest = file_digest(path, root=opened.base)
    return replace(digest, path=f"base/{digest.path}")


def _digests(
    files: Sequence[Path], opened: Opened, routed: routes.Routed
) -> tuple[FileDigest, ...]:
    """The digest of every file; those that a Router adds go before its route's of the same name."""
    digests = {one.path: one for one in (_digest(path, opened) for path in files)}
    if routed.files:
        root = routed.files[0].parent
        digests |= {one.path: one for one in (file_digest(p, root=root) for p in routed.files)}
    return tuple(digests[path] for path in sorted(digests))
