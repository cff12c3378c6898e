"""calibration_texts: trials pool and cut as the Embedder does, which is the judge here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport import recipe
from jexport.building.calibration_texts import TokenizedTexts, calibration_data
from jexport.quantization.evaluator import embed
from jexport.runtime.embedder import Embedder
from jexport.stages import load
from jexport.types import LoadedModel, Tensors, TensorSpec

TASK = "retrieval.passage"
WIDTH = 32
HIDDEN = TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", "sequence", WIDTH))
POOLED = TensorSpec(name="sentence_embedding", dtype="float32", shape=("batch", WIDTH))


class Tokens:
    """A runner whose token vectors depend on the token alone, whose text vectors are their sum."""

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).standard_normal((31_000, WIDTH)).astype(np.float32)

    def __call__(self, feeds: Tensors) -> Tensors:
        hidden = self.table[feeds["input_ids"]]
        summed = (hidden * feeds["attention_mask"][:, :, None]).sum(axis=1)
        length = np.linalg.norm(summed, axis=1, keepdims=True)
        return {HIDDEN.name: hidden, POOLED.name: (summed / length).astype(np.float32)}


@pytest.fixture(scope="module")
def model(small: Path) -> LoadedModel:
    loaded = load.run(recipe.for_model(str(small)).load, task=TASK)
    wide = dataclasses.replace(loaded.embedding, dimension=WIDTH, matryoshka=())
    return dataclasses.replace(loaded, embedding=wide)


def of(model: LoadedModel, **embedding: Any) -> TokenizedTexts:
    changed = dataclasses.replace(model.embedding, **embedding)
    return TokenizedTexts.of("everyday", dataclasses.replace(model, embedding=changed))


@pytest.mark.parametrize(
    ("pooling", "output", "truncate_dim", "include_prompt"),
    [
        ("mean", HIDDEN, 0, True),
        ("mean", HIDDEN, 0, False),
        ("max", HIDDEN, 10, False),
        ("cls", HIDDEN, 0, False),
        ("last", HIDDEN, 10, True),
        ("mean", POOLED, 10, True),  # with include_prompt=False no graph pools
    ],
)
def test_held_out_texts_point_where_the_embedder_points(
    pooling: str, output: TensorSpec, truncate_dim: int, include_prompt: bool, model: LoadedModel
) -> None:
    texts = of(model, pooling=pooling, truncate_dim=truncate_dim, include_prompt=include_prompt)
    embedding = texts.model.embedding
    assert embedding.prompt
    runner = Tokens()
    judge = Embedder(
        tokenizer=texts.tokenizer, runner=runner, embedding=embedding, outputs=[output.name]
    )
    wanted = judge.encode([sample.text for sample in texts.parts.held_out.samples])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = texts.embed(runner, [output])
    assert found.shape == wanted.shape == (len(texts.held_out()), truncate_dim or WIDTH)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    # what trials of the search embed
    data = calibration_data(texts, recipe.QuantizeSpec(max_tokens=8192))
    assert (data.pooling.skip_tokens > 1) == (not include_prompt)
    trial = embed(
        runner,
        data.held_out,
        pad=data.pad,
        pooling=data.pooling,
        output=output.name,
    )
    np.testing.assert_allclose(trial, wanted, atol=1e-6)


def test_a_prompt_that_is_not_pooled_changes_the_mean(model: LoadedModel) -> None:
    runner = Tokens()
    whole = of(model, include_prompt=True).embed(runner, [HIDDEN])
    without = of(model, include_prompt=False).embed(runner, [HIDDEN])
    assert (whole * without).sum(axis=1).min() < 0.95
    assert of(model, include_prompt=False, prompt="").pooling.skip_tokens == 0
