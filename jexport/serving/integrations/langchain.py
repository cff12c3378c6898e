"""LangChain's Embeddings on jexport artifacts: queries with one, documents with the other.

Knows LangChain's interface and nothing of engines; the work is `pair.Pair`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self, Unpack

from jexport.serving.integrations.pair import Options, Pair
from jexport.targets import check_installed

check_installed(("langchain_core",), extra="langchain", purpose=f"importing {__name__}")

from langchain_core.embeddings import Embeddings  # noqa: E402  (after saying what is missing)


class JexportEmbeddings(Embeddings):
    """Embeds for LangChain: a list of floats for a query, a list of them for documents.

        from jexport.integrations.langchain import JexportEmbeddings

        folder = "artifacts/jina-embeddings-v3"
        with JexportEmbeddings(
            f"{folder}/retrieval.query/onnx-int8/latest",
            f"{folder}/retrieval.passage/onnx-fp32/latest",
            dimensions=256,
        ) as embeddings:
            store = InMemoryVectorStore(embeddings)
            store.add_texts(["The ferry leaves at seven.", "Costs fell."])
            store.similarity_search("When does the boat go?", k=1)

    One artifact is enough where a task embeds both alike (text-matching, a plain model). The async
    methods run in a thread, so they do not hold up the event loop. Threads may share it; a pickled
    copy opens its own engines. `close()`, or leaving the `with` block, frees the engines.
    """

    def __init__(
        self,
        queries: str | Path,
        documents: str | Path | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Open both artifacts.

        Args:
            queries: folder of the artifact that embeds queries.
            documents: of the one that embeds documents; None for the same artifact.
            options: dimensions, normalize, truncate, batch_tokens, device, threads, verify, as
                `pair.Options` describes them.

        Raises:
            PairError: they are swapped, or not of one model.
            DimensionError: not a size that the model was trained for. Also what
                `jexport.open_artifact` raises.
        """
        self._pair = Pair(queries, documents, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def name(self) -> str:
        """Model, and task, engine and version of each artifact."""
        return self._pair.name

    @property
    def dimension(self) -> int:
        """Size of every vector: what a vector store wants to know."""
        return self._pair.dimension

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, in the order given.

        Args:
            texts: without a prompt.

        Returns:
            `dimension` floats for each.
        """
        return self._pair.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query.

        Args:
            text: without a prompt.

        Returns:
            `dimension` floats.
        """
        return self._pair.embed_queries([text])[0]

    def close(self) -> None:
        """Free the engines. Twice is harmless; embedding afterwards is a RuntimeError."""
        self._pair.close()
