"""No architecture that is written for vLLM is left out of what check_layouts.py runs in it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from jexport import recipe
from jexport.checkpoints.server_layouts import LAYOUTS, VLLM
from jexport.toy import like

rows: Any = runpy.run_path(str(Path(__file__).parent / "vllm" / "layout_rows.py"))
KINDS = {like.read(name).config["model_type"] for name in rows["LIKE"]} | {
    kind for kind, _, _ in rows["TINY"].values()
}


def test_every_architecture_for_vllm_is_run() -> None:
    assert {kind for kind, layout in LAYOUTS.items() if VLLM in layout.poolings} == KINDS


def test_every_pooling_of_vllm_is_run() -> None:
    likes = {like.read(name).table["pooling"]["mode"] for name in rows["LIKE"]}
    assert likes == {"mean", "cls", "lasttoken"}


def test_recipes_for_vllm_are_of_architectures_that_were_run() -> None:
    names = [name for name in recipe.names() if "vllm" in recipe.read(name).targets]
    described = [name for name in names if name not in like.LAYOUTS]
    assert len(described) > 20
    assert {like.read(name).config["model_type"] for name in described} <= KINDS
    assert set(names) - set(described) == set(like.LAYOUTS)
    assert set(like.LAYOUTS) == {"jina-embeddings-v3", *(name for name, _, _ in rows["JINA_V5"])}
