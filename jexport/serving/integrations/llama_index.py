"""LlamaIndex's BaseEmbedding on jexport artifacts: queries with one, nodes with the other.

Knows LlamaIndex's interface and nothing of engines; the work is `pair.Pair`'s.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Self, cast

from jexport.serving.integrations.pair import Options, Pair
from jexport.targets import check_installed

check_installed(("llama_index",), extra="llama-index", purpose=f"importing {__name__}")

from llama_index.core.base.embeddings.base import BaseEmbedding  # noqa: E402  (after the check)
from llama_index.core.bridge.pydantic import (  # noqa: E402
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
)


class JexportEmbedding(BaseEmbedding):
    """Embeds for LlamaIndex: a list of floats for a query or a node.

        from jexport.integrations.llama_index import JexportEmbedding

        folder = "artifacts/jina-embeddings-v3"
        with JexportEmbedding(
            f"{folder}/retrieval.query/onnx-int8/latest",
            f"{folder}/retrieval.passage/onnx-fp32/latest",
            dimensions=256,
        ) as embedding:
            index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
            index.as_retriever(similarity_top_k=1).retrieve("When does the boat go?")

    One artifact is enough where a task embeds both alike (text-matching, a plain model).
    `model_name` says which artifacts were opened; it cannot be set. The async methods run in a
    thread, so they do not hold up the event loop. Threads may share it; a pickled copy, such as an
    ingestion pipeline's workers get, opens its own engines. `close()`, or leaving the `with` block,
    frees the engines. Raises PairError (swapped, or not of one model), DimensionError, and what
    `jexport.open_artifact` raises.
    """

    # A misspelt option must not be dropped in silence.
    model_config = ConfigDict(extra="forbid")

    queries: str = Field(description="Folder of the artifact that embeds queries.")
    documents: str | None = Field(
        default=None, description="Folder of the one that embeds nodes; None for the same artifact."
    )
    dimensions: int | None = Field(
        default=None, description="Size of the vectors (Matryoshka); None for the full one."
    )
    normalize: bool | None = Field(
        default=None, description="Vectors have length 1; None: as the checkpoint does."
    )
    truncate: bool = Field(
        default=True, description="Cut texts over the length limit instead of refusing them."
    )
    batch_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens of one forward pass, padding included; None: what suits the engine.",
    )
    device: str = Field(default="auto", description="'auto', 'cpu' or 'cuda'.")
    threads: int = Field(default=0, ge=0, description="0 for all cores.")
    verify: bool = Field(default=True, description="Check every file's SHA-256 when opening.")
    # LlamaIndex's own default of 10 leaves little to sort by length; batches are cut by tokens.
    embed_batch_size: int = Field(
        default=256, gt=0, le=2048, description="Nodes handed over at once."
    )

    _pair: Pair = PrivateAttr()

    def __init__(
        self, queries: str | Path, documents: str | Path | None = None, **options: Any
    ) -> None:
        """Open both artifacts.

        Args:
            queries: folder of the artifact that embeds queries.
            documents: of the one that embeds nodes; None for the same artifact.
            options: the fields above and those of BaseEmbedding.
        """
        super().__init__(
            queries=str(queries),
            documents=None if documents is None else str(documents),
            **options,
        )

    def model_post_init(self, context: Any) -> None:
        """Open the engines once the fields are known to be right.

        Args:
            context: pydantic's, handed on.
        """
        super().model_post_init(context)
        options = {name: getattr(self, name) for name in Options.__annotations__}
        self._pair = Pair(self.queries, self.documents, options=cast(Options, options))
        self.model_name = self._pair.name

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, engines closed until used.

        LlamaIndex's own would call __init__ and, when that fails, leave an object without engines.
        It leaves out of a pickle what cannot be pickled; here such a field gets its default.
        """
        for name, field in type(self).model_fields.items():
            if name not in state["__dict__"]:
                state["__dict__"][name] = field.get_default(call_default_factory=True)
        BaseModel.__setstate__(self, state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex stores it."""
        return "JexportEmbedding"

    @property
    def dimension(self) -> int:
        """Size of every vector: what a vector store wants to know."""
        return self._pair.dimension

    def close(self) -> None:
        """Free the engines. Twice is harmless; embedding afterwards is a RuntimeError."""
        self._pair.close()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._pair.embed_queries([query])[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._pair.embed_documents([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._pair.embed_documents(texts)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
