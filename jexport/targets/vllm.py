"""vllm: the merged checkpoint under names that vLLM and TEI (candle) serve without remote code.

jina-embeddings-v3 becomes nomic_bert (checkpoints/nomic_bert.py) and EuroBERT a Llama that reads
both ways, for vLLM alone; every other model keeps its own architecture, under names that the
servers expect (checkpoints/server_layouts.py); one server may take what the other does not. vLLM
itself is not needed here: to be validated, the written folder is read back and run in torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import write_json
from jexport.checkpoints import (
    JINA_V3,
    auto_model,
    module_stack,
    module_writer,
    nomic_bert,
    sentence_transformer,
    server_layouts,
    shard_writer,
)
from jexport.checkpoints.server_layouts import ServerLayout
from jexport.errors import CheckpointError, UnsupportedCheckpointError
from jexport.recipe import CompileSpec
from jexport.targets import hf
from jexport.types import CompiledModel, HeadModule, LoadedModel, MergedModel, Runner

JINA_POOLINGS = ("mean", "cls")
"""Poolings of a relabelled jina-embeddings-v3 that both servers have."""

ACTIVATIONS = (module_stack.TANH, "torch.nn.modules.linear.Identity")
"""Of a Dense module. Source: TEI's backends/candle/src/models/dense.rs, whose default is Identity;
vLLM's get_act_fn knows more."""

PROJECTION = "one Pooling, then Dense (Tanh or Identity, without a residual), then Normalize"
"""Source: vLLM's _load_st_projector and try_get_dense_modules, TEI's router/src/lib.rs."""

WAY_OUT = "use --target hf (transformers, sentence-transformers) or --target onnx (TEI's ort)"
USE = "Or serve it: `vllm serve FOLDER --dtype {dtype}`,"
USE_TEI = "or `text-embeddings-router --model-id FOLDER`."
NO_PROMPTS = "vLLM does not put the prompt before a text"
TEI_PROMPTS = ", TEI does with `--default-prompt-name`."
BOTH = (server_layouts.VLLM, server_layouts.TEI)
BY_TRANSFORMERS = "transformers, from the written folder"
NOT_CAUSAL = (
    "Do not open it with transformers or sentence-transformers: it is EuroBERT under the name of",
    "Llama, which reads both ways in vLLM only, by `is_causal`. The target `hf` is for them.",
)
NOT_TRANSFORMERS = (
    "Do not open it with transformers or sentence-transformers: their `nomic_bert` is another",
    "network, made up where this one has no weights. The target `hf` is for them.",
)


def fingerprint() -> dict[str, Any]:
    """Say where it runs: releases whose loaders were run (vLLM) or read (TEI)."""
    return {"vllm": ">=0.32", "text-embeddings-inference": ">=1.9", "device": "any"}


def check(model: MergedModel) -> None:
    """Refuse an architecture, activation or pooling that neither vLLM nor TEI takes as it is.

    Args:
        model: merged.

    Raises:
        UnsupportedCheckpointError: says which of them, and what there is instead.
    """
    able, evidence = _servers(model)
    if not able:
        raise UnsupportedCheckpointError(
            "this checkpoint cannot be written for vLLM or TEI",
            evidence=evidence,
            fix=WAY_OUT,
        )


def _servers(model: MergedModel) -> tuple[tuple[str, ...], str]:
    """The servers that take a checkpoint, and why others do not."""
    loaded = model.model
    if loaded.head and not _is_projection(loaded.head):
        return (), (
            f"its modules are: {'; '.join(loaded.embedding.modules)}; they read: {PROJECTION}"
        )
    if not loaded.embedding.contextual:
        return (), "it is a static embedding: neither of them has a model without layers"
    if loaded.source.layout not in JINA_V3:
        return server_layouts.servers(loaded)
    activation = loaded.config.get("hidden_act", "gelu")
    if activation != "gelu":
        return (), f"hidden_act = {activation!r}; the architecture that is written has gelu"
    pooling = loaded.embedding.pooling
    if pooling not in JINA_POOLINGS:
        return (), f"its pooling is '{pooling}'; they have: {', '.join(JINA_POOLINGS)}"
    return BOTH, ""


def _own_architecture(loaded: LoadedModel, dtype: str) -> tuple[dict[str, Any], ServerLayout]:
    """config.json of an architecture that the servers have, and its layout."""
    own = sentence_transformer.config_json(loaded.config, dtype)
    layout = server_layouts.LAYOUTS[loaded.config["model_type"]]
    return own | server_layouts.keys(loaded.config), layout


def _is_projection(head: Sequence[HeadModule]) -> bool:
    """Whether both servers run all of these modules, and nothing else."""
    _, *after = head
    if after and after[-1].kind == "Normalize":
        after.pop()
    return all(
        one.kind == "Dense"
        and one.config["activation_function"] in ACTIVATIONS
        and not one.config["use_residual"]
        for one in after
    )


