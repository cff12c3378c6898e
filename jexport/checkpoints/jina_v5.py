"""jina-embeddings-v5-text: a Qwen3 or EuroBERT model, and one PEFT folder per task in adapters/.

config.json is that of the native model under another model_type, and the weights have the native
class's names, so that no code of the checkpoint is needed. What its own encode() does besides is
stated here: prompts for every task, the last real token, cut, L2. Sources: config.json, adapters/
and modeling file of jinaai/jina-embeddings-v5-text-{small,nano}; vLLM 0.32, models/jina.py. Knows
nothing of merging.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport import tasks
from jexport.checkpoints import eager, peft_adapter, sentence_transformer, shards
from jexport.checkpoints.module_stack import Stack
from jexport.checkpoints.transformer_files import count, quiet_transformers
from jexport.errors import AdapterError, CheckpointError, JexportError, UnsupportedCheckpointError
from jexport.types import LowRank, Runner, WeightReader

if TYPE_CHECKING:
    import torch

MODEL_TYPE = "jina_embeddings_v5"
ADAPTERS = "adapters"
QWEN3, EUROBERT = "qwen3", "eurobert"
ARCHITECTURES = {QWEN3: "Qwen3Model", EUROBERT: "EuroBertModel"}
ONLY_QWEN3 = ".self_attn.q_norm.weight"
"""End of a weight's name that Qwen3 has in each layer, and EuroBERT in none."""

MATRYOSHKA = (32, 64, 128, 256, 512, 768, 1024)
"""Sizes that both models were trained for, up to their width; their config.json has no list."""

POOLING = Stack(mode="last", normalize=True)
DEFAULT_PROMPT = "document"


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds this layout.

    Args:
        folder: not looked at.
        config: its config.json, whose model_type decides.

    Returns:
        True also for a merged checkpoint, which has no adapters.
    """
    return config.get("model_type") == MODEL_TYPE


def known_tasks(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks that the checkpoint says it has adapters for.

    Args:
        folder: of the base model.
        config: its config.json; where it lists no tasks, they are the usual four.

    Returns:
        In the order of the list, also those whose folder is missing: that is an error once the
        task is opened. Empty without an adapters folder: a merged checkpoint.

    Raises:
        CheckpointError: config.json lists the tasks in a way that cannot be read.
    """
    return listed_tasks(config) if (folder / ADAPTERS).is_dir() else ()


def listed_tasks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks that config.json lists.

    Args:
        config: the checkpoint's config.json.

    Returns:
        `task_names`, or the usual four.

    Raises:
        CheckpointError: it is no list of names that a folder can have, or has one twice.
    """
    listed = config.get("task_names")
    if listed is None:
        return tasks.JINA_V5
    names = listed if isinstance(listed, list | tuple) else [None]
    plain = all(isinstance(name, str) and name and Path(name).name == name for name in names)
    if not names or not plain or len(set(names)) < len(names):
        raise CheckpointError(
            "config.json does not list the tasks",
            evidence=f"task_names = {listed!r:.200}",
            fix="give the config.json that belongs to these weights",
        )
    return tuple(names)


def check_adapter(folder: Path, config: Mapping[str, Any], task: str) -> None:
    """Refuse a task whose adapter is missing, by the name of its folder.

    Args:
        folder: of the base model.
        config: its config.json.
        task: asked for; one that the checkpoint does not list is somebody else's to refuse.

    Raises:
        AdapterError: the checkpoint lists the task and has no folder for it.
    """
    home = folder / ADAPTERS / task
    if task in listed_tasks(config) and not home.is_dir():
        raise AdapterError(
            f"there is no adapter for the task '{task}'",
            evidence=f"no folder {home}; without it the vectors would be the raw base model's",
            fix=f"download {ADAPTERS}/{task} of this checkpoint, or --task none for a checkpoint "
            "whose adapter was merged",
        )


def read(
    folder: Path, config: Mapping[str, Any], task: str
) -> tuple[dict[str, WeightReader], dict[str, LowRank], list[Path]]:
    """Find what one task needs. Other tasks' adapters are not opened.

    Args:
        folder: of the base model; the adapters' folders are below it.
        config: not looked at.
        task: one of `known_tasks`, or 'none' for the base model alone.

    Returns:
        Weights under the names in the file, the task's deltas under the same, and the files that
        hold them.

    Raises:
        CheckpointError: a file is missing or broken.
        UnsupportedCheckpointError: the adapter is more than plain LoRA.
        AdapterError: the adapter is not whole, or does not fit the base.
    """
    weights, _, paths = sentence_transformer.read(folder, config, task)
    if task == tasks.NONE:
        return weights, {}, paths
    home = folder / ADAPTERS / task
    shapes = shards.shapes(folder)
    with _naming(home):
        adapter = peft_adapter.read(home, base=folder)
        deltas = peft_adapter.matrices(adapter, shapes)
        peft_adapter.check_whole(adapter, shapes, deltas)
    return weights, deltas, [*paths, *adapter.files]


@contextlib.contextmanager
def _naming(home: Path) -> Iterator[None]:
    """An error of what is read here names the adapter's folder."""
    try:
        yield
    except JexportError as error:
        raise type(error)(
            f"{home.parent.name}/{home.name}: {error.what}",
            evidence=f"in {home}\n{error.evidence}",
            fix=error.fix,
        ) from error


