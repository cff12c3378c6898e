"""What the tests of the room share: small graphs, and the project's own exports."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from jexport.recipe import ExportSpec
from jexport.stages import export
from jexport.targets.trt.lint import Diagnostic, lint
from jexport.types import OnnxModel

HERE = Path(__file__).parent
TEXT = [0, *range(5, 45), 2]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small are many times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def graphs() -> Any:
    """tests/targets/trt/graphs.py."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "graphs.py")))


@pytest.fixture
def linted(graphs: Any, tmp_path: Path) -> Callable[..., list[Diagnostic]]:
    """`linted(model)`: the findings on a graph that is saved first."""

    def run(made: onnx.ModelProto, dims: Any = None, **options: Any) -> list[Diagnostic]:
        return lint(graphs.save(made, tmp_path), dims, **options)

    return run


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OnnxModel]:
    """`own("jina", "fp16")`: a seeded architecture, exported by the project's own stage, once."""
    seeded = SimpleNamespace(**runpy.run_path(str(HERE.parents[2] / "graph" / "seeded.py")))
    made: dict[Any, OnnxModel] = {}

    def exported(kind: str, precision: str = "fp32", **changes: Any) -> OnnxModel:
        key = (kind, precision, tuple(sorted(changes.items())))
        if key not in made:
            made[key] = export.run(
                seeded.as_loaded(functools.partial(seeded.build, kind, **changes)),
                ExportSpec(outputs=("last_hidden_state", "sentence_embedding")),
                precision=precision,
                samples=[TEXT],
                out_dir=tmp_path_factory.mktemp(f"{kind}-{precision}"),
            )
        return made[key]

    return exported
