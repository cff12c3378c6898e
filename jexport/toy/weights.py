"""What a toy checkpoint holds: every tensor's name, shape and values, and their file.

Each tensor is drawn by a generator of its own, seeded with its name in the original layout: the
order of writing cannot matter, and both layouts of one seed hold the same numbers.

Knows no folder and no companion file (`toy.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jexport.tasks import JINA_V3_PROMPTS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Drawing: TypeAlias = "tuple[Shape, Callable[[], Tensor]]"

TASKS = tuple(JINA_V3_PROMPTS)
LORA_RANK = 4
PARAMETRIZED = ".parametrizations.weight"
BLOCK = 1 << 24
"""Values drawn at a time, in float32 (64 MiB), so that the largest table costs little memory."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a toy is.

    Args:
        layers: transformer blocks.
        hidden: size of a token's vector.
        heads: of the attention; they share `hidden`.
        intermediate: size between the two matrices of a block's MLP.
        vocabulary: rows of its table; None for as many as the tokenizer needs.
        matryoshka: sizes that vectors may be cut to.
    """

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


def tensor_shapes(size: Size, rows: int) -> dict[str, Shape]:
    """Every tensor of the original layout.

    Args:
        size: how large the toy is.
        rows: of the embedding table.

    Returns:
        Shapes by name.
    """
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
    hidden, inner = size.hidden, size.intermediate
    matrices = {
        "roberta.embeddings.word_embeddings": (rows, hidden),
        "roberta.embeddings.token_type_embeddings": (1, hidden),
    }
    for n in range(size.layers):
        layer = f"roberta.encoder.layers.{n}"
        matrices[f"{layer}.mixer.Wqkv"] = (3 * hidden, hidden)
        matrices[f"{layer}.mixer.out_proj"] = (hidden, hidden)
        matrices[f"{layer}.mlp.fc1"] = (inner, hidden)
        matrices[f"{layer}.mlp.fc2"] = (hidden, inner)
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


def draw(
    key: str, shape: Shape, mean: float, deviation: float, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of normal values, the same for the same key whatever was drawn before.

    Args:
        key: seeds the generator.
        shape: of the tensor.
        mean: of its values.
        deviation: their standard deviation.
        dtype: of the tensor; None for bfloat16.

    Returns:
        The tensor, on the CPU.
    """
    import torch

    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    tensor = torch.empty(shape, dtype=dtype or torch.bfloat16)
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), BLOCK):
        block = flat[start : start + BLOCK]
        values = torch.randn(block.numel(), generator=generator)
        block.copy_(values.mul_(deviation).add_(mean))
    return tensor


def drawings(size: Size, rows: int, seed: int) -> dict[str, Drawing]:
    """Every tensor of the original layout, not drawn yet.

    Args:
        size: how large the toy is.
        rows: of the embedding table.
        seed: of every number.

    Returns:
        By name the shape, and what draws the bfloat16 tensor when called.
    """
    return {
        name: (
            shape,
            partial(draw, f"{seed}/{name}", shape, *_spread(name, shape, size.layers)),
        )
        for name, shape in tensor_shapes(size, rows).items()
    }


def adapter_tensors(factors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """One adapter in the hub's naming: native for q, k, v, original for everything else.

    Args:
        factors: the original layout's stacked LoRA factors by name, [tasks, ...].
        index: of the task in TASKS.

    Returns:
        Views of them, two dimensions each, by the hub's name.
    """
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


def write_tensors(path: Path, tensors: Mapping[str, Drawing]) -> None:
    """Write a bfloat16 safetensors file, one tensor in memory at a time.

    `safetensors.torch.save_file` holds the whole file twice (2.3 GB at full size). The format is a
    length (8 bytes, little endian), a JSON header padded to 8 bytes, and the tensors in order.

    Args:
        path: written anew.
        tensors: by name the shape, and what gives the bfloat16 tensor.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, make in tensors.values():
            file.write(make().contiguous().view(torch.int16).numpy().data)
