"""Graph steps for CUDA: the same numbers, by onnxruntime's kernels where this machine has them.

Right padding only: the steps say that they need it.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from jexport.errors import UnsupportedGraphError
from jexport.graph import cuda_attention, cuda_kernels, cuda_steps, edit, ort_fusion
from jexport.recipe import CUDA_STEPS, CompileSpec, ExportSpec
from jexport.runtime.pool import pool
from jexport.stages import export
from jexport.targets import onnx as onnx_target

HIDDEN, POOLED = "last_hidden_state", "sentence_embedding"
TOLERANCE = 1e-5
MS = "com.microsoft"
ENCODERS = ("minilm", "small", "gated")
CUDA_ONLY = ("packed_attention",)
"""Steps whose operators have no CPU kernel."""


@pytest.fixture(scope="session")
def reference() -> Any:
    """tests/graph/cuda_reference.py."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("cuda_reference.py"))))


@pytest.fixture(scope="session")
def encoders(
    exports: Callable[..., Any], seeded: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`encoders("small", "fp16")`: a standard graph whose heads CUDA's kernels take.

    "gated": nomic_bert with rotations, a gated MLP and no biases, its heads of 16 numbers.
    """
    made: dict[str, Any] = {}

    def standard(name: str, precision: str) -> Any:
        if name != "gated":
            return exports(name, precision).model
        if precision not in made:
            loaded = seeded.as_loaded(partial(seeded.build, "nomic_bert", hidden_size=64))
            made[precision] = export.run(
                replace(loaded, embedding=replace(loaded.embedding, dimension=64)),
                ExportSpec(outputs=(HIDDEN, POOLED)),
                precision=precision,
                samples=[[0, *range(5, 45), 2]],
                out_dir=tmp_path_factory.mktemp(f"gated-{precision}"),
            )
        return made[precision]

    return standard


@pytest.fixture(scope="session")
def rewritten(
    encoders: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`rewritten("small", "fp16", "fast_gelu")`: that graph with these steps, made once."""
    made: dict[Any, Any] = {}

    def rewrite_once(name: str, precision: str, *steps: str) -> Any:
        key = (name, precision, steps)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{precision}-cuda")
            model = replace(encoders(name, precision), max_tokens=8192)
            made[key] = onnx_target.build(model, CompileSpec(cuda=steps), folder)
        return made[key]

    return rewrite_once


@pytest.fixture(scope="session")
def right_padded(seeded: Any) -> dict[str, dict[str, np.ndarray]]:
    """Batches that are padded on the right, or not at all."""
    return {
        kind: feed
        for kind, feed in seeded.feeds().items()
        if "left" not in kind and "empty" not in kind
    }


def graph_of(compiled: Any) -> ir.Model:
    return ir.load(compiled.folder / "model.onnx")


def operators(compiled: Any) -> list[str]:
    return [node.op_type for node in graph_of(compiled).graph]


def counted(compiled: Any) -> dict[str, int]:
    steps: dict[str, int] = compiled.facts["cuda"]["steps"]
    return steps


def lowest_cosine(found: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> float:
    vectors = [v if v.ndim == 2 else pool(v, mask, "mean") for v in (found, wanted)]
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    return float((a * b).sum(axis=1).min())


# --- which there are ------------------------------------------------------------------------------


def test_a_recipe_knows_the_steps_that_there_are() -> None:
    assert cuda_steps.names() == CUDA_STEPS


def test_all_stands_for_every_one_and_order_means_nothing() -> None:
    usual = tuple(step for step in CUDA_STEPS if step not in CUDA_ONLY)
    assert cuda_steps.expand(["all"]) == usual
    assert cuda_steps.expand(["all", *CUDA_ONLY]) == CUDA_STEPS
    assert cuda_steps.expand(CUDA_STEPS[::-1]) == CUDA_STEPS
    assert cuda_steps.expand([]) == ()


@pytest.mark.parametrize(
    ("name", "precision", "wanted"),
    [
        # half_rotary, half_residual, skip_layer_norm, fast_gelu, split_projection,
        # packed_attention, efficient_attention
        ("minilm", "fp32", (0, 0, 12, 6, 6, 6, 6)),
        ("minilm", "fp16", (0, 12, 12, 6, 6, 6, 6)),
        ("small", "fp32", (0, 0, 4, 2, 2, 2, 2)),
        ("small", "fp16", (4, 4, 4, 2, 2, 2, 2)),
        ("gated", "fp16", (4, 4, 4, 0, 4, 2, 2)),  # gate and up are one product, too
    ],
)
def test_how_many_places_each_step_changes(
    name: str, precision: str, wanted: tuple[int, ...], encoders: Callable[..., Any]
) -> None:
    found = []
    for step in cuda_steps.names():
        model = ir.load(encoders(name, precision).path)
        ort_fusion.fuse(model, skip_layer_norm=False, max_tokens=8192)
        found.append(cuda_steps.apply(model, [step])[step])
    assert tuple(found) == wanted


def test_heads_that_no_fused_kernel_takes_are_left_alone(
    exports: Callable[..., Any], tmp_path: Path
) -> None:
    """Those of the seeded models have 12 numbers; the kernels want a multiple of 8."""
    model = exports("xlm_roberta").model
    graph = ir.load(model.path)
    ort_fusion.fuse(graph, skip_layer_norm=False, max_tokens=8192)
    steps = ["packed_attention", "efficient_attention"]
    assert cuda_steps.apply(graph, steps) == dict.fromkeys(steps, 0)
    assert "RemovePadding" not in [node.op_type for node in graph.graph]
    with pytest.raises(UnsupportedGraphError, match="nothing in this graph"):
        onnx_target.build(model, CompileSpec(cuda=tuple(steps)), tmp_path)


# --- numbers, by onnxruntime's kernels ------------------------------------------------------------


@pytest.mark.parametrize("step", ["skip_layer_norm", "split_projection", "efficient_attention"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_exact_step_gives_what_standard_gives(
    name: str,
    step: str,
    encoders: Callable[..., Any],
    rewritten: Callable[..., Any],
    right_padded: Any,
    seeded: Any,
) -> None:
    standard = seeded.session(encoders(name, "fp32").path)
    ours = seeded.session(rewritten(name, "fp32", step).folder / "model.onnx")
    for kind, feed in right_padded.items():
        real = feed["attention_mask"].astype(bool)
        truth, found = standard.run(None, feed), ours.run(None, feed)
        assert np.abs(found[0] - truth[0])[real].max() < TOLERANCE, kind
        assert np.abs(found[1] - truth[1]).max() < TOLERANCE, kind


def test_fast_gelu_is_another_formula_and_near(
    encoders: Callable[..., Any], rewritten: Callable[..., Any], right_padded: Any, seeded: Any
) -> None:
    standard = seeded.session(encoders("minilm", "fp32").path)
    ours = seeded.session(rewritten("minilm", "fp32", "fast_gelu").folder / "model.onnx")
    feed = right_padded["right padded"]
    truth, found = standard.run([HIDDEN], feed)[0], ours.run([HIDDEN], feed)[0]
    real = feed["attention_mask"].astype(bool)
    assert 1e-4 < np.abs(found - truth)[real].max() < 1e-2
    assert lowest_cosine(found, truth, feed["attention_mask"]) > 0.99999


HALVED = [
    ("half_rotary",),
    ("half_residual",),
    ("half_residual", "skip_layer_norm"),
    tuple(step for step in CUDA_STEPS if step not in CUDA_ONLY),
]


@pytest.mark.parametrize(
    ("name", "steps"),
    [("small", steps) for steps in HALVED] + [("minilm", steps) for steps in HALVED[1:]],
)
def test_float16_stays_near(
    name: str,
    steps: tuple[str, ...],
    encoders: Callable[..., Any],
    rewritten: Callable[..., Any],
    right_padded: Any,
    seeded: Any,
) -> None:
    standard = seeded.session(encoders(name, "fp32").path)
    ours = seeded.session(rewritten(name, "fp16", *steps).folder / "model.onnx")
    for kind, feed in right_padded.items():
        for truth, found in zip(standard.run(None, feed), ours.run(None, feed), strict=True):
            assert found.dtype == np.float32
            assert lowest_cosine(found, truth, feed["attention_mask"]) > 0.9999, kind


# --- what a step leaves behind --------------------------------------------------------------------


def test_no_float32_lies_between_the_products(rewritten: Callable[..., Any]) -> None:
    compiled = rewritten("small", "fp16", "half_rotary", "half_residual", "skip_layer_norm")
    nodes = list(graph_of(compiled).graph)
    first = next(n for n, node in enumerate(nodes) if node.op_type == "MatMul")
    last = max(n for n, node in enumerate(nodes) if node.op_type == "SkipLayerNormalization")
    kinds = {value.dtype for node in nodes[first : last + 1] for value in node.outputs}
    assert kinds == {ir.DataType.FLOAT16}
    assert "RotaryEmbedding" in [node.op_type for node in nodes[first:last]]


def test_norms_are_told_to_sum_in_float32(rewritten: Callable[..., Any]) -> None:
    strict = {"enable_skip_layer_norm_strict_mode": "1"}
    told = rewritten("small", "fp16", "skip_layer_norm").facts["cuda"]["provider_options"]
    assert told == strict
    assert not rewritten("small", "fp16", "fast_gelu").facts["cuda"]["provider_options"]


def test_lengths_take_the_place_of_mask_and_branches(rewritten: Callable[..., Any]) -> None:
    compiled = rewritten("small", "fp32", "efficient_attention")
    graph = graph_of(compiled).graph
    assert "If" not in operators(compiled)
    masks = {node.inputs[4] for node in graph if node.op_type == "MultiHeadAttention"}
    assert [value.name for value in masks if value is not None] == ["starts"]


def test_starts_are_as_onnxruntime_reads_them(
    rewritten: Callable[..., Any], seeded: Any, tmp_path: Path
) -> None:
    """[3 * batch + 2]: lengths, then where queries begin and end, and where keys do.

    The CPU kernel reads the lengths alone (docs: key_padding_mask of MultiHeadAttention).
    """
    model = graph_of(rewritten("small", "fp32", "efficient_attention"))
    starts = next(node for node in model.graph if node.name == "starts")
    model.graph.outputs.append(starts.outputs[0])
    ir.save(model, tmp_path / "model.onnx", external_data="data")
    feed = seeded.feed([7, 3, 5], 9)
    found = seeded.outputs(tmp_path / "model.onnx", feed)["starts"]
    assert found.dtype == np.int32
    assert found.tolist() == [7, 3, 5, 0, 9, 18, 27, 0, 9, 18, 27]


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps", [CUDA_ONLY, ("skip_layer_norm", "split_projection", *CUDA_ONLY)], ids=" ".join
)
@pytest.mark.parametrize("name", ENCODERS)
def test_packed_gives_what_standard_gives(
    name: str,
    steps: tuple[str, ...],
    encoders: Callable[..., Any],
    rewritten: Callable[..., Any],
    reference: Any,
    right_padded: Any,
    seeded: Any,
) -> None:
    compiled = rewritten(name, "fp32", *steps)
    standard = seeded.session(encoders(name, "fp32").path)
    ours = reference.evaluator(compiled.folder / "model.onnx")
    kinds = ("right padded", "nothing padded", "one token")
    for kind in kinds[: 1 if name == "minilm" else 3]:  # ONNX's reference is slow
        feed = right_padded[kind]
        real = feed["attention_mask"].astype(bool)
        truth, found = standard.run(None, feed), ours.run(None, feed)
        assert np.abs(found[0] - truth[0])[real].max() < TOLERANCE, kind
        assert np.abs(found[1] - truth[1]).max() < TOLERANCE, kind
        assert not found[0][~real].any()  # padding is zeros, not what a norm makes of nothing


@pytest.mark.parametrize("name", ["small", "gated"])
def test_all_steps_together_stay_near(
    name: str,
    encoders: Callable[..., Any],
    rewritten: Callable[..., Any],
    reference: Any,
    right_padded: Any,
    seeded: Any,
) -> None:
    standard = seeded.session(encoders(name, "fp32").path)
    ours = reference.evaluator(rewritten(name, "fp16", "all", *CUDA_ONLY).folder / "model.onnx")
    feed = right_padded["right padded"]
    for truth, found in zip(standard.run(None, feed), ours.run(None, feed), strict=True):
        assert found.dtype == np.float32
        assert lowest_cosine(found, truth, feed["attention_mask"]) > 0.9999


CONVERT = """
import sys
import onnx
import onnxruntime.transformers  # its modules import each other by their bare names
from onnxruntime.transformers.convert_to_packing_mode import PackingMode
from onnxruntime.transformers.onnx_model import OnnxModel
model = OnnxModel(onnx.load(sys.argv[1]))
PackingMode(model).convert(use_symbolic_shape_infer=False)
model.topological_sort()
onnx.save(model.model, sys.argv[2])
"""


def test_our_reading_of_the_operators_is_that_of_onnxruntimes_own_converter(
    exports: Callable[..., Any], reference: Any, right_padded: Any, seeded: Any, tmp_path: Path
) -> None:
    """It packs a graph of Attention nodes that have lengths as their mask."""
    path = exports("xlm_roberta").model.path
    model = ir.load(path)
    ort_fusion.fuse(model, max_tokens=512)
    work = edit.Edit(model.graph)
    real = cuda_attention.lengths(work)
    for node in model.graph:
        if node.op_type == "Attention":
            node.replace_input_with(3, real)
    model.graph.sort()
    ir.save(model, tmp_path / "lengths.onnx", external_data="lengths.data")
    subprocess.run(
        [sys.executable, "-c", CONVERT, tmp_path / "lengths.onnx", tmp_path / "packed.onnx"],
        check=True,
    )
    kinds = [node.op_type for node in onnx.load(tmp_path / "packed.onnx").graph.node]
    assert kinds.count("PackedAttention") == 2
    assert {"RemovePadding", "RestorePadding"} <= set(kinds)
    feed = right_padded["right padded"]
    real_tokens = feed["attention_mask"].astype(bool)
    truth = seeded.outputs(path, feed)[HIDDEN]
    found = reference.evaluator(tmp_path / "packed.onnx").run([HIDDEN], feed)[0]
    assert np.abs(found - truth)[real_tokens].max() < TOLERANCE


def test_places_start_anew_in_each_text(
    rewritten: Callable[..., Any], reference: Any, seeded: Any, tmp_path: Path
) -> None:
    """A rotation by places that go on would give the same scores, until the tables end."""
    model = graph_of(rewritten("small", "fp32", *CUDA_ONLY))
    places = next(node for node in model.graph if node.name == "packed/positions")
    model.graph.outputs.append(places.outputs[0])
    ir.save(model, tmp_path / "model.onnx", external_data="data")
    found = reference.evaluator(tmp_path / "model.onnx").run(None, seeded.feed([4, 1, 3], 5))
    assert found[-1].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]


def test_all_can_be_captured_as_a_cuda_graph(rewritten: Callable[..., Any]) -> None:
    assert cuda_kernels.place(graph_of(rewritten("small", "fp16", "all"))).capturable
    assert "RemovePadding" not in operators(rewritten("small", "fp16", "all"))


def test_layers_run_on_tokens_alone(rewritten: Callable[..., Any]) -> None:
    model = onnx.load(rewritten("small", "fp32", *CUDA_ONLY).folder / "model.onnx")
    shapes = {
        info.name: [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in model.graph.value_info
    }
    products = [node.output[0] for node in model.graph.node if node.op_type == "MatMul"]
    layers = [name for name in products if name.startswith("layers/")]
    assert len(layers) == 8
    assert not {"Split", "If"} & set(
        operators(rewritten("small", "fp32", "split_projection", *CUDA_ONLY))
    )
    assert all(shapes[name][0] == "tokens" and len(shapes[name]) == 2 for name in layers)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_onnxruntime_takes_the_graph_and_lacks_only_the_kernels(
    name: str, precision: str, rewritten: Callable[..., Any], seeded: Any
) -> None:
    """Operators, attributes, types and shapes are checked before a kernel is looked for."""
    path = rewritten(name, precision, "all", *CUDA_ONLY).folder / "model.onnx"
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented) as caught:
        seeded.session(path)
    assert "Could not find an implementation for Re" in str(caught.value)


@pytest.mark.parametrize("broken", ["attribute", "type"])
def test_onnxruntime_would_have_seen_a_wrong_graph(
    broken: str, rewritten: Callable[..., Any], seeded: Any, tmp_path: Path
) -> None:
    """Guards the test above."""
    model = graph_of(rewritten("small", "fp32", *CUDA_ONLY))
    node = next(node for node in model.graph if node.op_type == "PackedMultiHeadAttention")
    if broken == "attribute":
        del node.attributes["num_heads"]
    else:
        node.replace_input_with(4, model.graph.inputs[1])  # int64
    ir.save(model, tmp_path / "model.onnx", external_data="data")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        seeded.session(tmp_path / "model.onnx")
    assert "NOT_IMPLEMENTED" not in str(caught.value)


# --- where its nodes run --------------------------------------------------------------------------

ATTENTIONS = ("packed_attention", "efficient_attention")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ENCODERS)
def test_nothing_runs_on_the_cpu_and_nothing_is_copied(
    name: str, attention: str, precision: str, rewritten: Callable[..., Any]
) -> None:
    others = [step for step in CUDA_STEPS if step not in ATTENTIONS]
    found = cuda_kernels.place(graph_of(rewritten(name, precision, *others, attention)))
    assert (found.cpu, found.copies, found.control_flow) == ((), (), ())
