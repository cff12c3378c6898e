"""How a checkpoint turns a text into an embedding: prompts, pooling, sizes, length limit.

Knows no weight; what [load] of a recipe says is put over what the checkpoint's own files say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.checkpoints import module_stack, sentence_files
from jexport.checkpoints.tokenizer_backend import Tokenizing
from jexport.errors import CheckpointError, UnsupportedCheckpointError
from jexport.recipe import LoadSpec
from jexport.types import Embedding, HeadModule

ENDLESS = 32_768
"""Length limit of a model that has none: no table of positions, and no file states one."""


@dataclass(frozen=True, kw_only=True)
class OwnCode:
    """How a Transformer class of the checkpoint's own embeds, where it is the only module.

    Args:
        pooling: in the module.
        prompts: by name; config_sentence_transformers.json is put over them.
        default_prompt_name: of them, where that file names none.
    """

    pooling: module_stack.Stack
    prompts: Mapping[str, str]
    default_prompt_name: str


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What is known of the model itself.

    Args:
        config: of the model.
        width: of its hidden states.
        positions: how many its config states, 0 for none.
        table: rows of its learned table of positions that a text can use, 0 for none.
        tokenizing: its tokenizer.
        transformer: what the Transformer module's own file says.
        jina: whether the checkpoint is of a jina-embeddings-v3 layout.
        own: how the checkpoint's own code embeds; None where sentence-transformers' modules say it.
    """

    config: Mapping[str, Any]
    width: int
    positions: int
    table: int
    tokenizing: Tokenizing
    transformer: sentence_files.TransformerSettings
    jina: bool
    own: OwnCode | None = None


def read(
    folder: Path, encoder: Encoder, spec: LoadSpec, task: str
) -> tuple[Embedding, tuple[HeadModule, ...], tuple[Path, ...]]:
    """How the checkpoint's texts become embeddings.

    Args:
        folder: of modules.json and the modules' folders, where there are any.
        encoder: what they have to agree with.
        spec: its max_tokens and prompts are put over the checkpoint's.
        task: whose prompt is taken.

    Returns:
        The Embedding; the modules after the transformer where they are more than it says; the files
        that decide them.

    Raises:
        CheckpointError: its files contradict each other.
        UnsupportedCheckpointError: they ask for something that jexport does not have.
        DependencyError: its authors ask for a package that is not here.
    """
    pooling = _pooling(folder, encoder, spec)
    _check(encoder, pooling)
    limit = _limit(encoder)
    if spec.max_tokens > limit:
        raise UnsupportedCheckpointError(
            f"load.max_tokens = {spec.max_tokens} is more than the checkpoint takes",
            evidence=f"its own files allow {limit}",
            fix=f"set load.max_tokens to {limit} or less",
        )
    own = sentence_files.settings(folder)
    prompts, default = _prompts(encoder, own, spec, task)
    dimension = pooling.dimension or encoder.width
    embedding = Embedding(
        task=task,
        prompt=prompts[default] if default else "",
        pooling=pooling.mode,
        normalize=pooling.normalize,
        dimension=dimension,
        matryoshka=_matryoshka(encoder.config, pooling),
        max_tokens=spec.max_tokens or limit,
        prompts=prompts,
        default_prompt_name=default,
        similarity=own.similarity,
        truncate_dim=own.truncate_dim if own.truncate_dim < dimension else 0,
        include_prompt=pooling.include_prompt,
        modules=pooling.modules,
    )
    return embedding, pooling.head, pooling.files


def _check(encoder: Encoder, pooling: module_stack.Stack) -> None:
    """Refuse a pooling of another model, and padding that changes vectors."""
    if pooling.width not in (0, encoder.width):
        raise CheckpointError(
            "the Pooling module is of another model",
            evidence=f"it pools vectors of {pooling.width}, the model gives vectors of "
            f"{encoder.width}",
            fix="give the 1_Pooling/config.json that belongs to these weights",
        )
    if encoder.tokenizing.pads_left and encoder.table:
        raise UnsupportedCheckpointError(
            "the tokenizer pads on the left of a model with learned positions",
            evidence="padding_side = 'left': in sentence-transformers a text's vector then depends "
            "on how long the other texts of its batch are",
            fix="set padding_side to 'right' in tokenizer_config.json, for the vector that each "
            "text has alone",
        )


def _pooling(folder: Path, encoder: Encoder, spec: LoadSpec) -> module_stack.Stack:
    """What modules.json says; for jina-embeddings-v3 what its own encode() does, if they agree."""
    if encoder.own is not None:
        return _own_pooling(folder, encoder.own)
    stated = module_stack.read(
        folder, own_transformer=encoder.jina, trust_code=spec.trust_remote_code
    )
    if not encoder.jina:
        return _plain_pooling(folder, encoder) if stated is None else stated
    if stated is not None and stated.head:
        raise UnsupportedCheckpointError(
            "modules after the pooling of a jina-embeddings-v3 checkpoint are not exported",
            evidence=f"{sentence_files.MODULES}: {'; '.join(stated.modules)}",
            fix="remove them from modules.json: the authors' own encode() does not run them",
        )
    # The authors' encode() pools over the mask unless emb_pooler says cls, and normalises.
    named = encoder.config.get("emb_pooler")
    authors = module_stack.Stack(mode="cls" if named == "cls" else "mean", normalize=True)
    if stated is not None and named is not None and stated.mode != authors.mode:
        raise UnsupportedCheckpointError(
            "the checkpoint says two things about its pooling",
            evidence=f"config.json: emb_pooler = {named!r}; 1_Pooling/config.json: {stated.mode}",
            fix="make them say the same",
        )
    return stated or authors


