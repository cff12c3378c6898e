"""Architectures that are traced another way, or refused by name, and never end in a traceback.

`make sweep` does this for every text model of the installed transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.errors import UnsupportedGraphError
from jexport.graph import probe
from jexport.recipe import ExportSpec, LoadSpec
from jexport.stages import export, load

TINY = Path(__file__).parents[1] / "sweep" / "tiny.py"


@pytest.fixture
def loaded(imported: Callable[[Path], Any], tmp_path: Path) -> Callable[[str], Any]:
    """`loaded("gpt2")`: a seeded tiny checkpoint of that model type, opened."""

    def opened(model_type: str) -> Any:
        imported(TINY).make(model_type, tmp_path / model_type)
        return load.run(LoadSpec(model=str(tmp_path / model_type)), task="none")

    return opened


@pytest.mark.parametrize(
    ("model_type", "additive"),
    [
        ("bert", True),
        ("roberta", True),
        ("mpnet", True),
        ("modernbert", True),
        ("gpt2", False),
        ("deberta-v2", False),
    ],
)
def test_what_is_traced_is_the_model(
    model_type: str, additive: bool, loaded: Callable[[str], Any]
) -> None:
    """gpt2's module has the bidirectional mask as well, and its own is causal."""
    model = loaded(model_type)
    encoder = export._encoder(model, ExportSpec())
    assert encoder.additive_mask is additive
    module = model.assemble(model.weights)
    texts = probe.of(module, max_tokens=model.embedding.max_tokens)
    assert probe.agrees(encoder, texts, probe.own_states(module, texts))


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("fnet", "FNetModel gives the same text other vectors beside longer texts"),
        ("nystromformer", "NystromformerModel gives the same text other vectors beside longer"),
        ("dpr", "DPRQuestionEncoder gives no hidden state for each token"),
    ],
)
def test_no_vector_of_its_own(model_type: str, what: str, loaded: Callable[[str], Any]) -> None:
    with pytest.raises(UnsupportedGraphError, match=what) as caught:
        export._encoder(loaded(model_type), ExportSpec())
    assert caught.value.exit_code == 16


def test_what_the_exporter_cannot_do_is_named(loaded: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedGraphError, match="XLNetModel cannot be exported") as caught:
        export.run(loaded("xlnet"), ExportSpec(), precision="fp32", samples=(), out_dir=tmp_path)
    assert "modeling_xlnet.py line" in caught.value.evidence
    assert "aten::sub" in caught.value.evidence
    assert "--target hf" in caught.value.fix
    assert caught.value.__cause__ is not None
    assert len(str(caught.value).splitlines()) < 12


@pytest.mark.parametrize("axis", [0, 1])
def test_a_shape_that_the_trace_made_a_constant(axis: int) -> None:
    """As of mamba, whose scan is unrolled over the length that it was traced with."""
    import onnx_ir as ir

    def model(*sizes: int | str) -> Any:
        ids = ir.Value(name="input_ids", shape=ir.Shape(sizes))
        return ir.Model(ir.Graph([ids], [], nodes=[], opset_imports={"": 20}), ir_version=10)

    free: list[int | str] = ["batch", "sequence"]
    export._check_free(model(*free), "X")
    free[axis] = 16
    with pytest.raises(UnsupportedGraphError, match="X cannot be exported") as caught:
        export._check_free(model(*free), "X")
    assert f"input_ids: {export.AXES[axis]} is 16" in caught.value.evidence
