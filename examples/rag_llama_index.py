"""Retrieval for LlamaIndex: documents into VectorStoreIndex, questions out of its retriever.

    pip install "jexport[onnx,llama-index]"
    python examples/rag_llama_index.py                    # on what `make demo` built
    python examples/rag_llama_index.py QUERIES DOCUMENTS  # of retrieval.query, retrieval.passage

Retrieval only: no language model is asked. Reaches no network.
"""

from __future__ import annotations

from llama_index.core import Document, VectorStoreIndex
from rag_texts import QUESTIONS, TEXTS, artifacts

from jexport.serving.integrations.llama_index import JexportEmbedding


def main() -> None:
    """Index the texts, ask each question, print where the best answer stands."""
    queries, documents = artifacts("LlamaIndex")
    # Metadata would be embedded with the text unless it is left out by name.
    texts = [
        Document(text=text, metadata={"from": place}, excluded_embed_metadata_keys=["from"])
        for place, text in TEXTS
    ]
    with JexportEmbedding(queries, documents) as embedding:
        print(embedding.model_name)
        # Short texts need no splitter; the default one would fetch a tokenizer of its own.
        index = VectorStoreIndex(nodes=texts, embed_model=embedding)
        retriever = index.as_retriever(similarity_top_k=1)
        for question in QUESTIONS:
            [best] = retriever.retrieve(question)
            place = best.node.metadata["from"]
            print(f"  {best.score:.3f}  {question}  ->  {place}: {best.node.get_content()}")


if __name__ == "__main__":
    main()
