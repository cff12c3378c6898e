"""The vllm target: names, config keys, what it refuses; its runner is independent of transformers.

vLLM and TEI are not run here; what is asserted of keys and names is what their loaders ask for
(vLLM 0.32 and 0.33: models/config.py, bert_with_rope.py; TEI 1.9.3: models/nomic.rs).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jexport.checkpoints import nomic_bert
from jexport.errors import CheckpointError, StateDictError, UnsupportedCheckpointError
from jexport.recipe import CompileSpec
from jexport.targets import vllm as target
from jexport.types import CompiledModel, MergedModel

WEIGHTS = "model.safetensors"
IDS = np.array([[0, 17, 230, 9, 2], [0, 44, 2, 1, 1]], dtype=np.int64)
FEED = {"input_ids": IDS, "attention_mask": (IDS != 1).astype(np.int64)}
KEPT = FEED["attention_mask"] == 1


@pytest.fixture
def made(merged: MergedModel, tmp_path: Path) -> CompiledModel:
    return target.build(merged, CompileSpec(), tmp_path)


def changed(model: MergedModel, *, embedding: Any = None, **config: Any) -> MergedModel:
    loaded = model.model
    other = dataclasses.replace(
        loaded,
        config={**loaded.config, **config},
        embedding=dataclasses.replace(loaded.embedding, **(embedding or {})),
    )
    return dataclasses.replace(model, model=other)


def states(compiled: CompiledModel) -> np.ndarray:
    with target.runner(compiled, "cpu", 1) as run:
        return run(FEED)["last_hidden_state"]


def edit_config(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}))


# --- what is written ----------------------------------------------------------------------------


def test_names_are_those_of_the_original_without_prefix_and_mixer(
    made: CompiledModel, small: Path
) -> None:
    """Against the names in the authors' own file, not against our map."""
    original = {
        name.removeprefix("roberta.").replace(".parametrizations.weight.original", ".weight")
        for name in load_file(small / WEIGHTS)
        if not name.endswith(("lora_A", "lora_B"))
    }
    wanted = {name.replace("mixer.", "attn.") for name in original if "pooler" not in name}
    assert set(load_file(made.folder / WEIGHTS)) == wanted


def test_the_inverse_map_gives_the_merged_weights(merged: MergedModel, made: CompiledModel) -> None:
    found = load_file(made.folder / WEIGHTS)
    back: dict[str, torch.Tensor] = {}
    inverse = {theirs: ours for ours, theirs in nomic_bert.LAYER.items()}
    for name in merged.model.weights:
        module, kind = name.rsplit(".", 1)
        if module.startswith("layers."):
            _, number, rest = module.split(".", 2)
            at = f"encoder.layers.{number}"
            part = rest.removeprefix("self_attn.")
            if part in nomic_bert.PARTS:
                thirds = found[f"{at}.attn.Wqkv.{kind}"].chunk(3)
                back[name] = thirds[nomic_bert.PARTS.index(part)]
            else:
                back[name] = found[f"{at}.{inverse[rest]}.{kind}"]
        elif module == "embeddings.LayerNorm":
            back[name] = found[f"emb_ln.{kind}"]
        elif not module.startswith("pooler"):
            back[name] = found[name]
    assert len(back) == len(merged.model.weights) - 2  # the pooler's
    for name, tensor in back.items():
        assert torch.equal(tensor, merged.model.weights[name]()), name


def test_config_has_every_key_that_tei_demands(made: CompiledModel) -> None:
    config = json.loads((made.folder / "config.json").read_text(encoding="utf-8"))
    kinds = {
        "prenorm": bool,
        "rotary_emb_fraction": float,
        "qkv_proj_bias": bool,
        "rotary_emb_base": float,
        "rotary_emb_interleaved": bool,
        "mlp_fc1_bias": bool,
        "mlp_fc2_bias": bool,
        "max_trained_positions": int,
        "n_embd": int,
        "n_head": int,
        "n_inner": int,
        "n_layer": int,
        "n_positions": int,
        "activation_function": str,
        "vocab_size": int,
        "type_vocab_size": int,
        "layer_norm_epsilon": float,
        "model_type": str,
        "architectures": list,
        "max_position_embeddings": int,
        "pad_token_id": int,
        "hidden_size": int,
        "num_hidden_layers": int,
    }
    assert {key: type(config[key]) for key in kinds} == kinds
    assert config["rotary_scaling_factor"] is None
    assert not [key for key in config if "moe" in key or "expert" in key]
    # TEI takes the ungated network for 'gelu' alone.
    assert (config["model_type"], config["activation_function"]) == ("nomic_bert", "gelu")


