"""LangChain's own standard suites for embeddings, and what they do not ask."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

import jexport
from jexport.errors import PairError
from jexport.serving.integrations.langchain import JexportEmbeddings


class OnePair:
    """The suites' subject: a query and a passage artifact, 32 dimensions."""

    @pytest.fixture(autouse=True)
    def _artifacts(self, pair: tuple[Path, Path]) -> None:
        self.words = {"queries": pair[0], "documents": str(pair[1]), "dimensions": 32}

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return JexportEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return self.words


class OneArtifact(OnePair):
    """The same with one artifact for both."""

    @pytest.fixture(autouse=True)
    def _artifacts(self, symmetric: Path) -> None:  # type: ignore[override]
        self.words = {"queries": symmetric}


class TestPairUnit(OnePair, EmbeddingsUnitTests):
    pass


class TestPairIntegration(OnePair, EmbeddingsIntegrationTests):
    pass


class TestOneUnit(OneArtifact, EmbeddingsUnitTests):
    pass


class TestOneIntegration(OneArtifact, EmbeddingsIntegrationTests):
    pass


def test_vectors_are_the_artifacts(pair: tuple[Path, Path], texts: list[str]) -> None:
    with JexportEmbeddings(*pair) as embeddings:
        documents = embeddings.embed_documents(texts)
        queries = [embeddings.embed_query(text) for text in texts]
        assert asyncio.run(embeddings.aembed_documents(texts)) == documents
        assert asyncio.run(embeddings.aembed_query(texts[0])) == queries[0]
        assert embeddings.dimension == len(documents[0])
        assert "retrieval.passage" in embeddings.name
        assert repr(embeddings) == f"JexportEmbeddings({embeddings.name!r})"
    for folder, found in zip(pair, (queries, documents), strict=True):
        with jexport.open_artifact(folder) as model:
            np.testing.assert_allclose(found, model.encode(texts), atol=1e-6)
    with pytest.raises(RuntimeError, match="closed"):
        embeddings.embed_query("x")


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
    with JexportEmbeddings(symmetric, **given) as embeddings:  # type: ignore[arg-type]
        taken = {**embeddings._pair._opening, **embeddings._pair._encoding}
    assert taken.pop("max_batch_tokens") == given.pop("batch_tokens")
    assert taken == given


def test_a_misspelt_option_is_refused(symmetric: Path) -> None:
    with pytest.raises(TypeError, match="'dimension'"):
        JexportEmbeddings(symmetric, dimension=16)  # type: ignore[call-arg]


def test_a_vector_store_finds_what_it_was_given(pair: tuple[Path, Path]) -> None:
    with JexportEmbeddings(*pair) as embeddings:
        store = InMemoryVectorStore(embeddings)
        store.add_documents([Document(page_content=text) for text in ("one", "two", "three")])
        [vector] = embeddings.embed_documents(["two"])
        [(found, score)] = store.similarity_search_with_score_by_vector(vector, k=1)
    assert found.page_content == "two"
    assert score == pytest.approx(1, abs=1e-6)


def test_a_pickled_copy_embeds_alike(pair: tuple[Path, Path]) -> None:
    with JexportEmbeddings(*pair) as embeddings:
        wanted = embeddings.embed_query("x")
        with pickle.loads(pickle.dumps(embeddings)) as twin:
            assert twin.embed_query("x") == wanted


def test_swapped(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PairError, match="swapped"):
        JexportEmbeddings(queries=pair[1], documents=pair[0])


@pytest.mark.parametrize(
    ("module", "framework", "extra"),
    [("langchain", "langchain_core", "langchain"), ("llama_index", "llama_index", "llama-index")],
)
def test_without_the_framework(module: str, framework: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{framework!r}] = None\n"
        "import jexport.serving.integrations.pair\n"
        "from jexport.errors import DependencyError\n"
        f"try:\n    import jexport.serving.integrations.{module}\n"
        "except DependencyError as error:\n    print(error)\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & ({'langchain_core', 'llama_index', 'pydantic'} - {sys.argv[1]})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, framework], capture_output=True, text=True, check=True
    )
    assert f"jexport.serving.integrations.{module} needs {framework}" in done.stdout
    assert f'fix: pip install "jexport[{extra}]"' in done.stdout
