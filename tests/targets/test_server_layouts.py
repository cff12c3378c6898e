"""Names and keys that the servers' loaders ask for, written here from their sources, not our table.

vLLM 0.32.0: models/bert_with_rope.py, modernbert.py, gemma3.py, adapters.py. TEI 1.9: candle's
gte.rs, nomic.rs, modernbert.rs, gemma3.rs, qwen3.rs, mpnet.rs, distilbert.rs, debertav2.rs.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from jexport.errors import ServingError, UnsupportedCheckpointError
from jexport.recipe import CompileSpec, LoadSpec
from jexport.serving import servers
from jexport.stages import load
from jexport.targets import hf, vllm
from jexport.types import MergedModel

tiny: Any = runpy.run_path(str(Path(__file__).parents[1] / "sweep" / "tiny.py"))
IDS = np.array([[0, 17, 230, 9, 2], [0, 44, 2, 1, 1]], dtype=np.int64)
FEED = {"input_ids": IDS, "attention_mask": (IDS != 1).astype(np.int64)}
KEPT = FEED["attention_mask"] == 1
LAST = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
BOTH, TEI, VLLM = ["vllm", "tei"], ["tei"], ["vllm"]

DECODER = {
    "embed_tokens.weight",
    "norm.weight",
    "layers.1.self_attn.q_proj.weight",
    "layers.1.mlp.gate_proj.weight",
    "layers.1.post_attention_layernorm.weight",
}
GTE = {
    "embeddings.LayerNorm.bias",
    "encoder.layer.1.attention.qkv_proj.bias",
    "encoder.layer.1.attention.o_proj.weight",
    "encoder.layer.1.attn_ln.weight",
    "encoder.layer.1.mlp.up_gate_proj.weight",
    "encoder.layer.1.mlp.down_proj.bias",
    "encoder.layer.1.mlp_ln.bias",
}
NOMIC = {
    "emb_ln.weight",
    "embeddings.token_type_embeddings.weight",
    "encoder.layers.1.attn.Wqkv.weight",
    "encoder.layers.1.attn.out_proj.weight",
    "encoder.layers.1.mlp.fc11.weight",
    "encoder.layers.1.mlp.fc12.weight",
    "encoder.layers.1.mlp.fc2.weight",
    "encoder.layers.1.norm1.bias",
    "encoder.layers.1.norm2.weight",
}
MODERN = {
    "embeddings.tok_embeddings.weight",
    "layers.1.attn.Wqkv.weight",
    "layers.1.mlp.Wi.weight",
    "layers.1.attn_norm.weight",
    "final_norm.weight",
}
DISTIL = {
    "distilbert.embeddings.word_embeddings.weight",
    "distilbert.transformer.layer.1.attention.q_lin.weight",
    "distilbert.transformer.layer.1.ffn.lin1.bias",
}
MPNET = {
    "embeddings.word_embeddings.weight",
    "encoder.layer.1.attention.attn.q.weight",
    "encoder.relative_attention_bias.weight",
}
DEBERTA = {
    "embeddings.word_embeddings.weight",
    "encoder.rel_embeddings.weight",
    "encoder.layer.1.attention.self.query_proj.weight",
}
CASES: dict[str, tuple[dict[str, Any], list[str], str, set[str], dict[str, Any]]] = {
    "qwen3": (LAST, BOTH, "Qwen3Model", DECODER, {"rope_theta": float, "eos_token_id": int}),
    "qwen2": (LAST, BOTH, "Qwen2Model", DECODER, {"rope_theta": float}),
    "llama": (LAST, BOTH, "LlamaModel", DECODER, {"rope_theta": float}),
    "mistral": (LAST, BOTH, "MistralModel", DECODER, {"rope_theta": float}),
    "gemma3_text": (
        {},
        BOTH,
        "Gemma3TextModel",
        DECODER,
        {"rope_local_base_freq": float, "_sliding_window_pattern": int, "pad_token_id": int},
    ),
    "gte": ({}, BOTH, "GteModel", GTE, {"layer_norm_type": str, "rope_theta": float}),
    "nomic_bert": ({}, BOTH, "NomicBertModel", NOMIC, {"n_embd": int, "n_positions": int}),
    "modernbert": (
        {},
        BOTH,
        "ModernBertModel",
        MODERN,
        {"global_rope_theta": float, "local_rope_theta": float, "global_attn_every_n_layers": int},
    ),
    "distilbert": ({}, TEI, "DistilBertModel", DISTIL, {"n_heads": int}),
    "mpnet": ({}, TEI, "MPNetModel", MPNET, {"layer_norm_eps": float}),
    "deberta-v2": ({}, TEI, "DebertaV2Model", DEBERTA, {"max_relative_positions": int}),
}
CONFIG: dict[str, dict[str, Any]] = {
    "gemma3_text": {"use_bidirectional_attention": True},
    "mistral": {"sliding_window": None},
    "deberta-v2": {"relative_attention": True},
}


def opened(
    kind: str, folder: Path, pooling: dict[str, Any] | None = None, **config: Any
) -> MergedModel:
    tiny["make"](kind, folder, **(CONFIG.get(kind, {}) | config))
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (pooling or {})))
    loaded = load.run(LoadSpec(model=str(folder)), task="none")
    return MergedModel(model=loaded, precision="fp32")


def states(target: Any, model: MergedModel, folder: Path) -> np.ndarray:
    folder.mkdir()
    with target.runner(target.build(model, CompileSpec(), folder), "cpu", 1) as run:
        return run(FEED)["last_hidden_state"][KEPT]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CASES)
def test_names_keys_and_numbers(kind: str, tmp_path: Path) -> None:
    pooling, able, architecture, names, keys = CASES[kind]
    model = opened(kind, tmp_path / "model", pooling)
    vllm.check(model)
    written = tmp_path / "vllm"
    given = states(vllm, model, written)
    assert np.abs(given - states(hf, model, tmp_path / "hf")).max() < 1e-5
    tensors = load_file(written / "model.safetensors")
    assert names <= set(tensors), names - set(tensors)
    assert not [name for name in tensors if "pooler" in name or "lm_head" in name]
    config = json.loads((written / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [architecture]
    assert {key: type(config[key]) for key in keys} == keys
    again = tmp_path / "facts"
    again.mkdir()
    facts = vllm.build(model, CompileSpec(), again).facts
    assert facts["served_by"] == able
    content = {
        "target": "vllm",
        "engine": {"facts": facts},
        "embedding": {"pooling": model.model.embedding.pooling},
    }
    for server in BOTH:
        if server in able:
            assert servers.way(server, content)
        else:
            with pytest.raises(ServingError, match="no class for this artifact"):
                servers.way(server, content)
    told = " ".join(facts["use"])
    assert ("vllm serve" in told) == ("vllm" in able)
    assert ("text-embeddings-router" in told) == ("tei" in able)


def test_fused_matrices_are_in_the_servers_order(tmp_path: Path) -> None:
    """gte.rs takes `up` from the first half; bert_with_rope.py chunks it the same way."""
    model = opened("gte", tmp_path / "model")
    states(vllm, model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    import transformers

    plain = transformers.AutoModel.from_pretrained(tmp_path / "model").state_dict()
    fused = tensors["encoder.layer.0.mlp.up_gate_proj.weight"].chunk(2)
    for half, name in zip(fused, ("up_proj", "gate_proj"), strict=True):
        assert half.equal(plain[f"layers.0.mlp.{name}.weight"])
    thirds = tensors["encoder.layer.0.attention.qkv_proj.weight"].chunk(3)
    for third, letter in zip(thirds, "qkv", strict=True):
        assert third.equal(plain[f"layers.0.self_attn.{letter}_proj.weight"])


@pytest.mark.parametrize(
    ("kind", "pooling", "config", "able", "why"),
    [
        ("modernbert", LAST, {}, VLLM, "its pooling is 'last'"),
        ("modernbert", {}, {"norm_bias": True}, VLLM, "norm_bias"),
        ("gemma3_text", {}, {"use_bidirectional_attention": False}, VLLM, "both ways only"),
        ("mistral", LAST, {"sliding_window": 16}, [], "sliding_window = 16"),
        ("mpnet", LAST, {}, [], "its pooling is 'last'"),
        ("nomic_bert", {}, {"hidden_act": "gelu"}, [], "hidden_act"),
        ("electra", {}, {}, [], "model_type 'electra'"),
    ],
)
def test_what_a_server_does_not_take_is_named(
    kind: str, pooling: Any, config: Any, able: list[str], why: str, tmp_path: Path
) -> None:
    model = opened(kind, tmp_path / "model", pooling, **config)
    if able:
        vllm.check(model)
        (tmp_path / "out").mkdir()
        facts = vllm.build(model, CompileSpec(), tmp_path / "out").facts
        assert facts["served_by"] == able
        assert why in " ".join(facts["use"])
    else:
        with pytest.raises(UnsupportedCheckpointError) as caught:
            vllm.check(model)
        assert why in caught.value.evidence
