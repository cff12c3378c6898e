"""vllm: the merged checkpoint under names that vLLM and TEI (candle) serve without remote code.

jina-embeddings-v3 becomes nomic_bert (checkpoints/nomic_bert.py); BERT and RoBERTa encoders keep
their own architecture, under the names that both servers expect. vLLM itself is not needed here: to
be validated, the written folder is read back and run in plain torch as vLLM would run it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import write_json
from jexport.checkpoints import (
    JINA,
    auto_model,
    nomic_bert,
    sentence_transformer,
    shard_writer,
)
from jexport.errors import UnsupportedCheckpointError
from jexport.recipe import CompileSpec
from jexport.targets import hf
from jexport.types import CompiledModel, MergedModel, Runner

ENCODERS = {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}
"""Architectures that both servers have for themselves, with learned positions."""

POOLINGS = ("mean", "cls", "last")
"""What both servers read from 1_Pooling."""

WAY_OUT = "use --target hf (transformers, sentence-transformers) or --target onnx (TEI's ort)"
USE = (
    "Or serve it: `vllm serve FOLDER --dtype {dtype}`,",
    "or `text-embeddings-router --model-id FOLDER`.",
    "vLLM does not put the prompt before a text, TEI does with `--default-prompt-name`.",
)
NOT_TRANSFORMERS = (
    "Do not open it with transformers or sentence-transformers: their `nomic_bert` is another",
    "network, made up where this one has no weights. The target `hf` is for them.",
)


def fingerprint() -> dict[str, Any]:
    """Say where it runs: releases whose loaders were run (vLLM) or read (TEI)."""
    return {"vllm": ">=0.32", "text-embeddings-inference": ">=1.9", "device": "any"}


def check(model: MergedModel) -> None:
    """Refuse an architecture, activation or pooling that vLLM and TEI would not take as it is.

    Args:
        model: merged.

    Raises:
        UnsupportedCheckpointError: says which of them, and what there is instead.
    """
    loaded = model.model
    config, pooling = loaded.config, loaded.embedding.pooling
    evidence = ""
    if pooling not in POOLINGS:
        evidence = f"its pooling is '{pooling}'; they have: {', '.join(POOLINGS)}"
    elif loaded.source.layout in JINA:
        activation = config.get("hidden_act", "gelu")
        if activation != "gelu":
            evidence = f"hidden_act = {activation!r}; the architecture that is written has gelu"
    elif not loaded.weights or config.get("model_type") not in ENCODERS:
        evidence = (
            f"model_type {config.get('model_type')!r} (layout {loaded.source.layout}); "
            f"there are: jina-embeddings-v3, {', '.join(ENCODERS)}"
        )
    elif config.get("position_embedding_type", "absolute") != "absolute":
        evidence = f"position_embedding_type = {config['position_embedding_type']!r}"
    if evidence:
        raise UnsupportedCheckpointError(
            "this checkpoint cannot be written for both vLLM and TEI",
            evidence=evidence,
            fix=WAY_OUT,
        )


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
    use = [line.format(dtype=dtype) for line in USE]
    validated_by = "transformers, from the written folder"
    if loaded.source.layout in JINA:
        config = nomic_bert.config_json(loaded.config, loaded.embedding, model.precision)
        weights = nomic_bert.relabelled(loaded.weights, config["n_layer"])
        use += NOT_TRANSFORMERS
        validated_by = "plain torch, from the written folder, read as vLLM reads it"
    else:
        weights = sentence_transformer.plain_names(loaded.weights)
        config = sentence_transformer.config_json(loaded.config, dtype) | {
            "architectures": [ENCODERS[loaded.config["model_type"]]],
            "position_embedding_type": "absolute",
        }
    files = shard_writer.write(out_dir, weights, model.precision)
    write_json(out_dir / hf.CONFIG, config)
    return CompiledModel(
        target="vllm",
        precision=model.precision,
        folder=out_dir,
        files=(*files, hf.CONFIG),
        signature=hf.signature(loaded.embedding.dimension),
        facts={
            "model_type": config["model_type"],
            "weights": len(weights),
            "validated_by": validated_by,
            "use": use,
            "tags": ["text-embeddings-inference"],
        },
    )


@contextlib.contextmanager
def runner(compiled: CompiledModel, device: str, threads: int) -> Iterator[Runner]:
    """Open the folder in this process, without vLLM.

    Relabelled jina-embeddings-v3 runs in plain torch, read as vLLM reads it; an encoder of its own
    architecture in transformers.

    Args:
        compiled: what `build` wrote.
        device: 'auto' (CUDA when there), 'cpu' or 'cuda'.
        threads: of torch; 0 leaves its own number.

    Yields:
        A runner that gives last_hidden_state in float32.

    Raises:
        StateDictError: a weight is missing, unexpected or of another shape.
        CheckpointError: a server could not take the config or the tensors.
        DependencyError: 'cuda' is asked for and torch has none, or transformers is too old.
        ValueError: another device.
    """
    relabelled = compiled.facts["model_type"] == nomic_bert.MODEL_TYPE
    open_folder = nomic_bert.runner if relabelled else auto_model.runner
    with open_folder(compiled.folder, compiled.precision, device, threads) as run:
        yield run


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
