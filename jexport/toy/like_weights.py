"""What a checkpoint like a known one holds: transformers' own class, with numbers drawn by name.

The class says which tensors there are, and transformers writes them under the names that files on
the hub have. Knows no companion file (`like.py`).
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.toy.weights import draw

if TYPE_CHECKING:
    from torch import Tensor

BRANCH_END = re.compile(
    r"(o_proj|out_proj|out_lin|down_proj|fc2|lin2|wo|Wo|attn\.o|SelfAttention\.o|output\.dense)"
    r"\.weight$"
)
"""Matrices whose result is added to what flows past them."""

ATTENDING = re.compile(r"(query|key|q_proj|k_proj|q_lin|k_lin|attn\.q|attn\.k|Wqkv)\.weight$")
T5_QUERY = re.compile(r"SelfAttention\.q\.weight$")
"""T5 divides no product of query and key by the root of their size: its queries are small."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A Dense module's linear map.

    Args:
        folder: of the module.
        inputs: size of the vectors that go in.
        outputs: size of those that come out.
        bias: whether it has one.
    """

    folder: str
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which files of weights there are.

    Args:
        file: 'model.safetensors' or 'pytorch_model.bin'.
        dtype: torch's name of it.
        architecture: class of transformers that the model is made with.
        shards: files that the weights are split into.
        position_ids: whether the file has the counting buffer of transformers before 4.31.
        heads: rows of linear maps that stand beside it, by file, which is torch's.
        table: name of a table that is all there is; '' for a model.
        rows: of that table.
        width: of a token's vector.
        dense: the projections behind the pooling.
    """

    file: str
    dtype: str
    architecture: str
    shards: int
    position_ids: bool
    table: str
    rows: int
    width: int
    heads: Mapping[str, int] = field(default_factory=dict)
    dense: tuple[Projection, ...] = ()


def write(folder: Path, home: Path, spec: Weights, seed: int) -> None:
    """Write every file of weights.

    Args:
        folder: the checkpoint's own, its config.json and the modules' folders in it.
        home: the first module's folder.
        spec: which files, and how large.
        seed: of every number.
    """
    import torch

    dtype = getattr(torch, spec.dtype)
    if spec.table:
        shape = (spec.rows, spec.width)
        tensors = {spec.table: draw(f"{seed}/{spec.table}", shape, 0.0, 1.0, dtype)}
    else:
        tensors = _model_tensors(folder, spec, seed)
    if spec.position_ids:
        table = next(name for name in tensors if name.endswith("position_embeddings.weight"))
        counter = table.replace("position_embeddings.weight", "position_ids")
        tensors[counter] = torch.arange(len(tensors[table])).unsqueeze(0)
    _save(home, spec, tensors)
    for one in spec.dense:
        shapes = {"linear.weight": (one.outputs, one.inputs), "linear.bias": (one.outputs,)}
        drawn = {
            name: draw(f"{seed}/{one.folder}/{name}", shape, 0.0, 0.5 / shape[-1] ** 0.5, dtype)
            for name, shape in shapes.items()
            if one.bias or name != "linear.bias"
        }
        _save_file(folder / one.folder / "model.safetensors", drawn)
    for name, rows in spec.heads.items():
        head = {
            key: draw(f"{seed}/{name}/{key}", shape, 0.0, 0.1, dtype)
            for key, shape in (("weight", (rows, spec.width)), ("bias", (rows,)))
        }
        torch.save(head, folder / name)


def _model_tensors(folder: Path, spec: Weights, seed: int) -> dict[str, Tensor]:
    """A model of the class that config.json names, as transformers saves it."""
    import torch
    import transformers
    from safetensors.torch import load_file

    with _quiet():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        architecture = getattr(transformers, spec.architecture)
        if spec.architecture == "AutoModel":
            architecture = architecture._model_mapping[type(config)]
        model = architecture(config)
        with torch.no_grad():
            for name, one in model.named_parameters():
                mean, deviation = _spread(name, one, config)
                shape = tuple(one.shape)
                one.copy_(draw(f"{seed}/{name}", shape, mean, deviation, torch.float32))
        model = model.to(getattr(torch, spec.dtype))
        with tempfile.TemporaryDirectory() as work:
            model.save_pretrained(work)
            return dict(load_file(Path(work) / "model.safetensors"))


def _spread(name: str, one: Tensor, config: Any) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's values.

    A branch's end shrinks with the root of the number of layers, so that the sum stays of order 1;
    attention is sharpened, so that a wrong pooling or mask shows. A norm is drawn around the value
    that its class starts with: 1, or 0 where it adds 1 itself (Gemma).
    """
    if one.ndim < 2:
        start = round(float(one.detach().float().mean()))
        return (start, 0.1) if name.endswith("weight") else (0.0, 0.02)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    if "relative_attention_bias" in name:
        return 0.0, 1.0
    if one.shape[0] >= 2 and re.search(r"(embed|shared|embeddings\.)", name):
        if "token_type" in name or "position" in name:
            return 0.0, 0.1
        return 0.0, 1 / math.sqrt(hidden) if config.model_type == "gemma3_text" else 0.3
    inputs = one.shape[-1]
    if T5_QUERY.search(name):
        return 0.0, 2.0 / math.sqrt(inputs * config.d_kv)
    gain = 1 / math.sqrt(layers) if BRANCH_END.search(name) else 1.0
    if ATTENDING.search(name):
        gain = 2.0
    return 0.0, gain / math.sqrt(inputs)


def _save(home: Path, spec: Weights, tensors: dict[str, Tensor]) -> None:
    """The weights in one file, or in shards with their index."""
    if spec.shards == 1:
        _save_file(home / spec.file, tensors)
        return
    import json

    names, total = sorted(tensors), spec.shards
    parts = [names[number::total] for number in range(total)]
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{total:05d}.safetensors"
        _save_file(home / file, {name: tensors[name] for name in part})
        places |= dict.fromkeys(part, file)
    size = sum(one.numel() * one.element_size() for one in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    path = home / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_file(path: Path, tensors: dict[str, Tensor]) -> None:
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file({name: one.contiguous() for name, one in tensors.items()}, path, {"format": "pt"})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings: what is unusual about these models is meant."""
    import warnings

    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
