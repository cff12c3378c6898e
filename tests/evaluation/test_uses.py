"""encode_query and encode_document: the checkpoint's own prompts, through the Embedder."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from jexport.evaluation import reference_set
from jexport.recipe import LoadSpec
from jexport.stages import load

edit_json = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["edit_json"]
PROMPTS = "config_sentence_transformers.json"


@pytest.fixture
def asked(changed: Path) -> Path:
    """The tiny checkpoint with a prompt for queries and one for documents."""
    edit_json(changed / PROMPTS, prompts={"query": "find: ", "document": "text: "})
    return changed


def test_each_use_is_compared(trial: Any, asked: Path) -> None:
    own = type(trial)(loaded=load.run(LoadSpec(model=str(asked)), task="none"), out=trial.out)
    metrics = own.validate(asked).metrics
    for use in ("encode_query", "encode_document"):
        assert metrics[use]["texts"] >= min(reference_set.USE_TEXTS, 20)
        assert metrics[use]["cosine_min"] > 0.999999


def test_a_lost_prompt_of_one_use_is_refused(trial: Any, asked: Path) -> None:
    text = trial.refused(asked)  # the artifact of the checkpoint without them
    assert "encode_query" in text
    assert "prompt: the checkpoint puts one there" in text


def test_no_prompts_cost_nothing(trial: Any, tiny: Path) -> None:
    assert "encode_query" not in trial.validate(tiny).metrics
