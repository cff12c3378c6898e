"""LlamaIndex's BaseEmbedding: every public way in, its caches, pipelines and copies."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from pydantic import ValidationError

import jexport
from jexport.errors import ArtifactError, DimensionError, PairError
from jexport.serving.integrations.llama_index import JexportEmbedding


@pytest.fixture
def embedding(pair: tuple[Path, Path]) -> Iterator[JexportEmbedding]:
    with JexportEmbedding(*pair, dimensions=32, embed_batch_size=2) as one:
        yield one


@pytest.fixture(scope="module")
def wanted(pair: tuple[Path, Path], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the texts as queries, and as documents."""
    found = []
    for folder in pair:
        with jexport.open_artifact(folder) as model:
            found.append(model.encode(texts, dimensions=32))
    return found[0], found[1]


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_it_is_an_embedding_of_llama_index() -> None:
    """What LlamaIndex's own embedding packages are tested for, and that nothing is abstract."""
    assert BaseEmbedding.__name__ in [base.__name__ for base in JexportEmbedding.__mro__]
    assert JexportEmbedding.class_name() == "JexportEmbedding"
    assert not JexportEmbedding.__abstractmethods__
    # The base class would run these on the event loop, one text at a time.
    for name in ("_get_text_embeddings", "_aget_text_embedding", "_aget_text_embeddings"):
        assert getattr(JexportEmbedding, name) is not getattr(BaseEmbedding, name)


def test_every_way_in(
    embedding: JexportEmbedding, texts: list[str], wanted: tuple[np.ndarray, np.ndarray]
) -> None:
    queries, documents = wanted
    close(embedding.get_query_embedding(texts[0]), queries[0])
    close(embedding.get_text_embedding(texts[0]), documents[0])
    close(embedding.get_text_embedding_batch(texts), documents)
    close(embedding.get_agg_embedding_from_queries(texts[:3]), queries[:3].mean(axis=0))
    assert embedding.get_text_embedding_batch([]) == []
    assert type(embedding.get_query_embedding("x")[0]) is float
    assert embedding.dimension == 32

    async def each() -> None:
        close(await embedding.aget_query_embedding(texts[0]), queries[0])
        close(await embedding.aget_text_embedding(texts[0]), documents[0])
        close(await embedding.aget_text_embedding_batch(texts), documents)
        embedding.num_workers = 3
        close(await embedding.aget_text_embedding_batch(texts), documents)

    asyncio.run(each())


def test_the_event_loop_is_not_held_up(
    embedding: JexportEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go_on = threading.Event(), threading.Event()
    real = embedding._pair.embed_documents

    def slow(texts: list[str]) -> Any:
        waiting.set()
        assert go_on.wait(30)
        return real(texts)

    monkeypatch.setattr(embedding._pair, "embed_documents", slow)

    async def both() -> list[float]:
        call = asyncio.create_task(embedding.aget_text_embedding("x"))
        while not waiting.is_set():
            await asyncio.sleep(0.001)
        go_on.set()  # reached only when the loop runs while the engine does
        return await call

    assert len(asyncio.run(asyncio.wait_for(both(), 30))) == 32


def test_a_cache_is_used(pair: tuple[Path, Path], texts: list[str], wanted: Any) -> None:
    cache = SimpleKVStore()
    with JexportEmbedding(*pair, dimensions=32, embeddings_cache=cache) as embedding:
        close(embedding.get_text_embedding_batch(texts), wanted[1])
    with pytest.raises(RuntimeError, match="closed"):
        embedding.get_text_embedding("not in the cache")
    close(embedding.get_text_embedding_batch(texts), wanted[1])


def test_nodes_and_pipelines(embedding: JexportEmbedding, wanted: Any, texts: list[str]) -> None:
    nodes = [TextNode(text=text) for text in texts]
    close([node.embedding for node in embedding(nodes)], wanted[1])
    pipeline = IngestionPipeline(transformations=[embedding])
    documents = [Document(text=text) for text in texts]
    close([node.embedding for node in pipeline.run(documents=documents)], wanted[1])
    embedding.close()  # a second run comes from the pipeline's own cache
    close([node.embedding for node in pipeline.run(documents=documents)], wanted[1])


def test_an_index_retrieves(pair: tuple[Path, Path], texts: list[str], wanted: Any) -> None:
    with JexportEmbedding(*pair, dimensions=32) as embedding:
        nodes = [TextNode(text=text) for text in texts]
        index = VectorStoreIndex(nodes=nodes, embed_model=embedding)
        for number, question in enumerate(texts[:5]):
            [found] = index.as_retriever(similarity_top_k=1).retrieve(question)
            scores = wanted[1] @ wanted[0][number]
            assert found.score == pytest.approx(scores.max(), abs=1e-5)
            assert found.text == texts[int(scores.argmax())]


def test_it_says_what_it_is_and_can_be_made_again(
    embedding: JexportEmbedding, pair: tuple[Path, Path]
) -> None:
    assert f"retrieval.query/onnx-fp32/{pair[0].name}" in embedding.model_name
    said = embedding.to_dict()
    assert (said["queries"], said["documents"]) == (str(pair[0]), str(pair[1]))
    assert embedding.to_payload()["model_name"] == embedding.model_name
    with JexportEmbedding.from_json(embedding.to_json()) as twin:
        assert twin.to_dict() == said
        assert twin.get_query_embedding("x") == embedding.get_query_embedding("x")


def test_copies_open_their_own_engines(
    embedding: JexportEmbedding, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = embedding.get_query_embedding("x")
    embedding.callback_manager = CallbackManager([])
    twins = [pickle.loads(pickle.dumps(embedding)), copy.deepcopy(embedding)]
    assert caplog.text == ""  # LlamaIndex warns of what it cannot pickle
    embedding.close()
    for twin in twins:
        with twin:
            assert twin.get_query_embedding("x") == wanted
            assert twin.to_dict() == embedding.to_dict()


def test_a_copy_without_what_cannot_be_pickled(embedding: JexportEmbedding) -> None:
    embedding.rate_limiter = threading.Lock()  # cannot be pickled, so LlamaIndex leaves it out
    with pickle.loads(pickle.dumps(embedding)) as twin:
        assert twin.rate_limiter is None
        assert len(twin.get_query_embedding("x")) == 32


def test_a_copy_of_what_is_gone_says_so(symmetric: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(symmetric)
    with JexportEmbedding(link) as embedding:
        stored = pickle.dumps(embedding)
    link.unlink()
    with pytest.raises(ArtifactError, match="latest is not a jexport artifact"):
        pickle.loads(stored).get_query_embedding("x")


def test_refusals(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PairError, match="swapped"):
        JexportEmbedding(queries=pair[1], documents=pair[0])
    with pytest.raises(DimensionError, match="does not offer 65"):
        JexportEmbedding(*pair, dimensions=65)
    with pytest.raises(ValidationError, match="dimension\n"):
        JexportEmbedding(*pair, dimension=32)  # misspelt


def test_every_option_reaches_the_pair(symmetric: Path) -> None:
    given = {
        "dimensions": 16,
        "normalize": False,
        "truncate": False,
        "batch_tokens": 7,
        "device": "cpu",
        "threads": 1,
        "verify": False,
    }
    with JexportEmbedding(symmetric, **given) as embedding:
        taken = {**embedding._pair._opening, **embedding._pair._encoding}
    assert taken.pop("max_batch_tokens") == given.pop("batch_tokens")
    assert taken == given
