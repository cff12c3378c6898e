"""Retrieval for LlamaIndex: documents into VectorStoreIndex, questions out of its retriever.

    pip install "jexport[onnx,llama-index]"
    python examples/rag_llama_index.py                    # on what `make demo` built
    python examples/rag_llama_index.py QUERIES DOCUMENTS  # of retrieval.query, retrieval.passage

Retrieval only: no language model is asked. Reaches no network.
"""

from __future__ import annotations

import argparse

from llama_index.core import Document, VectorStoreIndex

from jexport.integrations.llama_index import JexportEmbedding

TEXTS = (
    ("harbour", "The ferry to the island leaves at seven in the morning and at noon."),
    ("kitchen", "Soak the beans overnight, then simmer them with a bay leaf for two hours."),
    ("garden", "Prune the roses in late winter, before the buds begin to swell."),
    ("library", "Borrowed books may be renewed twice unless another reader has asked for them."),
    ("workshop", "Tighten the brake cable until the pads nearly touch the rim of the wheel."),
)
QUESTIONS = (
    "When does the boat go?",
    "How long do I cook dried beans?",
    "Can I keep a book for longer?",
)
MADE_BY_DEMO = "artifacts/all-MiniLM-L6-v2/none/onnx-fp32/latest"


def main() -> None:
    """Index the texts, ask each question, print where the best answer stands."""
    parser = argparse.ArgumentParser(description="Retrieve with LlamaIndex.")
    parser.add_argument("queries", nargs="?", default=MADE_BY_DEMO, help="artifact for questions")
    parser.add_argument("documents", nargs="?", help="artifact for texts; default: the same")
    words = parser.parse_args()
    # Metadata would be embedded with the text unless it is left out by name.
    texts = [
        Document(text=text, metadata={"from": place}, excluded_embed_metadata_keys=["from"])
        for place, text in TEXTS
    ]
    with JexportEmbedding(words.queries, words.documents) as embedding:
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
