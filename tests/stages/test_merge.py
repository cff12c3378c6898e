"""merge: W + up @ down * scaling, when it is read, in float32, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jexport.errors import AdapterError, NotFiniteError
from jexport.recipe import LoadSpec
from jexport.stages import load, merge
from jexport.types import LoadedModel, LowRank

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
STACK = ".parametrizations.weight"
LAYERS = {"mixer.out_proj": "self_attn.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def expected(folder: Path, index: int) -> dict[str, torch.Tensor]:
    """Every matrix merged by the authors' formula in float64, under native names."""
    stored = {
        name.removeprefix("roberta."): tensor.double()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    whole = {}
    for name, weight in stored.items():
        if name.endswith(".original"):
            stem = name.removesuffix(".original")
            first, second = (stored[f"{stem}.0.lora_{which}"][index] for which in "AB")
            delta = first @ second if "embeddings" in stem else second @ first
            whole[stem.removesuffix(STACK)] = weight + delta / 4
    named = {}
    for name, weight in whole.items():
        if name.endswith("Wqkv"):
            layer = name.split(".")[2]
            for letter, third in zip("qkv", weight.chunk(3), strict=True):
                named[f"layers.{layer}.self_attn.{letter}_proj.weight"] = third
        elif name.startswith("encoder"):
            layer, module = name.removeprefix("encoder.layers.").split(".", 1)
            named[f"layers.{layer}.{LAYERS[module]}.weight"] = weight
        else:
            named[f"{name}.weight"] = weight
    return named


@pytest.mark.parametrize("index", range(5))
def test_every_matrix_is_merged_by_the_authors_formula(index: int, small: Path) -> None:
    model = load.run(LoadSpec(model=str(small)), task=TASKS[index])
    merged = merge.run(model)
    wanted = expected(small, index)
    assert set(wanted) == set(model.adapter)
    for name, read in merged.weights.items():
        weight = read()
        assert weight.dtype == torch.float32
        if name in wanted:
            assert (weight - wanted[name]).abs().max() < 1e-6, name
            assert (weight - model.weights[name]()).abs().max() > 1e-3, name
        else:
            assert torch.equal(weight, model.weights[name]()), name


def test_what_goes_in_is_left_as_it_was(small: Path) -> None:
    model = load.run(LoadSpec(model=str(small)), task="separation")
    name = "layers.0.mlp.fc1.weight"
    before, count = model.weights[name](), len(model.adapter)
    merged = merge.run(model)
    first = merged.weights[name]()
    assert torch.equal(merged.weights[name](), first)
    assert torch.equal(model.weights[name](), before)
    assert (len(model.adapter), len(merged.adapter)) == (count, 0)
    kept = dataclasses.replace(merged, weights=model.weights, adapter=model.adapter)
    assert kept == model


def tiny(model: LoadedModel, base: torch.Tensor, **delta: torch.Tensor | float) -> LoadedModel:
    """A model of one weight [6, 2] and its delta of rank 1."""
    up, down = delta.get("up", torch.ones(6, 1)), delta.get("down", torch.ones(1, 2))
    assert isinstance(up, torch.Tensor)
    assert isinstance(down, torch.Tensor)
    low = LowRank(
        up=lambda: up.clone(), down=lambda: down.clone(), scaling=float(delta.get("scaling", 0.5))
    )
    return dataclasses.replace(model, weights={"w": base.clone}, adapter={"w": low})


@pytest.fixture(scope="module")
def model(small: Path) -> LoadedModel:
    return load.run(LoadSpec(model=str(small)), task="separation")


def test_a_long_table_is_merged_block_by_block(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 rows in blocks of 4: the second block is shorter, and no row is merged twice or never."""
    monkeypatch.setattr(merge, "ROW_BLOCK", 4)
    seen: list[int] = []
    times = torch.Tensor.__matmul__

    def spy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(left.shape[0])
        return times(left, right)

    up, down = torch.arange(1.0, 7.0)[:, None], torch.tensor([[1.0, -2.0]])
    merged = merge.run(tiny(model, torch.full((6, 2), 10.0), up=up, down=down))
    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    found = merged.weights["w"]()
    assert found.tolist() == [[10 + n / 2, 10.0 - n] for n in range(1, 7)]
    assert seen == [4, 2]


def test_nothing_is_read_until_it_is_asked_for(model: LoadedModel) -> None:
    read: list[str] = []

    def noted(name: str, reader: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: (read.append(name), reader())[1]

    weights = {name: noted(name, reader) for name, reader in model.weights.items()}
    adapter = {
        name: dataclasses.replace(low, up=noted(f"{name} up", low.up))
        for name, low in model.adapter.items()
    }
    merged = merge.run(dataclasses.replace(model, weights=weights, adapter=adapter))
    assert not read
    merged.weights["layers.1.mlp.fc2.weight"]()
    assert read == ["layers.1.mlp.fc2.weight", "layers.1.mlp.fc2.weight up"]


@pytest.mark.parametrize(
    "delta",
    [
        {"up": torch.full((6, 1), math.nan)},
        {"down": torch.tensor([[1.0, math.inf]])},
        {"up": torch.full((6, 1), 1e30), "down": torch.full((1, 2), 1e30)},
        {"scaling": math.nan},
    ],
)
def test_a_sum_that_is_not_finite_is_an_error(
    delta: dict[str, torch.Tensor | float], model: LoadedModel
) -> None:
    merged = merge.run(tiny(model, torch.ones(6, 2), **delta))
    with pytest.raises(NotFiniteError, match="merging the adapter into 'w'"):
        merged.weights["w"]()


def test_an_adapter_of_another_model_is_refused(model: LoadedModel) -> None:
    weights = {name: read for name, read in model.weights.items() if "layers.1" not in name}
    with pytest.raises(AdapterError, match="does not belong") as caught:
        merge.run(dataclasses.replace(model, weights=weights))
    assert "layers.1.mlp.fc1.weight" in caught.value.evidence
    with pytest.raises(AdapterError, match="does not belong"):
        merge.run(dataclasses.replace(model, adapter={}))