def _usage(able: Sequence[str], dtype: str) -> list[str]:
    """The lines that say how it is served."""
    if server_layouts.VLLM not in able:
        return ["Or serve it: `text-embeddings-router --model-id FOLDER`."]
    lines = [USE.format(dtype=dtype)]
    if server_layouts.TEI not in able:
        return [lines[0].rstrip(",") + ".", f"{NO_PROMPTS}."]
    return [*lines, USE_TEI, NO_PROMPTS + TEI_PROMPTS]


def build(model: MergedModel, spec: CompileSpec, out_dir: Path) -> CompiledModel:
    """Write model.safetensors (or shards and their index) and config.json.

    Args:
        model: with nothing left to merge.
        spec: has nothing for this target.
        out_dir: an empty folder.

    Returns:
        The folder as a compiled model, its weights in model.precision under the servers' names.
    """
    loaded = model.model
    assert not loaded.adapter, "merge comes first"
    dtype = shard_writer.DTYPES[model.precision][1]
    able, reason = _servers(model)
    validated_by, opened_as = BY_TRANSFORMERS, ""
    notes: tuple[str, ...] = ()
    if loaded.source.layout in JINA_V3:
        config = nomic_bert.config_json(loaded.config, loaded.embedding, model.precision)
        weights = nomic_bert.relabelled(loaded.weights, config["n_layer"])
        notes = NOT_TRANSFORMERS
        validated_by = "plain torch, from the written folder, read as vLLM reads it"
    else:
        config, layout = _own_architecture(loaded, dtype)
        weights = layout.names(loaded.weights)
        notes = tuple(f"{note}." for server, note in layout.notes.items() if server in able)
        if loaded.config["model_type"] == server_layouts.EUROBERT:
            notes, opened_as = NOT_CAUSAL, server_layouts.EUROBERT
    use = [*_usage(able, dtype), *notes]
    use += [f"Not for every server: {reason}."] if reason else []
    files = shard_writer.write(out_dir, weights, model.precision)
    write_json(out_dir / hf.CONFIG, config)
    modules = module_writer.write(out_dir, loaded.head, model.precision) if loaded.head else ()
    return CompiledModel(
        target="vllm",
        precision=model.precision,
        folder=out_dir,
        files=(*files, hf.CONFIG, *modules),
        signature=hf.signature(loaded.embedding.dimension, whole=bool(loaded.head)),
        facts={
            "model_type": config["model_type"],
            "weights": len(weights),
            "validated_by": validated_by,
            "use": use,
            "served_by": list(able),
            "tags": ["text-embeddings-inference"] if server_layouts.TEI in able else [],
            **({"opened_as": opened_as} if opened_as else {}),
        },
    )


@contextlib.contextmanager
def runner(compiled: CompiledModel, device: str, threads: int) -> Iterator[Runner]:
    """Open the folder in this process, without vLLM.

    Relabelled jina-embeddings-v3 runs in plain torch, read as vLLM reads it; an encoder of its own
    architecture in transformers, EuroBERT under its own name.

    Args:
        compiled: what `build` wrote.
        device: 'auto' (CUDA when there), 'cpu' or 'cuda'.
        threads: of torch; 0 leaves its own number.

    Yields:
        A runner that gives last_hidden_state in float32, or sentence_embedding where Dense modules
        follow the pooling.

    Raises:
        StateDictError: a weight is missing, unexpected or of another shape.
        CheckpointError: a server could not take the config or the tensors.
        DependencyError: 'cuda' is asked for and torch has none, or transformers is too old.
        ValueError: another device.
    """
    with _opening(compiled.facts)(compiled.folder, compiled.precision, device, threads) as run:
        yield hf.with_modules(compiled, run)


def _opening(
    facts: Mapping[str, Any],
) -> Callable[[Path, str, str, int], AbstractContextManager[Runner]]:
    """Who opens a written folder."""
    relabelled = facts["model_type"] == nomic_bert.MODEL_TYPE
    if relabelled and facts.get("validated_by") != BY_TRANSFORMERS:
        return nomic_bert.runner
    if "opened_as" in facts:
        return partial(
            auto_model.runner, check=_check_both_ways, model_type=str(facts["opened_as"])
        )
    return auto_model.runner


def _check_both_ways(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless vLLM's Llama would look at the tokens on both sides."""
    expected = {"architectures": ["LlamaModel"], "is_causal": False}
    odd = [f"{key} = {config.get(key)!r}" for key in expected if config.get(key) != expected[key]]
    if odd:
        raise CheckpointError(
            "config.json is not that of EuroBERT for vLLM",
            evidence=", ".join(odd),
            fix="build it again",
        )


# A merged checkpoint as hf's is: precisions, devices and what it needs are the same.
TARGET = dataclasses.replace(
    hf.TARGET,
    name="vllm",
    summary="vLLM and TEI's candle backend: the merged checkpoint, relabelled, no remote code",
    fingerprint=fingerprint,
    check=check,
    build=build,
    runner=runner,
)
