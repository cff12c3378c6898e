"""What the tests of every layout need: checkpoints to break, and vectors by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jexport.recipe import LoadSpec
from jexport.stages import load, merge
from jexport.types import LoadedModel, Runner

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models this small are 50 times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded_remote_code() -> dict[str, Any]:
    """The modules of remote code that are loaded, no longer loaded."""
    names = [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where transformers copies code to before it runs it: a folder of this test's own."""
    from transformers import dynamic_module_utils

    # A folder that an earlier test put on the path would be found first.
    others = [path for path in sys.path if path != dynamic_module_utils.HF_MODULES_CACHE]
    monkeypatch.setattr(sys, "path", others)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    before = loaded_remote_code()
    yield
    loaded_remote_code()
    sys.modules.update(before)


@pytest.fixture(scope="session")
def opened() -> Callable[..., LoadedModel]:
    """Open a folder for a task."""

    def open_folder(folder: Path, task: str = "none", **spec: Any) -> LoadedModel:
        return load.run(LoadSpec(model=str(folder), **spec), task=task)

    return open_folder


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """Change keys of a JSON file; a value of ... removes the key."""

    def edit(path: Path, **changes: Any) -> None:
        content = json.loads(path.read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return edit


@pytest.fixture(scope="session")
def edit_weights() -> Callable[..., None]:
    """Rewrite a weight file: with the dict that `change` gives, or what it did in place."""

    def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = folder if folder.suffix else folder / WEIGHTS
        tensors = load_file(path)
        made = change(tensors)
        save_file(made if isinstance(made, dict) else tensors, path, metadata={"format": "pt"})

    return edit


def pooled(states: np.ndarray, mode: str) -> np.ndarray:
    """One vector of one text's token vectors [tokens, width]; no padding in them."""
    made = {
        "mean": lambda: states.mean(axis=0),
        "cls": lambda: states[0],
        "max": lambda: states.max(axis=0),
        "mean_sqrt_len": lambda: states.sum(axis=0) / np.sqrt(len(states)),
        "last": lambda: states[-1],
    }[mode]()
    return np.asarray(made)


def states_of(run: Runner, ids: Sequence[Sequence[int]], batch: int = 10) -> list[np.ndarray]:
    """Token vectors of each text, from padded batches of neighbours as they come."""
    found: list[np.ndarray] = []
    for start in range(0, len(ids), batch):
        rows = ids[start : start + batch]
        longest = max(map(len, rows))
        feed = {
            "input_ids": np.array([[*row, *[1] * (longest - len(row))] for row in rows]),
            "attention_mask": np.array([[1] * len(r) + [0] * (longest - len(r)) for r in rows]),
        }
        states = run(feed)["last_hidden_state"]
        assert states.dtype == np.float32
        found += [states[place, : len(row)].copy() for place, row in enumerate(rows)]
    return found


def vectors_of(model: LoadedModel, run: Runner, texts: list[str]) -> np.ndarray:
    how = model.embedding
    states = states_of(run, model.tokenize_reference(texts))
    vectors = np.stack([pooled(one, how.pooling) for one in states])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if how.normalize else vectors


@pytest.fixture(scope="session")
def reference_vectors() -> Callable[[LoadedModel, list[str]], np.ndarray]:
    """What the reference runner gives, pooled and normalised as the model says."""

    def embed(model: LoadedModel, texts: list[str]) -> np.ndarray:
        with model.reference() as run:
            return vectors_of(model, run, texts)

    return embed


@pytest.fixture(scope="session")
def merged_vectors() -> Callable[[LoadedModel, list[str]], np.ndarray]:
    """What the module gives that is exported: the adapter merged into its weights."""

    def embed(model: LoadedModel, texts: list[str]) -> np.ndarray:
        whole = merge.run(model) if model.adapter else model
        module = whole.assemble(whole.weights)
        assert not module.training

        def run(feed: Any) -> Any:
            with torch.inference_mode():
                out = module(**{name: torch.from_numpy(array) for name, array in feed.items()})
            return {"last_hidden_state": out.last_hidden_state.numpy()}

        return vectors_of(model, run, texts)

    return embed
