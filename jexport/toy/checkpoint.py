"""toy: a seeded random-weight checkpoint in a layout of jina-embeddings, made on the spot.

A toy has the architecture, the tensor names, the dtype and the companion files of the real model,
so that everything can be tried without a hub. Its vectors mean nothing, but they behave: texts
differ from each other, tasks differ from each other, and no activation grows with depth.

This module does not know how a checkpoint is read (`checkpoints/`), nor how its numbers are drawn
(`toy_weights.py`).
"""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jexport.errors import (
    DiskFullError,
    OutputPathError,
    TokenizerError,
    UnsupportedCheckpointError,
    nearest,
)
from jexport.tasks import JINA_V3_PROMPTS
from jexport.toy import jina_v5, weights
from jexport.toy import tokenizer as toy_tokenizer
from jexport.toy.weights import FULL, LORA_RANK, PARAMETRIZED, SMALL, TASKS, Drawing, Size

LAYOUTS = ("original", "native")
ALL_LAYOUTS = (*LAYOUTS, *jina_v5.LAYOUTS)
MAX_TOKENS = 8194
SENTENCE = "sentence_transformers.models"
LORA_ALPHA = 1


def write(
    folder: Path,
    *,
    layout: str = "original",
    full_size: bool = False,
    tokenizer: Path | None = None,
    seed: int = 0,
) -> Path:
    """Write a toy checkpoint; its folder appears whole or not at all.

    Args:
        folder: new or empty.
        layout: of jina-embeddings-v3 'original' (one file, adapters stacked in `parametrizations`)
            or 'native' (a base model and one PEFT folder per task); of v5 'jina-v5-small' or
            'jina-v5-nano'.
        full_size: the real model's sizes (v3: 572,310,396 parameters) instead of about 480
            thousand, with heads of 64 as the real one (servers take few sizes).
        tokenizer: a tokenizer.json to copy; None for the built-in byte-level BPE.
        seed: of every number; the same in both layouts of v3.

    Returns:
        `folder`.

    Raises:
        UnsupportedCheckpointError: there is no such layout.
        TokenizerError: the tokenizer cannot be read, is not XLM-R's kind, or has too many tokens.
        DiskFullError, OutputPathError: the folder cannot be written, or is not empty.
    """
    if layout not in ALL_LAYOUTS:
        raise UnsupportedCheckpointError(
            f"toy: there is no checkpoint layout '{layout}'",
            evidence=f"a toy is written as: {', '.join(ALL_LAYOUTS)}",
            fix=nearest(layout, ALL_LAYOUTS),
        )
    if layout in jina_v5.LAYOUTS:
        with whole_folder(folder) as work:
            jina_v5.write_files(work, layout, full_size=full_size, tokenizer=tokenizer, seed=seed)
        return folder
    size = FULL if full_size else SMALL
    tokenizer_json = toy_tokenizer.train() if tokenizer is None else toy_tokenizer.read(tokenizer)
    tokens = toy_tokenizer.rows(tokenizer_json, tokenizer)
    rows = size.vocabulary or tokens
    if tokens > rows:
        raise TokenizerError(
            "toy: the tokenizer does not fit the embedding table",
            evidence=f"{tokenizer} has {tokens} tokens, the full-size table has {rows} rows",
            fix="take a smaller tokenizer, or leave out full_size",
        )
    drawings = weights.drawings(size, rows, seed)
    with whole_folder(folder) as work:
        _write_companions(work, size, layout, rows)
        (work / "tokenizer.json").write_bytes(tokenizer_json)
        if layout == "original":
            _write_original(work, drawings)
        else:
            _write_native(work, drawings)
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A work folder beside `folder` that takes its name when the block ends well.

    Args:
        folder: new or empty.

    Yields:
        The work folder.

    Raises:
        DiskFullError, OutputPathError: it cannot be written, or `folder` is not empty.
    """
    target = folder.resolve()
    work = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        _check_free(folder)
        work.mkdir(parents=True)
        yield work
        work.replace(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                "toy: no space left on the device",
                evidence=f"while writing {folder}",
                fix="free some space (a full-size toy needs 1.2 GB), or write elsewhere",
            ) from error
        raise OutputPathError(
            f"toy: cannot write {folder}",
            evidence=str(error),
            fix="name a folder that you may write to",
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_free(folder: Path) -> None:
    """Raise OutputPathError unless `folder` is absent or an empty folder."""
    if folder.is_dir():
        entries = sorted(entry.name for entry in folder.iterdir())
        evidence = f"it holds {len(entries)} entries, the first is {entries[0]}" if entries else ""
    else:
        evidence = "it is a file" if folder.exists() else ""
    if evidence:
        raise OutputPathError(
            f"toy: {folder} is not an empty folder",
            evidence=evidence,
            fix="name a new folder, or remove what is in this one",
        )


def _write_original(folder: Path, drawings: Mapping[str, Drawing]) -> None:
    """model.safetensors with the five adapters stacked beside each matrix."""
    weights.write_tensors(folder / "model.safetensors", drawings)


def _write_native(folder: Path, drawings: Mapping[str, Drawing]) -> None:
    """The base as model.safetensors, and a PEFT folder for each task."""
    base = {
        name.replace(f"{PARAMETRIZED}.original", ".weight"): drawing
        for name, drawing in drawings.items()
        if ".lora_" not in name
    }
    weights.write_tensors(folder / "model.safetensors", base)
    factors = {name: make() for name, (_, make) in drawings.items() if ".lora_" in name}
    for index, task in enumerate(TASKS):
        adapter = folder / task.replace(".", "_").replace("-", "_")
        adapter.mkdir()
        _write_json(adapter / "adapter_config.json", _adapter_config())
        tensors = weights.adapter_tensors(factors, index)
        ready = {name: (tuple(tensor.shape), tensor.clone) for name, tensor in tensors.items()}
        weights.write_tensors(adapter / "adapter_model.safetensors", ready)


# --- companion files ---------------------------------------------------------------------------


def _write_companions(folder: Path, size: Size, layout: str, rows: int) -> None:
    """config.json, the tokenizer's settings and the sentence-transformers files."""
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    special |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    loading = {"model_max_length": MAX_TOKENS, "tokenizer_class": "PreTrainedTokenizerFast"}
    kinds = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {"word_embedding_dimension": size.hidden}
    pooling |= {f"pooling_mode_{kind}": kind == "mean_tokens" for kind in kinds}
    prompts = {
        "prompts": dict(JINA_V3_PROMPTS),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "custom_st.Transformer", "kwargs": ["task"]},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{SENTENCE}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{SENTENCE}.Normalize"},
    ]
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "config.json", _config(size, layout, rows))
    _write_json(folder / "tokenizer_config.json", special | loading)
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(folder / "config_sentence_transformers.json", prompts)


