"""vllm: the merged checkpoint under names that vLLM and TEI (candle) serve without remote code.

jina-embeddings-v3 becomes nomic_bert (checkpoints/nomic_bert.py) and EuroBERT a Llama that reads
both ways, for vLLM alone; BERT, RoBERTa and Qwen3 keep their own architecture, under the names that
both servers expect. vLLM itself is not needed here: to be validated, the written folder is read
back and run in torch as vLLM would run it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import write_json
from jexport.checkpoints import (
    JINA,
    auto_model,
    module_stack,
    module_writer,
    nomic_bert,
    sentence_transformer,
    shard_writer,
)
from jexport.errors import CheckpointError, UnsupportedCheckpointError
from jexport.recipe import CompileSpec
from jexport.targets import hf
from jexport.types import CompiledModel, HeadModule, LoadedModel, MergedModel, Runner


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the servers want a model_type that they have a class for.

    Args:
        architecture: the name that they look for.
        config: keys of config.json that are put over the checkpoint's.
        defaults: keys that TEI asks for by name, and what the class takes where one is missing.
        tei: whether TEI loads it; vLLM does.
    """

    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tei: bool = True


LEARNED = {"position_embedding_type": "absolute"}
FORMS: Mapping[str, Form] = {
    "bert": Form(architecture="BertModel", config=LEARNED),
    "roberta": Form(architecture="RobertaModel", config=LEARNED),
    "xlm-roberta": Form(architecture="XLMRobertaModel", config=LEARNED),
    "qwen3": Form(
        architecture="Qwen3Model",
        defaults={
            "attention_bias": False,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
    "eurobert": Form(
        architecture="LlamaModel", config={"model_type": "llama", "is_causal": False}, tei=False
    ),
}
"""By the checkpoint's model_type. Sources: vLLM 0.32 registry.py (`*Model` is served as the
`*ForCausalLM` of that name, as an embedder), llama.py (is_causal); TEI 1.9 models/qwen3.rs."""

POOLINGS = ("mean", "cls", "last")
"""What both servers read from 1_Pooling."""

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
LLAMA = "llama"
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
    elif loaded.head and not _is_projection(loaded.head):
        evidence = (
            f"its modules are: {'; '.join(loaded.embedding.modules)}; they read: {PROJECTION}"
        )
    elif loaded.source.layout in JINA:
        activation = config.get("hidden_act", "gelu")
        if activation != "gelu":
            evidence = f"hidden_act = {activation!r}; the architecture that is written has gelu"
    elif not loaded.embedding.contextual:
        evidence = "it is a static embedding: neither of them has a model without layers"
    elif not loaded.weights or config.get("model_type") not in FORMS:
        evidence = (
            f"model_type {config.get('model_type')!r} (layout {loaded.source.layout}); "
            f"there are: jina-embeddings-v3, {', '.join(FORMS)}"
        )
    elif _rope(config).get("rope_type", "default") != "default":
        evidence = f"RoPE of type {_rope(config)['rope_type']!r}, which TEI does not read"
    elif config.get("position_embedding_type", "absolute") != "absolute":
        evidence = f"position_embedding_type = {config['position_embedding_type']!r}"
    if evidence:
        raise UnsupportedCheckpointError(
            "this checkpoint cannot be written for both vLLM and TEI",
            evidence=evidence,
            fix=WAY_OUT,
        )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of RoPE, in the words of transformers 5 or those of version 4."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return stated if isinstance(stated, Mapping) else {}


def _own_architecture(loaded: LoadedModel, dtype: str) -> tuple[dict[str, Any], Form]:
    """config.json of an architecture that the servers have, and its form.

    The base of RoPE also stands where transformers 4 wrote it: TEI reads it nowhere else.
    """
    form = FORMS[loaded.config["model_type"]]
    theta = _rope(loaded.config).get("rope_theta")
    return {
        **form.defaults,
        **sentence_transformer.config_json(loaded.config, dtype),
        **({"rope_theta": theta} if theta else {}),
        **form.config,
        "architectures": [form.architecture],
    }, form


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
    use, servers = [USE.format(dtype=dtype)], ["vllm", "tei"]
    validated_by = "transformers, from the written folder"
    if loaded.source.layout in JINA:
        config = nomic_bert.config_json(loaded.config, loaded.embedding, model.precision)
        weights = nomic_bert.relabelled(loaded.weights, config["n_layer"])
        warning: tuple[str, ...] = NOT_TRANSFORMERS
        validated_by = "plain torch, from the written folder, read as vLLM reads it"
    else:
        weights = sentence_transformer.plain_names(loaded.weights)
        config, form = _own_architecture(loaded, dtype)
        servers = servers if form.tei else ["vllm"]
        warning = NOT_CAUSAL if config["model_type"] == LLAMA else ()
    use += [USE_TEI, NO_PROMPTS + TEI_PROMPTS] if "tei" in servers else [f"{NO_PROMPTS}."]
    use += warning
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
            "served_by": servers,
            "tags": ["text-embeddings-inference"] if "tei" in servers else [],
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
    with _opening(compiled.facts["model_type"])(
        compiled.folder, compiled.precision, device, threads
    ) as run:
        yield hf.with_modules(compiled, run)


def _opening(
    model_type: str,
) -> Callable[[Path, str, str, int], AbstractContextManager[Runner]]:
    """Who opens a written folder of that model_type."""
    if model_type == nomic_bert.MODEL_TYPE:
        return nomic_bert.runner
    if model_type == LLAMA:
        return partial(auto_model.runner, check=_check_both_ways, model_type="eurobert")
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
