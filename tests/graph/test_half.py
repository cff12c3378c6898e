"""float16 graphs: what stays float32, what may be kept so, and overflow named beforehand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from jexport.errors import OverflowRangeError, RecipeError
from jexport.graph import half, overflow, traceable
from jexport.graph.half import Keep
from jexport.recipe import CompileSpec, ExportSpec
from jexport.runtime.pool import pool
from jexport.stages import export
from jexport.targets import onnx as onnx_target

DELICATE = ("LayerNormalization", "Softmax", "Div", "Clip", "Sub", "Sigmoid")
FULL, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
NAMED = ("small", "minilm", "unknown")


def types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value, by onnx's own inference."""
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    found = {
        v.name: v.type.tensor_type.elem_type
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def floats(node: onnx.NodeProto, kinds: dict[str, int]) -> set[int]:
    """The float types that a node reads and writes."""
    return {kinds[name] for name in (*node.input, *node.output) if name} & {FULL, HALF}


@pytest.mark.parametrize("name", NAMED)
def test_the_delicate_parts_are_float32(name: str, exports: Callable[..., Any]) -> None:
    proto = exports(name, "fp16").proto
    kinds, graph = types(proto), proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    tables = {
        value
        for node in graph.node
        if node.op_type in ("Slice", "Unsqueeze")
        for value in node.output
        if node.name.startswith("rotary")
        or ("Unsqueeze" in node.name and node.input[0].startswith("rotary"))
    }
    for node in graph.node:
        delicate = node.op_type in DELICATE
        residual = node.op_type == "Add" and not set(node.input) & weights
        rotation = bool(set(node.input) & tables) and node.op_type == "Mul"
        if delicate or residual or rotation or node.op_type.startswith("Reduce"):
            assert floats(node, kinds) == {FULL}, node.name
    assert all(kinds[value.name] == FULL for value in graph.output)
    assert bool(tables) == (name == "small")


@pytest.mark.parametrize("name", NAMED)
def test_the_heavy_parts_are_float16(name: str, exports: Callable[..., Any]) -> None:
    proto = exports(name, "fp16").proto
    kinds = types(proto)
    heavy = [n for n in proto.graph.node if n.op_type in ("MatMul", "Gelu")]
    assert heavy
    assert all(floats(node, kinds) == {HALF} for node in heavy)
    words = [n for n in proto.graph.node if "word" in n.name and n.op_type == "Gather"]
    assert [kinds[node.input[0]] for node in words] == [HALF]
    onnx.checker.check_model(str(exports(name, "fp16").model.path), full_check=True)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("fused", [False, True])
def test_vectors_stay_near(
    name: str, fused: bool, exports: Callable[..., Any], fusions: Callable[..., Any], seeded: Any
) -> None:
    path = exports(name, "fp16").model.path
    if fused:
        path = fusions(name, "fp16").folder / "model.onnx"
    ours, truth = seeded.session(path), seeded.session(exports(name).model.path)
    for kind, feed in seeded.feeds().items():
        real = feed["attention_mask"].any(axis=1)
        for found, wanted in zip(ours.run(None, feed), truth.run(None, feed), strict=True):
            assert found.dtype == np.float32
            assert np.isfinite(found).all(), kind
            vectors = [
                v if v.ndim == 2 else pool(v, feed["attention_mask"], "mean")
                for v in (found, wanted)
            ]
            a, b = (v[real] / np.linalg.norm(v[real], axis=1, keepdims=True) for v in vectors)
            assert ((a * b).sum(axis=1) >= 0.999).all(), kind


def test_fused_norms_and_rotations_stay_float32(fusions: Callable[..., Any]) -> None:
    compiled = fusions("small", "fp16")
    assert compiled.facts["fused"] == {
        "MatMulIntegerToFloat": 0,
        "Attention": 0,
        "MultiHeadAttention": 2,
        "RotaryEmbedding": 4,
        "SkipLayerNormalization": 4,
        "BiasGelu": 2,
    }
    model = ir.load(compiled.folder / "model.onnx")
    for node in model.graph.all_nodes():
        wanted = {
            "RotaryEmbedding": ir.DataType.FLOAT,
            "SkipLayerNormalization": ir.DataType.FLOAT,
            "LayerNormalization": ir.DataType.FLOAT,
            "BiasGelu": ir.DataType.FLOAT16,
            "MultiHeadAttention": ir.DataType.FLOAT16,
        }.get(node.op_type)
        if wanted is not None:
            given = [v.dtype for v in (*node.inputs, *node.outputs) if v is not None]
            assert {d for d in given if d is not None and d.is_floating_point()} == {wanted}


def test_half_the_bytes(exports: Callable[..., Any]) -> None:
    sizes = [
        exports("minilm", precision).model.path.with_name("model.onnx_data").stat().st_size
        for precision in ("fp16", "fp32")
    ]
    assert sizes[0] < 0.52 * sizes[1]


# --- keep_fp32 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name", "fits"),
    [
        ("layers.1", "layers/1/mlp/fc1/MatMul", True),
        ("layers.1", "layers/10/mlp/fc1/MatMul", False),
        ("layers.1", "layers/11/mlp/fc1/MatMul", False),
        ("mlp.fc2", "layers/0/mlp/fc2/Add", True),
        ("fc2", "layers/0/mlp/fc2/Add", True),
        ("mlp.fc2", "layers/0/mlp/fc1/Add", False),
        ("fc2.mlp", "layers/0/mlp/fc2/Add", False),
        ("layers.0.self_attn.k_proj", "layers/0/self_attn/q_proj_k_proj_v_proj/MatMul", True),
        ("layers.0.self_attn.MatMul", "layers/0/self_attn/MatMul_2", True),
        ("layers.0.self_attn.MatMul", "layers/0/self_attn/o_proj/MatMul", False),
        ("layers.0.mlp.fc1.MatMul.more", "layers/0/mlp/fc1/MatMul", False),
        ("", "layers/0/mlp/fc1/MatMul", False),
    ],
)
def test_what_a_listed_part_fits(part: str, name: str, fits: bool) -> None:
    assert Keep((part,))(name) is fits