def _config(size: Size, layout: str, rows: int) -> dict[str, Any]:
    """config.json as on the hub, without `auto_map`: there is no code beside the weights."""
    native = layout == "native"
    tokens = {"vocab_size": rows, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    blocks = {"num_hidden_layers": size.layers, "num_attention_heads": size.heads}
    widths = {"hidden_size": size.hidden, "intermediate_size": size.intermediate}
    dropout = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    return {
        "_name_or_path": "jinaai/jina-embeddings-v3",
        "architectures": ["JinaEmbeddingsV3Model" if native else "XLMRobertaModel"],
        "model_type": "jina_embeddings_v3" if native else "xlm-roberta",
        **(tokens | blocks | widths | dropout),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "initializer_range": 0.02,
        "type_vocab_size": 1,
        "max_position_embeddings": MAX_TOKENS,
        "position_embedding_type": "rotary",
        "rotary_emb_base": 20000.0,
        "load_trained_adapters": True,
        "lora_adaptations": list(TASKS),
        "lora_rank": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout_p": 0.0,
        "lora_main_params_trainable": False,
        "task_instructions": dict(JINA_V3_PROMPTS),
        "matryoshka_dimensions": list(size.matryoshka),
        "truncate_dim": None,
        "emb_pooler": None,
        "classifier_dropout": None,
        "use_flash_attn": True,
        "use_cache": True,
        "output_past": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.30.2",
    }


ADAPTED_MODULES = "word_embeddings token_type_embeddings q_proj k_proj v_proj o_proj fc1 fc2 dense"


def _adapter_config() -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "target_modules": ADAPTED_MODULES.split(),
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
