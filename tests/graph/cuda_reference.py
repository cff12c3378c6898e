"""com.microsoft's operators in ONNX's ReferenceEvaluator: a stand-in for the CUDA provider.

What onnxruntime has a CPU kernel for is run by that kernel, a session for each node. RemovePadding,
RestorePadding and PackedMultiHeadAttention have CUDA kernels only: they are written here after
docs/ContribOperators.md, which is our reading until a GPU runs them. Attention itself is still
onnxruntime's: each text alone, without padding.

Tests are no package: a conftest opens this file with `runpy.run_path`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

MS = "com.microsoft"
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid(MS, 1)]


def run_alone(node: onnx.NodeProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One node in onnxruntime, on the CPU."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in given.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "alone", inputs, outputs)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, given)
    return found


class ByKernel(OpRun):
    """An operator by onnxruntime's CPU kernel."""

    op_domain = MS

    def _run(self, *values: Any, **_: Any) -> tuple[np.ndarray, ...]:
        named = zip(self.onnx_node.input, values, strict=True)
        return tuple(run_alone(self.onnx_node, {name: v for name, v in named if v is not None}))


def by_kernel(name: str) -> type[OpRun]:
    return type(name, (ByKernel,), {})


class RemovePadding(OpRun):
    """Rows of tokens, their offsets (padding last), where texts begin, the longest text."""

    op_domain = MS

    def _run(self, padded: Any, counts: Any, **_: Any) -> tuple[np.ndarray, ...]:
        batch, sequence, hidden = padded.shape
        assert counts.dtype == np.int32
        assert counts.shape == (batch,)
        places = np.arange(batch * sequence, dtype=np.int32).reshape(batch, sequence)
        real = np.arange(sequence) < counts[:, None]
        order = np.concatenate([places[real], places[~real]])
        return (
            padded.reshape(-1, hidden)[places[real]],
            order.reshape(batch, sequence).astype(np.int32),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            np.array([counts.max()], np.int32),
        )


class RestorePadding(OpRun):
    """[batch, sequence, hidden] with zeros where there is padding."""

    op_domain = MS

    def _run(self, tokens: Any, offset: Any, **_: Any) -> tuple[np.ndarray]:
        padded = np.zeros((offset.size, tokens.shape[1]), tokens.dtype)
        padded[offset.reshape(-1)[: len(tokens)]] = tokens
        return (padded.reshape(*offset.shape, -1),)


class PackedMultiHeadAttention(OpRun):
    """Each text alone, by MultiHeadAttention's CPU kernel."""

    op_domain = MS

    def _run(
        self, query: Any, key: Any, value: Any, bias: Any, offset: Any, begins: Any, **_: Any
    ) -> tuple[np.ndarray]:
        assert bias is None
        assert begins.dtype == offset.dtype == np.int32
        assert begins.shape == (offset.shape[0] + 1,)
        assert begins[-1] == len(query)
        attributes = {a.name: helper.get_attribute_value(a) for a in self.onnx_node.attribute}
        node = helper.make_node(
            "MultiHeadAttention", ["q", "k", "v"], ["y"], domain=MS, **attributes
        )
        found = np.zeros_like(value)
        for begin, end in itertools.pairwise(begins):
            if end > begin:
                given = {"q": query, "k": key, "v": value}
                alone = {name: tokens[None, begin:end] for name, tokens in given.items()}
                found[begin:end] = run_alone(node, alone)[0][0]
        return (found,)


class PackedAttention(OpRun):
    """Projection of packed tokens, then the same; only ONNX Runtime's own converter makes it."""

    op_domain = MS

    def _run(
        self, tokens: Any, weight: Any, bias: Any, offset: Any, begins: Any, *_: Any, **__: Any
    ) -> tuple[np.ndarray]:
        query, key, value = np.split(tokens @ weight + bias, 3, axis=1)
        return PackedMultiHeadAttention._run(self, query, key, value, None, offset, begins)


OPERATORS = [
    *map(
        by_kernel,
        ("BiasGelu", "FastGelu", "RotaryEmbedding", "SkipLayerNormalization", "MultiHeadAttention"),
    ),
    RemovePadding,
    RestorePadding,
    PackedMultiHeadAttention,
    PackedAttention,
]


def evaluator(path: Path) -> ReferenceEvaluator:
    """A graph, to be run in ONNX's own reference."""
    return ReferenceEvaluator(onnx.load(path), new_ops=OPERATORS)
