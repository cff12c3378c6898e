"""A module of transformers in memory -> Runner: its forward pass on the CPU, in float32.

Knows no layout and no file: whoever assembled the module says what it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jexport.flow import Runner, Tensors


@contextlib.contextmanager
def opened(model: Any) -> Iterator[Runner]:
    """Run the module; its weights are gone at the end, whoever still holds it."""
    import torch

    def run(feed: Tensors) -> Tensors:
        with torch.inference_mode():
            out = model(
                input_ids=torch.from_numpy(feed["input_ids"]),
                attention_mask=torch.from_numpy(feed["attention_mask"]),
            )
        return {"last_hidden_state": out.last_hidden_state.numpy()}

    try:
        yield run
    finally:
        model.to("meta")
