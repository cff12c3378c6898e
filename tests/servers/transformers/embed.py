"""transformers: AutoModel, with the mean taken here. Imports no jexport."""

from __future__ import annotations

import numpy as np
import torch
from asked import Job, answer, batches, pooled, prompted
from transformers import AutoModel, AutoTokenizer


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts."""
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    model, loading = AutoModel.from_pretrained(job["folder"], output_loading_info=True)
    # A weight that is not there is made up, with only a warning. The pooler is not part of the
    # embedding; a sentence-transformers checkpoint may not have one.
    absent = [key for key in loading["missing_keys"] if not key.startswith("pooler.")]
    assert not absent, absent
    assert not loading["unexpected_keys"], loading
    rows = []
    for some in batches(prompted(job)):
        tokens = tokenizer(
            some, padding=True, truncation=True, max_length=job["max_tokens"], return_tensors="pt"
        )
        with torch.no_grad():
            states = model(**tokens).last_hidden_state
        rows.append(pooled(states.numpy(), tokens["attention_mask"].numpy(), job))
    return np.concatenate(rows)


if __name__ == "__main__":
    answer(embed, "transformers")
