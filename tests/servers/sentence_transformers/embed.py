"""sentence-transformers, with the backend that the artifact is for. Imports no jexport."""

from __future__ import annotations

import numpy as np
from asked import Job, answer
from sentence_transformers import SentenceTransformer

BACKENDS = {"hf": "torch", "onnx": "onnx", "openvino": "openvino"}


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts, with the prompt that the folder itself asks for."""
    options = {"provider": "CPUExecutionProvider"} if job["target"] == "onnx" else {}
    model = SentenceTransformer(
        job["folder"], backend=BACKENDS[job["target"]], device="cpu", model_kwargs=options
    )
    vectors = model.encode(job["texts"], batch_size=8)
    if job["task"] == "retrieval.query":
        assert np.abs(model.encode_query(job["texts"][:2]) - vectors[:2]).max() < 1e-5
    if job["task"] == "retrieval.passage":
        assert np.abs(model.encode_document(job["texts"][:2]) - vectors[:2]).max() < 1e-5
    return vectors


if __name__ == "__main__":
    answer(embed, "sentence-transformers", "transformers")
