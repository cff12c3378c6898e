"""onnxruntime's own operators: the same numbers, only where the pattern is the real thing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from jexport.graph import ort_fusion

FUSED = ("minilm", "small", "xlm_roberta", "distilbert", "electra", "albert", "nomic_bert")
LEFT_ALONE = ("mpnet", "deberta", "modernbert", "unknown")
TOLERANCE = 1e-5

COUNTS = {
    # MultiHeadAttention, RotaryEmbedding, SkipLayerNormalization, BiasGelu; for long texts
    "minilm": (6, 0, 12, 6),
    "small": (2, 4, 4, 2),
    "xlm_roberta": (2, 0, 4, 2),
    "distilbert": (2, 0, 4, 2),
    "electra": (2, 0, 4, 2),
    "albert": (2, 0, 4, 0),  # its Gelu is the tanh form
    "nomic_bert": (2, 4, 4, 0),  # gated, without biases
    "mpnet": (0, 0, 4, 2),  # a bias per position in its attention
    "deberta": (0, 0, 4, 2),
    "modernbert": (0, 0, 0, 0),  # norms before the sum
    "unknown": (0, 0, 1, 0),  # only its last sum has one user
}


@pytest.mark.parametrize("name", COUNTS)
def test_how_many_are_fused(name: str, fusions: Callable[..., Any]) -> None:
    assert tuple(fusions(name).facts["fused"].values()) == (0, 0, *COUNTS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_short_texts_get_attention_with_its_projection(
    name: str, fusions: Callable[..., Any]
) -> None:
    """Where nothing happens between the projection and the heads: no rotation."""
    expected, long = fusions(name, max_tokens=512).facts["fused"], COUNTS[name]
    packed = 0 if long[1] else long[0]
    assert tuple(expected.values()) == (0, packed, long[0] - packed, *long[1:])
    assert fusions(name, max_tokens=513).facts["fused"]["Attention"] == 0


@pytest.mark.parametrize("max_tokens", [512, 8192])
@pytest.mark.parametrize("name", [*FUSED, *LEFT_ALONE])
def test_fused_gives_what_standard_gives(
    name: str,
    max_tokens: int,
    exports: Callable[..., Any],
    fusions: Callable[..., Any],
    seeded: Any,
) -> None:
    standard = seeded.session(exports(name).model.path)
    fused = seeded.session(fusions(name, max_tokens=max_tokens).folder / "model.onnx")
    for kind, feed in seeded.feeds().items():
        for truth, ours in zip(standard.run(None, feed), fused.run(None, feed), strict=True):
            assert np.isfinite(ours).all(), kind
            # A row of padding alone sums to -10,000 and a score: what is left of a float32 there.
            assert np.abs(ours - truth).max() < (1e-3 if "empty" in kind else TOLERANCE), kind


def test_what_is_fused_is_gone(fusions: Callable[..., Any]) -> None:
    operators = fusions("small", outputs=("last_hidden_state",)).facts["operators"]
    assert not {"Softmax", "Gelu", "Neg", "Concat", "Transpose", "Reshape", "Mul"} & set(operators)
    assert operators["LayerNormalization"] == 1
    assert operators["If"] == 2


def test_names_stay_readable_and_unique(fusions: Callable[..., Any]) -> None:
    for name in FUSED:
        graph = onnx.load(fusions(name).folder / "model.onnx", load_external_data=False).graph
        inside = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
        nodes = [node.name for one in (graph, *inside) for node in one.node]
        values = [value for one in (graph, *inside) for node in one.node for value in node.output]
        assert len(set(nodes)) == len(nodes)
        assert len(set(values)) == len(values)
        assert not [value for value in (*nodes, *values) if value.startswith("val_")]


def test_sums_stay_apart_from_their_norms_unless_asked_for(exports: Callable[..., Any]) -> None:
    model = ir.load(exports("small").model.path)
    norms = sum(node.op_type == "LayerNormalization" for node in model.graph)
    counts = ort_fusion.fuse(model, skip_layer_norm=False, max_tokens=8192)
    assert tuple(counts.values()) == (0, 0, 2, 4, 0, 2)
    assert sum(node.op_type == "LayerNormalization" for node in model.graph) == norms


def test_fusing_twice_changes_nothing(fusions: Callable[..., Any]) -> None:
    model = ir.load(fusions("small").folder / "model.onnx")
    assert not any(ort_fusion.fuse(model, max_tokens=8192).values())


def change(path: Path, edit: Callable[[Any], None]) -> Any:
    model = ir.load(path)
    nodes = {str(node.name): node for node in model.graph}
    edit(nodes)
    return model


def swapped_halves(nodes: Any) -> None:
    split = nodes["layers/0/self_attn/Slice/halves"]
    first, second = split.outputs
    negative, joined = next(iter(second.consumers())), nodes["layers/0/self_attn/Concat_2"]
    negative.replace_input_with(0, first)
    joined.replace_input_with(1, second)


def later_positions(nodes: Any) -> None:
    cut = nodes["rotary_emb/Slice"]
    start, end = ir.tensor([2], name="two"), ir.tensor([2 + 17], name="end")
    for place, tensor in ((1, start), (2, end)):
        value = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape([1]))
        cut.graph.register_initializer(value)
        cut.replace_input_with(place, value)


def other_mask(nodes: Any) -> None:
    nodes["layers/0/self_attn/Add_3"].replace_input_with(1, nodes["Mul"].inputs[0])


def other_order(nodes: Any) -> None:
    back = nodes["layers/0/self_attn/Transpose_5"]
    back.attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 3, 1])


def other_axis(nodes: Any) -> None:
    softmax = nodes["layers/0/self_attn/Softmax"]
    softmax.attributes["axis"] = ir.AttrInt64("axis", 2)


@pytest.mark.parametrize(
    "edit", [swapped_halves, later_positions, other_mask, other_order, other_axis]
)
def test_another_attention_is_left_as_it_is(
    edit: Callable[[Any], None], exports: Callable[..., Any], seeded: Any, tmp_path: Path
) -> None:
    """Each edit makes layer 0 (or, for positions, both) compute something else."""
    path = exports("small", outputs=("last_hidden_state",)).model.path
    feed = seeded.feeds()["right padded"]
    changed = change(path, edit)
    ir.save(changed, tmp_path / "changed.onnx", external_data="changed.data")
    truth = seeded.outputs(tmp_path / "changed.onnx", feed)["last_hidden_state"]
    usual = seeded.outputs(path, feed)["last_hidden_state"]
    assert np.abs(truth - usual).max() > 1e-3  # the edit is felt

    model = ir.load(tmp_path / "changed.onnx")
    counts = ort_fusion.fuse(model, max_tokens=8192)
    assert counts["MultiHeadAttention"] == (0 if edit is later_positions else 1)
    ir.save(model, tmp_path / "fused.onnx", external_data="fused.data")
    fused = seeded.outputs(tmp_path / "fused.onnx", feed)["last_hidden_state"]
    assert np.abs(fused - truth).max() < TOLERANCE


def test_a_sum_that_is_used_twice_is_left_alone(
    exports: Callable[..., Any], seeded: Any, tmp_path: Path
) -> None:
    path = exports("small", outputs=("last_hidden_state",)).model.path
    model = ir.load(path)
    total = next(node for node in model.graph if node.name == "layers/0/Add")
    total.outputs[0].name = "residual"
    model.graph.outputs.append(total.outputs[0])
    assert ort_fusion.fuse(model, max_tokens=8192)["SkipLayerNormalization"] == 3
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx_data")
    feed = seeded.feeds()["right padded"]
    found = seeded.outputs(tmp_path / "model.onnx", feed)
    usual = seeded.outputs(path, feed)
    assert np.abs(found["last_hidden_state"] - usual["last_hidden_state"]).max() < TOLERANCE


MEMORY = """
import sys
from pathlib import Path
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.enable_mem_pattern = False
session = onnxruntime.InferenceSession(sys.argv[1], options)
def run(length):
    ids = np.full((1, length), 7, dtype=np.int64)
    session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    # not ru_maxrss: a child's begins at its parent's
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
print(run(64), run(4096))
"""
SCORES_KIB = 4 * 4096 * 4096 * 4 // 1024
"""Attention scores of one layer of the small checkpoint (4 heads) at 4,096 tokens: 256 MiB."""


def peak_growth_kib(path: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], check=True, capture_output=True, text=True
    )
    short, long = map(int, done.stdout.split())
    return long - short


def test_a_long_text_takes_no_square_of_memory(
    exports: Callable[..., Any], fusions: Callable[..., Any]
) -> None:
    assert peak_growth_kib(exports("small").model.path) > SCORES_KIB  # the measurement sees it
    assert peak_growth_kib(fusions("small").folder / "model.onnx") < SCORES_KIB / 2


def test_a_fused_model_opens_through_a_link(
    fusions: Callable[..., Any], seeded: Any, tmp_path: Path
) -> None:
    link = tmp_path / "latest"
    link.symlink_to(fusions("small").folder, target_is_directory=True)
    assert seeded.session(link / "model.onnx").get_outputs()


def test_residual_sums_are_fused_only_on_request(exports: Callable[..., Any]) -> None:
    model = ir.load(exports("small").model.path)
    counts = ort_fusion.fuse(model, skip_layer_norm=False, max_tokens=8192)
    assert counts["SkipLayerNormalization"] == 0
    assert counts["MultiHeadAttention"] == 2
    assert sum(n.op_type == "LayerNormalization" for n in model.graph) == 5
