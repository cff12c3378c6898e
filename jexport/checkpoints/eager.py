"""A module of transformers in memory -> Runner: its forward pass on the CPU, in float32.

Each call uses one thread: with another number torch's last bits are others for a few rows (1 x 384,
7 x 384 on 1, 2 and 7 threads), and what is measured against them goes into artifacts that must not
differ. Calls may be made from several threads at once. Knows no layout and no file: whoever
assembled the module says what it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from jexport.errors import DeviceMemoryError
from jexport.types import Runner, Tensors

_PROCESS = os.getpid()
"""The process that may have started torch's threads; a forked child has another number."""


@contextlib.contextmanager
def opened(model: Any) -> Iterator[Runner]:
    """Run a module on the CPU; its weights are gone at the end, whoever still holds it.

    Args:
        model: of transformers, float32, in eval mode; it is moved to the meta device at the end.

    Yields:
        Gives last_hidden_state, float32 [batch, sequence, dim].
    """
    import torch

    def run(feed: Tensors) -> Tensors:
        with torch.inference_mode():
            out = model(
                input_ids=torch.from_numpy(feed["input_ids"]),
                attention_mask=torch.from_numpy(feed["attention_mask"]),
            )
        return {"last_hidden_state": out.last_hidden_state.numpy()}

    with torch_threads(1):
        try:
            yield run
        finally:
            model.to("meta")


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn torch's own error for a device without memory into one that names a fix.

    Yields:
        Nothing; the passes run inside.

    Raises:
        DeviceMemoryError: in place of torch.OutOfMemoryError.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            "torch: the device's memory is full",
            evidence=next(iter(str(error).splitlines()), repr(error)),
            fix="use smaller batches (max_batch_tokens, --batch-tokens), or free memory there",
        ) from error


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Use so many threads of torch meanwhile, and the former number afterwards.

    Args:
        threads: for the whole process, 0 to leave them as they are; a forked child always has 1.

    Yields:
        Nothing; the passes run inside.
    """
    import torch

    if os.getpid() != _PROCESS:
        threads = 1  # of OpenMP's other threads a forked child has none, and would wait for them
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads:
            torch.set_num_threads(before)
