"""A checkpoint of no known layout, which its own code opens: see remote_code.py."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport import tasks
from jexport.checkpoints import remote_code, sentence_transformer, shards
from jexport.checkpoints.layout import Opened, OwnFormat, Parts, Sizes
from jexport.types import LowRank, Runner, WeightReader

if TYPE_CHECKING:
    import torch

SIZES = ("hidden_size", "vocab_size", "max_position_embeddings")


class RemoteCode(OwnFormat):
    """Exported as its own code runs it; its only task is `none`."""

    name = "remote_code"
    needs_code = True

    def matches(self, folder: Path, config: Mapping[str, Any], *, trust_code: bool) -> bool:
        """Whether auto_map names a class for AutoModel.

        As transformers does, it is left aside where it is not trusted and the architecture is one
        of transformers' own.
        """
        is_asked = trust_code or not sentence_transformer.is_native(config)
        return is_asked and "AutoModel" in remote_code.auto_map(config)

    def read(self, folder: Path, config: Mapping[str, Any], task: str) -> Parts:
        """The weight files; their names mean nothing here, the remote class reads them itself."""
        return {}, {}, shards.files(folder, shards.tensors(folder))

    def sizes(self, opened: Opened) -> Sizes:
        """Those of config.json; what it leaves out, the checkpoint's own config class says."""
        if not all(key in opened.config for key in SIZES):
            own = remote_code.sizes(opened.base, opened.spec)
            opened = replace(opened, config={**opened.config, **own})
        table = sentence_transformer.positions(opened.base, opened.config)
        return replace(super().sizes(opened), table=table)

    def open_tokenizer(self, opened: Opened) -> Any:
        """The tokenizer, with the checkpoint's own code where it names some."""
        return remote_code.open_tokenizer(opened.home, opened.spec)

    def assemble(self, opened: Opened, weights: Mapping[str, WeightReader]) -> torch.nn.Module:
        """The remote class with its weights, repaired and checked."""
        return remote_code.assemble(opened.base, opened.spec)

    def reference(
        self,
        opened: Opened,
        weights: Mapping[str, WeightReader],
        adapter: Mapping[str, LowRank],
    ) -> AbstractContextManager[Runner]:
        """The checkpoint's own forward pass."""
        return remote_code.reference(opened.base, opened.config, opened.spec, tasks.NONE)
