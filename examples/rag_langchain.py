"""Retrieval for LangChain: texts into InMemoryVectorStore, questions out of it.

    pip install "jexport[onnx,langchain]"
    python examples/rag_langchain.py                    # on what `make demo` built
    python examples/rag_langchain.py QUERIES DOCUMENTS  # of retrieval.query, retrieval.passage

Any vector store of LangChain takes the same embeddings. Reaches no network.
"""

from __future__ import annotations

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from rag_texts import QUESTIONS, TEXTS, artifacts

from jexport.serving.integrations.langchain import JexportEmbeddings


def main() -> None:
    """Index the texts, ask each question, print where the best answer stands."""
    queries, documents = artifacts("LangChain")
    with JexportEmbeddings(queries, documents) as embeddings:
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
