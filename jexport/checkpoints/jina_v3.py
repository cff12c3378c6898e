"""What both layouts of jina-embeddings-v3 share: transformers' own JinaEmbeddingsV3Model.

The authors' encode() pools, cuts and prompts in its own way: see embedding.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from jexport.checkpoints import native_class
from jexport.checkpoints.layout import JINA_LICENCE, Opened, OwnFormat
from jexport.types import LowRank, Runner, WeightReader

if TYPE_CHECKING:
    import torch


class JinaV3(OwnFormat):
    """Assembled from weights under native names, whatever the file calls them."""

    licence = JINA_LICENCE
    is_jina_v3 = True

    def assemble(self, opened: Opened, weights: Mapping[str, WeightReader]) -> torch.nn.Module:
        """A JinaEmbeddingsV3Model with these weights, read one by one."""
        return native_class.assemble(opened.config, weights)

    def reference(
        self,
        opened: Opened,
        weights: Mapping[str, WeightReader],
        adapter: Mapping[str, LowRank],
    ) -> AbstractContextManager[Runner]:
        """The native model with the adapter beside its matrices; it has no pooler to adapt."""
        pooler = f"{native_class.POOLER}.weight"
        return super().reference(
            opened, weights, {name: one for name, one in adapter.items() if name != pooler}
        )
