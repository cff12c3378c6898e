"""Real checkpoints by pinned commit: fetched, built (the judge is in it), held to golden values."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PINS = Path(__file__).with_name("pins.toml")
CLOSE = 1e-3
"""The values have four decimals; a merged adapter adds float32's rounding over 24 layers."""


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A model on a hub, by commit; '' where nobody has stated one."""

    name: str
    model: str
    commit: str
    tasks: Sequence[str]

    @property
    def variable(self) -> str:
        """The environment variable that gives the commit."""
        return f"JEXPORT_PIN_{self.name.upper().replace('-', '_')}"


def pins() -> list[Pin]:
    """The models of pins.toml, with the commits that the environment gives."""
    table = tomllib.loads(PINS.read_text(encoding="utf-8"))
    found = []
    for name, entry in table.items():
        if "commit" in entry:
            pin = Pin(name=name, **entry)
            commit = os.environ.get(pin.variable) or pin.commit
            found.append(Pin(name=name, **{**entry, "commit": commit}))
    return found


def golden() -> Mapping[str, Any]:
    """The table [golden] of pins.toml."""
    table: Mapping[str, Any] = tomllib.loads(PINS.read_text(encoding="utf-8"))["golden"]
    return table


def why_not(pin: Pin) -> str:
    """Why a model cannot be had here, '' when it is here now."""
    from jexport.checkpoints import hub
    from jexport.errors import HubError

    if not hub.is_commit(pin.commit):
        return f"no commit of {pin.model} is pinned: set {pin.variable} to 40 hex digits"
    try:
        hub.fetch(pin.model, pin.commit, hub.WEIGHTS_AND_CONFIG)
    except HubError as error:
        return f"{pin.model} cannot be had here: {error.evidence}"
    return ""


def build(pin: Pin, task: str, out: Path, **validate: int) -> Path:
    """The onnx fp32 artifact of a task; its parity gates hold, or a ParityError is raised."""
    from jexport import recipe
    from jexport.building import pipeline

    load = {"model": pin.model, "revision": pin.commit}
    chosen = recipe.from_table(
        {"name": pin.name, "load": load, "validate": validate}, origin=PINS.name
    )
    return pipeline.build(chosen, task=task, target="onnx", out=out).path


def corner(artifact: Path, sentence: str) -> tuple[int, np.ndarray]:
    """How many tokens a sentence has without a prompt, and last_hidden_state[0, 1, 1:4] of it."""
    import onnxruntime

    from jexport.runtime.tokenise import TextTokenizer

    [ids] = TextTokenizer.open(artifact, max_tokens=512).model_ids([sentence])
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    session = onnxruntime.InferenceSession(artifact / "model.onnx")
    [hidden] = session.run(["last_hidden_state"], feed)
    return len(ids), hidden[0, 1, 1:4]
