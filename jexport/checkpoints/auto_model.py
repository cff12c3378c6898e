"""A written checkpoint as transformers opens it: AutoModel, from the folder, strictly.

What users get from `AutoModel.from_pretrained(FOLDER)`, with the dtype that config.json names, and
an error where transformers would only print a table of weights it made up. Knows no layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.checkpoints import shards
from jexport.checkpoints.eager import memory_errors, torch_threads
from jexport.checkpoints.sentence_transformer import check_report, model_class
from jexport.checkpoints.shard_writer import DTYPES
from jexport.checkpoints.transformer_files import quiet_transformers, read_json
from jexport.errors import CheckpointError, DependencyError
from jexport.types import Runner, Tensors

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
SINCE = {"jina_embeddings_v3": "5.4"}
"""The first transformers with an architecture; those of before do not open its checkpoints."""


@contextlib.contextmanager
def runner(  # as every target's runner, and two that only some need
    folder: Path,
    precision: str,
    device: str,
    threads: int,
    *,
    model_type: str = "",
    check: Callable[[Mapping[str, Any]], None] = lambda config: None,
) -> Iterator[Runner]:
    """Open a written folder with AutoModel, strictly.

    Args:
        folder: as shard_writer wrote it, with its config.json.
        precision: that it was written in, 'fp32' or 'bf16'.
        device: 'auto' (CUDA when torch sees one), 'cpu' or 'cuda'.
        threads: of torch, for the whole process while this is open; 0 leaves torch's own number.
        model_type: to open it as, in place of what config.json says.
        check: raises for a config.json that is not as it has to be.

    Yields:
        Gives last_hidden_state, float32 [batch, sequence, dim]; its weights are gone at the end.

    Raises:
        StateDictError: a weight is missing, or there is another one.
        CheckpointError: it opens in another dtype than it was written in.
        DependencyError: transformers lacks the architecture, or torch sees no CUDA device.
    """
    import torch

    place = torch_device(device)
    config = read_json(folder / "config.json")
    check(config)
    model = _opened(
        folder, precision, {**config, "model_type": model_type} if model_type else {}
    ).to(place)
    opened = [model]
    del model

    def run(feed: Tensors) -> Tensors:
        with memory_errors(), torch.inference_mode():
            out = opened[0](
                input_ids=torch.from_numpy(feed["input_ids"]).to(place),
                attention_mask=torch.from_numpy(feed["attention_mask"]).to(place),
            )
            return {"last_hidden_state": out.last_hidden_state.float().cpu().numpy()}

    with torch_threads(threads):
        try:
            yield run
        finally:
            opened.pop().to("meta")


def _opened(folder: Path, precision: str, config: Mapping[str, Any]) -> Any:
    """The model; config: in place of config.json, {} for that."""
    from transformers import CONFIG_MAPPING, AutoConfig

    _check_known(config or read_json(folder / "config.json"))
    names = shards.tensors(folder)
    with quiet_transformers():
        stated = (
            CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            if config
            else AutoConfig.from_pretrained(folder, trust_remote_code=False)
        )
        model, report = model_class(stated).from_pretrained(
            folder,
            config=stated,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused by check_report
        )
    check_report(report, names, prefix=model.base_model_prefix)
    if str(model.dtype) != f"torch.{DTYPES[precision][1]}":
        raise CheckpointError(
            "the checkpoint opens in another precision than it was written in",
            evidence=f"{folder}: {model.dtype}, not {DTYPES[precision][1]}",
            fix="build it again",
        )
    return model.eval().requires_grad_(False)


def _check_known(config: Mapping[str, Any]) -> None:
    """Raise DependencyError where transformers is older than the architecture."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        since = SINCE.get(str(kind))
        raise DependencyError(
            f"transformers {transformers.__version__} cannot read this artifact",
            evidence=f"it has no architecture '{kind}'"
            + (f"; versions that have: {since} and newer" if since else ""),
            fix=f'pip install "transformers>={since}"' if since else "build for another target",
        )


def torch_device(device: str) -> torch.device:
    """The torch device that a name of DEVICES stands for.

    Args:
        device: 'auto' (CUDA when torch sees one), 'cpu' or 'cuda'.

    Returns:
        CUDA or the CPU; nothing is put there yet.

    Raises:
        ValueError: another name.
        DependencyError: CUDA is asked for, and torch sees none.
    """
    import torch

    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; torch is given {', '.join(DEVICES)}")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise DependencyError(
            "this torch sees no CUDA device",
            evidence=f"torch {torch.__version__}",
            fix="install a torch built for CUDA on a machine with a GPU, or use the CPU",
        )
    return torch.device("cuda" if there and device != "cpu" else "cpu")
