"""What leaves export: a standard graph that an expert would sign, of every kind of checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from jexport.artifacts.manifest import file_digest
from jexport.graph import tidy
from jexport.recipe import ExportSpec, LoadSpec
from jexport.runtime.pool import finish, pool
from jexport.stages import export, load

REPOSITORY = Path(__file__).parents[2]
NAMED = ("minilm", "small", "xlm_roberta", "unknown")
"""Checkpoints whose graphs are looked at operator by operator."""

SEEDED = ("distilbert", "electra", "albert", "mpnet", "deberta", "modernbert", "nomic_bert")

LAYERS = {"minilm": 6, "small": 2, "xlm_roberta": 2, "unknown": 2}
TOLERANCE = 1e-5


@pytest.fixture(params=NAMED)
def graph(request: Any, exports: Callable[..., Any]) -> onnx.GraphProto:
    return exports(request.param).proto.graph


def counts(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def weight_products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    weights = {tensor.name for tensor in graph.initializer}
    return [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]


def test_only_standard_operators(graph: onnx.GraphProto) -> None:
    assert {node.domain for node in graph.node} == {""}


@pytest.mark.parametrize("name", NAMED)
def test_one_opset_and_no_functions(name: str, exports: Callable[..., Any]) -> None:
    proto = exports(name).proto
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    assert not proto.functions


@pytest.mark.parametrize(
    ("name", "norms", "gelus"),
    [("minilm", 13, 6), ("small", 5, 2), ("xlm_roberta", 5, 2), ("unknown", 4, 0)],
)
def test_real_norms_and_gelus(
    name: str, norms: int, gelus: int, exports: Callable[..., Any]
) -> None:
    found = counts(exports(name).proto.graph)
    assert (found["LayerNormalization"], found["Gelu"]) == (norms, gelus)
    assert not {"Erf", "Tanh", "Pow", "Sqrt", "ReduceMean"} & set(found)


def test_no_safe_softmax_and_no_leftovers(graph: onnx.GraphProto) -> None:
    unwanted = {
        "IsNaN",
        "IsInf",
        "Where",
        "Identity",
        "Dropout",
        "If",
        "Loop",
        "Scan",
        "Cos",
        "Sin",
        "Expand",
        "ConstantOfShape",
        "Constant",
        "Trilu",
        "And",
        "Or",
    }
    assert not unwanted & set(counts(graph))


@pytest.mark.parametrize(("name", "each"), [("minilm", 4), ("small", 4), ("xlm_roberta", 4)])
def test_queries_keys_and_values_are_one_product(
    name: str, each: int, exports: Callable[..., Any]
) -> None:
    graph = exports(name).proto.graph
    products = weight_products(graph)
    assert len(products) == each * LAYERS[name]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    width = exports(name).loaded.embedding.dimension
    joined = [n for n in products if shapes[n.input[1]] == (width, 3 * width)]
    assert len(joined) == LAYERS[name]


def test_no_weight_is_transposed_at_run_time(graph: onnx.GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    moved = [
        n.name
        for n in graph.node
        if n.op_type != "Gather"
        and n.input[0] in weights
        and n.op_type in ("Transpose", "Unsqueeze", "Reshape", "Cast", "Concat")
    ]
    assert not moved


def test_rope_comes_from_two_tables_cut_once(exports: Callable[..., Any]) -> None:
    graph = exports("small").proto.graph
    tables = {t.name: tuple(t.dims) for t in graph.initializer if t.name.startswith("rotary_emb.")}
    assert tables == {"rotary_emb.cos": (1, 8194, 16), "rotary_emb.sin": (1, 8194, 16)}
    users = [n for n in graph.node if set(n.input) & set(tables)]
    assert [n.op_type for n in users] == ["Slice", "Slice"]


def test_every_node_leads_to_an_output(graph: onnx.GraphProto) -> None:
    makers = {output: node for node in graph.node for output in node.output}
    wanted, seen = [value.name for value in graph.output], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        wanted += makers[name].input if name in makers else []
    dead = [node.name for node in graph.node if not set(node.output) & seen]
    unused = [tensor.name for tensor in graph.initializer if tensor.name not in seen]
    assert (dead, unused) == ([], [])


def test_numbers_are_finite(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        numbers = numpy_helper.to_array(tensor)
        assert np.isfinite(numbers).all(), tensor.name


def test_axes_of_reductions_are_initializers(graph: onnx.GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    reductions = [node for node in graph.node if node.op_type.startswith("Reduce")]
    assert reductions
    assert all(len(node.input) == 2 and node.input[1] in weights for node in reductions)


def test_no_shape_is_computed_but_the_length(graph: onnx.GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    assert counts(graph)["Shape"] <= 1
    shaped = [node for node in graph.node if node.op_type == "Reshape"]
    assert all(node.input[1] in weights for node in shaped)


def test_only_two_inputs_and_every_axis_dynamic(graph: onnx.GraphProto) -> None:
    def axes(value: onnx.ValueInfoProto) -> list[object]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]
    assert all(axes(value) == ["batch", "sequence"] for value in graph.input)
    hidden, pooled = graph.output
    assert axes(hidden)[:2] == ["batch", "sequence"]
    assert axes(pooled)[:1] == ["batch"]
    assert axes(hidden)[2:] == axes(pooled)[1:] != [0]


def test_names_can_be_read(graph: onnx.GraphProto) -> None:
    names = [node.name for node in graph.node]
    made = [output for node in graph.node for output in node.output]
    weights = [tensor.name for tensor in graph.initializer]
    assert len(set(names)) == len(names)
    assert len({*made, *weights}) == len(made) + len(weights)
    for name in (*names, *made, *weights):
        assert re.fullmatch(r"[\w./:]+", name), name
        assert not re.search(r"val_\d|aten|torch|node_|::|\bmodel\.", name), name
    large = [t.name for t in graph.initializer if int(np.prod(t.dims)) > 64]
    assert all(re.search(r"\.[a-z]", name) for name in large), large


def test_weights_of_a_layer_keep_their_names(exports: Callable[..., Any]) -> None:
    names = {tensor.name for tensor in exports("small").proto.graph.initializer}
    assert {
        "embeddings.word_embeddings.weight",
        "layers.1.self_attn.q_proj_k_proj_v_proj.weight",
        "layers.1.self_attn.o_proj.bias",
        "layers.1.mlp.fc1.weight",
        "layers.1.post_mlp_layernorm.weight",
    } <= names


@pytest.mark.parametrize("name", NAMED)
def test_nothing_of_this_machine_is_in_the_file(name: str, exports: Callable[..., Any]) -> None:
    path = exports(name).model.path
    content = path.read_bytes()
    for trace in (
        str(REPOSITORY),
        str(Path.home()),
        str(path.parent),
        "site-packages",
        ".py",
        "Traceback",
        'File "',
        "pkg.torch",
    ):
        assert trace.encode() not in content, trace


@pytest.mark.parametrize("name", [*NAMED, *SEEDED])
def test_two_files_and_valid_to_the_strict_checker(name: str, exports: Callable[..., Any]) -> None:
    path = exports(name).model.path
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    size = path.with_name("model.onnx_data").stat().st_size
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            assert place["location"] == "model.onnx_data"
            assert int(place["offset"]) + int(place["length"]) <= size
    onnx.checker.check_model(str(path), full_check=True, check_custom_domain=True)


@pytest.mark.parametrize("name", [*NAMED, *SEEDED])
def test_numbers_of_every_shape_and_padding(
    name: str, exports: Callable[..., Any], seeded: Any
) -> None:
    made = exports(name)
    module, session = made.module(), seeded.session(made.model.path)
    for kind, feed in seeded.feeds().items():
        hidden, pooled = session.run(None, feed)
        assert np.isfinite(hidden).all(), kind
        assert np.isfinite(pooled).all(), kind
        real = feed["attention_mask"].astype(bool)
        if real.any():
            truth = seeded.torch_hidden(module, feed)
            assert np.abs(hidden - truth)[real].max() < TOLERANCE, kind


def test_a_window_is_not_lost(exports: Callable[..., Any], seeded: Any) -> None:
    # Guards the test above: without its sliding layers the model gives something else.
    feed = seeded.feeds()["longer than traced"]
    module = exports("modernbert").module()
    truth = seeded.torch_hidden(module, feed)
    module.config.sliding_window = 10_000
    assert np.abs(seeded.torch_hidden(module, feed) - truth).max() > 0.1


@pytest.mark.parametrize("name", ["small", "xlm_roberta", "nomic_bert"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_real_token(
    name: str, left: bool, exports: Callable[..., Any], seeded: Any
) -> None:
    # Positions are relative (RoPE) or counted from the first real token (RoBERTa).
    session = seeded.session(exports(name).model.path)
    padded = seeded.feed([9, 4], 12, left=left)
    hidden = session.run(None, padded)[0]
    for row, mask in enumerate(padded["attention_mask"].astype(bool)):
        alone = {key: value[row : row + 1, mask] for key, value in padded.items()}
        assert np.abs(session.run(None, alone)[0][0] - hidden[row, mask]).max() < TOLERANCE


def test_a_layer_is_forty_nodes(exports: Callable[..., Any]) -> None:
    # 172 for 4 layers, where a plain dynamo export of the native class has 277.
    graph = exports("small", outputs=("last_hidden_state",)).proto.graph
    assert len(graph.node) <= 12 + 2 * 40


def test_same_input_same_bytes_in_another_process(
    exports: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    made = exports("small").model
    code = f"""
