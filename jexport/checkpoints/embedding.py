"""How a checkpoint turns a text into an embedding: prompt, pooling, sizes, length limit.

Knows no weight; what [load] of a recipe says is put over what the checkpoint's own files say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.checkpoints import sentence_files
from jexport.errors import CheckpointError, UnsupportedCheckpointError
from jexport.flow import Embedding
from jexport.recipe import LoadSpec


def read(
    folder: Path, config: Mapping[str, Any], spec: LoadSpec, task: str, *, width: int, jina: bool
) -> tuple[Embedding, tuple[Path, ...]]:
    """The Embedding, and the files that say so. width: of the model's hidden states.

    jina: the checkpoint is of a jina-embeddings-v3 layout. Raises CheckpointError and
    UnsupportedCheckpointError.
    """
    pooling = _pooling(folder, config, jina=jina)
    if pooling.width not in (0, width):
        raise CheckpointError(
            "the Pooling module is of another model",
            evidence=f"it pools vectors of {pooling.width}, the model gives vectors of {width}",
            fix="give the 1_Pooling/config.json that belongs to these weights",
        )
    limit = sentence_files.length_limit(folder, config, jina=jina)
    if spec.max_tokens > limit:
        raise UnsupportedCheckpointError(
            f"load.max_tokens = {spec.max_tokens} is more than the checkpoint takes",
            evidence=f"its own files allow {limit}",
            fix=f"set load.max_tokens to {limit} or less",
        )
    prompt = spec.prompts.get(task, _own_prompt(folder, config, task, jina=jina))
    if prompt and not pooling.include_prompt:
        raise UnsupportedCheckpointError(
            "this model leaves its prompt out of the pooling, which jexport cannot do",
            evidence=f"its Pooling has include_prompt = false, its prompt is {prompt!r}",
            fix=f'build it without one: [load.prompts] "{task}" = "" in the recipe',
        )
    embedding = Embedding(
        task=task,
        prompt=prompt,
        pooling=pooling.mode,
        normalize=pooling.normalize,
        dimension=width,
        matryoshka=_matryoshka(config),
        max_tokens=spec.max_tokens or limit,
    )
    return embedding, pooling.files


def _pooling(folder: Path, config: Mapping[str, Any], *, jina: bool) -> sentence_files.Pooling:
    """What modules.json says; for jina-embeddings-v3 what its own encode() does, if they agree."""
    stated = sentence_files.pooling(folder, own_transformer=jina)
    if not jina:
        if stated is None:
            raise UnsupportedCheckpointError(
                "the checkpoint does not say how its vectors are pooled",
                evidence=f"{folder} has no {sentence_files.MODULES}",
                fix="add modules.json and 1_Pooling/config.json, as sentence-transformers does",
            )
        return stated
    # The authors' encode() pools over the mask unless emb_pooler says cls, and normalises.
    named = config.get("emb_pooler")
    authors = sentence_files.Pooling(mode="cls" if named == "cls" else "mean", normalize=True)
    if stated is not None and named is not None and stated.mode != authors.mode:
        raise UnsupportedCheckpointError(
            "the checkpoint says two things about its pooling",
            evidence=f"config.json: emb_pooler = {named!r}; 1_Pooling/config.json: {stated.mode}",
            fix="make them say the same",
        )
    return stated or authors


def _own_prompt(folder: Path, config: Mapping[str, Any], task: str, *, jina: bool) -> str:
    if not jina:
        return sentence_files.default_prompt(folder)
    instructions = config.get("task_instructions") or {}
    if not isinstance(instructions, dict):
        raise CheckpointError(
            "config.json does not list the tasks' prompts",
            evidence=f"task_instructions = {instructions!r}",
            fix="give the config.json that belongs to these weights",
        )
    return str({**tasks.JINA_V3_PROMPTS, **instructions}.get(task, ""))


def _matryoshka(config: Mapping[str, Any]) -> tuple[int, ...]:
    sizes = config.get("matryoshka_dimensions") or ()
    try:
        return tuple(sorted(int(size) for size in sizes))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "config.json does not list the vector's smaller sizes",
            evidence=f"matryoshka_dimensions = {sizes!r}",
            fix="give the config.json that belongs to these weights",
        ) from error
