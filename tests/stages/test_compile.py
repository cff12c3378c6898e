"""compile: check first, then build; nothing is touched but its own folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest

from jexport import targets
from jexport.artifacts.manifest import file_digest
from jexport.errors import UnsupportedGraphError
from jexport.recipe import CompileSpec
from jexport.stages import compile as compile_stage
from jexport.types import CompiledModel, OnnxModel, Signature


def digests(folder: Path) -> list[Any]:
    return [file_digest(path, root=folder) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("fuse", [True, False])
def test_the_files_are_there_and_the_input_is_as_it_was(
    fuse: bool, exported: OnnxModel, tmp_path: Path
) -> None:
    before = digests(exported.path.parent)
    out = tmp_path / "out"
    out.mkdir()
    made = compile_stage.run(exported, targets.load("onnx"), CompileSpec(fuse=fuse), out_dir=out)
    assert digests(exported.path.parent) == before
    assert sorted(made.files) == sorted(path.name for path in out.iterdir())
    assert made.folder == out
    assert made.signature.inputs == exported.signature.inputs
    assert made.signature.outputs[:1] == exported.signature.outputs
    assert [spec.name for spec in made.signature.outputs[1:]] == ["sentence_embedding"]
    assert bool(made.facts["fused"]) is fuse
    domains = {node.domain for node in onnx.load(out / made.files[0]).graph.node}
    assert domains == ({"", "com.microsoft"} if fuse else {""})


def test_a_graph_that_is_refused_is_not_built(exported: OnnxModel, tmp_path: Path) -> None:
    exported.path.write_bytes(b"not a graph")
    with pytest.raises(UnsupportedGraphError) as caught:
        compile_stage.run(exported, targets.load("onnx"), CompileSpec(), out_dir=tmp_path / "out")
    assert caught.value.exit_code == 16
    assert not (tmp_path / "out").exists()


def test_a_target_that_forgets_a_file_is_a_bug(exported: OnnxModel, tmp_path: Path) -> None:
    def forgetful(model: OnnxModel, spec: CompileSpec, out_dir: Path) -> CompiledModel:
        return CompiledModel(
            target="onnx",
            precision="fp32",
            folder=out_dir,
            files=("plan.bin",),
            signature=Signature(inputs=(), outputs=()),
            facts={},
        )

    target: targets.Target = dataclasses.replace(targets.load("onnx"), build=forgetful)
    with pytest.raises(AssertionError, match=r"plan\.bin"):
        compile_stage.run(exported, target, CompileSpec(), out_dir=tmp_path)
