"""The other sides of `make bench-openvino`, each in a process of its own.

    python sentence_transformers_side.py BACKEND MODEL TEXTS.json VECTORS.npy

Opens MODEL with sentence-transformers' backend 'torch' or 'openvino'; for each line on stdin it
embeds all texts once and prints `seconds N`. Imports nothing of jexport.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer


def main(backend: str, model: str, asked: str, vectors: str) -> None:
    """Answer until stdin ends."""
    sentences = json.loads(Path(asked).read_text(encoding="utf-8"))
    opened = SentenceTransformer(model, backend=backend, device="cpu")
    for _ in sys.stdin:
        begin = time.perf_counter()
        made = opened.encode(sentences, normalize_embeddings=True, show_progress_bar=False)
        print(f"seconds {time.perf_counter() - begin}", flush=True)
        np.save(vectors, made)


if __name__ == "__main__":
    main(*sys.argv[1:])
