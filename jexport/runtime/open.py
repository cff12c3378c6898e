"""From an artifact's folder to an Embedder: verify, read the manifest, open the engine.

Needs numpy, tokenizers and the target's engine only.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from jexport import manifest, targets
from jexport.flow import CompiledModel, Embedding, Signature, TensorSpec
from jexport.runtime.embedder import Embedder
from jexport.runtime.tokenise import TextTokenizer


def open_artifact(
    path: str | Path, *, device: str = "auto", threads: int = 0, verify: bool = True
) -> Embedder:
    """Open an artifact's folder for embedding; close it, or use it in a `with` block.

    device: 'auto' (a GPU when the engine sees one), 'cpu' or 'cuda'. threads: 0 for all cores.
    verify: check every file's SHA-256 first (about a second a GB); without it only the manifest is
    read. Raises ArtifactError, DependencyError, TokenizerError.
    """
    folder = Path(path)
    content = (manifest.verify(folder) if verify else manifest.read(folder)).content
    target = targets.load(content["target"])
    targets.check_installed(target.run_needs, extra=target.extra, purpose="opening this artifact")
    compiled = compiled_model(folder, content)
    embedding = embedding_of(content)
    tokenizer = TextTokenizer.open(folder, max_tokens=embedding.max_tokens)
    stack = contextlib.ExitStack()
    runner = stack.enter_context(target.runner(compiled, device, threads))
    return Embedder(
        tokenizer=tokenizer,
        runner=runner,
        embedding=embedding,
        outputs=[spec.name for spec in compiled.signature.outputs],
        release=stack.close,
    )


def embedding_of(content: Any) -> Embedding:
    """The Embedding that a manifest's content describes."""
    said = content["embedding"]
    return Embedding(
        task=said["task"],
        prompt=said["prompt"],
        pooling=said["pooling"],
        normalize=said["normalize"],
        dimension=said["dimension"],
        matryoshka=tuple(said["matryoshka"]),
        max_tokens=said["max_tokens"],
    )


def compiled_model(folder: Path, content: Any) -> CompiledModel:
    """The CompiledModel that a manifest's content describes."""
    engine = content["engine"]

    def specs(key: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=s["name"], dtype=s["dtype"], shape=tuple(s["shape"]))
            for s in engine[key]
        )

    return CompiledModel(
        target=content["target"],
        precision=content["precision"],
        folder=folder,
        files=tuple(engine["files"]),
        signature=Signature(inputs=specs("inputs"), outputs=specs("outputs")),
        facts=engine["facts"],
    )