@pytest.mark.parametrize(
    ("parts", "nodes"),
    [
        (
            ("layers.0.mlp.fc2", "layers.1.self_attn.k_proj"),
            {"layers/0/mlp/fc2/MatMul", "layers/1/self_attn/q_proj_k_proj_v_proj/MatMul"},
        ),
        (
            ("layers.1.self_attn.MatMul",),
            {"layers/1/self_attn/MatMul", "layers/1/self_attn/MatMul_2"},
        ),
    ],
)
def test_kept_products_are_float32_and_no_others(
    parts: tuple[str, ...],
    nodes: set[str],
    exports: Callable[..., Any],
    fusions: Callable[..., Any],
    seeded: Any,
) -> None:
    proto = exports("small", "fp16", keep_fp32=parts).proto
    kinds = types(proto)
    products = [node for node in proto.graph.node if node.op_type == "MatMul"]
    assert {node.name for node in products if floats(node, kinds) == {FULL}} == nodes
    assert all(len(floats(node, kinds)) == 1 for node in products)
    # and the target's own operators keep it so
    feed = seeded.feeds()["right padded"]
    compiled = fusions("small", "fp16", keep_fp32=parts)
    assert compiled.facts["fused"]["MultiHeadAttention"] == 2
    fused = seeded.outputs(compiled.folder / "model.onnx", feed)["sentence_embedding"]
    truth = seeded.outputs(exports("small").model.path, feed)["sentence_embedding"]
    assert ((fused * truth).sum(axis=1) > 0.999).all()
    attention = {
        str(node.name): node.inputs[0].dtype
        for node in ir.load(compiled.folder / "model.onnx").graph.all_nodes()
        if node.op_type == "MultiHeadAttention" and node.inputs[0] is not None
    }
    wide = {name for name, kind in attention.items() if kind == ir.DataType.FLOAT}
    kept = "layers/1/self_attn/MultiHeadAttention/"
    assert wide == ({f"{kept}whole", f"{kept}padded"} if "self_attn.MatMul" in parts[0] else set())


