"""jina-embeddings-v5 for vLLM: Qwen3 as it is, EuroBERT as a Llama that reads both ways.

vLLM is not run here. What is asserted of keys and names is what its loaders ask for (vLLM 0.32:
registry.py, llama.py, adapters.py, transformers_utils/config.py; TEI 1.9: models/qwen3.rs), and the
folder is opened once more by transformers' own Qwen3 and Llama, which know nothing of ours.
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
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaModel, Qwen3Model

from jexport.errors import CheckpointError, ServingError
from jexport.recipe import CompileSpec, LoadSpec
from jexport.serving import servers
from jexport.stages import load, merge
from jexport.targets import vllm as target
from jexport.toy import checkpoint
from jexport.types import CompiledModel, MergedModel

IDS = np.array([[17, 230, 9, 4, 5], [44, 2, 1, 600, 600]], dtype=np.int64)
FEED = {"input_ids": IDS, "attention_mask": (IDS != 600).astype(np.int64)}
KEPT = FEED["attention_mask"] == 1
TASK = "text-matching"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MergedModel]:
    folder = tmp_path_factory.mktemp("v5")
    models = {}
    for kind in ("jina-v5-small", "jina-v5-nano"):
        home = checkpoint.write(folder / kind, layout=kind)
        loaded = load.run(LoadSpec(model=str(home)), task=TASK)
        models[kind] = MergedModel(model=merge.run(loaded), precision="fp32")
    return models


@pytest.fixture
def made(toys: dict[str, MergedModel], tmp_path: Path) -> Callable[..., CompiledModel]:
    def build(kind: str, precision: str = "fp32") -> CompiledModel:
        folder = tmp_path / f"{kind}-{precision}"
        folder.mkdir()
        model = dataclasses.replace(toys[kind], precision=precision)
        target.check(model)
        return target.build(model, CompileSpec(), folder)

    return build


def config_of(compiled: CompiledModel) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((compiled.folder / "config.json").read_text("utf-8"))
    return content


def states(compiled: CompiledModel) -> np.ndarray:
    with target.runner(compiled, "cpu", 1) as run:
        return run(FEED)["last_hidden_state"]


def unmerged(model: MergedModel, toys: dict[str, MergedModel]) -> np.ndarray:
    """What the checkpoint itself gives, its adapter beside the matrices."""
    loaded = load.run(LoadSpec(model=str(model.model.folder)), task=TASK)
    with loaded.reference() as run:
        return np.asarray(run(FEED)["last_hidden_state"])


@pytest.mark.parametrize(
    ("kind", "architecture", "reader"),
    [("jina-v5-small", "Qwen3Model", Qwen3Model), ("jina-v5-nano", "LlamaModel", LlamaModel)],
)
def test_the_folder_needs_no_override(
    kind: str, architecture: str, reader: Any, made: Callable[..., Any], toys: Any
) -> None:
    compiled = made(kind)
    config = config_of(compiled)
    assert config["architectures"] == [architecture]
    assert "auto_map" not in config
    assert "task_names" not in config
    # `dimensions` of a request is refused without this list.
    assert config["matryoshka_dimensions"] == [32, 64, 128]
    wanted = unmerged(toys[kind], toys)
    assert np.abs(states(compiled) - wanted)[KEPT].max() < 2e-5
    model, report = reader.from_pretrained(
        compiled.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    with torch.inference_mode():
        out = model(**{name: torch.from_numpy(array) for name, array in FEED.items()})
    assert np.abs(out.last_hidden_state.numpy() - wanted)[KEPT].max() < 2e-5


def test_nano_reads_both_ways(made: Callable[..., Any]) -> None:
    compiled = made("jina-v5-nano")
    assert config_of(compiled)["is_causal"] is False
    assert config_of(compiled)["model_type"] == "llama"
    assert AutoConfig.from_pretrained(compiled.folder).is_causal is False
    changed = dict(FEED, input_ids=IDS.copy())
    changed["input_ids"][0, 4] = 300
    with target.runner(compiled, "cpu", 1) as run:
        first, second = (run(feed)["last_hidden_state"][0, 0] for feed in (FEED, changed))
    assert np.abs(first - second).max() > 1e-3
    path = compiled.folder / "config.json"
    path.write_text(json.dumps(config_of(compiled) | {"is_causal": True}))
    with pytest.raises(CheckpointError, match="EuroBERT for vLLM"):
        states(compiled)


def test_small_has_the_keys_that_tei_asks_for(made: Callable[..., Any], toys: Any) -> None:
    config = config_of(made("jina-v5-small"))
    for key in ("rope_theta", "attention_bias", "use_sliding_window", "sliding_window"):
        assert key in config
    assert config["rope_theta"] == 1_000_000
    assert isinstance(config["eos_token_id"], int)
    loaded = toys["jina-v5-small"].model
    new = {key: value for key, value in loaded.config.items() if "rope" not in key}
    new["rope_parameters"] = {"rope_theta": 1_000_000, "rope_type": "default"}
    other = dataclasses.replace(loaded, config=new)
    assert target._own_architecture(other, "float32")[0]["rope_theta"] == 1_000_000


def test_bf16_is_what_is_on_the_disk(made: Callable[..., Any]) -> None:
    compiled = made("jina-v5-nano", "bf16")
    tensors = load_file(compiled.folder / "model.safetensors")
    assert {str(one.dtype) for one in tensors.values()} == {"torch.bfloat16"}
    assert config_of(compiled)["torch_dtype"] == "bfloat16"
    assert np.isfinite(states(compiled)).all()


def test_names_with_a_prefix_are_written_without(toys: Any, tmp_path: Path) -> None:
    loaded = toys["jina-v5-small"].model
    prefixed = {f"model.{name}": read for name, read in loaded.weights.items()}
    prefixed["lm_head.weight"] = loaded.weights["embed_tokens.weight"]
    model = MergedModel(model=dataclasses.replace(loaded, weights=prefixed), precision="fp32")
    compiled = target.build(model, CompileSpec(), tmp_path)
    assert set(load_file(compiled.folder / "model.safetensors")) == set(loaded.weights)


def test_rope_that_tei_does_not_read(toys: Any) -> None:
    loaded = toys["jina-v5-small"].model
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    other = dataclasses.replace(loaded, config={**loaded.config, "rope_scaling": rope})
    able, reason = target._servers(MergedModel(model=other, precision="fp32"))
    assert able == ("vllm",)
    assert "yarn" in reason


def test_tei_is_not_offered_where_it_has_no_class(made: Callable[..., Any]) -> None:
    for kind, served_by in (("jina-v5-small", ["vllm", "tei"]), ("jina-v5-nano", ["vllm"])):
        facts = made(kind).facts
        assert facts["served_by"] == served_by
        assert any("text-embeddings-router" in line for line in facts["use"]) is (
            "tei" in served_by
        )
        content = {"target": "vllm", "engine": {"facts": facts}, "embedding": {"pooling": "last"}}
        assert servers.way("vllm", content)
        if "tei" in served_by:
            assert servers.way("tei", content)
        else:
            with pytest.raises(ServingError, match="no class for this artifact"):
                servers.way("tei", content)
