"""The hf target: what it writes, that transformers opens it strictly, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jexport.errors import (
    CheckpointError,
    DependencyError,
    StateDictError,
    UnsupportedCheckpointError,
)
from jexport.recipe import CompileSpec, LoadSpec
from jexport.stages import load, merge
from jexport.targets import hf as target
from jexport.toy import checkpoint
from jexport.types import CompiledModel, MergedModel

WEIGHTS = "model.safetensors"
IDS = np.array([[0, 17, 230, 9, 2], [0, 44, 2, 1, 1]], dtype=np.int64)
FEED = {"input_ids": IDS, "attention_mask": (IDS != 1).astype(np.int64)}


def in_precision(model: MergedModel, precision: str) -> MergedModel:
    return dataclasses.replace(model, precision=precision)


@pytest.fixture
def made(merged: MergedModel, tmp_path: Path) -> CompiledModel:
    return target.build(merged, CompileSpec(), tmp_path)


def states(compiled: CompiledModel) -> np.ndarray:
    with target.runner(compiled, "cpu", 1) as run:
        return run(FEED)["last_hidden_state"]


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- what is written ----------------------------------------------------------------------------


def test_every_merged_weight_is_there_and_no_other(
    merged: MergedModel, made: CompiledModel
) -> None:
    found = load_file(made.folder / WEIGHTS)
    assert set(found) == set(merged.model.weights)
    for name, read in merged.model.weights.items():
        assert torch.equal(found[name], read()), name
    assert "pooler.dense.weight" in found  # or transformers would make one up, with a warning


def test_config_says_what_the_native_class_reads(made: CompiledModel) -> None:
    config = json.loads((made.folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "jina_embeddings_v3"
    assert config["rope_parameters"] == {"rope_theta": 20000.0, "rope_type": "default"}
    assert config["matryoshka_dimensions"] == [16, 32, 64]
    assert not {"auto_map", "lora_adaptations", "rotary_emb_base"} & set(config)


def test_another_rope_base_is_kept(small_copy: Path, tmp_path: Path) -> None:
    # The native class ignores `rotary_emb_base`; without rope_parameters it would run at 20,000.
    path = small_copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rotary_emb_base": 500.0}))
    loaded = load.run(LoadSpec(model=str(small_copy)), task="none")
    (tmp_path / "out").mkdir()
    made = target.build(
        MergedModel(model=loaded, precision="fp32"), CompileSpec(), tmp_path / "out"
    )
    with loaded.reference() as run:
        wanted = run(FEED)["last_hidden_state"]
    assert np.abs(states(made) - wanted)[FEED["attention_mask"] == 1].max() <= 1e-5


def test_building_twice_gives_the_same_bytes(
    merged: MergedModel, made: CompiledModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = target.build(merged, CompileSpec(), tmp_path_factory.mktemp("again"))
    for name in made.files:
        assert (made.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_bf16_weights_are_the_merged_ones_cast_once(merged: MergedModel, tmp_path: Path) -> None:
    made = target.build(in_precision(merged, "bf16"), CompileSpec(), tmp_path)
    found = load_file(made.folder / WEIGHTS)
    for name, read in merged.model.weights.items():
        assert torch.equal(found[name], read().to(torch.bfloat16)), name
    assert (made.folder / WEIGHTS).stat().st_size < 0.6 * 4 * sum(
        tensor.numel() for tensor in found.values()
    )


def test_minilm_keeps_its_names_and_its_config(
    minilm_merged: MergedModel, minilm: Path, tmp_path: Path
) -> None:
    made = target.build(minilm_merged, CompileSpec(), tmp_path)
    theirs = load_file(minilm / WEIGHTS)
    found = load_file(made.folder / WEIGHTS)
    assert set(found) == set(theirs) - {"embeddings.position_ids"}  # a buffer of transformers 4
    assert all(torch.equal(found[name], theirs[name]) for name in found)
    config = json.loads((made.folder / "config.json").read_text(encoding="utf-8"))
    assert config.pop("torch_dtype") == "float32"
    assert config == json.loads((minilm / "config.json").read_text(encoding="utf-8"))


def test_a_checkpoint_without_a_pooler(small_copy: Path, tmp_path: Path) -> None:
    edit(
        small_copy / WEIGHTS,
        lambda ts: [ts.pop(name) for name in list(ts) if "pooler" in name],
    )
    loaded = load.run(LoadSpec(model=str(small_copy)), task="none")
    (tmp_path / "out").mkdir()
    made = target.build(
        MergedModel(model=loaded, precision="fp32"), CompileSpec(), tmp_path / "out"
    )
    assert not [name for name in load_file(made.folder / WEIGHTS) if "pooler" in name]
    assert np.isfinite(states(made)).all()


# --- opening ------------------------------------------------------------------------------------


def test_states_are_those_of_the_checkpoint(merged: MergedModel, made: CompiledModel) -> None:
    with merged.model.reference() as run:
        # This LoadedModel is merged: its own reference still has the adapter beside the base.
        wanted = run(FEED)["last_hidden_state"]
    kept = FEED["attention_mask"] == 1
    assert np.abs(states(made) - wanted)[kept].max() <= 1e-5


def test_bf16_keeps_rotary_frequencies_in_float32(
    merged: MergedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `.half()` after loading would round them: off by 1.0 at position 8191.
    from jexport.checkpoints import auto_model

    made = target.build(in_precision(merged, "bf16"), CompileSpec(), tmp_path)
    model = auto_model._opened(made.folder, "bf16", {})
    assert model.dtype == torch.bfloat16
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    found = states(made)
    assert found.dtype == np.float32


def take(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def add(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(2)})


def reshape(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (take("layers.1.mlp.fc2.bias"), "missing: layers.1.mlp.fc2.bias"),
        (take("pooler.dense.bias"), "missing: pooler.dense.bias"),
        (add("layers.0.stray"), "unexpected: layers.0.stray"),
        (reshape("embeddings.word_embeddings.weight"), "embeddings.word_embeddings.weight"),
    ],
)
def test_a_weight_that_is_not_as_written_is_refused(
    change: Callable[[dict[str, torch.Tensor]], object], named: str, made: CompiledModel
) -> None:
    edit(made.folder / WEIGHTS, change)
    with pytest.raises(StateDictError) as caught, target.runner(made, "cpu", 1):
        pass
    assert named in str(caught.value)


def test_another_dtype_than_was_meant_is_refused(made: CompiledModel) -> None:
    path = made.folder / "config.json"
    content = {**json.loads(path.read_text()), "torch_dtype": "bfloat16"}
    path.write_text(json.dumps(content))
    with (
        pytest.raises(CheckpointError, match="another precision"),
        target.runner(made, "cpu", 1),
    ):
        pass


def test_threads_are_put_back(made: CompiledModel) -> None:
    before = torch.get_num_threads()
    with target.runner(made, "cpu", before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_device_that_is_not_there(made: CompiledModel) -> None:
    with pytest.raises(ValueError, match="'gpu'"), target.runner(made, "gpu", 0):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(DependencyError, match="no CUDA"), target.runner(made, "cuda", 0):
            pass


# --- refused ------------------------------------------------------------------------------------


@pytest.fixture
def unknown(write_unknown: Callable[..., Path], tmp_path: Path) -> MergedModel:
    folder = write_unknown(tmp_path / "unknown")
    loaded = load.run(LoadSpec(model=str(folder), trust_remote_code=True), task="none")
    return MergedModel(model=loaded, precision="fp32")


def test_a_checkpoint_of_its_own_code_is_refused(unknown: MergedModel) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="only its own code") as caught:
        target.check(unknown)
    assert "--target onnx" in caught.value.fix


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_both_jina_layouts_can_be_written(layout: str, tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path / "toy", layout=layout)
    loaded = load.run(LoadSpec(model=str(folder)), task="text-matching")
    (tmp_path / "out").mkdir()
    made = target.build(
        MergedModel(model=merge.run(loaded), precision="fp32"), CompileSpec(), tmp_path / "out"
    )
    with loaded.reference() as run:
        wanted = run(FEED)["last_hidden_state"]
    assert np.abs(states(made) - wanted)[FEED["attention_mask"] == 1].max() <= 1e-4
    base = load.run(LoadSpec(model=str(folder)), task="none")
    with base.reference() as run:
        assert np.abs(states(made) - run(FEED)["last_hidden_state"]).max() > 1e-2


def test_a_transformers_that_is_too_old_is_named_with_those_that_are_not(
    made: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from transformers.models.auto import configuration_auto

    known = {
        name: kind
        for name, kind in configuration_auto.CONFIG_MAPPING.items()
        if name != "jina_embeddings_v3"
    }
    monkeypatch.setattr(configuration_auto, "CONFIG_MAPPING", known)
    monkeypatch.setattr(transformers, "__version__", "5.3.1")
    with pytest.raises(DependencyError) as caught, target.runner(made, "cpu", 0):
        pass
    assert str(caught.value).splitlines() == [
        "transformers 5.3.1 cannot read this artifact",
        "  it has no architecture 'jina_embeddings_v3'; versions that have: 5.4 and newer",
        '  fix: pip install "transformers>=5.4"',
    ]
