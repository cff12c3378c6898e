"""The benchmark's artifacts, as `make gpu-check` builds them at full size, against torch.

JEXPORT_GPU_WORK names the folder that they lie in (python -m benchmarks.gpu --prepare-only). On the
CPU, and without it, the tiny ones of the same kinds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from benchmarks.on_gpu import models, sides
from jexport import recipe
from jexport.artifacts import manifest
from jexport.runtime.tokenise import TextTokenizer

pytestmark = pytest.mark.device

CASES = [
    (model.folder, name)
    for model in models.models(small=True)
    for name, variant in models.VARIANTS.items()
    if variant.target == "onnx"
    and model.folder in variant.folders
    and os.environ.get("JEXPORT_TEST_PROVIDER", "cpu") in variant.providers
]


@pytest.fixture(scope="module")
def work(request: pytest.FixtureRequest, device: str) -> Path:
    given = os.environ.get("JEXPORT_GPU_WORK", "")
    if given and (Path(given) / models.INDEX).is_file():
        return Path(given)
    if device == "cuda":
        pytest.skip("JEXPORT_GPU_WORK names no folder with artifacts (make gpu-check)")
    made: Path = request.getfixturevalue("small_work")
    return made


@pytest.fixture(scope="module")
def index(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / models.INDEX).read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def torch_vectors(index: dict[str, Any], device: str) -> Any:
    """`torch_vectors("jina", texts)`: by the hf artifact in float32, and kept."""
    known: dict[str, np.ndarray] = {}

    def make(folder: str, texts: list[str]) -> np.ndarray:
        if folder not in known:
            path = Path(index[folder]["hf"])
            rows = []
            with sides.exact_products(), sides.torch_graph(path, device, "float32") as opened:
                assert opened.graph is not None
                for ids in ids_of(path, texts):
                    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)))}
                    rows.append(
                        opened.graph({name: value.astype(np.int64) for name, value in feed.items()})
                    )
            known[folder] = np.concatenate(rows)
        return known[folder]

    return make


def ids_of(path: Path, texts: list[str]) -> list[list[int]]:
    limit = manifest.read(path).content["embedding"]["max_tokens"]
    return TextTokenizer.open(path, max_tokens=limit).model_ids(texts)


@pytest.fixture(scope="module")
def texts(index: dict[str, Any], device: str) -> list[str]:
    """From a few to some hundred tokens, and one of 2,048 on a GPU."""
    path = next(Path(place) for name, place in index["jina"].items() if name != "hf")
    tokenizer = TextTokenizer.open(path, max_tokens=8192)
    lengths = [4, 7, 16, 17, 31, 33, 64, 90, 128, 200, 256, 300, 500]
    more = [2048] if device == "cuda" else []
    return models.TextSource(tokenizer.token_ids).texts([*lengths, *more])


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_the_recipes_gates(
    folder: str,
    name: str,
    index: dict[str, Any],
    texts: list[str],
    torch_vectors: Any,
    device: str,
) -> None:
    failure = index["failed"].get(f"{folder} {name}")
    assert failure is None, failure
    if name not in index[folder]:
        pytest.skip(f"the work folder has no artifact '{name}'")
    path = Path(index[folder][name])
    precision = manifest.read(path).content["precision"]
    wanted = torch_vectors(folder, texts)
    with jexport.open_artifact(path, device=device, verify=False) as model:
        found = model.encode(texts, prompt=False)
        alone = np.stack([model.encode(text, prompt=False) for text in texts])
    level = recipe.DEFAULT_GATES[precision]
    assert (found * wanted).sum(1).min() > level["cosine_min"]
    assert (found * alone).sum(1).min() > level["batch_cosine_min"]
    if precision == "fp32":
        assert np.abs(found - wanted).max() < 1e-5
    assert (found * np.roll(wanted, 1, axis=0)).sum(1).min() < level["cosine_min"]
