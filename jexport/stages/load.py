"""load: LoadSpec -> LoadedModel (opened, checked, weights still on disk).

Knows nothing of adapters being merged, nor of ONNX.
"""

from __future__ import annotations

from jexport import checkpoints
from jexport.recipe import LoadSpec
from jexport.types import LoadedModel


def run(spec: LoadSpec, *, task: str) -> LoadedModel:
    """Open a checkpoint folder or hub id for one task.

    Reads configs, headers and digests; a weight's numbers are read, and checked to be finite, when
    a later stage asks for them. Those of other tasks' adapters never are: a NaN there is no error.

    Args:
        spec: [load] of the recipe.
        task: whose adapter and prompt are opened; 'none' for the base model.

    Returns:
        The model, its weights still on the disk.

    Raises:
        UnknownTaskError: the checkpoint has no such task.
        CheckpointError, StateDictError, AdapterError, TokenizerError: a file is missing or wrong.
        UnsupportedCheckpointError, HubError, RemoteCodeError: it cannot be opened here.
    """
    model = checkpoints.open_checkpoint(spec, task)
    assert model.embedding.task == task
    return model