def test_a_part_that_fits_nothing_is_refused(opened: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"layers\.7"):
        export.run(
            opened("bert"),
            ExportSpec(keep_fp32=("encoder.layer.0", "layers.7")),
            precision="fp16",
            samples=[[0, 5, 2]],
            out_dir=tmp_path,
        )


# --- overflow -----------------------------------------------------------------------------------


def peaks_of(loaded: Any, ids: list[int]) -> dict[str, float]:
    module = loaded.assemble(loaded.weights)
    encoder = traceable.Encoder(module, loaded.embedding, ("last_hidden_state",), 0)
    return overflow.check_texts(encoder, [ids], Keep(()))


@pytest.mark.parametrize("name", ["minilm", "small", "mpnet", "deberta", "unknown"])
def test_every_product_is_watched_under_a_name_that_the_graph_has(
    name: str, opened: Callable[..., Any], exports: Callable[..., Any]
) -> None:
    peaks = peaks_of(opened(name), list(range(5, 30)))
    assert all(0 < peak < 65_504 for peak in peaks.values())
    heavy = [
        node.name for node in exports(name).proto.graph.node if node.op_type in ("MatMul", "Gelu")
    ]
    for node in heavy:
        assert any(Keep((watched,))(node) for watched in peaks), f"{node} is not watched"
    nodes = [node.name for node in exports(name).proto.graph.node]
    for watched in peaks:
        assert any(Keep((watched,))(node) for node in nodes), f"{watched} is no node's name"


def overflowing(seeded: Any, factor: float = 1e7) -> Any:
    """A model whose fc1 of layer 1 exceeds float16, and whose fc2 undoes it."""

    def make() -> Any:
        model = seeded.build("jina")
        with torch.no_grad():
            model.layers[1].mlp.fc1.weight.mul_(factor)
            model.layers[1].mlp.fc2.weight.div_(factor)
            model.layers[1].mlp.fc1.weight.data.clamp_(-60_000, 60_000)
        return model

    return seeded.as_loaded(make)


def export_half(loaded: Any, out: Path, *kept: str) -> Any:
    out.mkdir()
    ids = [[0, *range(5, 40), 2]]
    return export.run(
        loaded, ExportSpec(keep_fp32=kept), precision="fp16", samples=ids, out_dir=out
    )


def test_an_activation_that_overflows_is_named_as_keep_fp32_takes_it(
    seeded: Any, tmp_path: Path
) -> None:
    loaded = overflowing(seeded)
    with pytest.raises(OverflowRangeError) as caught:
        export_half(loaded, tmp_path / "refused")
    assert not list((tmp_path / "refused").iterdir())
    named = re.findall(r'"([^"]+)"', caught.value.fix)
    # fc1's output is Gelu's input and output, and fc2's input
    assert named == ["layers.1.mlp.activation_fn", "layers.1.mlp.fc1", "layers.1.mlp.fc2"]
    assert all(name in caught.value.evidence for name in named)

    made = export_half(loaded, tmp_path / "kept", *named)
    proto = onnx.load(made.path)
    kinds = types(proto)
    for node in proto.graph.node:
        if node.op_type in ("MatMul", "Gelu"):
            wanted = FULL if node.name.startswith("layers/1/mlp") else HALF
            assert floats(node, kinds) == {wanted}, node.name
    folder = tmp_path / "compiled"
    folder.mkdir()
    onnx_target.build(made, CompileSpec(), folder)
    feed = seeded.feeds()["right padded"]
    truth = seeded.torch_hidden(loaded.assemble({}), feed)
    real = feed["attention_mask"].astype(bool)
    for path in (made.path, folder / "model.onnx"):
        hidden = seeded.outputs(path, feed)["last_hidden_state"][real]
        cosines = (hidden * truth[real]).sum(1) / (
            np.linalg.norm(hidden, axis=1) * np.linalg.norm(truth[real], axis=1)
        )
        assert cosines.min() > 0.999


