"""What runs side by side: jexport's artifacts and torch, as a bare graph and end to end.

A graph side takes padded ids and gives one unit vector a text, on the host: both engines pool where
they run. An encode side takes texts. Every side returns when the device is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import jexport
from jexport import targets
from jexport.artifacts import manifest
from jexport.runtime import open as opening
from jexport.runtime.pool import finish, pool
from jexport.types import Runner

Feed = Mapping[str, NDArray[np.int64]]
Vectors = NDArray[np.float32]
Graph = Callable[[Feed], Vectors]
Encode = Callable[[Sequence[str]], Vectors]

SENTENCE_BATCH = 32
"""Texts of one batch of sentence-transformers: its default."""

COMPILERS = {"cuda": "inductor", "cpu": "eager"}
"""torch.compile's backend; on a CPU, where only the lines are exercised, one that needs no C++."""

HIDDEN, POOLED = "last_hidden_state", "sentence_embedding"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """One opened side: `graph` or `encode`, the other is None."""

    graph: Graph | None = None
    encode: Encode | None = None


@contextlib.contextmanager
def onnx_graph(artifact: Path, provider: str, *, cuda_graphs: bool = False) -> Iterator[Opened]:
    """The artifact's runner as jexport opens it, asked for pooled vectors where it gives them."""
    content = manifest.read(artifact).content
    target = targets.load(content["target"])
    compiled = opening.compiled_model(artifact, content)
    pooling = content["embedding"]["pooling"]
    gives = {output["name"] for output in content["engine"]["outputs"]}
    opener = target.runner
    if cuda_graphs:
        assert target.runtime.cuda_graphs is not None, target.name
        opener = target.runtime.cuda_graphs
    with opener(compiled, provider, 0) as run:
        wanted = POOLED if POOLED in gives else HIDDEN
        only = getattr(run, "only", None)
        asked: Runner = run if only is None else only((wanted,))

        def graph(feed: Feed) -> Vectors:
            output = asked(feed)[wanted]
            if wanted == HIDDEN:
                output = pool(output, feed["attention_mask"], pooling)
            return finish(np.asarray(output, np.float32), dimensions=None, normalize=True)

        yield Opened(graph=graph)


@contextlib.contextmanager
def onnx_encode(artifact: Path, provider: str, **options: Any) -> Iterator[Opened]:
    """`encode` with default batches; no prompt is put before texts, so that lengths stay."""
    with jexport.open_artifact(artifact, device=provider, verify=False, **options) as model:
        yield Opened(encode=lambda sentences: model.encode(sentences, prompt=False))


@contextlib.contextmanager
def torch_graph(
    folder: Path, provider: str, dtype: str, *, compiled: bool = False
) -> Iterator[Opened]:
    """The merged checkpoint in transformers with SDPA; mean pooling and length 1 on the device."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model = model.to(provider).eval().requires_grad_(False)

    def pooled(input_ids: Any, attention_mask: Any) -> Any:
        hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        summed = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(summed.float(), dim=1)

    forward = (
        torch.compile(pooled, backend=COMPILERS[provider], dynamic=True) if compiled else pooled
    )

    def graph(feed: Feed) -> Vectors:
        with torch.inference_mode():
            on_device = [
                torch.from_numpy(np.ascontiguousarray(feed[name])).to(provider)
                for name in ("input_ids", "attention_mask")
            ]
            made: Vectors = forward(*on_device).cpu().numpy()
        return made

    try:
        yield Opened(graph=graph)
    finally:
        model.to("meta")


@contextlib.contextmanager
def torch_encode(
    folder: Path, provider: str, dtype: str, *, compiled: bool = False
) -> Iterator[Opened]:
    """sentence-transformers with SDPA: sorted by length, padded, its own default batch."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder),
        device=provider,
        model_kwargs={"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"},
    )
    if compiled:
        model[0].model = torch.compile(model[0].model, backend=COMPILERS[provider], dynamic=True)

    def encode(sentences: Sequence[str]) -> Vectors:
        made: Vectors = model.encode(
            list(sentences),
            batch_size=SENTENCE_BATCH,
            prompt="",
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return made.astype(np.float32)

    try:
        yield Opened(encode=encode)
    finally:
        model.to("meta")


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 is float32 in torch meanwhile: no TF32."""
    import torch

    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def batches_of(artifact: Path, provider: str, sentences: Sequence[str]) -> list[Feed]:
    """The batches that `encode` makes of these texts, as its engine was given them."""
    seen: list[Feed] = []
    load = targets.load

    def recording(name: str) -> targets.Target:
        target = load(name)

        @contextlib.contextmanager
        def runner(*words: Any, **options: Any) -> Iterator[Runner]:
            with target.runner(*words, **options) as run:
                yield _Recorded(run, seen)

        return dataclasses.replace(
            target, runner=runner, runtime=dataclasses.replace(target.runtime, streams=None)
        )

    with (
        mock.patch.object(opening.targets, "load", recording),
        jexport.open_artifact(artifact, device=provider, verify=False) as model,
    ):
        model.encode(sentences, prompt=False)
    return seen


class _Recorded:
    """A runner that keeps what it is given."""

    def __init__(self, run: Runner, seen: list[Feed]) -> None:
        self._run, self._seen = run, seen

    def __call__(self, feed: Any) -> Any:
        self._seen.append({name: np.array(value) for name, value in feed.items()})
        return self._run(feed)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._run, name)
        if name != "only":
            return value
        return lambda names: _Recorded(value(names), self._seen)
