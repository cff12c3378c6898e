"""Opening a checkpoint: which layout it is, which tasks it has, and one LoadedModel per task.

One file per layout; each has `matches`, `known_tasks` and `read`. Knows no target and no recipe key
beyond [load].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.artifacts.manifest import file_digest
from jexport.checkpoints import (
    embedding,
    hub,
    jina_v3_native,
    jina_v3_original,
    jina_v5,
    native_class,
    native_mismatch,
    peft_adapter,
    remote_code,
    routes,
    sentence_files,
    sentence_transformer,
    shards,
    static_embedding,
    tokenizer_backend,
    transformer_files,
    uses,
)
from jexport.errors import (
    CheckpointError,
    PrecisionError,
    RecipeError,
    RemoteCodeError,
    UnsupportedCheckpointError,
    nearest,
)
from jexport.recipe import LoadSpec
from jexport.types import (
    Embedding,
    FileDigest,
    HeadModule,
    LoadedModel,
    LowRank,
    Runner,
    Source,
    WeightReader,
)

STATIC = "static_embedding"
LAYOUTS: Mapping[str, Any] = {
    STATIC: static_embedding,
    "jina_v3_original": jina_v3_original,
    "jina_v3_native": jina_v3_native,
    "jina_v5": jina_v5,
    "remote_code": remote_code,
    "sentence_transformer": sentence_transformer,
}
JINA = ("jina_v3_original", "jina_v3_native")
JINA_V5 = "jina_v5"
JINA_LICENCE = "CC-BY-NC-4.0"
"""Licence of the published weights (formats of the model card); a README's own line wins."""


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


def detect(folder: Path, config: Mapping[str, Any], *, trust_code: bool = False) -> str:
    """Which layout a folder holds.

    Code that auto_map names is left aside, as transformers does, where it is not trusted and the
    architecture is one of transformers' own.

    Args:
        folder: of config.json and weights.
        config: its config.json.
        trust_code: whether the checkpoint's own code may run.

    Returns:
        The first key of LAYOUTS that matches.

    Raises:
        UnsupportedCheckpointError: none does.
    """
    for name, layout in LAYOUTS.items():
        if name == "remote_code" and not trust_code and sentence_transformer.is_native(config):
            continue
        if layout.matches(folder, config):
            return name
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
    if static_embedding.matches(folder, {}):
        return (tasks.NONE,)
    adapter = peft_adapter.find(home)
    config = transformer_files.read_json((adapter.base if adapter else home) / "config.json")
    layout = LAYOUTS[detect(folder, config)]
    return (*layout.known_tasks(home, config), tasks.NONE)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A checkpoint whose layout is known, and what [load] says of it.

    Attributes:
        folder: the checkpoint's own.
        home: that of its tokenizer and the Transformer module's file.
        base: that of config.json and weights: another one only where an adapter's base is.
        stated: config.json as it is.
        config: that of the model that is assembled.
        peft: the adapter at its root, if there is one.
        transformer: what the Transformer module's file says.
    """

    folder: Path
    home: Path
    base: Path
    stated: Mapping[str, Any]
    config: Mapping[str, Any]
    layout: str
    spec: LoadSpec
    peft: peft_adapter.PeftAdapter | None
    transformer: sentence_files.TransformerSettings


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
    opened = _open(routed.folder, spec)
    layout, config = opened.layout, opened.config
    _check_asked(opened, task)
    code: tuple[FileDigest, ...] = ()
    code_revision = ""
    if layout == "remote_code" or (spec.trust_remote_code and layout != STATIC):
        code, code_revision = remote_code.code_files(opened.base, config, spec)
        _check_authors_code(layout, task)
    weights, adapter, weight_files = LAYOUTS[layout].read(opened.base, config, task)
    if opened.peft is not None:
        adapter = peft_adapter.matrices(opened.peft, shards.shapes(opened.base))
    encoder = _encoder(opened)
    tokenizing = encoder.tokenizing
    how, head, stated = _embedding(opened, encoder, routed, task)
    licence = transformer_files.licence(folder)
    files = {*weight_files, *tokenizing.read, *_around(opened, licence), *stated}
    return LoadedModel(
        folder=folder,
        config=config,
        weights=weights,
        adapter=adapter,
        assemble=_assemble(opened),
        tokenize_reference=transformer_files.reference_tokenizer(
            tokenizing.open, prompt=how.prompt, max_tokens=how.max_tokens
        ),
        reference=_reference(opened, weights, adapter, task),
        tokenizer_files=tokenizing.files,
        embedding=how,
        source=Source(
            name=spec.model if revision else folder.resolve().name,
            layout=layout,
            revision=revision,
            code_revision=code_revision,
            licence=spec.licence or licence or (JINA_LICENCE if layout in (*JINA, JINA_V5) else ""),
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


def _check_asked(opened: _Opened, task: str) -> None:
    """Refuse a task, prompts of tasks, or code that the checkpoint does not have or need."""
    spec = opened.spec
    if opened.layout == JINA_V5:
        jina_v5.check_adapter(opened.base, opened.stated, task)
    offered = (*LAYOUTS[opened.layout].known_tasks(opened.base, opened.stated), tasks.NONE)
    tasks.check_task(task, offered)
    by_name = tuple(tasks.JINA_V5_PROMPTS) if opened.layout == JINA_V5 else ()
    for name in spec.prompts:  # where there are no tasks, it is a prompt by its name
        if name not in (*offered, *by_name) and len(offered) > 1:
            raise RecipeError(
                f"recipe key 'load.prompts.{name}' is of a task that the checkpoint does not have",
                evidence=f"it has: {', '.join(offered)}",
                fix=nearest(name, offered),
            )
    if opened.layout == JINA_V5 and spec.trust_remote_code:
        raise RemoteCodeError(
            "this checkpoint needs no code of its own, and jexport does not run it",
            evidence=f"the layout is {opened.layout}: {opened.config['architectures'][0]} of "
            "transformers, and the task's adapter",
            fix="build without --trust-remote-code",
        )


def _embedding(
    opened: _Opened, encoder: embedding.Encoder, routed: routes.Routed, task: str
) -> tuple[Embedding, tuple[HeadModule, ...], tuple[Path, ...]]:
    """How texts become embeddings for the use that is asked for, and what embedding.read gives."""
    stated, head, files = embedding.read(opened.folder, encoder, opened.spec, task)
    how = uses.chosen(stated, opened.spec.use, routed.routes)
    return replace(how, side=routed.side, contextual=opened.layout != STATIC), head, files


def _encoder(opened: _Opened) -> embedding.Encoder:
    """The tokenizer and the sizes of the model that it feeds."""
    width, rows, positions = _sizes(opened)
    tokenizing = _tokenizing(opened, rows)
    is_jina = opened.layout in JINA
    return embedding.Encoder(
        config=opened.config,
        width=width,
        positions=positions,
        table=0
        if is_jina or opened.layout == STATIC
        else sentence_transformer.positions(opened.base, opened.config),
        tokenizing=tokenizing,
        transformer=opened.transformer,
        jina=is_jina,
        own=_own_code(opened.layout),
    )


def _own_code(layout: str) -> embedding.OwnCode | None:
    """How the only module of a layout embeds, which is code of the checkpoint's own."""
    if layout != JINA_V5:
        return None
    return embedding.OwnCode(
        pooling=jina_v5.POOLING,
        prompts=tasks.JINA_V5_PROMPTS,
        default_prompt_name=jina_v5.DEFAULT_PROMPT,
    )


