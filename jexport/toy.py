"""toy: a seeded random-weight checkpoint in a jina-embeddings-v3 layout, made on the spot.

A toy has the architecture, the tensor names, the dtype and the companion files of the real model,
so that everything can be tried without a hub. Its vectors mean nothing, but they behave: texts
differ from each other, tasks differ from each other, and no activation grows with depth.

Each tensor is drawn by a generator of its own, seeded with its name in the original layout: the
order of writing cannot matter, and both layouts of one seed hold the same numbers.

This module does not know how a checkpoint is read (`checkpoints/`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jexport import toy_tokenizer
from jexport.errors import (
    DiskFullError,
    OutputPathError,
    TokenizerError,
    UnsupportedCheckpointError,
    nearest,
)
from jexport.tasks import JINA_V3_PROMPTS

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Drawing: TypeAlias = "tuple[Shape, Callable[[], Tensor]]"

LAYOUTS = ("original", "native")
TASKS = tuple(JINA_V3_PROMPTS)
MAX_TOKENS = 8194
SENTENCE = "sentence_transformers.models"
LORA_RANK = 4
LORA_ALPHA = 1
PARAMETRIZED = ".parametrizations.weight"
BLOCK = 1 << 24
"""Values drawn at a time, in float32 (64 MiB), so that the largest table costs little memory."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a toy is; `vocabulary` is the rows of its table, None for the tokenizer's own."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int | None
    matryoshka: tuple[int, ...]


SMALL = Size(
    layers=2, hidden=128, heads=2, intermediate=320, vocabulary=None, matryoshka=(32, 64, 128)
)
FULL = Size(
    layers=24,
    hidden=1024,
    heads=16,
    intermediate=4096,
    vocabulary=250_002,
    matryoshka=(32, 64, 128, 256, 512, 768, 1024),
)


def write(
    folder: Path,
    *,
    layout: str = "original",
    full_size: bool = False,
    tokenizer: Path | None = None,
    seed: int = 0,
) -> Path:
    """Write a toy checkpoint into `folder`, which must be new or empty, and return `folder`.

    layout: 'original' (one file, adapters stacked in `parametrizations`) or 'native' (a base model
    and one PEFT folder per task). full_size: the real model's 572,310,396 parameters instead of
    about 480 thousand, with heads of 64 as the real one (servers take few sizes). tokenizer: a
    tokenizer.json to copy instead of the built-in byte-level BPE.
    The folder appears whole or not at all.
    Raises DiskFullError, OutputPathError, TokenizerError and UnsupportedCheckpointError.
    """
    if layout not in LAYOUTS:
        raise UnsupportedCheckpointError(
            f"toy: there is no checkpoint layout '{layout}'",
            evidence=f"a toy is written as: {', '.join(LAYOUTS)}",
            fix=nearest(layout, LAYOUTS),
        )
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
    drawings = _drawings(size, rows, seed)
    with _whole_folder(folder) as work:
        _write_companions(work, size, layout, rows)
        (work / "tokenizer.json").write_bytes(tokenizer_json)
        if layout == "original":
            _write_original(work, drawings)
        else:
            _write_native(work, drawings)
    return folder


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A work folder beside `folder` that takes its name when the block ends well."""
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
        found = f"it holds {len(entries)} entries, the first is {entries[0]}" if entries else ""
    else:
        found = "it is a file" if folder.exists() else ""
    if found:
        raise OutputPathError(
            f"toy: {folder} is not an empty folder",
            evidence=found,
            fix="name a new folder, or remove what is in this one",
        )


# --- numbers -----------------------------------------------------------------------------------


def tensor_shapes(size: Size, rows: int) -> dict[str, Shape]:
    """Every tensor of the original layout by name, with its shape; `rows` is the table's length."""
    hidden = size.hidden
    shapes: dict[str, Shape] = {}
    for name, (height, width) in _adapted(size, rows).items():
        shapes[f"{name}{PARAMETRIZED}.original"] = (height, width)
        # An embedding is adapted the other way round: A runs along its rows, B along its columns.
        down = (height, LORA_RANK) if _is_table(name) else (LORA_RANK, width)
        up = (LORA_RANK, width) if _is_table(name) else (height, LORA_RANK)
        shapes[f"{name}{PARAMETRIZED}.0.lora_A"] = (len(TASKS), *down)
        shapes[f"{name}{PARAMETRIZED}.0.lora_B"] = (len(TASKS), *up)
        if not _is_table(name):
            shapes[f"{name}.bias"] = (height,)
    norms = [f"roberta.encoder.layers.{n}.norm{k}" for n in range(size.layers) for k in (1, 2)]
    for name in ("roberta.emb_ln", *norms):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)
    return shapes


