"""LangChain's Embeddings on jexport artifacts: queries with one, documents with the other.

Knows LangChain's interface and nothing of engines; the work is `pair.Pair`'s.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

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
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = True,
        batch_tokens: int | None = None,
        device: str = "auto",
        threads: int = 0,
        verify: bool = True,
    ) -> None:
        """Open both artifacts. queries, documents: folders; documents None for the same artifact.

        dimensions: size of the vectors (Matryoshka), None for the full one. normalize: to length
        1, None as the checkpoint does.
        truncate: cut texts over the length limit, else TextTooLongError. batch_tokens: tokens of
        one forward pass, padding included; None for what suits the engine. device: 'auto', 'cpu'
        or 'cuda'. threads: 0 for all cores. verify: check every file's SHA-256 first.
        Raises PairError (swapped, or not of one model), DimensionError, and what
        `jexport.open_artifact` raises.
        """
        options = Options(
            dimensions=dimensions,
            normalize=normalize,
            truncate=truncate,
            batch_tokens=batch_tokens,
            device=device,
            threads=threads,
            verify=verify,
        )
        self._pair = Pair(queries, documents, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        """Embed documents, in the order given."""
        return self._pair.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        return self._pair.embed_queries([text])[0]

    def close(self) -> None:
        """Free the engines. Twice is harmless; embedding afterwards is a RuntimeError."""
        self._pair.close()
