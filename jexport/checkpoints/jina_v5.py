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
from jexport.checkpoints import peft_adapter, sentence_transformer, shards
from jexport.checkpoints.embedding import OwnCode
from jexport.checkpoints.layout import JINA_LICENCE, Opened, OwnFormat, Parts, Sizes, stated_sizes
from jexport.checkpoints.module_stack import Stack
from jexport.checkpoints.sentence_files import TransformerSettings
from jexport.checkpoints.transformer_files import count, quiet_transformers
from jexport.errors import (
    AdapterError,
    CheckpointError,
    JexportError,
    RemoteCodeError,
    UnsupportedCheckpointError,
)
from jexport.types import WeightReader

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


class JinaV5(OwnFormat):
    """A native model under another name, and one PEFT folder per task."""

    name = "jina_v5"
    licence = JINA_LICENCE
    own = OwnCode(
        pooling=POOLING, prompts=tasks.JINA_V5_PROMPTS, default_prompt_name=DEFAULT_PROMPT
    )

    def matches(self, folder: Path, config: Mapping[str, Any], *, trust_code: bool) -> bool:
        """By config.json's model_type; a merged checkpoint, too, which has no adapters."""
        return config.get("model_type") == MODEL_TYPE

    def known_tasks(self, folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Those that config.json lists, or the usual four; none without an adapters folder.

        A listed task whose folder is missing is an error once it is opened.
        """
        return listed_tasks(config) if (folder / ADAPTERS).is_dir() else ()

    def check(self, opened: Opened, task: str) -> None:
        """Refuse a listed task without its adapter's folder, and code that is trusted.

        Raises:
            AdapterError: the folder is missing.
            RemoteCodeError: the native class needs no code.
        """
        home = opened.base / ADAPTERS / task
        if task in listed_tasks(opened.stated) and not home.is_dir():
            raise AdapterError(
                f"there is no adapter for the task '{task}'",
                evidence=f"no folder {home}; without it the vectors would be the raw base model's",
                fix=f"download {ADAPTERS}/{task} of this checkpoint, or --task none for a "
                "checkpoint whose adapter was merged",
            )
        if opened.spec.trust_remote_code:
            raise RemoteCodeError(
                "this checkpoint needs no code of its own, and jexport does not run it",
                evidence=f"the layout is {self.name}: {opened.config['architectures'][0]} of "
                "transformers, and the task's adapter",
                fix="build without --trust-remote-code",
            )

    def model_config(
        self, base: Path, stated: Mapping[str, Any], transformer: TransformerSettings
    ) -> dict[str, Any]:
        """That of the native model which this one is under another name, and its trained sizes.

        Raises:
            UnsupportedCheckpointError: is_decoder says another model than the weights are.
        """
        config = super().model_config(base, stated, transformer)
        kind = _backbone(base, config)
        left_out = ("auto_map", "task_names", "_name_or_path")
        width = count(config, "hidden_size")
        return {
            "matryoshka_dimensions": [size for size in MATRYOSHKA if size <= width],
            **{key: value for key, value in config.items() if key not in left_out},
            "model_type": kind,
            "architectures": [ARCHITECTURES[kind]],
        }

    def read(self, folder: Path, config: Mapping[str, Any], task: str) -> Parts:
        """Weights under the names in the file. Other tasks' adapters are not opened.

        Raises:
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

    def sizes(self, opened: Opened) -> Sizes:
        """Those that config.json states, and a table of positions where there is one."""
        table = sentence_transformer.positions(opened.base, opened.config)
        return stated_sizes(opened.config, table=table)

    def assemble(self, opened: Opened, weights: Mapping[str, WeightReader]) -> torch.nn.Module:
        """A model of transformers' class with exactly these weights."""
        from transformers import CONFIG_MAPPING

        config = opened.config
        try:
            with quiet_transformers():
                native = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        except Exception as error:  # huggingface_hub's strict dataclasses have errors of their own
            raise sentence_transformer.unusable_config(error) from error
        return sentence_transformer.assembled(native, weights)


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