def _tokenizing(opened: _Opened, rows: int) -> tokenizer_backend.Tokenizing:
    """The tokenizer, checked against the rows of the embedding table."""
    if opened.layout == STATIC:
        return static_embedding.tokenizing(opened.home, rows)
    return tokenizer_backend.take(
        opened.home,
        _tokenizer(opened),
        rows=rows,
        do_lower_case=opened.transformer.do_lower_case,
        as_stored=not opened.transformer.tokenizer,
    )


def _open(folder: Path, spec: LoadSpec) -> _Opened:
    """Where its parts are, its layout, and what its Transformer module's file says."""
    home = sentence_files.transformer_home(folder)
    if static_embedding.matches(folder, {}):
        config = static_embedding.config(home)
        return _Opened(
            folder=folder,
            home=home,
            base=home,
            stated=config,
            config=config,
            layout=STATIC,
            spec=spec,
            peft=None,
            transformer=sentence_files.TransformerSettings(),
        )
    peft = peft_adapter.find(home)
    base = peft.base if peft else home
    config = transformer_files.read_json(base / "config.json")
    _check_float(config, base)
    layout = detect(folder, config, trust_code=spec.trust_remote_code)
    if peft and layout != "sentence_transformer":
        raise UnsupportedCheckpointError(
            "an adapter at the root of a checkpoint of this layout is not merged",
            evidence=f"{home / peft_adapter.CONFIG}; the layout is {layout}",
            fix="merge it with peft (merge_and_unload), and save the model whole",
        )
    stated = config
    transformer = sentence_files.TransformerSettings()
    if (folder / sentence_files.MODULES).is_file():
        # Without modules.json sentence-transformers does not read it.
        transformer = sentence_files.transformer(home)
    if layout == "sentence_transformer":
        native_mismatch.check(config)
        config = sentence_transformer.given_config(base, config, transformer.config)
        sentence_transformer.check_native(config)
    elif transformer.config or transformer.tokenizer:
        raise UnsupportedCheckpointError(
            "arguments for a model that its own code opens are not passed on",
            evidence=f"{transformer.file}: {[*transformer.config, *transformer.tokenizer]}",
            fix="put them into config.json and tokenizer_config.json",
        )
    if layout == JINA_V5:
        config = jina_v5.native_json(base, config)
    return _Opened(
        folder=folder,
        home=home,
        base=base,
        stated=stated,
        config=config,
        layout=layout,
        spec=spec,
        peft=peft,
        transformer=transformer,
    )


