"""Opens an artifact and embeds text with it: tokenise, batch, run, pool.

    tokenise.py   text -> token ids -> padded batch; knows the length limit and the pad token
    pool.py       token vectors -> one vector, cut and normalised; plain numpy
    parallel.py   several batches at once, their results in order
    embedder.py   Embedder: sorts, batches, runs and pools; late chunking
    stream.py     text files larger than memory -> .npy or .jsonl, written atomically
    open.py       an artifact folder -> Embedder

It imports numpy and tokenizers only; the engine comes from `targets/` as a `types.Runner`. The
names below are imported when first used, so that importing this package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jexport.runtime.embedder import Embedder
    from jexport.runtime.tokenise import TextTokenizer

__all__ = ["Embedder", "TextTokenizer"]

_HOME = {"Embedder": "jexport.runtime.embedder", "TextTokenizer": "jexport.runtime.tokenise"}


def __getattr__(name: str) -> object:
    """Import a re-exported name on first use (PEP 562)."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
