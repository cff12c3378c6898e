"""export as a stage: what it refuses, what it says of its graph, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from jexport.errors import DimensionError, RecipeError
from jexport.recipe import ExportSpec, LoadSpec
from jexport.stages import export, load, merge
from jexport.types import LoadedModel


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are many times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def merged(small: Path) -> LoadedModel:
    return merge.run(load.run(LoadSpec(model=str(small)), task="separation"))


def never(weights: Any) -> Any:
    raise AssertionError("weights were read")


def run(model: LoadedModel, out: Path, precision: str = "fp32", **spec: Any) -> Any:
    return export.run(
        model, ExportSpec(**spec), precision=precision, samples=[[0, 5, 6, 2]], out_dir=out
    )


@pytest.mark.parametrize("dimension", [1, 33, 65, 128])
def test_a_size_the_model_was_not_trained_for(
    dimension: int, merged: LoadedModel, tmp_path: Path
) -> None:
    unread = dataclasses.replace(merged, assemble=never)
    with pytest.raises(DimensionError, match="16, 32, 64") as caught:
        run(unread, tmp_path, dimension=dimension)
    assert caught.value.exit_code == 23


@pytest.mark.parametrize("dimension", [0, 16, 32, 64])
def test_sizes_the_model_was_trained_for(dimension: int, merged: LoadedModel) -> None:
    export.check_dimension(ExportSpec(dimension=dimension), merged)


@pytest.mark.parametrize("precision", ["int8", "bf16", ""])
def test_a_precision_it_does_not_write(precision: str, merged: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not write"):
        run(dataclasses.replace(merged, assemble=never), tmp_path, precision)


def test_what_it_says_is_what_the_graph_has(merged: LoadedModel, tmp_path: Path) -> None:
    made = run(merged, tmp_path, outputs=("sentence_embedding",), dimension=32)
    session = onnxruntime.InferenceSession(str(made.path))
    kinds = {"int64": "tensor(int64)", "float32": "tensor(float)"}
    for specs, values in (
        (made.signature.inputs, session.get_inputs()),
        (made.signature.outputs, session.get_outputs()),
    ):
        assert [(s.name, kinds[s.dtype], list(s.shape)) for s in specs] == [
            (v.name, v.type, v.shape) for v in values
        ]
    assert (made.precision, made.opset) == ("fp32", 20)
    assert onnx.load(made.path, load_external_data=False).opset_import[0].version == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]


def test_the_model_can_be_exported_again(merged: LoadedModel, tmp_path: Path) -> None:
    # It frees what it assembled; what it was given is as it was.
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    first, second = (run(merged, folder) for folder in folders)
    assert first.sha256 == second.sha256
    assert all(bool(torch.isfinite(read()).all()) for read in merged.weights.values())


def test_other_weights_have_another_digest(
    merged: LoadedModel, small: Path, tmp_path: Path
) -> None:
    base = load.run(LoadSpec(model=str(small)), task="none")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    first, second = (run(m, f) for m, f in zip((merged, base), folders, strict=True))
    assert first.sha256 != second.sha256


def test_a_model_of_few_tokens(small: Path, tmp_path: Path) -> None:
    # Fewer than the shape that is traced otherwise.
    short = load.run(LoadSpec(model=str(small), max_tokens=5), task="none")
    made = run(short, tmp_path)
    session = onnxruntime.InferenceSession(str(made.path))
    ids = np.full((3, 5), 7, dtype=np.int64)
    (hidden,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert hidden.shape == (3, 5, 64)


def test_the_exporters_warnings_stay_inside(
    merged: LoadedModel, tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: Any
) -> None:
    run(merged, tmp_path)
    assert not recwarn.list
    assert capfd.readouterr().out == ""
