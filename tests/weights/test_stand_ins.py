"""What `make test-weights` runs, on stand-ins that lie in a hub's cache under the real names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from jexport.errors import CheckpointError

HERE = Path(__file__).parent
COMMIT = "c" * 40


@pytest.fixture
def real(imported: Callable[[Path], Any]) -> Any:
    return imported(HERE / "real.py")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Path], None]:
    """`kept(model, commit, folder)`: as if huggingface_hub had fetched it."""
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def keep(model: str, commit: str, folder: Path) -> None:
        home = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
        shutil.copytree(folder, home / "snapshots" / commit)

    return keep


def pinned(real: Any, name: str) -> Any:
    return next(pin for pin in real.pins() if pin.name == name)


def test_pins(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = real.pins()
    assert [pin.name for pin in pins] == [
        "jina-embeddings-v3",
        "all-minilm-l6-v2",
        "bge-m3",
        "multilingual-e5-small",
    ]
    assert all(pin.commit == "" or len(pin.commit) == 40 for pin in pins)
    assert set(real.golden()["values"]) == set(pins[0].tasks)
    assert "JEXPORT_PIN_BGE_M3" in real.why_not(pinned(real, "bge-m3"))
    monkeypatch.setenv("JEXPORT_PIN_BGE_M3", COMMIT)
    assert pinned(real, "bge-m3").commit == COMMIT


@pytest.mark.usefixtures("kept")
def test_what_is_not_here_says_why(real: Any) -> None:
    reason = real.why_not(pinned(real, "jina-embeddings-v3"))
    assert reason.startswith("jinaai/jina-embeddings-v3-hf cannot be had here: ")


def test_a_stand_in_under_jinas_name(
    real: Any,
    kept: Callable[[str, str, Path], None],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found at the pinned commit, built, and held to golden values, which are not its own."""
    pin = pinned(real, "jina-embeddings-v3")
    kept(pin.model, pin.commit, small)
    assert real.why_not(pin) == ""
    artifact = real.build(pin, "separation", tmp_path / "out", budget_tokens=1, max_tokens=64)
    tokens, corner = real.corner(artifact, real.golden()["sentence"])
    assert tokens > 3
    assert corner.shape == (3,)
    assert np.abs(corner - real.golden()["values"]["separation"]).max() > real.CLOSE


def test_a_model_that_has_no_safetensors_is_no_skip(
    real: Any,
    kept: Callable[[str, str, Path], None],
    small_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (small_copy / "model.safetensors").unlink()
    monkeypatch.setenv("JEXPORT_PIN_BGE_M3", COMMIT)
    pin = pinned(real, "bge-m3")
    kept(pin.model, pin.commit, small_copy)
    assert real.why_not(pin) == ""
    with pytest.raises(CheckpointError):
        real.build(pin, "none", tmp_path / "out")
