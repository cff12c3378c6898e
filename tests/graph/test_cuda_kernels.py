"""The table of CUDA kernels, the rules of placement, and where the nodes of our graphs go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as bindings

from jexport.graph import cuda_kernels, cuda_ready, pooled_output
from jexport.recipe import CompileSpec
from jexport.targets import onnx as target

HIDDEN = "last_hidden_state"
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len", "weightedmean", "last")
ENCODERS = (
    "minilm",
    "small",
    "xlm_roberta",
    "distilbert",
    "electra",
    "albert",
    "nomic_bert",
    "mpnet",
    "deberta",
    "modernbert",
)
USUAL = ("minilm", "small", "modernbert")
"""Those of every run; a graph of each of the others once a week."""


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", cuda_kernels.KERNELS)
def test_every_operator_and_version_exists(operator: str) -> None:
    """Against the schemas of onnx and of the installed onnxruntime, not against our own reading."""
    domain, _, name = operator.rpartition(".")
    kernel = cuda_kernels.KERNELS[operator]
    if domain:
        known = {(one.domain, one.name) for one in bindings.get_all_operator_schema()}
        assert (domain, name) in known
        assert kernel.versions == ((1, 1),)
        return
    history = {
        s.since_version: s
        for s in onnx.defs.get_all_schemas_with_history()
        if (s.domain, s.name) == ("", name)
    }
    assert {version for span in kernel.versions for version in span[:1]} <= {*history, 14, 15}
    newest = history[max(version for version in history if version <= kernel.versions[-1][1])]
    places = [*kernel.host_inputs]
    assert all(place < len(newest.inputs) for place in places), operator
    assert all(place < len(newest.outputs) for place in kernel.host_outputs), operator


def placed(text: str, opset: int = 20) -> cuda_kernels.Placement:
    """A graph in ONNX's own text form, its types inferred by ONNX, placed."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(f"{header}\n{text}"))
    return cuda_kernels.place(ir.from_proto(proto))


@pytest.mark.parametrize(("opset", "found"), [(18, 0), (19, 0), (20, 1)])
def test_a_kernel_is_of_one_version_of_its_operator(opset: int, found: int) -> None:
    """ReduceMax became another operator at opset 20: a kernel of version 18 does not take it."""
    text = "encoder (float[b, s] x) => (float y) { y = ReduceMax <keepdims = 0> (x) }"
    assert len(placed(text, opset).cpu) == found


def test_a_type_without_a_kernel_runs_on_the_cpu_and_is_copied() -> None:
    found = placed("""encoder (float[b, s] x) => (float[b, s] y) {
        [narrow] n = Cast <to = 5> (x)
        [abs] a = Abs (n)
        [wide] w = Cast <to = 1> (a)
        [half] h = Abs (x)
        [end] y = Add (w, h)
    }""")  # int16
    assert found.cpu == ("Abs (abs)", "Cast (wide)")
    assert set(found.copies) == {"n", "w"}
    assert not found.capturable


def test_what_computes_on_shapes_goes_to_the_cpu_and_is_not_copied() -> None:
    found = placed("""encoder (float[b, s] x) => (float[n] y)
            <int64[1] zero = {0}, int64 one = {1}> {
        [shape] shape = Shape (x)
        [first] first = Gather (shape, zero)
        [size] size = Mul (first, one)
        [flat] y = Reshape (x, size)
    }""")
    assert found.shapes == ("Gather (first)", "Mul (size)")
    assert (found.cpu, found.copies) == ((), ())
    assert found.capturable


def test_numbers_of_a_shape_that_meet_tensors_are_copied() -> None:
    found = placed("""encoder (float[b, s] x) => (float[b, s] y) <int64[1] zero = {0}> {
        [shape] shape = Shape (x)
        [first] first = Gather (shape, zero)
        [number] number = Cast <to = 1> (first)
        [positive] p = Abs (x)
        [scaled] y = Mul (p, number)
    }""")
    assert found.shapes == ("Gather (first)", "Cast (number)")
    assert found.copies == ("number",)


def test_a_condition_that_is_made_on_the_gpu_is_copied() -> None:
    found = placed("""encoder (float x) => (float y) {
        [test] test = Cast <to = 9> (x)
        [choice] y = If (test) <
            then_branch = g1 () => (float a) { [yes] a = Abs (x) },
            else_branch = g2 () => (float b) { [no] b = Neg (x) }>
    }""")
    assert (found.cpu, found.copies, found.control_flow) == ((), ("test",), ("If (choice)",))


# --- our graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_pooling_stays_on_the_gpu(opset: int, pooling: str, exports: Callable[..., Any]) -> None:
    model = ir.load(exports("bert", outputs=(HIDDEN,), layers=1, opset=opset).model.path)
    before = cuda_kernels.place(model)
    assert pooled_output.append(model, pooling, normalize=True)
    after = cuda_kernels.place(model)
    assert (after.cpu, after.copies) == (before.cpu, before.copies)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in USUAL else pytest.mark.rare) for name in ENCODERS],
)
@pytest.mark.parametrize("max_tokens", [512, 8192])
def test_an_artifact_runs_on_the_gpu_alone(
    max_tokens: int, name: str, precision: str, exports: Callable[..., Any], tmp_path: Path
) -> None:
    """For long texts attention's branch is chosen on the host: one scalar is copied, once a run."""
    model = replace(exports(name, precision, outputs=(HIDDEN,)).model, max_tokens=max_tokens)
    compiled = target.build(model, CompileSpec(), tmp_path)
    found = cuda_kernels.place(ir.load(compiled.folder / "model.onnx"))
    branches = bool(found.control_flow)
    assert found.cpu == ()
    assert found.copies == (("whole",) if branches else ())


# --- cuda_ready ---------------------------------------------------------------------------------

REWRITTEN = {
    "largest": "y = ReduceMax <keepdims = 0> (x, axis)",
    "largest kept": "y = ReduceMax (x, axis)",
    "smallest": "y = ReduceMin <keepdims = 0> (x, axis)",
    "equal": "e = Equal (x, two) y = Cast <to = 1> (e)",
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_has_no_kernel_is_rewritten_and_gives_the_same(name: str) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        encoder (float[b, s, w] x) => (float[] y) <int64[1] axis = {{1}}, float two = {{2.0}}>
        {{ {REWRITTEN[name]} }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert cuda_kernels.place(model).cpu
    assert sum(cuda_ready.rewrite(model).values()) == 1
    assert cuda_kernels.place(model).cpu == ()
    feed = {"x": np.random.default_rng(3).integers(-3, 4, (2, 5, 3)).astype(np.float32)}
    feed["x"][1, 2, 0] = np.inf
    before, after = (
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        for one in (proto, ir.to_proto(model))
    )
    np.testing.assert_array_equal(before.run(None, feed)[0], after.run(None, feed)[0])