def test_keeping_too_little_is_still_refused(seeded: Any, tmp_path: Path) -> None:
    # fc1 alone: what it gives would then be cast to float16 for Gelu.
    with pytest.raises(OverflowRangeError) as caught:
        export_half(overflowing(seeded), tmp_path / "refused", "layers.1.mlp.fc1")
    assert "layers.1.mlp.activation_fn" in caught.value.fix


def test_a_weight_that_overflows_is_named_and_can_be_kept(seeded: Any, tmp_path: Path) -> None:
    def make() -> Any:
        model = seeded.build("jina")
        with torch.no_grad():
            model.layers[0].self_attn.k_proj.weight[0, 0] = 1e6
            model.embeddings.LayerNorm.weight[0] = 0.0  # so that nothing is multiplied by it
            model.embeddings.LayerNorm.bias[0] = 0.0
        return model

    loaded = seeded.as_loaded(make)
    with pytest.raises(OverflowRangeError, match="k_proj") as caught:
        export_half(loaded, tmp_path / "refused")
    (named,) = re.findall(r'"([^"]+)"', caught.value.fix)
    assert named == "layers.0.self_attn.k_proj"
    made = export_half(loaded, tmp_path / "kept", named)
    feed = seeded.feeds()["nothing padded"]
    hidden = seeded.outputs(made.path, feed)["last_hidden_state"]
    assert np.abs(hidden - seeded.torch_hidden(make(), feed)).max() < 0.05


def test_a_constant_that_overflows_is_named(tmp_path: Path) -> None:
    # One that no text shows, because nothing runs: the conversion itself looks as well.
    model = small_graph(0.5)
    model.graph.initializers["w"].const_value = ir.tensor(
        np.full((4, 4), 1e5, dtype=np.float32), name="w"
    )
    next(iter(model.graph)).name = "layers/0/mlp/fc1/MatMul"
    with pytest.raises(OverflowRangeError, match="'w'") as caught:
        half.to_float16(model, Keep(()))
    assert '"layers.0.mlp.fc1"' in caught.value.fix


def test_a_nan_in_an_activation_counts_as_overflow(opened: Callable[..., Any]) -> None:
    loaded = opened("bert")
    module = loaded.assemble({})
    with torch.no_grad():
        module.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    row = torch.tensor([[5, 6]])
    with pytest.raises(OverflowRangeError, match="cannot hold") as caught:
        overflow.check(module, lambda: module(input_ids=row), Keep(()))
    assert '"encoder.layer.1.output.dense"' in caught.value.fix


def test_hooks_are_gone_afterwards(opened: Callable[..., Any]) -> None:
    module = opened("bert").assemble({})
    row = torch.tensor([[5, 6]])

    def broken() -> None:
        module(input_ids=row)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        overflow.check(module, broken, Keep(()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def small_graph(factor: float) -> ir.Model:
    """(x @ w) * factor."""
    tensors = [
        numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"),
        numpy_helper.from_array(np.float32(factor), "factor"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Mul", ["product", "factor"], ["y"], name="scaled"),
    ]
    shape = ["batch", 4]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FULL, shape)],
        [helper.make_tensor_value_info("y", FULL, shape)],
        tensors,
        value_info=[helper.make_tensor_value_info("product", FULL, shape)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


@pytest.mark.parametrize("factor", [0.125, 0.17677669, 1e-9, 1e9, 0.0, -3.0])
def test_a_factor_that_float16_lacks_stays_float32(
    factor: float, tmp_path: Path, seeded: Any
) -> None:
    model = small_graph(factor)
    half.to_float16(model, Keep(()))
    ir.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    found = seeded.outputs(tmp_path / "m.onnx", {"x": x})["y"]
    assert np.allclose(found, x * np.float32(factor), rtol=3e-3, atol=0)
