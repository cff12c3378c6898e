"""`load.use`: prompts and a Router's routes against encode_query, encode_document and encode."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Router
from sentence_transformers.sentence_transformer.modules import Pooling

from jexport.checkpoints import known_tasks
from jexport.errors import (
    CheckpointError,
    PromptError,
    UnknownTaskError,
    UnsupportedCheckpointError,
)
from jexport.runtime import Embedder, TextTokenizer
from jexport.types import LoadedModel

Open = Callable[..., LoadedModel]
Edit = Callable[..., None]
models = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("static_models.py"))))
SETTINGS = "config_sentence_transformers.json"
TEXTS = ["the harbour at night", "SHIPS and Boats, 1923!", "", "x y z " * 40]


def encoded(model: LoadedModel, method: str = "encode") -> np.ndarray:
    folder, embedding = model.tokenizer_files[0].parent, model.embedding
    with model.reference() as run:
        ours = Embedder(
            tokenizer=TextTokenizer.open(folder, max_tokens=embedding.max_tokens),
            runner=run,
            embedding=embedding,
            outputs=["last_hidden_state"],
        )
        vectors: np.ndarray = getattr(ours, method)(TEXTS)
    return vectors


def library(folder: Path, **settings: Any) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", **settings)


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and bool(np.abs(found - wanted).max() <= 2e-6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return models.save_static(tmp_path / "saved", prompts=models.PROMPTS)


@pytest.mark.parametrize(
    "prompts",
    [
        models.PROMPTS,
        {"query": "search: "},
        {"passage": "text: "},
        {"query": "search: ", "passage": "text: ", "corpus": "c: "},
        {"document": "text: ", "query": ""},
    ],
)
def test_query_and_document_are_the_librarys(
    prompts: dict[str, str], saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / SETTINGS, prompts=prompts, default_prompt_name="query")
    theirs = library(saved)
    for use, method in (("query", "encode_query"), ("document", "encode_document")):
        model = opened(saved, use=use)
        assert model.embedding.use == use
        assert near(encoded(model), getattr(theirs, method)(TEXTS))
        for name in ("encode_query", "encode_document"):  # one artifact serves all its prompts
            assert near(encoded(model, name), getattr(theirs, name)(TEXTS))


def test_a_prompt_by_its_name(saved: Path, opened: Open) -> None:
    model = opened(saved, use="other")
    assert model.embedding.default_prompt_name == "other"
    assert near(encoded(model), library(saved).encode(TEXTS, prompt_name="other"))
    assert not near(encoded(model), library(saved).encode(TEXTS))


def test_prompts_of_a_recipe_are_uses(saved: Path, opened: Open, edit_json: Edit) -> None:
    edit_json(saved / SETTINGS, prompts={})
    given = {"query": "q: ", "document": "d: "}
    theirs = library(saved, prompts=given)
    assert near(encoded(opened(saved, prompts=given, use="query")), theirs.encode_query(TEXTS))
    assert near(
        encoded(opened(saved, prompts=given, use="document")), theirs.encode_document(TEXTS)
    )
    assert near(encoded(opened(saved, prompts=given)), theirs.encode(TEXTS))


def test_an_unknown_use_names_those_that_there_are(
    saved: Path, opened: Open, edit_json: Edit
) -> None:
    with pytest.raises(PromptError, match="unknown use 'qery'") as caught:
        opened(saved, use="qery")
    assert "query, document, other" in str(caught.value)
    assert "'query'" in caught.value.fix
    edit_json(saved / SETTINGS, prompts={"query": ""})
    with pytest.raises(PromptError, match="no prompts"):
        opened(saved, use="query")


@pytest.mark.parametrize("task", ["retrieval.query", "retrieval.passage", "none"])
def test_a_checkpoint_with_a_task_for_each_side_has_none(task: str, opened: Open) -> None:
    with pytest.raises(PromptError, match=r"--use|use 'query'"):
        opened(models.SMALL, task, use="query")


@pytest.mark.parametrize("settings", [{}, {"default_route": "query"}, {"default_route": None}])
def test_each_route_is_the_librarys(settings: Any, tmp_path: Path, opened: Open) -> None:
    saved = models.save_router(tmp_path / "saved", **settings)
    theirs = library(saved)
    assert known_tasks(saved) == ("none",)
    by_side = {}
    for use, method in (("query", "encode_query"), ("document", "encode_document")):
        model = opened(saved, use=use)
        by_side[use] = encoded(model)
        assert model.folder == saved
        assert model.embedding.side == use
        assert near(by_side[use], getattr(theirs, method)(TEXTS))
        other = "encode_document" if use == "query" else "encode_query"
        with pytest.raises(UnknownTaskError, match="does not embed"):
            encoded(model, other)
    assert not near(by_side["query"], by_side["document"])
    assert near(encoded(opened(saved)), theirs.encode(TEXTS))


def test_both_routes_list_the_same_files(tmp_path: Path, opened: Open) -> None:
    saved = models.save_router(tmp_path / "saved")
    query, document = (
        {one.path: one.sha256 for one in opened(saved, use=use).source.files}
        for use in ("query", "document")
    )
    common = query.keys() & document.keys()
    assert all(query[path] == document[path] for path in common)
    assert {"modules.json", "router_config.json"} <= common
    assert {path for path in common if path.endswith(".safetensors")} == {
        "query_0_StaticEmbedding/model.safetensors",
        "document_0_Transformer/model.safetensors",
    }


def test_without_a_default_route_both_are_named(tmp_path: Path, opened: Open) -> None:
    saved = models.save_router(tmp_path / "saved", default_route=None, allow_empty_key=False)
    with pytest.raises(PromptError) as caught:
        opened(saved)
    assert "--use query or --use document" in caught.value.fix
    with pytest.raises(PromptError, match="unknown use 'qury'") as caught:
        opened(saved, use="qury")
    assert "query, document" in str(caught.value)


def test_routes_that_share_a_module(tmp_path: Path, opened: Open) -> None:
    shared = models.encoder(tmp_path / "encoder")
    routes = {
        "query": [shared, Pooling(models.WIDTH, "cls")],
        "document": [shared, Pooling(models.WIDTH, "mean")],
    }
    saved = models.save(tmp_path / "saved", Router(routes))
    theirs = library(saved)
    assert near(encoded(opened(saved, use="query")), theirs.encode_query(TEXTS))
    assert near(encoded(opened(saved, use="document")), theirs.encode_document(TEXTS))


def test_routes_by_mappings(tmp_path: Path, opened: Open) -> None:
    routes = {
        "small": [models.static()],
        "large": [models.encoder(tmp_path / "encoder"), Pooling(models.WIDTH, "mean")],
    }
    mappings = {("query", "text"): "small", ("document", None): "large"}
    router = Router(routes, route_mappings=mappings)
    saved = models.save(tmp_path / "saved", router, Normalize())
    theirs = library(saved)
    query = opened(saved, use="query")
    assert query.embedding.side == "query"
    assert near(encoded(query), theirs.encode_query(TEXTS))
    assert near(encoded(opened(saved, use="document")), theirs.encode_document(TEXTS))
    assert near(encoded(opened(saved, use="large")), theirs.encode(TEXTS, task="large"))


def test_as_versions_before_5_wrote_it(tmp_path: Path, opened: Open, edit_json: Edit) -> None:
    """Asym in a folder of its own, config.json, old names of classes."""
    saved = models.save_router(tmp_path / "saved")
    home = saved / "0_Asym"
    home.mkdir()
    for name in ("query_0_StaticEmbedding", "document_0_Transformer", "document_1_Pooling"):
        (saved / name).rename(home / name)
    config = json.loads((saved / "router_config.json").read_text())
    (saved / "router_config.json").unlink()
    config["types"] = {
        name: f"sentence_transformers.models.{kind.rsplit('.', 1)[-1]}"
        for name, kind in config["types"].items()
    }
    config["parameters"] = {"allow_empty_key": True}
    (home / "config.json").write_text(json.dumps(config))
    modules = json.loads((saved / "modules.json").read_text())
    modules[0] |= {"path": home.name, "type": "sentence_transformers.models.Asym"}
    (saved / "modules.json").write_text(json.dumps(modules))
    theirs = library(saved)
    assert near(encoded(opened(saved, use="document")), theirs.encode_document(TEXTS))
    assert near(encoded(opened(saved)), theirs.encode(TEXTS))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"structure": {"query": ["gone"]}}, CheckpointError, "does not say its routes"),
        ({"structure": ...}, CheckpointError, "does not say its routes"),
        ({"parameters": {"default_route": "gone"}}, CheckpointError, "does not have"),
        ({"parameters": {"new": 1}}, UnsupportedCheckpointError, "parameters: 'new'"),
    ],
)
def test_what_is_broken_is_named(
    change: dict[str, Any],
    error: type[Exception],
    words: str,
    tmp_path: Path,
    opened: Open,
    edit_json: Edit,
) -> None:
    saved = models.save_router(tmp_path / "saved")
    edit_json(saved / "router_config.json", **change)
    with pytest.raises(error, match=words):
        opened(saved, use="query")


def test_a_module_that_is_refused_is_named(tmp_path: Path, opened: Open) -> None:
    saved = models.save_router(tmp_path / "saved")
    config = json.loads((saved / "router_config.json").read_text())
    name = "query_0_StaticEmbedding"
    config["types"][name] = "sentence_transformers.models.SparseStaticEmbedding"
    (saved / "router_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpointError, match="sparse vectors"):
        opened(saved, use="query")
    assert encoded(opened(saved, use="document")).any()
