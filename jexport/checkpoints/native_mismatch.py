"""Checkpoints whose model_type is one of transformers' own, and whose network is another.

transformers leaves out keys of config.json that its class does not have, and does not say so. Those
here change every vector. Source: jinaai/jina-bert-implementation (jina-embeddings-v2: ALiBi for
positions, gated feed-forward layers), whose model_type is `bert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jexport.errors import UnsupportedCheckpointError

PLAIN: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "feed_forward_type": (None, "original"),
}
"""Keys that transformers' class of 5.23 may not have, and the values that ask for no more."""

ROTARY = ("rope", "rotary")
"""Values of position_embedding_type that a class with rope_parameters meets (GTE)."""

CODE = ("jina-bert-implementation", "jina-bert-v2-qk-post-norm", "JinaBert")
"""Parts of names in auto_map: repositories and classes of jina-embeddings-v2."""


def check(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that asks for more than transformers' class of its model_type has.

    Args:
        config: of a checkpoint that would be opened by that class.

    Raises:
        UnsupportedCheckpointError: names the keys.
    """
    kind = str(config.get("model_type"))
    odd = [
        f"{key} = {config[key]!r:.80}"
        for key, plain in PLAIN.items()
        if key in config and config[key] not in plain and not _has(kind, key)
        if config[key] not in ROTARY or not _has(kind, "rope_parameters")
    ]
    named = repr(config.get("auto_map"))
    odd += [f"auto_map names {part}" for part in CODE if part in named]
    if odd:
        raise UnsupportedCheckpointError(
            f"this checkpoint calls itself '{kind}', and its network is another",
            evidence=f"config.json: {', '.join(odd)}; transformers' own class has no such thing, "
            "and would give other vectors without a word (so are those of jina-embeddings-v2)",
            fix="read the code that its auto_map names, then allow it with --trust-remote-code; "
            "where config.json has no auto_map, take the file of the original repository",
        )


def _has(kind: str, key: str) -> bool:
    """Whether the config class of the installed transformers has a field for the key."""
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[kind], key)
