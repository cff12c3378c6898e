"""What holds for every checkpoint layout alike: a new one gets an example here."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jexport.checkpoints import LAYOUTS, known_tasks
from jexport.toy import checkpoint
from jexport.types import LoadedModel

models = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("static_models.py"))))
pytestmark = pytest.mark.usefixtures("own_module_cache")
Vectors = Callable[[LoadedModel, list[str]], np.ndarray]
NAMES = [layout.name for layout in LAYOUTS]


@pytest.fixture
def example(tmp_path: Path, write_unknown: Callable[..., Path]) -> Callable[[str], Path]:
    """A tiny checkpoint of the layout of that name."""

    def toy(layout: str) -> Path:
        checkpoint.write(tmp_path / layout, layout=layout)
        return tmp_path / layout

    def plain() -> Path:
        from sentence_transformers.sentence_transformer.modules import Pooling

        return models.save(
            tmp_path / "plain", models.encoder(tmp_path / "encoder"), Pooling(32, "mean")
        )

    examples = {
        "static_embedding": lambda: models.save_static(tmp_path / "static"),
        "jina_v3_original": lambda: toy("original"),
        "jina_v3_native": lambda: toy("native"),
        "jina_v5": lambda: toy("jina-v5-small"),
        "remote_code": lambda: write_unknown(tmp_path / "unknown"),
        "sentence_transformer": plain,
    }
    return lambda name: examples[name]()


def test_names_are_not_used_twice() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_folder_of_nothing_is_of_no_layout(layout: object, tmp_path: Path) -> None:
    assert not layout.matches(tmp_path, {}, trust_code=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_assembled_is_the_reference(
    name: str,
    example: Callable[[str], Path],
    opened: Callable[..., LoadedModel],
    texts: list[str],
    reference_vectors: Vectors,
    merged_vectors: Vectors,
) -> None:
    folder, trust = example(name), name == "remote_code"
    for task in (known_tasks(folder)[0], "none"):
        model = opened(folder, task, trust_remote_code=trust)
        assert model.source.layout == name
        module = model.assemble(model.weights)
        assert not module.training
        for parameter in module.parameters():
            assert parameter.dtype == torch.float32
            assert not parameter.requires_grad
        # Two roads to an adapter: beside the matrices, and merged into them.
        beside, merged = reference_vectors(model, texts[:6]), merged_vectors(model, texts[:6])
        assert beside.shape == (6, model.embedding.dimension)
        assert np.abs(beside - merged).max() <= 2e-6
        if task == "none":
            break