def _own_pooling(folder: Path, own: OwnCode) -> module_stack.Stack:
    """What the own module does, unless modules.json lists modules after it."""
    listed = sentence_files.modules(folder)
    if listed is None or (len(listed) == 1 and listed[0].kind == "Transformer"):
        return own.pooling
    stated = module_stack.read(folder, own_transformer=True)
    assert stated is not None, "modules.json is there"
    return stated


def _plain_pooling(folder: Path, encoder: Encoder) -> module_stack.Stack:
    """What sentence-transformers does without modules.json: no normalisation, no prompt.

    Source: `SentenceTransformer._load_default_modules` of version 6.2.
    """
    if encoder.tokenizing.chat_template:
        raise UnsupportedCheckpointError(
            "sentence-transformers would send every text through this checkpoint's chat template",
            evidence=f"{folder} has no {sentence_files.MODULES}, its tokenizer has a chat_template",
            fix="add modules.json and 1_Pooling/config.json, as sentence-transformers does, or "
            "remove the chat template",
        )
    named = encoder.config.get("architectures") or [""]
    is_causal = str(named[0]).endswith("ForCausalLM") and encoder.config.get("is_causal", True)
    return module_stack.Stack(mode="last" if is_causal else "mean", normalize=False)


def _limit(encoder: Encoder) -> int:
    """Tokens a text may have: as sentence-transformers cuts, within what the table holds.

    It does not look at the table where a limit is stated, and breaks on longer texts.
    """
    if encoder.jina:
        return _jina_limit(encoder)
    own = [size for size in (encoder.tokenizing.max_length, encoder.positions) if size]
    stated = encoder.transformer.max_length or (min(own) if own else 0)
    limits = [size for size in (stated, encoder.table) if size]
    return min(limits) if limits else ENDLESS


def _jina_limit(encoder: Encoder) -> int:
    """jina-embeddings-v3 counts 8194 positions from pad_token_id + 1; its window is 8192."""
    pad = encoder.config.get("pad_token_id")
    table = (encoder.positions or 512) - (pad if isinstance(pad, int) else 1) - 1
    return min(table, encoder.transformer.max_length or encoder.tokenizing.max_length or table)


def _prompts(
    encoder: Encoder, own: sentence_files.Settings, spec: LoadSpec, task: str
) -> tuple[dict[str, str], str]:
    """Every prompt by its name, and the name of the default one, '' for none."""
    if encoder.jina:
        return _jina_prompts(encoder.config, own, spec, task)
    prompts, name = dict(own.prompts), own.default_prompt_name
    if encoder.own is not None:
        prompts = {**encoder.own.prompts, **prompts}
        name = name or encoder.own.default_prompt_name
    prompts |= spec.prompts
    if task in spec.prompts:
        return prompts, task if spec.prompts[task] else ""
    return prompts, name if prompts.get(name) else ""


def _jina_prompts(
    config: Mapping[str, Any], own: sentence_files.Settings, spec: LoadSpec, task: str
) -> tuple[dict[str, str], str]:
    """The task's prompt, beside those that the checkpoint has under names of its own.

    config.json says the tasks' prompts, config_sentence_transformers.json may repeat them.

    Raises:
        UnsupportedCheckpointError: the two differ, or the default prompt is not this task's.
    """
    prompt = spec.prompts.get(task, _jina_prompt(config, task))
    named = tasks.named_prompts(task, prompt)
    stated = {f"prompts.{name}": own.prompts[name] for name in named if name in own.prompts}
    if own.default_prompt_name:
        chosen = own.prompts.get(own.default_prompt_name, "")
        stated[f"default_prompt_name = {own.default_prompt_name!r}"] = chosen
    for key, text in stated.items():
        if text != prompt and task not in spec.prompts:
            raise _two_prompts(key, text, prompt)
    others = {
        name: text
        for name, text in own.prompts.items()
        if name not in tasks.JINA_V3_PROMPTS and name not in named
    }
    return {**others, **named}, task if prompt else ""


def _two_prompts(key: str, text: str, prompt: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        "the checkpoint says two things about the prompt of this task",
        evidence=f"{sentence_files.PROMPTS}: {key}, {text!r}; the task's own prompt is {prompt!r}",
        fix="make them say the same, or set the prompt in the recipe: load.prompts",
    )


def _jina_prompt(config: Mapping[str, Any], task: str) -> str:
    instructions = config.get("task_instructions") or {}
    if not isinstance(instructions, dict):
        raise CheckpointError(
            "config.json does not list the tasks' prompts",
            evidence=f"task_instructions = {instructions!r}",
            fix="give the config.json that belongs to these weights",
        )
    return str({**tasks.JINA_V3_PROMPTS, **instructions}.get(task, ""))


def _matryoshka(config: Mapping[str, Any], stack: module_stack.Stack) -> tuple[int, ...]:
    """The smaller sizes that the config states, where a smaller vector is a cut of the whole.

    It is none where each size has a Dense module of its own; nomic_bert's authors put a LayerNorm
    before the cut, which no file says.
    """
    if stack.other_widths or config.get("model_type") == "nomic_bert":
        return ()
    sizes = config.get("matryoshka_dimensions") or ()
    try:
        return tuple(
            size
            for size in sorted(int(size) for size in sizes)
            if not stack.head or size <= stack.dimension
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "config.json does not list the vector's smaller sizes",
            evidence=f"matryoshka_dimensions = {sizes!r}",
            fix="give the config.json that belongs to these weights",
        ) from error