from pathlib import Path
from jexport.recipe import ExportSpec, LoadSpec
from jexport.stages import export, load, merge
loaded = merge.run(load.run(LoadSpec(model={str(small)!r}), task="retrieval.passage"))
spec = ExportSpec(outputs=("last_hidden_state", "sentence_embedding"))
export.run(loaded, spec, precision="fp32", samples=(), out_dir=Path({str(tmp_path)!r}))
"""
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env=environment, cwd=tmp_path
    )
    for name in ("model.onnx", "model.onnx_data"):
        ours = file_digest(made.path.parent / name, root=made.path.parent)
        assert file_digest(tmp_path / name, root=tmp_path) == ours


@pytest.mark.parametrize("opset", [18, 19, 21, 22, 23])
def test_every_opset_of_a_recipe_loads_and_agrees(
    opset: int, exports: Callable[..., Any], fusions: Callable[..., Any], seeded: Any
) -> None:
    made = exports("jina", opset=opset, layers=1)
    assert {e.domain: e.version for e in made.proto.opset_import} == {"": opset}
    onnx.checker.check_model(str(made.model.path), full_check=True)
    usual = seeded.session(exports("jina", layers=1).model.path)
    plain = seeded.session(made.model.path)
    compiled = fusions("jina", opset=opset, layers=1)
    fused = seeded.session(compiled.folder / "model.onnx")
    for kind, feed in seeded.feeds().items():
        for truth, ours, theirs in zip(
            usual.run(None, feed), plain.run(None, feed), fused.run(None, feed), strict=True
        ):
            assert np.abs(ours - truth).max() < TOLERANCE, kind
            assert np.abs(theirs - truth).max() < TOLERANCE, kind
    assert compiled.facts["fused"]["MultiHeadAttention"] == 1


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max", "mean_sqrt_len"])
def test_pooling_in_the_graph_is_pooling_in_numpy(
    pooling: str, exports: Callable[..., Any], seeded: Any
) -> None:
    made = exports("bert", pooling=pooling, layers=0)
    session = seeded.session(made.model.path)
    for kind, feed in seeded.feeds().items():
        hidden, pooled = session.run(None, feed)
        truth = finish(
            pool(hidden, feed["attention_mask"], pooling), dimensions=None, normalize=True
        )
        assert np.abs(pooled - truth).max() < TOLERANCE, kind


def test_a_pooled_output_can_be_cut(exports: Callable[..., Any], seeded: Any) -> None:
    made = exports(
        "bert", outputs=("sentence_embedding",), dimension=16, matryoshka=(16, 32), layers=0
    )
    feed = seeded.feeds()["right padded"]
    (pooled,) = seeded.session(made.model.path).run(None, feed)
    hidden = seeded.torch_hidden(made.module(), feed)
    truth = finish(pool(hidden, feed["attention_mask"], "mean"), dimensions=16, normalize=True)
    assert pooled.shape == (5, 16)
    assert np.abs(pooled - truth).max() < TOLERANCE
    assert made.model.signature.outputs[0].shape == ("batch", 16)


def test_outputs_can_be_in_any_order(exports: Callable[..., Any], seeded: Any) -> None:
    made = exports("bert", outputs=("sentence_embedding", "last_hidden_state"), layers=0)
    feed = seeded.feeds()["right padded"]
    found, usual = (
        seeded.outputs(one.model.path, feed)
        for one in (made, exports("bert", pooling="mean", layers=0))
    )
    assert list(found) == ["sentence_embedding", "last_hidden_state"]
    assert all(np.array_equal(found[name], usual[name]) for name in found)


ATTENTIONS = {
    "a mask of -inf": """
        weights = query @ key.transpose(-1, -2) * (hidden // self.heads) ** -0.5
        blank = attention_mask[:, None, None, :] == 0
        mixed = weights.masked_fill(blank, float("-inf")).softmax(dim=-1) @ value
""",
    "torch's own with a bool mask": """
        mask = attention_mask[:, None, None, :].bool()
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
""",
    "torch's own, causal": """
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
""",
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_remote_class_may_mask_as_it_likes(
    kind: str, write_unknown: Callable[..., Path], seeded: Any, tmp_path: Path
) -> None:
    folder = write_unknown(tmp_path / f"graph_tests_{list(ATTENTIONS).index(kind)}")
    code = (folder / "modeling_tiny.py").read_text()
    start, end = code.index("        scores = query @"), code.index("        return states + self")
    body = (
        ATTENTIONS[kind] + "        mixed = mixed.transpose(1, 2).reshape(batch, length, hidden)\n"
    )
    (folder / "modeling_tiny.py").write_text(code[:start] + body.lstrip("\n") + code[end:])
    loaded = load.run(LoadSpec(model=str(folder), trust_remote_code=True), task="none")
    out = tmp_path / "out"
    out.mkdir()
    made = export.run(loaded, ExportSpec(), precision="fp32", samples=(), out_dir=out)
    graph = onnx.load(made.path).graph
    for tensor in graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all(), tensor.name
    assert counts(graph)["IsNaN"] == 0
    module, session = loaded.assemble({}), seeded.session(made.path)
    for shape, feed in seeded.feeds().items():
        (hidden,) = session.run(None, feed)
        assert np.isfinite(hidden).all(), shape
        real = feed["attention_mask"].astype(bool)
        if real.any():
            truth = seeded.torch_hidden(module, feed)
            assert np.abs(hidden - truth)[real].max() < TOLERANCE, shape


def test_a_reshape_between_unknown_sizes_is_not_guessed() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[N, M] x, int64[2] sizes) => (float[?, 2] y)
        <float[?, ?] turned>
        {
            turned = Transpose <perm: ints = [1, 0]> (x)
            y = Reshape (turned, sizes)
        }
        """
    )
    tidy.constant_reshapes(model.graph)
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    given = {"x": x, "sizes": np.array([12, 2])}
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, given)
    assert np.array_equal(found[0], x.T.reshape(12, 2))


def test_a_weight_of_a_layer_that_runs_three_times_has_three_names() -> None:
    """As HRM's layers leave them: a transposed copy each time that a module runs."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))
    weights = [ir.Value(name=f"val_{n}") for n in range(3)]
    nodes, value = [], x
    for weight in weights:
        weight.const_value = ir.tensor(rng.random((4, 4), dtype=np.float32), name=weight.name)
        nodes.append(ir.node("MatMul", [value, weight], name="layers.0/mlp/MatMul"))
        value = nodes[-1].outputs[0]
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 20})
    tidy._name_weights(graph)
    stem = "layers.0.mlp.weight"
    assert list(graph.initializers) == [stem, f"{stem}_T", f"{stem}_T2"]
    assert [node.inputs[1] for node in nodes] == weights