def native_json(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the native model that this one is under another name.

    Args:
        folder: of the weights, whose names tell Qwen3 from EuroBERT.
        config: the checkpoint's config.json.

    Returns:
        For transformers' own class; with the smaller sizes that its authors trained.

    Raises:
        UnsupportedCheckpointError: is_decoder says another model than the weights are.
        CheckpointError: a weight file or the width cannot be read.
    """
    kind = _backbone(folder, config)
    left_out = ("auto_map", "task_names", "_name_or_path")
    width = count(config, "hidden_size")
    sizes = [size for size in MATRYOSHKA if size <= width]
    return {
        "matryoshka_dimensions": sizes,
        **{key: value for key, value in config.items() if key not in left_out},
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
    }


def _backbone(folder: Path, config: Mapping[str, Any]) -> str:
    """QWEN3 or EUROBERT, by the weights' names; is_decoder has to agree where it is stated.

    vLLM goes by is_decoder alone, and takes a missing one for Qwen3.
    """
    has_norm = any(name.endswith(ONLY_QWEN3) for name in shards.tensors(folder))
    stated = config.get("is_decoder")
    if stated is not None and stated is not has_norm:
        raise UnsupportedCheckpointError(
            "config.json and the weights are of two different models",
            evidence=f"is_decoder = {stated!r}; the weights "
            + ("have" if has_norm else "have not")
            + " Qwen3's q_norm, which the causal model of jina-embeddings-v5 has",
            fix="give the config.json and the weights of one and the same checkpoint",
        )
    return QWEN3 if has_norm else EUROBERT


def assemble(config: Mapping[str, Any], weights: Mapping[str, WeightReader]) -> torch.nn.Module:
    """A model of transformers' class with exactly these weights.

    Args:
        config: as `native_json` gives it.
        weights: all of them, under the names in the file.

    Returns:
        float32, on the CPU, in eval mode, without gradients.

    Raises:
        StateDictError: weights are missing, too many or of another shape.
        CheckpointError, NotFiniteError: the config or a weight cannot be used.
    """
    from transformers import CONFIG_MAPPING

    try:
        with quiet_transformers():
            native = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # huggingface_hub's strict dataclasses have errors of their own
        raise CheckpointError(
            "config.json has a value that the model cannot take",
            evidence=" ".join(str(error).split()),
            fix="give the config.json that belongs to these weights",
        ) from error
    return sentence_transformer.assembled(native, weights)


@contextlib.contextmanager
def reference(
    config: Mapping[str, Any],
    weights: Mapping[str, WeightReader],
    adapter: Mapping[str, LowRank],
) -> Iterator[Runner]:
    """The native model with the adapter beside its matrices, never merged.

    Args:
        config: as `native_json` gives it.
        weights: all of them, under the names in the file.
        adapter: the task's deltas by weight name; empty for the base model.

    Yields:
        Gives last_hidden_state, float32 [batch, sequence, dim].

    Raises:
        StateDictError, CheckpointError, NotFiniteError: as `assemble`.
    """
    model = sentence_transformer.with_adapter(assemble(config, weights), adapter)
    with eager.opened(model) as run:
        yield run