def _adapted(size: Size, rows: int) -> dict[str, tuple[int, int]]:
    """Every matrix with LoRA factors, as [rows, columns]: all linear maps and both embeddings."""
    hidden, wide = size.hidden, size.intermediate
    matrices = {
        "roberta.embeddings.word_embeddings": (rows, hidden),
        "roberta.embeddings.token_type_embeddings": (1, hidden),
    }
    for n in range(size.layers):
        layer = f"roberta.encoder.layers.{n}"
        matrices[f"{layer}.mixer.Wqkv"] = (3 * hidden, hidden)
        matrices[f"{layer}.mixer.out_proj"] = (hidden, hidden)
        matrices[f"{layer}.mlp.fc1"] = (wide, hidden)
        matrices[f"{layer}.mlp.fc2"] = (hidden, wide)
    return matrices | {"roberta.pooler.dense": (hidden, hidden)}


def _is_table(name: str) -> bool:
    return "embeddings" in name


def _spread(name: str, shape: Shape, layers: int) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values.

    Each block normalises after it adds, so activations stay of order 1 whatever the depth. The two
    matrices that end a branch shrink with 1 / sqrt(layers): at 1 / sqrt(inputs), all tokens of a
    text were the same vector after 24 layers (mean cosine 1.000, with these numbers 0.37), and a
    wrong pooling would have gone unseen. Queries and keys are doubled to sharpen attention.
    """
    if "ln." in name or "norm" in name:
        return (1.0, 0.1) if name.endswith("weight") else (0.0, 0.02)
    if name.endswith("bias"):
        return 0.0, 0.02
    if _is_table(name):
        deviation = 0.02 if "token_type" in name else 0.1
        return 0.0, {"lora_A": 1.0, "lora_B": 0.05}.get(name[-6:], deviation)
    gain = 1.0
    if "Wqkv" in name:
        gain = 2.0
    elif "out_proj" in name or "fc2" in name:
        gain = 0.7 / math.sqrt(layers)
    if name.endswith("lora_B"):
        return 0.0, gain / 2
    return 0.0, (1.0 if name.endswith("lora_A") else gain) / math.sqrt(shape[-1])


def _draw(key: str, shape: Shape, mean: float, deviation: float) -> Tensor:
    """A bfloat16 tensor of normal values, the same for the same key whatever was drawn before."""
    import torch

    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), BLOCK):
        block = flat[start : start + BLOCK]
        values = torch.randn(block.numel(), generator=generator)
        block.copy_(values.mul_(deviation).add_(mean))
    return tensor


def _drawings(size: Size, rows: int, seed: int) -> dict[str, Drawing]:
    """Every tensor of the original layout by name: its shape, and what draws it when called."""
    return {
        name: (
            shape,
            partial(_draw, f"{seed}/{name}", shape, *_spread(name, shape, size.layers)),
        )
        for name, shape in tensor_shapes(size, rows).items()
    }


def _write_original(folder: Path, drawings: Mapping[str, Drawing]) -> None:
    """model.safetensors with the five adapters stacked beside each matrix."""
    _write_tensors(folder / "model.safetensors", drawings)


def _write_native(folder: Path, drawings: Mapping[str, Drawing]) -> None:
    """The base as model.safetensors, and a PEFT folder for each task."""
    base = {
        name.replace(f"{PARAMETRIZED}.original", ".weight"): drawing
        for name, drawing in drawings.items()
        if ".lora_" not in name
    }
    _write_tensors(folder / "model.safetensors", base)
    factors = {name: make() for name, (_, make) in drawings.items() if ".lora_" in name}
    for index, task in enumerate(TASKS):
        adapter = folder / task.replace(".", "_").replace("-", "_")
        adapter.mkdir()
        _write_json(adapter / "adapter_config.json", _adapter_config())
        tensors = _adapter_tensors(factors, index)
        ready = {name: (tuple(tensor.shape), tensor.clone) for name, tensor in tensors.items()}
        _write_tensors(adapter / "adapter_model.safetensors", ready)


def _adapter_tensors(factors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """One adapter in the hub's naming: native for q, k, v, original for everything else."""
    tensors: dict[str, Tensor] = {}
    for stacked, factor in factors.items():
        name, which = stacked.split(f"{PARAMETRIZED}.0.lora_")
        values = factor[index]
        if _is_table(name):
            tensors[f"{name}.lora_embedding_{which}"] = values.T
        elif name.endswith("mixer.Wqkv"):
            # q, k and v share the A of the fused matrix; each takes its third of B.
            thirds = values.chunk(3) if which == "B" else (values, values, values)
            for letter, third in zip("qkv", thirds, strict=True):
                split = name.replace("mixer.Wqkv", f"self_attn.{letter}_proj")
                tensors[f"{split}.lora_{which}.weight"] = third
        else:
            tensors[f"{name}.lora_{which}.weight"] = values
    return tensors


def _write_tensors(path: Path, drawings: Mapping[str, Drawing]) -> None:
    """A bfloat16 safetensors file, one tensor in memory at a time.

    `safetensors.torch.save_file` holds the whole file twice (2.3 GB at full size). The format is a
    length (8 bytes, little endian), a JSON header padded to 8 bytes, and the tensors in order.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in drawings.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, make in drawings.values():
            file.write(make().contiguous().view(torch.int16).numpy().data)


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
