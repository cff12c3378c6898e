"""langchain-huggingface: documents and, for every text once more, queries. Imports no jexport."""

from __future__ import annotations

import numpy as np
from asked import Job, answer
from langchain_huggingface import HuggingFaceEmbeddings


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts, with the prompt that the folder itself asks for."""
    model = HuggingFaceEmbeddings(model_name=job["folder"], encode_kwargs={"batch_size": 8})
    vectors = np.array(model.embed_documents(job["texts"]))
    one_by_one = np.array([model.embed_query(text) for text in job["texts"][:3]])
    assert np.abs(one_by_one - vectors[:3]).max() < 1e-5
    return vectors


if __name__ == "__main__":
    answer(embed, "langchain-huggingface", "sentence-transformers", "transformers")
