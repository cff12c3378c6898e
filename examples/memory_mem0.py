"""Memory of an assistant: Mem0 on a Milvus Lite file, embedded by a jexport artifact.

    pip install "jexport[onnx]" mem0ai langchain milvus-lite pymilvus
    python examples/memory_mem0.py artifacts/jina-embeddings-v3/text-matching/onnx-fp32/latest

With --folder DIR the memories stay there, and a second run finds them.

Mem0's provider `langchain` embeds what it stores and what it looks for with one and the same call:
so the artifact has to be of a task that treats both alike, text-matching, or of a plain model.
Memories are stored as they are (infer=False), so no language model is asked; where Mem0 should pick
out facts itself, give it one in MODEL's place. Telemetry is off, and no network is reached.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from langchain_core.language_models import FakeListChatModel

from jexport.serving.integrations.langchain import JexportEmbeddings

MODEL = FakeListChatModel(responses=[])
"""Mem0 wants a language model even when it is never asked; this one has no answer to give."""

MEMORIES = (
    ("ana", "I am allergic to peanuts and carry an adrenaline pen."),
    ("ana", "My sister Ines lives in Porto and visits every summer."),
    ("ana", "I cycle to work unless it rains."),
    ("ben", "I grow tomatoes on my balcony."),
)
QUESTIONS = (
    ("ana", "Which foods must I avoid?"),
    ("ana", "How do I get to the office?"),
    ("ben", "Which foods must I avoid?"),
)


def configuration(embeddings: JexportEmbeddings, folder: Path) -> dict[str, Any]:
    """Mem0's settings: everything it keeps is below `folder`."""
    return {
        "embedder": {"provider": "langchain", "config": {"model": embeddings}},
        "vector_store": {
            "provider": "milvus",
            "config": {
                "url": str(folder / "memories.db"),
                "token": "",
                "collection_name": "memories",
                "embedding_model_dims": embeddings.dimension,  # Mem0 assumes 1,536
                "metric_type": "COSINE",
            },
        },
        "llm": {"provider": "langchain", "config": {"model": MODEL}},
        "history_db_path": str(folder / "history.db"),
    }


def main() -> None:
    """Store a few memories of two people, unless they are there already, and ask for them."""
    parser = argparse.ArgumentParser(description="Remember with Mem0 and Milvus Lite.")
    parser.add_argument("artifact", help="of text-matching, or of a plain model")
    parser.add_argument("--folder", type=Path, help="where to keep it; default: a temporary one")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = words.folder or Path(scratch)
        # Read when mem0 is imported; by default it reports its use and writes to the home folder.
        os.environ.update(MEM0_TELEMETRY="False", MEM0_DIR=str(folder / "mem0"))
        from mem0 import Memory

        with JexportEmbeddings(words.artifact) as embeddings:
            print(embeddings.name)
            known = (folder / "memories.db").exists()
            memory = Memory.from_config(configuration(embeddings, folder))
            client = memory.vector_store.client
            # Milvus Lite 3 keeps a file's collections closed until asked, and Mem0 2.2.1 does not
            # ask: without this line it remembers nothing after a restart.
            for name in client.list_collections():
                client.load_collection(name)
            for person, text in () if known else MEMORIES:
                memory.add(text, user_id=person, infer=False)
            for person, question in QUESTIONS:
                found = memory.search(question, filters={"user_id": person}, top_k=1, threshold=0.0)
                for one in found["results"]:
                    print(f"  {one['score']:.3f}  {person}: {question}  ->  {one['memory']}")
            client.close()


if __name__ == "__main__":
    main()