def _around(opened: _Opened, licence: str) -> list[Path]:
    """The files around weights, tokenizer and pooling that decide something, or say the licence."""
    named = [
        opened.base / "config.json",
        opened.folder / sentence_files.PROMPTS,
        *([opened.transformer.file] if opened.transformer.file else []),
        *(opened.peft.files if opened.peft else ()),
        *([opened.folder / "README.md"] if licence else []),
    ]
    return [path for path in named if path.is_file()]


def _digest(path: Path, opened: _Opened) -> FileDigest:
    """A file's digest, named relative to the checkpoint; below `base/` where it is elsewhere."""
    if path.is_relative_to(opened.folder):
        return file_digest(path, root=opened.folder)
    digest = file_digest(path, root=opened.base)
    return replace(digest, path=f"base/{digest.path}")


def _digests(
    files: Sequence[Path], opened: _Opened, routed: routes.Routed
) -> tuple[FileDigest, ...]:
    """The digest of every file; those that a Router adds go before its route's of the same name."""
    digests = {one.path: one for one in (_digest(path, opened) for path in files)}
    if routed.files:
        root = routed.files[0].parent
        digests |= {one.path: one for one in (file_digest(p, root=root) for p in routed.files)}
    return tuple(digests[path] for path in sorted(digests))


def _check_authors_code(layout: str, task: str) -> None:
    """Raise RemoteCodeError where the code beside the weights cannot be the reference."""
    if layout == "jina_v3_native" and task != tasks.NONE:
        raise RemoteCodeError(
            "the code beside this checkpoint does not know its PEFT adapters",
            evidence=f"the layout is {layout}, the task '{task}'",
            fix="build without --trust-remote-code",
        )


def _sizes(opened: _Opened) -> tuple[int, int, int]:
    """Width of the hidden states, rows of the embedding table, positions that the config states.

    Raises CheckpointError.
    """
    config = opened.config
    stated = config.get("max_position_embeddings")
    if opened.layout == "remote_code":
        known = ("hidden_size", "vocab_size", "max_position_embeddings")
        if not all(key in config for key in known):
            config = {**config, **remote_code.sizes(opened.base, opened.spec)}
            stated = config.get("max_position_embeddings")
    elif opened.layout == "sentence_transformer":
        stated = sentence_transformer.stated_positions(opened.base, opened.transformer.config)
    width, rows = transformer_files.width_and_rows(config)
    return width, rows, stated if isinstance(stated, int) and stated > 0 else 0


def _tokenizer(opened: _Opened) -> Callable[[], Any]:
    """Opens the tokenizer; that of a known layout needs no code, also when code is trusted."""
    if opened.layout == "remote_code":
        return partial(remote_code.open_tokenizer, opened.home, opened.spec)
    return partial(
        transformer_files.auto_tokenizer, opened.home, arguments=opened.transformer.tokenizer
    )


def _assemble(opened: _Opened) -> Callable[[Mapping[str, WeightReader]], Any]:
    if opened.layout == STATIC:
        return partial(static_embedding.assemble, opened.config)
    if opened.layout in JINA:
        return partial(native_class.assemble, opened.config)
    if opened.layout == "remote_code":
        return lambda weights: remote_code.assemble(opened.base, opened.spec)
    if opened.layout == JINA_V5:
        return partial(jina_v5.assemble, opened.config)
    arguments = opened.transformer.config
    return lambda weights: sentence_transformer.assemble(opened.base, weights, arguments)


def _reference(
    opened: _Opened,
    weights: Mapping[str, WeightReader],
    adapter: Mapping[str, LowRank],
    task: str,
) -> Callable[[], AbstractContextManager[Runner]]:
    if opened.layout == STATIC:
        return partial(static_embedding.reference, opened.config, weights)
    if opened.spec.trust_remote_code:
        return partial(remote_code.reference, opened.base, opened.config, opened.spec, task)
    if opened.layout in JINA:
        return partial(native_class.reference, opened.config, weights, adapter)
    if opened.layout == JINA_V5:
        return partial(jina_v5.reference, opened.config, weights, adapter)
    return partial(
        sentence_transformer.reference, opened.base, weights, adapter, opened.transformer.config
    )
