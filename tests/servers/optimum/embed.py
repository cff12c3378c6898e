"""Optimum's ORTModelForFeatureExtraction, with the mean taken here. Imports no jexport."""

from __future__ import annotations

import numpy as np
from asked import Job, answer, batches, pooled, prompted
from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import AutoTokenizer


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts."""
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    model = ORTModelForFeatureExtraction.from_pretrained(job["folder"])
    rows = []
    for some in batches(prompted(job)):
        tokens = tokenizer(
            some, padding=True, truncation=True, max_length=job["max_tokens"], return_tensors="np"
        )
        states = model(**tokens).last_hidden_state
        rows.append(pooled(states, tokens["attention_mask"], job))
    return np.concatenate(rows)


if __name__ == "__main__":
    answer(embed, "optimum", "optimum-onnx", "onnxruntime")
