"""Writes a checkpoint of an architecture that no library knows: code, weights, tokenizer.

The code is `fixtures/remote_unknown/`; its weights are drawn here, so that none are committed.
Tests are no package: open this file with `runpy.run_path(...)["write"]`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"
MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def write(folder: Path, *, seed: int = 0) -> Path:
    """Write a `tinymixer` checkpoint into the new `folder` and return it.

    A sentence-transformers folder (mean pooling, normalised, 512 tokens) that loads only with
    `trust_remote_code=True`.
    """
    shutil.copytree(
        FIXTURES / "remote_unknown", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / "jina_original_small" / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (path, kind) in enumerate(MODULES.items())
    ]
    pooling = {"word_embedding_dimension": config["hidden_size"], "pooling_mode_mean_tokens": True}
    pooling |= {f"pooling_mode_{kind}_tokens": False for kind in ("max", "mean_sqrt_len")}
    pooling["pooling_mode_cls_token"] = False
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False}
    )
    return folder


def _weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Every tensor by name: tables of order 1, maps that keep the scale, norms around 1."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def draw(name: str, *shape: int, scale: float, around: float = 0.0) -> None:
        weights[name] = around + scale * torch.randn(shape, generator=generator)

    def norm(name: str) -> None:
        draw(f"{name}.weight", hidden, scale=0.1, around=1.0)
        draw(f"{name}.bias", hidden, scale=0.05)

    def linear(name: str, outputs: int, inputs: int) -> None:
        draw(f"{name}.weight", outputs, inputs, scale=inputs**-0.5)
        draw(f"{name}.bias", outputs, scale=0.05)

    draw("words.weight", config["vocab_size"], hidden, scale=1.0)
    draw("positions.weight", config["max_position_embeddings"], hidden, scale=0.3)
    norm("attention.norm")
    linear("attention.qkv", 3 * hidden, hidden)
    linear("attention.out", hidden, hidden)
    for n in range(config["num_hidden_layers"]):
        norm(f"blocks.{n}.norm")
        linear(f"blocks.{n}.gate", wide, hidden)
        linear(f"blocks.{n}.up", wide, hidden)
        linear(f"blocks.{n}.down", hidden, wide)
    norm("norm")
    return weights


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