def test_config_has_what_vllm_demands(made: CompiledModel) -> None:
    config = json.loads((made.folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["NomicBertModel"]
    assert config["mlp_fc1_bias"] == config["mlp_fc2_bias"] == config["qkv_proj_bias"] is True
    assert config["rotary_emb_scale_base"] is None
    assert config["rotary_emb_interleaved"] is False
    assert config["rope_parameters"] == {"rope_theta": 20000.0, "rope_type": "default"}
    assert config["matryoshka_dimensions"] == [16, 32, 64]  # `dimensions` of a request
    # Without this key vLLM 0.32 cuts every text at 2,048 tokens.
    assert config["max_trained_positions"] == config["n_positions"] == 8192


def test_transformers_reads_the_config_as_vllm_does(made: CompiledModel) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(made.folder)
    assert type(config).__name__ == "NomicBertConfig"  # its own: no code is asked for
    assert config.rope_parameters["rope_theta"] == 20000.0
    assert (config.n_embd, config.num_attention_heads, config.layer_norm_epsilon) == (64, 4, 1e-5)


# --- reading it back ----------------------------------------------------------------------------


def test_states_are_those_of_the_checkpoint(merged: MergedModel, made: CompiledModel) -> None:
    with merged.model.reference() as run:
        wanted = run(FEED)["last_hidden_state"]
    assert np.abs(states(made) - wanted)[KEPT].max() <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"n_head": 2},
        {"layer_norm_epsilon": 0.5},
    ],
)
def test_the_reader_heeds_the_config(change: dict[str, Any], made: CompiledModel) -> None:
    # Guards the test above: a wrong value in config.json must show in the vectors.
    before = states(made)
    edit_config(made.folder, **change)
    assert np.abs(states(made) - before)[KEPT].max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "swiglu"},
        {"prenorm": True},
        {"rotary_emb_interleaved": True},
        {"qkv_proj_bias": False},
        {"torch_dtype": "bfloat16"},
        {"model_type": "bert"},
    ],
)
def test_a_config_that_means_another_network_is_refused(
    change: dict[str, Any], made: CompiledModel
) -> None:
    edit_config(made.folder, **change)
    with pytest.raises(CheckpointError) as caught, target.runner(made, "cpu", 1):
        pass
    assert next(iter(change)) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda ts: ts.pop("encoder.layers.1.attn.Wqkv.bias"), "missing: encoder.layers.1.attn"),
        (lambda ts: ts.update({"pooler.dense.bias": torch.zeros(64)}), "unexpected: pooler"),
        (lambda ts: ts.update({"emb_ln.bias": torch.zeros(32)}), "[32] instead of [64]"),
    ],
)
def test_a_weight_that_is_not_as_written_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object], named: str, made: CompiledModel
) -> None:
    tensors = load_file(made.folder / WEIGHTS)
    change(tensors)
    save_file(tensors, made.folder / WEIGHTS)
    with pytest.raises(StateDictError) as caught, target.runner(made, "cpu", 1):
        pass
    assert named in str(caught.value)


def test_swapped_thirds_of_qkv_show(made: CompiledModel) -> None:
    # Shapes cannot tell q, k and v apart; the vectors must.
    before = states(made)
    tensors = load_file(made.folder / WEIGHTS)
    name = "encoder.layers.0.attn.Wqkv.weight"
    query, key, value = tensors[name].chunk(3)
    tensors[name] = torch.cat([query, value, key])
    save_file(tensors, made.folder / WEIGHTS)
    assert np.abs(states(made) - before)[KEPT].max() > 1e-3


# --- encoders of their own architecture ---------------------------------------------------------


def test_minilm_stays_bert_under_plain_names(minilm_merged: MergedModel, tmp_path: Path) -> None:
    target.check(minilm_merged)
    made = target.build(minilm_merged, CompileSpec(), tmp_path)
    config = json.loads((made.folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertModel"]
    assert config["position_embedding_type"] == "absolute"
    names = set(load_file(made.folder / WEIGHTS))
    assert "encoder.layer.5.output.LayerNorm.bias" in names
    assert not [name for name in names if name.startswith(("bert.", "pooler.", "cls."))]
    with minilm_merged.model.reference() as run:
        wanted = run(FEED)["last_hidden_state"]
    assert np.abs(states(made) - wanted)[KEPT].max() <= 1e-5


def test_old_names_become_plain() -> None:
    from jexport.checkpoints.sentence_transformer import plain_names

    def read() -> torch.Tensor:
        return torch.ones(1)

    given = (
        "bert.embeddings.LayerNorm.gamma",
        "bert.encoder.layer.0.output.LayerNorm.beta",
        "roberta.embeddings.word_embeddings.weight",
        "bert.pooler.dense.bias",
        "cls.x",
        "lm_head.bias",
        "encoder.layer.0.output.dense.bias",
    )
    assert list(plain_names(dict.fromkeys(given, read))) == [
        "embeddings.LayerNorm.weight",
        "encoder.layer.0.output.LayerNorm.bias",
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.output.dense.bias",
    ]


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'"),
        ({"embedding": {"pooling": "max"}}, "pooling is 'max'"),
    ],
)
def test_a_jina_checkpoint_that_servers_would_run_otherwise(
    change: dict[str, Any], named: str, merged: MergedModel
) -> None:
    target.check(merged)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        target.check(changed(merged, **change))
    assert named in str(caught.value)
    assert "--target hf" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "electra"}, "'electra'"),
        ({"model_type": None}, "None"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"embedding": {"pooling": "mean_sqrt_len"}}, "mean_sqrt_len"),
    ],
)
def test_an_encoder_that_not_both_servers_have(
    change: dict[str, Any], named: str, minilm_merged: MergedModel
) -> None:
    with pytest.raises(UnsupportedCheckpointError) as caught:
        target.check(changed(minilm_merged, **change))
    assert named in str(caught.value)
    assert caught.value.exit_code == 22
    assert "--target hf" in caught.value.fix
