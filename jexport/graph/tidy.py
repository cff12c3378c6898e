"""What a graph expert would sign: fold, fuse QKV, name, and check that nothing odd is left.

Standard ONNX in, standard ONNX out. The numbers change by no more than the order of a sum.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from jexport.graph import edit

ODD = ("IsNaN", "Where", "IsInf", "Identity", "Dropout", "Loop", "If", "Scan")
ACTIVATION = "/activation_function/"
"""In the names of nodes that a Dense module's activation is made of."""


def tidy(model: ir.Model) -> None:
    """Run every step in order; `check` is what should hold afterwards.

    Args:
        model: as torch's exporter made it; changed in place.
    """
    graph = model.graph
    name_nodes(graph)
    drop_identities(graph)
    constant_reshapes(graph)
    finite_constants(graph)
    fold_transposes(graph)
    share_slices(graph)
    fuse_parallel_matmuls(graph)
    common.CommonSubexpressionEliminationPass()(model)
    edit.Edit(graph).drop_dead()
    common.DeduplicateInitializersPass(size_limit=1024)(model)
    graph.sort()
    _strip(model)
    _name_weights(graph)


def drop_identities(graph: ir.Graph) -> None:
    """Let whoever reads an Identity read what it reads, as UMT5's layers leave one each.

    Args:
        graph: changed in place; an Identity that is an output stays.
    """
    for node in list(graph):
        if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
            source = node.inputs[0]
            assert source is not None, "an Identity has an input"
            ir.convenience.replace_all_uses_with(node.outputs[0], source)


def operators(model: ir.Model) -> dict[str, int]:
    """How many nodes there are of each operator.

    Args:
        model: any graph.

    Returns:
        Counts by name (after the domain where that is not ONNX's own), most frequent first.
    """
    counts = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for node in model.graph.all_nodes()
    )
    return dict(counts.most_common())


def check(model: ir.Model, *, allow_odd: bool) -> None:
    """Postcondition: no dead node, only finite constants, and none of ODD.

    Args:
        model: what `tidy` left.
        allow_odd: a class that makes its mask itself may branch and mask as it likes.

    Raises:
        UnsupportedGraphError: it does not hold.
    """
    dead = [
        node.name
        for node in model.graph
        if not any(value.uses() or value.is_graph_output() for value in node.outputs)
    ]
    odd = [] if allow_odd else [node.name for node in model.graph if _is_odd(node)]
    infinite = [
        name
        for name, value in model.graph.initializers.items()
        if (numbers := edit.array(value)) is not None
        and numbers.dtype.kind == "f"
        and not np.isfinite(numbers).all()
    ]
    if dead or odd or infinite:
        raise edit.refuse(
            "the exported graph is not clean",
            f"dead nodes: {dead[:5]}\nunwanted operators: {odd[:5]}\n"
            f"constants that are not finite: {infinite[:5]}",
            "report this model: its class traces to a form that jexport does not know",
        )


def _is_odd(node: ir.Node) -> bool:
    """One of ODD; a Where over integers (buckets of relative positions) masks nothing.

    Nor does one in an activation behind the pooling: Softplus, and others, are two formulas.
    """
    kind = node.outputs[0].dtype
    chooses = (kind is not None and kind.is_integer()) or ACTIVATION in (node.name or "")
    return node.op_type in ODD and not (node.op_type == "Where" and chooses)


def name_nodes(graph: ir.Graph) -> None:
    """Name nodes and weights after their module: `layers/0/self_attn/q_proj/MatMul`.

    Args:
        graph: with the scopes that torch's exporter notes.
    """
    seen: Counter[str] = Counter()
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        modules = ast.literal_eval(scopes)[:-1] if scopes else []
        scope = modules[-1].removeprefix("model").removeprefix(".") if modules else ""
        if scope.startswith("_"):  # a hook of the tracer, not a module
            scope = ""
        base = f"{scope.replace('.', '/')}/{node.op_type}".lstrip("/")
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
    for name, value in list(graph.initializers.items()):
        if name.startswith("model."):
            value.name = name.removeprefix("model.")


def constant_reshapes(graph: ir.Graph) -> None:
    """Reshape to (batch, sequence, constants): 0 copies a dimension, so no Shape is needed.

    Args:
        graph: changed in place.
    """
    work = edit.Edit(graph)
    for node in list(graph):
        if node.op_type != "Reshape" or edit.array(node.inputs[1]) is not None:
            continue
        source, target = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or target.shape is None:
            continue
        new_shape: list[int] = []
        for axis, size in enumerate(target.shape):
            if isinstance(size, int):
                new_shape.append(size)
            elif size.value is not None and axis < len(source.shape) and source.shape[axis] == size:
                new_shape.append(0)
            else:
                new_shape.append(-1)
        if new_shape.count(-1) > 1:
            continue
        name = "shape_" + "_".join(str(size).replace("-", "m") for size in new_shape)
        constant = work.constant(name, np.array(new_shape, dtype=np.int64))
        node.replace_input_with(1, constant)
        node.attributes.pop("allowzero", None)
    work.drop_dead()


