"""OpenVINO GenAI's TextEmbeddingPipeline with the tokenizer graph. Imports no jexport."""

from __future__ import annotations

import numpy as np
import openvino_genai
from asked import Job, answer


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts, with the prompt as the pipeline's own instruction."""
    config = openvino_genai.TextEmbeddingPipeline.Config()
    config.pooling_type = openvino_genai.TextEmbeddingPipeline.PoolingType.MEAN
    config.normalize = True
    config.embed_instruction = config.query_instruction = job["prompt"]
    pipeline = openvino_genai.TextEmbeddingPipeline(
        job["folder"], "CPU", config, **job["properties"]
    )
    together = np.array(pipeline.embed_documents(job["texts"]))
    alone = np.array([pipeline.embed_query(text) for text in job["texts"][:3]])
    assert np.abs(alone - together[:3]).max() < 1e-5
    return together


if __name__ == "__main__":
    answer(embed, "openvino-genai", "openvino")
