"""Retrieval for LangChain: texts into InMemoryVectorStore, questions out of it.

    pip install "jexport[onnx,langchain]"
    python examples/rag_langchain.py                    # on what `make demo` built
    python examples/rag_langchain.py QUERIES DOCUMENTS  # of retrieval.query, retrieval.passage

Any vector store of LangChain takes the same embeddings. Reaches no network.
"""

from __future__ import annotations

import argparse

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from jexport.integrations.langchain import JexportEmbeddings

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
    parser = argparse.ArgumentParser(description="Retrieve with LangChain.")
    parser.add_argument("queries", nargs="?", default=MADE_BY_DEMO, help="artifact for questions")
    parser.add_argument("documents", nargs="?", help="artifact for texts; default: the same")
    words = parser.parse_args()
    with JexportEmbeddings(words.queries, words.documents) as embeddings:
        print(embeddings.name)
        store = InMemoryVectorStore(embeddings)
        store.add_documents(
            [Document(page_content=text, metadata={"from": place}) for place, text in TEXTS]
        )
        for question in QUESTIONS:
            [(best, score)] = store.similarity_search_with_score(question, k=1)
            print(f"  {score:.3f}  {question}  ->  {best.metadata['from']}: {best.page_content}")


if __name__ == "__main__":
    main()
