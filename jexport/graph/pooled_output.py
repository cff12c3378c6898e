"""A graph that gives token vectors -> the same graph that gives `sentence_embedding` beside them.

Pooled, and L2-normalised where the checkpoint does that, in float32 by operators that onnxruntime
has CUDA kernels for at every opset from 18 to 23 (cuda_kernels.py), so that only one vector a text
leaves the GPU. ReduceMax and Equal are not among them: at opset 20 and 19 they became other
operators, and would bring every token vector to the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from jexport.errors import UnsupportedGraphError, nearest
from jexport.graph import edit

HIDDEN, POOLED = "last_hidden_state", "sentence_embedding"
MODES = ("mean", "cls", "max", "mean_sqrt_len", "weightedmean", "last")

MIN_TOKENS, MIN_NORM = 1e-9, 1e-12
"""Clamps of counts and lengths: those of the runtime's own pooling (runtime/pool.py)."""

LOWEST = float(np.finfo(np.float32).min)


def append(model: ir.Model, pooling: str, *, normalize: bool) -> bool:
    """Add the output, after those that the graph has.

    Args:
        model: with the input `attention_mask` (int64 [batch, sequence], padding on either side) and
            the output `last_hidden_state` (float32 [batch, sequence, dim]).
        pooling: one of MODES. A text without a token gives zeros.
        normalize: to length 1.

    Returns:
        False for a graph that has it already or no token vectors.

    Raises:
        UnsupportedGraphError: on another pooling.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    if HIDDEN not in outputs or POOLED in outputs:
        return False
    if pooling not in MODES:
        raise UnsupportedGraphError(
            f"onnx: no pooling mode '{pooling}' in a graph",
            evidence=f"there are: {', '.join(MODES)}",
            fix=nearest(pooling, MODES),
        )
    hidden = outputs[HIDDEN]
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    vectors = _Appender(edit.Edit(graph)).pooled(hidden, mask, pooling, normalize=normalize)
    vectors.name = POOLED
    assert hidden.shape is not None
    vectors.shape = ir.Shape([hidden.shape[0], hidden.shape[2]])
    graph.outputs.append(vectors)
    return True


class _Appender:
    """Adds float32 nodes at the end of a graph."""

    def __init__(self, work: edit.Edit) -> None:
        self.work = work

    def pooled(
        self, hidden: ir.Value, mask: ir.Value, pooling: str, *, normalize: bool
    ) -> ir.Value:
        """One vector a text: float32 [batch, dim]."""
        weights = self.node("Cast", [mask], {"to": int(ir.DataType.FLOAT)}, name="weights")
        count = self.node("ReduceSum", [weights, self.axis(1)], {"keepdims": 1}, name="count")
        if pooling == "max":
            vectors = self._largest(hidden, mask, count)
        elif pooling == "weightedmean":
            vectors = self._weighted_mean(hidden, weights)
        elif pooling in ("cls", "last"):
            vectors = self._weighed(hidden, self._one_token(weights, count, pooling))
        else:
            size = self.node("Max", [count, self.number(MIN_TOKENS)], name="tokens")
            if pooling == "mean_sqrt_len":
                size = self.node("Sqrt", [size], name="sqrt_tokens")
            summed = self._weighed(hidden, weights)
            vectors = self.node("Div", [summed, size], name="mean")
        if not normalize:
            return vectors
        length = self.node("ReduceL2", [vectors, self.axis(1)], {"keepdims": 1}, name="length")
        length = self.node("Max", [length, self.number(MIN_NORM)], name="positive_length")
        return self.node("Div", [vectors, length], name="unit")

    def _weighed(self, hidden: ir.Value, weights: ir.Value) -> ir.Value:
        """Sum of token vectors [batch, sequence, dim], each times its weight [batch, sequence].

        As a matrix product no second tensor as large as the token vectors is written.
        """
        row = self.node("Unsqueeze", [weights, self.axis(1)], name="row")
        matmul = self.node("MatMul", [row, hidden], name="sum")
        return self.node("Squeeze", [matmul, self.axis(1)], name="vectors")

    def _weighted_mean(self, hidden: ir.Value, weights: ir.Value) -> ir.Value:
        """The mean in which the weight of a token is its number, from 1 on."""
        number = self.node("CumSum", [weights, self.scalar(1)], name="number")
        number = self.node("Mul", [number, weights], name="weight")
        total = self.node("ReduceSum", [number, self.axis(1)], {"keepdims": 1}, name="total")
        size = self.node("Max", [total, self.number(MIN_TOKENS)], name="weights_sum")
        return self.node("Div", [self._weighed(hidden, number), size], name="weighted_mean")

    def _one_token(self, weights: ir.Value, count: ir.Value, pooling: str) -> ir.Value:
        """1 at the first or last token of each text, else 0: float32 [batch, sequence].

        Real tokens are numbered from 1 on, padding has its neighbour's number.
        """
        number = self.node("CumSum", [weights, self.scalar(1)], name="number")
        if pooling == "cls":
            left = self.node("Sub", [self.number(2.0), number], name="left")
        else:
            behind = self.node("Sub", [number, count], name="behind")
            left = self.node("Add", [behind, self.number(1.0)], name="left")
        chosen = self.node("Max", [left, self.number(0.0)], name="chosen")
        return self.node("Mul", [chosen, weights], name="chosen_token")

    def _largest(self, hidden: ir.Value, mask: ir.Value, count: ir.Value) -> ir.Value:
        """Largest value of each column over the real tokens; TopK, as ReduceMax has no kernel."""
        bool_ = ir.DataType.BOOL
        real = self.node("Cast", [mask], {"to": int(bool_)}, name="real", dtype=bool_)
        column = self.node("Unsqueeze", [real, self.axis(2)], name="real_column", dtype=bool_)
        masked = self.node("Where", [column, hidden, self.number(LOWEST)], name="masked")
        one = self.axis(1)  # also the number of values that are wanted
        top = self.node("TopK", [masked, one], {"axis": 1}, name="largest")
        flat = self.node("Squeeze", [top, self.axis(1)], name="vectors")
        any_token = self.node("Min", [count, self.number(1.0)], name="any_token")
        return self.node("Mul", [flat, any_token], name="largest_of_tokens")

    def axis(self, number: int) -> ir.Value:
        """A list of one axis."""
        return self.work.constant(f"{POOLED}/axis_{number}", np.array([number], np.int64))

    def scalar(self, number: int) -> ir.Value:
        """An axis that is not a list."""
        return self.work.constant(f"{POOLED}/number_{number}", np.array(number, np.int64))

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.work.constant(f"{POOLED}/{value:g}", np.array(value, np.float32))

    def node(
        self,
        op: str,
        inputs: list[ir.Value],
        attributes: dict[str, Any] | None = None,
        *,
        name: str,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """A new last node; its first output."""
        count = 2 if op == "TopK" else 1
        node = ir.node(op, inputs, attributes or {}, num_outputs=count, name=f"{POOLED}/{name}")
        for number, value in enumerate(node.outputs):
            value.name = f"{POOLED}/{name}:{number}" if number else f"{POOLED}/{name}"
        node.outputs[0].type = ir.TensorType(dtype)
        self.work.graph.append(node)
        return node.outputs[0]
