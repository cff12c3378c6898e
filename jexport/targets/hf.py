"""hf: the merged checkpoint, for transformers and sentence-transformers without remote code.

For jina-embeddings-v3 it is the layout of transformers >= 5.4, with its own names; for any other
encoder the checkpoint's own names and config. There is no graph: the weights are merged and cast as
they are written. Knows no other engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jexport.artifacts.manifest import write_json
from jexport.checkpoints import (
    JINA_V3,
    auto_model,
    module_stack,
    module_writer,
    native_config,
    sentence_transformer,
    shard_writer,
    static_embedding,
)
from jexport.errors import UnsupportedCheckpointError
from jexport.recipe import CompileSpec
from jexport.targets import Requirements, RuntimeSupport, Target
from jexport.types import (
    Batching,
    CompiledModel,
    LoadedModel,
    MergedModel,
    Runner,
    Signature,
    Tensors,
    TensorSpec,
)

CONFIG = "config.json"
TOKEN_VECTORS, TEXT_VECTORS = "last_hidden_state", "sentence_embedding"
USE = (
    "Or, without jexport, `SentenceTransformer(FOLDER)` (the prompt is put before each text) or",
    "`AutoModel.from_pretrained(FOLDER)` (prompt, pooling and normalisation are left to you).",
    "transformers >= 5.4 and sentence-transformers >= 6; no remote code.",
)
USE_STATIC = (
    "Or, without jexport, `SentenceTransformer(FOLDER)`: sentence-transformers >= 6 (the prompt is",
    "put before each text).",
)
USE_BF16 = (
    "sentence-transformers pools in bfloat16 too, which costs more than the weights do, unless",
    'told not to: `SentenceTransformer(FOLDER, model_kwargs={"dtype": "float32"})`.',
)


def fingerprint() -> dict[str, Any]:
    """Say where it runs: wherever a transformers does that knows the class."""
    return {"transformers": ">=5.4", "sentence-transformers": ">=6", "device": "any"}


def check(model: MergedModel) -> None:
    """Refuse a checkpoint that only its own code can load.

    Args:
        model: merged.

    Raises:
        UnsupportedCheckpointError: it has no weights under names that transformers knows.
    """
    if not model.model.weights:
        raise UnsupportedCheckpointError(
            "a checkpoint that only its own code can load cannot be written for transformers",
            evidence=f"{model.model.source.name} is of the layout {model.model.source.layout}",
            fix="use --target onnx: a graph needs no code",
        )


def build(model: MergedModel, spec: CompileSpec, out_dir: Path) -> CompiledModel:
    """Write model.safetensors (or shards and their index) and config.json.

    Args:
        model: with nothing left to merge.
        spec: has nothing for this target.
        out_dir: an empty folder.

    Returns:
        The folder as a compiled model, its weights in model.precision.
    """
    loaded = model.model
    assert not loaded.adapter, "merge comes first"
    dtype = shard_writer.DTYPES[model.precision][1]
    if loaded.source.layout in JINA_V3:
        config = native_config.merged_json(loaded.config, loaded.embedding.matryoshka, dtype)
    else:
        config = sentence_transformer.config_json(loaded.config, dtype)
    files = shard_writer.write(out_dir, loaded.weights, model.precision)
    write_json(out_dir / CONFIG, config)
    modules = module_writer.write(out_dir, loaded.head, model.precision) if loaded.head else ()
    return CompiledModel(
        target="hf",
        precision=model.precision,
        folder=out_dir,
        files=(*files, CONFIG, *modules),
        signature=signature(loaded.embedding.dimension, whole=bool(loaded.head)),
        facts={
            "model_type": config["model_type"],
            "weights": len(loaded.weights),
            "use": [*_use(loaded), *(USE_BF16 if model.precision == "bf16" else ())],
            "tags": ["sentence-transformers", "transformers"],
        },
    )


def _use(model: LoadedModel) -> tuple[str, ...]:
    """How it is opened without jexport."""
    return USE if model.embedding.contextual else USE_STATIC


def signature(width: int, *, whole: bool = False) -> Signature:
    """What a merged checkpoint takes and gives: token vectors, pooled by who opens it.

    Args:
        width: of a token vector, or of a text's.
        whole: gives text vectors, by the modules that are written beside the transformer.

    Returns:
        int64 ids and mask [batch, sequence] -> float32 [batch, sequence, width], or [batch, width].
    """
    shape = ("batch", "sequence")
    name, lead = (TEXT_VECTORS, shape[:1]) if whole else (TOKEN_VECTORS, shape)
    return Signature(
        inputs=tuple(
            TensorSpec(name=name, dtype="int64", shape=shape)
            for name in ("input_ids", "attention_mask")
        ),
        outputs=(TensorSpec(name=name, dtype="float32", shape=(*lead, width)),),
    )


@contextlib.contextmanager
def runner(compiled: CompiledModel, device: str, threads: int) -> Iterator[Runner]:
    """Open the folder with AutoModel.

    Args:
        compiled: what `build` wrote.
        device: 'auto' (CUDA when there), 'cpu' or 'cuda'.
        threads: of torch; 0 leaves its own number.

    Yields:
        A runner that gives last_hidden_state in float32, or sentence_embedding where modules with
        weights follow the pooling.

    Raises:
        StateDictError: a weight is missing, unexpected or of another shape.
        CheckpointError: it opens in another precision than it was written in.
        DependencyError: 'cuda' is asked for and torch has none, or transformers is too old.
        ValueError: another device.
    """
    is_static = compiled.facts["model_type"] == static_embedding.MODEL_TYPE
    opening = (
        static_embedding.runner(compiled.folder, device)
        if is_static
        else auto_model.runner(compiled.folder, compiled.precision, device, threads)
    )
    with opening as run:
        yield with_modules(compiled, run)


def with_modules(compiled: CompiledModel, run: Runner) -> Runner:
    """A runner that also runs the modules that are written beside the transformer.

    Args:
        compiled: says by its signature whether there are any.
        run: gives last_hidden_state.

    Returns:
        `run` itself where there are none; else one that gives sentence_embedding, by float32
        arithmetic on the CPU.

    Raises:
        StateDictError, CheckpointError: as module_stack.read.
    """
    if compiled.signature.output(TEXT_VECTORS) is None:
        return run
    import torch

    from jexport.graph.head import Head

    stack = module_stack.read(compiled.folder)
    assert stack is not None, "the signature names what modules.json lists"
    head = Head(stack.head)

    def whole(feed: Tensors) -> Tensors:
        hidden = torch.from_numpy(np.asarray(run(feed)[TOKEN_VECTORS]))
        mask = torch.from_numpy(np.asarray(feed["attention_mask"])).to(torch.float32)
        with torch.inference_mode():
            return {TEXT_VECTORS: head(hidden, mask).numpy()}

    return whole


def batching(compiled: CompiledModel, device: str) -> Batching:
    """On a CPU shapes that repeat, where there are many texts.

    oneDNN keeps code for up to 1,024 shapes, and what it frees leaves holes: 100,000 short texts
    took the process from 482 to 563 MiB, and to 462 with shapes that repeat.

    Args:
        compiled: any.
        device: 'cpu' or 'cuda'.

    Returns:
        The default on CUDA, else with few_shapes='many'.
    """
    return Batching() if device == "cuda" else Batching(few_shapes="many")


TARGET = Target(
    name="hf",
    summary="transformers and sentence-transformers: the merged checkpoint, no remote code",
    precisions=("fp32", "bf16"),
    devices=("cpu", "cuda"),
    requirements=Requirements(
        build=("torch", "transformers", "safetensors"),
        run=("torch", "transformers", "safetensors", "tokenizers", "numpy"),
        extra="hf",
    ),
    fingerprint=fingerprint,
    check=check,
    build=build,
    runner=runner,
    needs_onnx=False,
    runtime=RuntimeSupport(steady_threads=1, batching=batching),  # see checkpoints/eager.py
)
