"""jina-embeddings-v3 under the names of nomic_bert, which vLLM and TEI know without any code.

With an ungated GELU network and biases, NomicBert is jina-embeddings-v3's own block: fused QKV,
RoPE by halves, post-LayerNorm. Keys and names: vLLM's models/config.py (NomicBertModelConfig) and
bert_with_rope.py, TEI's models/nomic.rs. transformers' own nomic_bert class is another: its network
is gated, so it must never open this layout. Only written, and read back to be checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.checkpoints import shards
from jexport.checkpoints.auto_model import torch_device
from jexport.checkpoints.eager import memory_errors, torch_threads
from jexport.checkpoints.native_class import mismatch
from jexport.checkpoints.native_config import native_config
from jexport.checkpoints.shard_writer import DTYPES
from jexport.checkpoints.transformer_files import count, read_json
from jexport.errors import CheckpointError
from jexport.types import Embedding, Runner, Tensors, WeightReader

if TYPE_CHECKING:
    import torch

MODEL_TYPE = "nomic_bert"
EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "emb_ln": "embeddings.LayerNorm",
}
LAYER = {
    "attn.out_proj": "self_attn.o_proj",
    "norm1": "post_attention_layernorm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "norm2": "post_mlp_layernorm",
}
"""Modules of this layout and transformers' names of them; attn.Wqkv is three of the latter."""

FUSED, PARTS = "attn.Wqkv", ("q_proj", "k_proj", "v_proj")


def config_json(config: Mapping[str, Any], embedding: Embedding, precision: str) -> dict[str, Any]:
    """config.json for vLLM and TEI, from that of a jina-embeddings-v3 checkpoint.

    max_trained_positions: without it vLLM 0.32 cuts texts at 2,048 tokens. n_positions is the
    length of TEI's RoPE table. A gelu here is exact in vLLM and tanh's in TEI.

    Args:
        config: of either layout.
        embedding: its max_tokens become every limit, its smaller sizes are named.
        precision: of the weights beside it, 'fp32' or 'bf16'.

    Returns:
        What is written as JSON.

    Raises:
        CheckpointError, UnsupportedCheckpointError: as `native_config`.
    """
    native = native_config(config)
    theta = native.rope_parameters["rope_theta"]
    limit = embedding.max_tokens
    return {
        "architectures": ["NomicBertModel"],
        "model_type": MODEL_TYPE,
        "activation_function": "gelu",
        "hidden_act": "gelu",
        "n_embd": native.hidden_size,
        "hidden_size": native.hidden_size,
        "n_head": native.num_attention_heads,
        "num_attention_heads": native.num_attention_heads,
        "n_inner": native.intermediate_size,
        "intermediate_size": native.intermediate_size,
        "n_layer": native.num_hidden_layers,
        "num_hidden_layers": native.num_hidden_layers,
        "n_positions": limit,
        "max_position_embeddings": limit,
        "max_trained_positions": limit,
        "layer_norm_epsilon": native.layer_norm_eps,
        "layer_norm_eps": native.layer_norm_eps,
        "prenorm": False,
        "qkv_proj_bias": True,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
        "rotary_emb_base": theta,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "vocab_size": native.vocab_size,
        "type_vocab_size": native.type_vocab_size,
        "pad_token_id": native.pad_token_id,
        "bos_token_id": native.bos_token_id,
        "eos_token_id": native.eos_token_id,
        **({"matryoshka_dimensions": list(embedding.matryoshka)} if embedding.matryoshka else {}),
        "torch_dtype": DTYPES[precision][1],
    }


def relabelled(weights: Mapping[str, WeightReader], layers: int) -> dict[str, WeightReader]:
    """The merged weights under the names of this layout.

    Nothing is read yet. The pooler is left out: both servers would skip it.

    Args:
        weights: under transformers' native names.
        layers: of the model.

    Returns:
        By this layout's name; a Wqkv is read as query, key and value, one below the other.
    """
    named = {
        f"{module}.{kind}": weights[f"{native}.{kind}"]
        for module, native in EMBEDDINGS.items()
        for kind in (("weight", "bias") if module == "emb_ln" else ("weight",))
    }
    for layer in range(layers):
        for kind in ("weight", "bias"):
            at = f"layers.{layer}"
            for module, native in LAYER.items():
                named[f"encoder.{at}.{module}.{kind}"] = weights[f"{at}.{native}.{kind}"]
            parts = [weights[f"{at}.self_attn.{part}.{kind}"] for part in PARTS]
            named[f"encoder.{at}.{FUSED}.{kind}"] = stacked(parts)
    return named


def stacked(parts: list[WeightReader]) -> WeightReader:
    """Several matrices as one, one below the other.

    Args:
        parts: read when the whole is read.

    Returns:
        The reader of the whole.
    """

    def read() -> torch.Tensor:
        import torch

        return torch.cat([part() for part in parts])

    return read


