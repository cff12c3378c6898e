"""ONNX Runtime with tokenizers and numpy, nothing else. Imports no jexport."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
from asked import Job, answer, batches, pooled, prompted
from tokenizers import Tokenizer


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts."""
    folder = Path(job["folder"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(job["max_tokens"])
    config = json.loads((folder / "config.json").read_text())
    tokenizer.enable_padding(pad_id=config["pad_token_id"])
    session = onnxruntime.InferenceSession(folder / job["files"][0])
    rows = []
    for some in batches(prompted(job)):
        encoded = tokenizer.encode_batch(some)
        mask = np.array([one.attention_mask for one in encoded])
        ids = np.array([one.ids for one in encoded])
        [states] = session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
        rows.append(pooled(states, mask, job))
    return np.concatenate(rows)


if __name__ == "__main__":
    answer(embed, "onnxruntime")
