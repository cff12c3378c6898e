"""sentence_embedding beside token vectors: what sentence-transformers pools, for every padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from jexport.errors import UnsupportedGraphError
from jexport.graph import pooled_output, storage
from jexport.recipe import CompileSpec
from jexport.targets import onnx as target

HIDDEN, POOLED = "last_hidden_state", "sentence_embedding"
THEIRS = {
    "mean": "mean",
    "cls": "cls",
    "max": "max",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean",
    "last": "lasttoken",
}


def appended(model: Any, folder: Path, pooling: str, *, normalize: bool) -> Path:
    graph = ir.load(model.path)
    assert pooled_output.append(graph, pooling, normalize=normalize)
    path = folder / "model.onnx"
    storage.save(graph, path)
    return path


def theirs(hidden: np.ndarray, mask: np.ndarray, pooling: str, *, normalize: bool) -> np.ndarray:
    """What sentence-transformers makes of the same token vectors."""
    features = {
        "token_embeddings": torch.from_numpy(hidden),
        "attention_mask": torch.from_numpy(mask),
    }
    module = Pooling(hidden.shape[-1], pooling_mode=THEIRS[pooling])
    features = module(features)
    if normalize:
        features = Normalize()(features)
    found: np.ndarray = features[POOLED].numpy()
    return found


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", THEIRS)
@pytest.mark.parametrize("opset", [18, 23])
def test_as_sentence_transformers_pools(
    opset: int,
    pooling: str,
    normalize: bool,
    exports: Callable[..., Any],
    seeded: Any,
    tmp_path: Path,
) -> None:
    model = exports("bert", outputs=(HIDDEN,), layers=1, opset=opset).model
    session = seeded.session(appended(model, tmp_path, pooling, normalize=normalize))
    assert [value.name for value in session.get_outputs()] == [HIDDEN, POOLED]
    assert session.get_outputs()[1].shape == ["batch", seeded.HIDDEN]
    for name, feed in seeded.feeds().items():
        hidden, pooled = session.run(None, feed)
        full = feed["attention_mask"].any(axis=1)
        wanted = theirs(hidden[full], feed["attention_mask"][full], pooling, normalize=normalize)
        np.testing.assert_allclose(pooled[full], wanted, rtol=2e-6, atol=2e-7, err_msg=name)
        assert not pooled[~full].any(), name  # as the runtime's own pooling


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_token_vectors_stay_first_and_keep_their_bits(
    precision: str, exports: Callable[..., Any], seeded: Any, tmp_path: Path
) -> None:
    model = exports("small", precision, outputs=(HIDDEN,)).model
    (tmp_path / "plain").mkdir()
    plain = target.build(replace(model, pooling=""), CompileSpec(), tmp_path / "plain")
    both = target.build(model, CompileSpec(), tmp_path)
    assert [spec.name for spec in plain.signature.outputs] == [HIDDEN]
    assert [spec.name for spec in both.signature.outputs] == [HIDDEN, POOLED]
    assert both.signature.outputs[1].shape == ("batch", 64)
    assert both.signature.outputs[1].dtype == "float32"
    sessions = [seeded.session(one.folder / "model.onnx") for one in (plain, both)]
    for feed in seeded.feeds().values():
        alone, beside = (session.run([HIDDEN], feed)[0] for session in sessions)
        np.testing.assert_array_equal(alone, beside)
        assert sessions[1].run(None, feed)[1].dtype == np.float32


def test_a_graph_that_pools_already_is_left_alone(exports: Callable[..., Any]) -> None:
    for outputs in ((HIDDEN, POOLED), (POOLED,)):
        graph = ir.load(exports("bert", outputs=outputs, layers=0).model.path)
        before = len(graph.graph)
        assert not pooled_output.append(graph, "mean", normalize=True)
        assert len(graph.graph) == before
        assert tuple(value.name for value in graph.graph.outputs) == outputs


def test_another_pooling_is_refused(exports: Callable[..., Any]) -> None:
    graph = ir.load(exports("bert", outputs=(HIDDEN,), layers=1).model.path)
    with pytest.raises(UnsupportedGraphError, match="attention"):
        pooled_output.append(graph, "attention", normalize=True)
