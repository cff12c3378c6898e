"""fastembed with a custom model. Imports no jexport."""

from __future__ import annotations

import numpy as np
from asked import Job, answer, prompted
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType


def embed(job: Job) -> np.ndarray:
    """Vectors of the job's texts."""
    graph, *more = job["files"]
    TextEmbedding.add_custom_model(
        model=job["name"],
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf=job["name"]),
        dim=job["dimension"],
        model_file=graph,
        additional_files=more,
    )
    model = TextEmbedding(job["name"], specific_model_path=job["folder"])
    return np.array(list(model.embed(prompted(job), batch_size=8)))


if __name__ == "__main__":
    answer(embed, "fastembed", "onnxruntime")
