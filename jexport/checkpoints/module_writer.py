"""modules.json and the modules' folders, as every reader of today takes them.

Old names of types, old flags of poolings, no key that a reader may refuse: sentence-transformers
from 2 to 6, Text Embeddings Inference and every vLLM read that (TEI's DenseConfig, vLLM's
try_get_dense_modules). Knows no target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import write_json
from jexport.checkpoints import shard_writer
from jexport.checkpoints.module_stack import NEW_POOLING_NAMES, POOLING_MODES
from jexport.checkpoints.sentence_files import MODULES
from jexport.types import Embedding, HeadModule

TYPES = "sentence_transformers.models"


def plain(embedding: Embedding, width: int) -> tuple[HeadModule, ...]:
    """The modules of one pooling and its normalisation.

    Args:
        embedding: names them.
        width: of the token vectors.

    Returns:
        One or two modules, without weights.
    """
    config = {"embedding_dimension": width, "pooling_mode": embedding.pooling.split("+")}
    modules = [HeadModule(kind="Pooling", config=config, weights={})]
    if embedding.normalize:
        modules.append(HeadModule(kind="Normalize", config={}, weights={}))
    return tuple(modules)


def write(
    folder: Path, modules: Sequence[HeadModule], precision: str, *, include_prompt: bool = True
) -> tuple[str, ...]:
    """Write modules.json, and each module's folder.

    Args:
        folder: of the transformer's own files.
        modules: those after the transformer.
        precision: of their weights, 'fp32' or 'bf16'; of no meaning without weights.
        include_prompt: False leaves the prompt's tokens out of the pooling.

    Returns:
        The files that were written, relative to the folder.

    Raises:
        NotFiniteError, CheckpointError: as shard_writer.write.
    """
    listed = [("Transformer", "")]
    files = [MODULES]
    for number, one in enumerate(modules, start=1):
        home = f"{number}_{one.kind}"
        listed.append((one.kind, home))
        config = _config(one, include_prompt=include_prompt)
        if config or one.weights:
            (folder / home).mkdir()
        if config:
            write_json(folder / home / "config.json", config)
            files.append(f"{home}/config.json")
        if one.weights:
            written = shard_writer.write(folder / home, one.weights, precision)
            files += [f"{home}/{name}" for name in written]
    entries = [
        {"idx": n, "name": str(n), "path": path, "type": f"{TYPES}.{kind}"}
        for n, (kind, path) in enumerate(listed)
    ]
    (folder / MODULES).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return tuple(files)


def _config(module: HeadModule, *, include_prompt: bool) -> dict[str, Any]:
    """A module's config.json; empty for one that is not read."""
    config = dict(module.config)
    if module.kind == "Normalize":
        return {}
    if module.kind == "Dense" and not config["use_residual"]:
        del config["use_residual"]  # sentence-transformers before 5.7 does not know it
    if module.kind != "Pooling":
        return config
    modes = config["pooling_mode"]
    written: dict[str, Any] = {"word_embedding_dimension": config["embedding_dimension"]}
    written |= {key: mode in modes for key, mode in POOLING_MODES.items()}
    if [mode for mode in POOLING_MODES.values() if mode in modes] != list(modes):
        # Another order than that of the flags, which only the new key can say.
        names = {ours: theirs for theirs, ours in NEW_POOLING_NAMES.items()}
        written["pooling_mode"] = [names.get(mode, mode) for mode in modes]
    if not include_prompt:
        written["include_prompt"] = False
    return written
