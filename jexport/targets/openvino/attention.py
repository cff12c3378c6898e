"""Attention whose sums do not depend on how far a batch is padded, for int8 graphs.

OpenVINO's softmax adds whole vectors of 16 keys first and what is left over after them. Where a
text's last keys stand in the rest when it is alone, and in a whole vector when a longer text pads
it, the sums differ in the last bit; behind a rounding to int8 that is now and then a whole step:
cosine 0.9993 between the same text alone and in a batch. With the keys padded to whole vectors
inside the graph, masked and zero, the bits are the same whoever opens it.
"""

from __future__ import annotations

from typing import Any

VECTOR = 16
MASKED = -10_000.0
"""The value that the exported mask has for padding (checkpoints' own, and finite in float16)."""


def whole_vectors(graph: Any) -> int:
    """Pad the keys of every masked attention to a multiple of VECTOR, in place.

    Attention of another form than MatMul, Add of a mask, Softmax, MatMul is left as it is.

    Args:
        graph: an openvino.Model.

    Returns:
        How many were padded.
    """
    cache: dict[tuple[str, int, int], Any] = {}
    missing: list[Any] = []
    count = 0
    for softmax in [node for node in graph.get_ordered_ops() if _is(node, "Softmax")]:
        parts = _parts(softmax)
        if parts is None:
            continue
        scores, added, mask_port, matmul = parts
        if not missing:
            missing.append(_missing(graph))
        _pad(scores.input(1), _axis(scores, keys=True), 0.0, missing[0], cache)
        _pad(matmul.input(1), _axis(matmul, keys=False), 0.0, missing[0], cache)
        _pad(added.input(mask_port), 3, MASKED, missing[0], cache)
        count += 1
    if count:
        graph.validate_nodes_and_infer_types()
    return count


def _is(node: Any, kind: str) -> bool:
    type_name: str = node.get_type_name()
    return type_name == kind


def _parts(softmax: Any) -> tuple[Any, Any, int, Any] | None:
    """Scores, the Add of the mask with the mask's port, and the product with the values."""
    added = softmax.input_value(0).get_node()
    readers = [port.get_node() for port in softmax.output(0).get_target_inputs()]
    if not _is(added, "Add") or len(readers) != 1 or not _is(readers[0], "MatMul"):
        return None
    for port in (0, 1):
        scores, mask = added.input_value(1 - port), added.input_value(port)
        shape = mask.get_partial_shape()
        if _is(scores.get_node(), "MatMul") and len(shape) == 4 and shape[2] == 1:
            return scores.get_node(), added, port, readers[0]
    return None


def _axis(matmul: Any, *, keys: bool) -> int:
    """The axis of a product's second input along which the keys lie."""
    turned = bool(matmul.get_attributes()["transpose_b"])
    return 2 if turned == keys else 3


def _missing(graph: Any) -> Any:
    """How many keys are missing to a whole vector: int64 [1]."""
    from openvino import opset13 as ops

    ids = next(port.get_node() for port in graph.inputs if "input_ids" in port.names)
    length = ops.gather(ops.shape_of(ids), [1], 0)
    vector = ops.constant([VECTOR], dtype="int64")
    return ops.floor_mod(ops.subtract(vector, ops.floor_mod(length, vector)), vector)


def _pad(port: Any, axis: int, value: float, missing: Any, cache: dict[Any, Any]) -> None:
    """Pad what a port reads; before a Transpose where there is one, for rows lie together there."""
    source = port.get_source_output()
    turn = source.get_node()
    if _is(turn, "Transpose") and len(source.get_target_inputs()) == 1:
        port, source = turn.input(0), turn.input_value(0)
        axis = int(turn.input_value(1).get_node().get_data()[axis])
    key = (source.get_node().get_name(), source.get_index(), axis)
    if key not in cache:
        cache[key] = _padded(source, axis, value, missing)
    port.replace_source_output(cache[key].output(0))


def _padded(source: Any, axis: int, value: float, missing: Any) -> Any:
    from openvino import opset13 as ops

    zero = ops.constant([0], dtype="int64")
    ends = ops.concat([missing if n == axis else zero for n in range(4)], 0)
    begins = ops.constant([0] * 4, dtype="int64")
    node = ops.pad(source, begins, ends, "constant", ops.constant(value, dtype="float32"))
    node.set_friendly_name(f"{source.get_node().get_friendly_name()}/whole_vectors/{axis}")
    return node
