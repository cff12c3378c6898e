"""llama-index-embeddings-huggingface: texts, and some as queries. Imports no jexport."""

from __future__ import annotations

import numpy as np
from asked import Job, answer
from llama_index.embeddings.huggingface import HuggingFaceEmbedding


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts, with the prompt as both of the class's instructions."""
    prompts = {"query_instruction": job["prompt"], "text_instruction": job["prompt"]}
    model = HuggingFaceEmbedding(model_name=job["folder"], device="cpu", **prompts)
    vectors = np.array(model.get_text_embedding_batch(job["texts"]))
    one_by_one = np.array([model.get_query_embedding(text) for text in job["texts"][:3]])
    assert np.abs(one_by_one - vectors[:3]).max() < 1e-5
    return vectors


if __name__ == "__main__":
    answer(embed, "llama-index-embeddings-huggingface", "sentence-transformers", "transformers")
