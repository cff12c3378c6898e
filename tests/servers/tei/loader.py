"""What text-embeddings-router asks of a folder before it serves it, as assertions.

After TEI 1.9: the router (ModelConfig, pooling, length), the ONNX Runtime backend (file, sizes) and
the candle backend (nomic_bert, bert). Imports nothing of jexport.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CANDLE = {
    "nomic_bert": {
        "prenorm": bool,
        "rotary_emb_fraction": float,
        "qkv_proj_bias": bool,
        "rotary_emb_base": (int, float),
        "rotary_emb_interleaved": bool,
        "mlp_fc1_bias": bool,
        "mlp_fc2_bias": bool,
        "rotary_scaling_factor": (float, type(None)),
        "n_embd": int,
        "n_head": int,
        "n_inner": int,
        "n_layer": int,
        "n_positions": int,
        "activation_function": str,
        "vocab_size": int,
        "type_vocab_size": int,
        "layer_norm_epsilon": float,
    },
    "bert": {
        "vocab_size": int,
        "hidden_size": int,
        "num_hidden_layers": int,
        "num_attention_heads": int,
        "intermediate_size": int,
        "hidden_act": str,
        "max_position_embeddings": int,
        "type_vocab_size": int,
        "layer_norm_eps": float,
        "pad_token_id": int,
        "position_embedding_type": str,
    },
}
"""Keys of config.json that the candle backend cannot do without, by model_type."""

EMBEDDINGS = ("embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight")
LAYERS = {
    "nomic_bert": (
        (*EMBEDDINGS, "emb_ln.weight", "emb_ln.bias"),
        "encoder.layers.{}.",
        ("attn.Wqkv", "attn.out_proj", "norm1", "mlp.fc1", "mlp.fc2", "norm2"),
    ),
    "bert": (
        (*EMBEDDINGS, "embeddings.position_embeddings.weight", "embeddings.LayerNorm.weight"),
        "encoder.layer.{}.",
        (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        ),
    ),
}
"""By model_type: tensors outside the layers, a layer's prefix, its modules (weight and bias)."""


def read(folder: Path, name: str) -> Any:
    """A JSON file of the folder."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def router(folder: Path) -> tuple[str, int]:
    """What the router itself reads: the pooling, and the longest text in tokens."""
    config = read(folder, "config.json")
    assert isinstance(config["model_type"], str)
    assert [name for name in config["architectures"] if isinstance(name, str)]
    # An architecture of this ending would be served as a classifier.
    assert not any(name.endswith("Classification") for name in config["architectures"])
    assert isinstance(config["pad_token_id"], int)
    assert isinstance(config["max_position_embeddings"], int)
    assert (folder / "tokenizer.json").is_file()
    modes = read(folder, "1_Pooling/config.json")
    # Its deserializer has no default for these two.
    assert isinstance(modes["pooling_mode_cls_token"], bool)
    assert isinstance(modes["pooling_mode_mean_tokens"], bool)
    chosen = [key for key, value in modes.items() if key.startswith("pooling_mode_") and value]
    assert len(chosen) == 1, chosen
    prompts = read(folder, "config_sentence_transformers.json")["prompts"]
    assert all(isinstance(prompt, str) for prompt in prompts.values())
    return chosen[0], read(folder, "sentence_bert_config.json")["max_seq_length"]


def graph(folder: Path) -> Path:
    """The file that the ONNX Runtime backend opens."""
    config = read(folder, "config.json")
    assert isinstance(config["hidden_size"], int)
    assert isinstance(config["num_hidden_layers"], int)
    found = [
        path for path in (folder / "model.onnx", folder / "onnx" / "model.onnx") if path.is_file()
    ]
    assert found, "no model.onnx in the root or in onnx/"
    return found[0]


def candle(folder: Path) -> None:
    """Config and weights as the candle backend reads them."""
    config = read(folder, "config.json")
    kind = config["model_type"]
    for key, types in CANDLE[kind].items():
        assert isinstance(config[key], types), (key, config.get(key))
        assert types is not int or not isinstance(config[key], bool), key
    assert not [key for key in config if key.startswith("moe_")]
    if kind == "nomic_bert":
        assert config["activation_function"] == "gelu"  # else it looks for a gated network
        assert config["n_positions"] >= read(folder, "sentence_bert_config.json")["max_seq_length"]
    else:
        assert config["position_embedding_type"] == "absolute"
    outside, prefix, modules = LAYERS[kind]
    layers = config["n_layer" if kind == "nomic_bert" else "num_hidden_layers"]
    wanted = set(outside) | {
        f"{prefix.format(layer)}{module}.{part}"
        for layer in range(layers)
        for module in modules
        for part in ("weight", "bias")
    }
    with (folder / "model.safetensors").open("rb") as stream:
        [size] = struct.unpack("<Q", stream.read(8))
        tensors = json.loads(stream.read(size))
    assert not wanted - set(tensors), sorted(wanted - set(tensors))[:5]
