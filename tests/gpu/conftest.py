"""Tests of what runs on a GPU. JEXPORT_TEST_PROVIDER says where: 'cuda' (`make test-gpu`) or 'cpu'.

On 'cpu', which `make test` takes, the same tests of the onnx target run in ONNX Runtime's CPU
provider, in a small form: they are known to work before a GPU sees them. What only a GPU can show
is skipped there; what needs TensorRT is skipped wherever it is missing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport.errors import JexportError

PROVIDER = os.environ.get("JEXPORT_TEST_PROVIDER", "cpu")
SHARED_TASK = "retrieval.passage"
"""The task of the artifacts that tests share with the benchmark's small form."""


def _lacks_tensorrt() -> str:
    from jexport.targets.trt import device

    try:
        device.check_installed("polygraphy")
        device.machine()
    except JexportError as error:
        return error.what
    return ""


def _lacks_cuda() -> str:
    """Why ONNX Runtime's CUDA provider or torch cannot compute on a GPU here, or ''."""
    import onnxruntime
    import torch

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} has no CUDA provider"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine, or the provider that was chosen, cannot run."""
    assert PROVIDER in ("cpu", "cuda"), f"JEXPORT_TEST_PROVIDER is {PROVIDER!r}"
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not here:
        return
    lacks_tensorrt, lacks_cuda = _lacks_tensorrt(), _lacks_cuda() if PROVIDER == "cuda" else ""
    for item in here:
        reason = lacks_cuda if item.get_closest_marker("device") else ""
        if item.path.name == "test_trt_on_gpu.py":
            item.add_marker(pytest.mark.gpu)
            reason = lacks_tensorrt
        elif item.get_closest_marker("cuda") and PROVIDER != "cuda":
            reason = "only a GPU can show it (JEXPORT_TEST_PROVIDER=cuda)"
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests run: 'cpu' or 'cuda'."""
    return PROVIDER


@pytest.fixture(scope="session")
def small_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's work folder in its small form: checkpoints and artifacts, built once."""
    from benchmarks.on_gpu import models

    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have a folder each below one of the run.
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    work = base / "gpu-work"
    with (base / "gpu-work.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        index = models.prepare(work, small=True, provider="cpu")
    # What MiniLM's shape lacks fails in its own tests, not in all of them.
    lacking = {what: why for what, why in index["failed"].items() if what.startswith("jina")}
    assert not lacking, lacking
    return work


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The merged checkpoint in torch: float32, no TF32, on the device of the tests."""

    model: Any
    place: str

    def tokens(self, ids: Sequence[int]) -> np.ndarray:
        """Token vectors of one text: float32 [tokens, dim]."""
        import torch

        given = torch.tensor([list(ids)], device=self.place)
        with torch.inference_mode():
            out = self.model(input_ids=given, attention_mask=torch.ones_like(given))
        made: np.ndarray = out.last_hidden_state[0].float().cpu().numpy()
        return made

    def vectors(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """One unit vector a text, each run alone and pooled in float64: float32 [texts, dim]."""
        pooled = np.stack([self.tokens(ids).astype(np.float64).mean(0) for ids in texts])
        return (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="session")
def truth(small_work: Path, device: str) -> Callable[[str], Truth]:
    """`truth("separation")`: torch with that task's adapter merged."""
    import torch

    from jexport.recipe import LoadSpec
    from jexport.stages import load, merge

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    known: dict[str, Truth] = {}

    def make(task: str) -> Truth:
        if task not in known:
            merged = merge.run(load.run(LoadSpec(model=str(small_work / "jina")), task=task))
            model = merged.assemble(merged.weights).to(device)
            known[task] = Truth(model=model, place=device)
        return known[task]

    return make


@pytest.fixture(scope="session")
def artifacts(small_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`artifacts("separation", "fp16", cuda=("all",))`: that onnx artifact of the small jina."""
    import json

    import jexport
    from jexport import recipe

    index = json.loads((small_work / "models.json").read_text(encoding="utf-8"))["jina"]
    known: dict[tuple[Any, ...], Path] = {}
    out = tmp_path_factory.mktemp("gpu-artifacts")

    def make(task: str, precision: str, **compile_keys: Any) -> Path:
        if task == SHARED_TASK and precision in index and not compile_keys:
            return Path(index[precision])
        key = (task, precision, *compile_keys.items())
        if key not in known:
            chosen = recipe.for_model(str(small_work / "jina")).replace_compile(**compile_keys)
            quick = dataclasses.replace(chosen.validate, budget_tokens=1, max_tokens=64)
            built = jexport.build(
                dataclasses.replace(chosen, validate=quick),
                task=task,
                target="onnx",
                precision=precision,
                out=out,
            )
            known[key] = built.path
        return known[key]

    return make