def finite_constants(graph: ir.Graph) -> None:
    """Let masks of -inf be the lowest float instead: a fully masked row then gives no NaN.

    Args:
        graph: changed in place.
    """
    for value in list(graph.initializers.values()):
        numbers = edit.array(value)
        if numbers is None or numbers.dtype.kind != "f" or not np.isinf(numbers).any():
            continue
        limits = np.finfo(numbers.dtype)
        finite = np.clip(numbers, limits.min, limits.max)
        value.const_value = ir.tensor(finite, name=str(value.name))


def fold_transposes(graph: ir.Graph) -> None:
    """Store a weight the way MatMul reads it, instead of transposing it at run time.

    Args:
        graph: changed in place.
    """
    work = edit.Edit(graph)
    folded: dict[int, ir.Value] = {}  # layers may share their weights
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        source = edit.weight(node.inputs[0])
        if source is None or node.inputs[0] is None:
            continue
        if id(source) not in folded:
            folded[id(source)] = work.lazy(
                f"{node.inputs[0].name}.T", source, edit.sizes(source)[::-1], _transposed(source)
            )
        work.replace(node.outputs[0], folded[id(source)])
    work.drop_dead()


def _transposed(source: Any) -> Any:
    def make() -> np.ndarray:
        raw = getattr(source, "raw", None)
        if raw is not None and hasattr(raw, "untyped_storage"):
            # A copy by torch: memory that numpy has seen cannot be freed before its last reference
            # is gone, and the tracer keeps some for good (1.2 GB at full size).
            copied: np.ndarray = raw.detach().T.contiguous().numpy()
            return copied
        numbers: np.ndarray = source.numpy().T
        return numbers

    return make


def share_slices(graph: ir.Graph) -> None:
    """Two halves of one axis, cut by two Slices, are one Split (rotate-half writes the former).

    Args:
        graph: changed in place.
    """
    work = edit.Edit(graph)
    for value in [output for node in graph for output in node.outputs]:
        cuts = [n for n in value.consumers() if n.op_type == "Slice" and n.inputs[0] is value]
        if len(cuts) != 2 or len(value.uses()) < 2 or value.shape is None:
            continue
        ranges = [_last_axis_range(cut, value) for cut in cuts]
        if None in ranges:
            continue
        (first, low), (second, high) = sorted(
            zip(ranges, cuts, strict=True), key=lambda entry: entry[0] or (0, 0)
        )
        assert first is not None
        assert second is not None
        width = value.shape[-1]
        if first[0] != 0 or first[1] != second[0] or second[1] != width:
            continue
        sizes = np.array([first[1], second[1] - second[0]], dtype=np.int64)
        earliest = min(cuts, key=list(graph).index)
        split = work.insert(
            earliest,
            "Split",
            [value, work.constant(f"split_{sizes[0]}_{sizes[1]}", sizes)],
            {"axis": -1},
            name=f"{low.name}/halves",
            num_outputs=2,
        )
        for cut, half in ((low, split.outputs[0]), (high, split.outputs[1])):
            half.type, half.shape = cut.outputs[0].type, cut.outputs[0].shape
            work.replace(cut.outputs[0], half)
    work.drop_dead()


def _last_axis_range(cut: ir.Node, value: ir.Value) -> tuple[int, int] | None:
    parts = [edit.array(v) for v in cut.inputs[1:]]
    if len(parts) < 3 or any(p is None or p.size != 1 for p in parts) or value.shape is None:
        return None
    start, end, axis = (int(p.reshape(-1)[0]) for p in parts[:3] if p is not None)
    width = value.shape[-1]
    step = int(parts[3].reshape(-1)[0]) if len(parts) > 3 and parts[3] is not None else 1
    if not isinstance(width, int) or axis not in (-1, len(value.shape) - 1) or step != 1:
        return None
    return start, min(end, width)