@contextlib.contextmanager
def runner(folder: Path, precision: str, device: str, threads: int) -> Iterator[Runner]:
    """Read a written folder back and run it as vLLM's NomicBert does, in plain torch.

    Everything comes from the folder's own config.json and tensors, under this layout's names.

    Args:
        folder: with config.json and weights as the target vllm writes them.
        precision: that it was written in, 'fp32' or 'bf16'.
        device: as auto_model.runner takes it.
        threads: as auto_model.runner takes them.

    Yields:
        Gives last_hidden_state, float32 [batch, sequence, n_embd].

    Raises:
        CheckpointError: config.json is not what a server takes for this block.
        StateDictError: names or shapes of the weights are not those of config.json.
        DependencyError: CUDA is asked for, and torch sees none.
    """
    import torch

    place = torch_device(device)
    config = read_json(folder / "config.json")
    _check_config(config, precision)
    entries = shards.tensors(folder)
    _check_names(entries, config)
    dtype = getattr(torch, DTYPES[precision][1])
    weights = {
        name: shards.reader(name, entry)().to(device=place, dtype=dtype)
        for name, entry in entries.items()
    }

    def run(feed: Tensors) -> Tensors:
        with memory_errors(), torch.inference_mode():
            hidden = _forward(
                weights,
                config,
                torch.from_numpy(feed["input_ids"]).to(place),
                torch.from_numpy(feed["attention_mask"]).to(place),
            )
            return {"last_hidden_state": hidden.float().cpu().numpy()}

    with torch_threads(threads):
        try:
            yield run
        finally:
            weights.clear()


def _check_config(config: Mapping[str, Any], precision: str) -> None:
    """Raise CheckpointError unless config.json says what both servers take for this block."""
    expected = {
        "model_type": MODEL_TYPE,
        "activation_function": "gelu",
        "prenorm": False,
        "qkv_proj_bias": True,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "torch_dtype": DTYPES[precision][1],
    }
    odd = [
        f"{key} = {config.get(key)!r}"
        for key, value in expected.items()
        if key not in config or config[key] != value
    ]
    if odd:
        raise CheckpointError(
            f"config.json is not that of a relabelled checkpoint in {precision}",
            evidence=", ".join(odd),
            fix="build it again",
        )


def _check_names(entries: Mapping[str, shards.Entry], config: Mapping[str, Any]) -> None:
    """Raise StateDictError unless names and shapes are those that config.json asks for."""
    hidden, inner = count(config, "n_embd"), count(config, "n_inner")
    expected: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (count(config, "vocab_size"), hidden),
        "embeddings.token_type_embeddings.weight": (count(config, "type_vocab_size"), hidden),
        "emb_ln.weight": (hidden,),
        "emb_ln.bias": (hidden,),
    }
    matrices = {
        FUSED: (3 * hidden, hidden),
        "attn.out_proj": (hidden, hidden),
        "mlp.fc1": (inner, hidden),
        "mlp.fc2": (hidden, inner),
    }
    for layer in range(count(config, "n_layer")):
        at = f"encoder.layers.{layer}"
        for module, shape in matrices.items():
            expected |= {f"{at}.{module}.weight": shape, f"{at}.{module}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            expected |= {f"{at}.{norm}.weight": (hidden,), f"{at}.{norm}.bias": (hidden,)}
    shapes = {name: entry.shape for name, entry in entries.items()}
    if shapes != expected:
        both = set(shapes) & set(expected)
        other = [
            f"{name} {list(shapes[name])} instead of {list(expected[name])}"
            for name in sorted(both)
            if shapes[name] != expected[name]
        ]
        raise mismatch(set(expected) - both, set(shapes) - both, other)


def _forward(
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    input_ids: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """The last hidden state [batch, sequence, n_embd] in the weights' dtype."""
    from torch.nn import functional

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(
            states, (states.shape[-1],), scale, shift, config["layer_norm_epsilon"]
        )

    def linear(states: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])

    batch, sequence = input_ids.shape
    heads = config["n_head"]
    width = config["n_embd"] // heads
    hidden = functional.embedding(input_ids, weights["embeddings.word_embeddings.weight"])
    hidden = norm(hidden + weights["embeddings.token_type_embeddings.weight"][0], "emb_ln")
    cosine, sine = _rotation(config["rope_parameters"]["rope_theta"], sequence, width, hidden)
    seen = mask.bool()[:, None, None, :]
    for layer in range(config["n_layer"]):
        at = f"encoder.layers.{layer}"
        fused = linear(hidden, f"{at}.{FUSED}").view(batch, sequence, 3, heads, width)
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            _rotated(query, cosine, sine), _rotated(key, cosine, sine), value, attn_mask=seen
        )
        joined = attended.transpose(1, 2).reshape(batch, sequence, heads * width)
        hidden = norm(hidden + linear(joined, f"{at}.attn.out_proj"), f"{at}.norm1")
        inner = functional.gelu(linear(hidden, f"{at}.mlp.fc1"))
        hidden = norm(hidden + linear(inner, f"{at}.mlp.fc2"), f"{at}.norm2")
    return hidden


def _rotation(
    theta: float, sequence: int, width: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [sequence, width] of RoPE: in float32, then cast."""
    import torch

    powers = torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width
    angles = torch.outer(torch.arange(sequence, device=like.device).float(), theta**-powers)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotated(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """RoPE by halves (not interleaved): position 0 is the first token."""
    import torch

    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine
