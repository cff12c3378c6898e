"""Text Embeddings Inference: its loader's rules, its contract with ONNX, and itself where it is.

Imports nothing of jexport.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
from asked import Job, answer, batches, prompted, started
from tei import loader
from tokenizers import Tokenizer

ROUTER = "text-embeddings-router"
BATCH = 8
"""The most that its ONNX Runtime backend takes at once."""


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts: from the server, where it is on the PATH."""
    folder = Path(job["folder"])
    pooling, limit = loader.router(folder)
    assert pooling == "pooling_mode_mean_tokens"
    assert limit == job["max_tokens"]
    graph = loader.graph(folder)
    if shutil.which(ROUTER):
        return served(job)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(limit)
    tokenizer.no_padding()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = {one.name: one.type for one in session.get_inputs()}
    # Those that it feeds; any other input would be missing at every request.
    assert set(names) <= {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    assert {"input_ids", "attention_mask"} <= set(names)
    assert set(names.values()) == {"tensor(int64)"}
    outputs = [one.name for one in session.get_outputs()]
    chosen = next(
        name
        for name in ("sentence_embedding", "last_hidden_state", "token_embeddings")
        if name in outputs
    )
    assert chosen == "sentence_embedding"  # it is given away as it is: nothing is pooled there
    pad = loader.read(folder, "config.json")["pad_token_id"]
    rows = []
    for some in batches(prompted(job), BATCH):
        ids = [one.ids for one in tokenizer.encode_batch(some)]
        batch = padded(ids, pad)
        feed = {"input_ids": batch.ids, "attention_mask": batch.mask}
        rows.append(session.run([chosen], feed)[0])
    found = np.concatenate(rows)
    return found / np.linalg.norm(found, axis=1, keepdims=True)  # a request's default


def padded(ids: list[list[int]], pad: int) -> SimpleNamespace:
    """Ids to the right of which `pad` stands, and their mask."""
    width = max(map(len, ids))
    table = np.full((len(ids), width), pad, dtype=np.int64)
    mask = np.zeros_like(table)
    for row, one in enumerate(ids):
        table[row, : len(one)], mask[row, : len(one)] = one, 1
    return SimpleNamespace(ids=table, mask=mask)


def served(job: Job) -> np.ndarray:
    """From the server itself; it puts the prompt, its line asks for that."""
    rows: list[list[float]] = []
    with started(job, "/health") as address:
        for some in batches(job["texts"], BATCH):
            request = urllib.request.Request(
                f"{address}/embed",
                data=json.dumps({"inputs": some, "truncate": True}).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as reply:
                rows += json.load(reply)
    return np.array(rows)


if __name__ == "__main__":
    answer(embed, "onnxruntime", "tokenizers")