def fuse_parallel_matmuls(graph: ir.Graph) -> None:
    """Linears of the same input (Q, K and V) become one MatMul, one Add and a Split.

    Args:
        graph: changed in place.
    """
    work = edit.Edit(graph)
    fused: dict[tuple[int, ...], ir.Value] = {}
    for value in [output for node in graph for output in node.outputs]:
        group = [n for n in value.consumers() if n.op_type == "MatMul" and n.inputs[0] is value]
        group = [node for node in group if edit.weight(node.inputs[1]) is not None]
        biases = [b for n in group if (b := edit.bias_add(n.outputs[0])) is not None]
        if len(group) > 1 and len(biases) in (0, len(group)):
            _fuse_group(work, value, group, biases, fused)
    work.drop_dead()


def _fuse_group(
    work: edit.Edit,
    value: ir.Value,
    group: list[ir.Node],
    biases: list[tuple[ir.Node, ir.Value]],
    merged: dict[tuple[int, ...], ir.Value],
) -> None:
    # Order by the module's own order of weights, which is the order of the nodes in the graph.
    modules = [str(node.name).rpartition("/")[0] for node in group]
    joined = "_".join(module.rpartition("/")[2] for module in modules)
    scope = f"{modules[0].rpartition('/')[0]}/{joined}".lstrip("/")
    stem = scope.replace("/", ".")
    weights = [node.inputs[1] for node in group]
    widths = [edit.sizes(edit.weight(weight))[1] for weight in weights]
    place, total = group[0], sum(widths)
    fused = _side_by_side(work, weights, f"{stem}.weight", merged)
    last = work.insert(place, "MatMul", [value, fused], name=f"{scope}/MatMul")
    inserted = [last]
    if biases:
        offset = _side_by_side(work, [bias for _, bias in biases], f"{stem}.bias", merged)
        last = work.insert(place, "Add", [last.outputs[0], offset], name=f"{scope}/Add")
        inserted.append(last)
    for node in inserted:
        node.outputs[0].type = value.type
        node.outputs[0].shape = ir.Shape([*list(value.shape or ())[:-1], total])
    split = work.insert(
        place,
        "Split",
        [
            last.outputs[0],
            work.constant("split_" + "_".join(map(str, widths)), np.array(widths, dtype=np.int64)),
        ],
        {"axis": -1},
        name=f"{scope}/Split",
        num_outputs=len(group),
    )
    ends = [add.outputs[0] for add, _ in biases] or [node.outputs[0] for node in group]
    for end, part in zip(ends, split.outputs, strict=True):
        part.type, part.shape = end.type, end.shape
        work.replace(end, part)


def _side_by_side(
    work: edit.Edit,
    parts: Sequence[ir.Value | None],
    name: str,
    fused: dict[tuple[int, ...], ir.Value],
) -> ir.Value:
    """Weights or biases joined along their last axis; layers that share theirs share this too."""
    tensors: list[Any] = [part.const_value for part in parts if part is not None]
    key = tuple(map(id, tensors))
    if key not in fused:
        taken = sum(other.startswith(name) for other in work.graph.initializers)
        shape = (*tensors[0].shape[:-1], sum(int(t.shape[-1]) for t in tensors))
        fused[key] = work.lazy(
            f"{name}_{taken + 1}" if taken else name,
            tensors[0],
            shape,
            lambda: np.concatenate([t.numpy() for t in tensors], axis=-1),
        )
    return fused[key]


def _name_weights(graph: ir.Graph) -> None:
    """Give the tracer's numbered constants (`val_123`) the name of what they are."""
    numbered = 0
    for node in graph:
        for value in node.inputs:
            if value is None or not value.is_initializer() or "val_" not in str(value.name):
                continue
            if node.op_type == "MatMul" and edit.weight(value) is not None:
                name = str(node.name).rpartition("/")[0].replace("/", ".") + ".weight"
                taken = sum(other.startswith(name) for other in graph.initializers)
                if taken:  # transposed, once for each time that its module runs
                    name += f"_T{taken}" if taken > 1 else "_T"
                value.name = name
            else:
                value.name = f"constant_{numbered}"
                numbered += 1


def _plain_axes(value: ir.Value) -> None:
    """Write `sequence` for `Min(8194, sequence)`, the length of what is cut from a table."""
    for axis, size in enumerate(value.shape or ()):
        bounded = re.fullmatch(r"Min\(\d+, (\w+)\)", str(size))
        if bounded and value.shape is not None:
            value.shape[axis] = bounded[1]


def _strip(model: ir.Model) -> None:
    """Drop traces and paths of the machine that exported; give plain value names."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "encoder"
    model.graph.doc_string = None
    model.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            _plain_axes(value)
            if not value.is_graph_output():
                suffix = f":{value.index()}" if len(node.outputs) > 1 else ""
                value.name = f"{node.name}{suffix}"
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    for name, value in model.graph.initializers.items():
        value.metadata_props.clear()
        assert re.match(r"[\w.:/-]+$", name), name
