"""Real trained weights: all-MiniLM-L6-v2 against sentence-transformers' own encode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jexport
from jexport.artifacts import manifest
from jexport.errors import DimensionError

TOLERANCE = 1e-6
"""Measured: 2e-7. Both run in float32; only the order of additions differs."""

LONG = "A sentence that goes on and on, about rivers and the towns along them. " * 40


@pytest.fixture(scope="module")
def reference(minilm: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    vectors: np.ndarray = model.encode([*texts, LONG, ""], convert_to_numpy=True)
    return vectors


def test_vectors_are_those_of_sentence_transformers(
    minilm_artifact: Path, texts: list[str], reference: np.ndarray
) -> None:
    with jexport.open_artifact(minilm_artifact) as model:
        vectors = model.encode([*texts, LONG, ""])
        assert model.truncated == 1
    assert vectors.shape == (len(texts) + 2, 384)
    assert np.abs(vectors - reference).max() <= TOLERANCE


def test_similar_texts_are_similar(minilm_artifact: Path) -> None:
    with jexport.open_artifact(minilm_artifact) as model:
        cat, kitten, tax = model.encode(
            ["A cat sleeps on the sofa.", "A kitten is napping on the couch.", "Taxes are due."]
        )
    assert cat @ kitten > 0.6 > 0.3 > cat @ tax


def test_what_the_artifact_says_of_itself(minilm_artifact: Path, minilm: Path) -> None:
    content = manifest.verify(minilm_artifact).content
    assert content["checkpoint"]["layout"] == "sentence_transformer"
    assert content["licence"] == "apache-2.0"
    assert content["embedding"] == {
        "task": "none",
        "prompt": "",
        "pooling": "mean",
        "normalize": True,
        "dimension": 384,
        "matryoshka": [],
        "max_tokens": 256,
        "space": content["embedding"]["space"],
        "prompts": {},
        "default_prompt_name": "",
        "include_prompt": True,
        "similarity": "cosine",
        "truncate_dim": 0,
    }
    config = json.loads((minilm_artifact / "config.json").read_text())
    own = json.loads((minilm / "config.json").read_text())
    assert config == own | {"max_position_embeddings": 256}
    model = jexport.open_artifact(minilm_artifact)
    with model, pytest.raises(DimensionError, match="does not offer 128"):
        model.encode("x", dimensions=128)
