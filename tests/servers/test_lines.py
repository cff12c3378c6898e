"""Lines that `jexport serve-with` prints, run as they are where `make test` has the engine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts.manifest import read
from jexport.serving import servers
from jexport.serving.servers.lines import Served
from jexport.serving.servers.ways import ENGINES

CONTENT = {
    "name": "a model",
    "target": "onnx",
    "precision": "fp32",
    "embedding": {
        "task": "retrieval.query",
        "prompt": "Query: ",
        "pooling": "mean",
        "normalize": True,
        "dimension": 64,
    },
    "engine": {"files": ["model.onnx", "model.onnx_data"], "facts": {}},
}
OPENVINO = {
    **CONTENT,
    "target": "openvino",
    "engine": {
        "files": ["openvino_model.xml"],
        "facts": {"properties": {"INFERENCE_PRECISION_HINT": "f32"}},
    },
}
WAYS = [(name, target) for name, engine in ENGINES.items() for target in engine.ways]


def in_shell(line: str, folder: Path) -> str:
    """What the line prints, with this environment's programs first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def content_for(target: str) -> dict[str, Any]:
    return OPENVINO if target == "openvino" else {**CONTENT, "target": target}


@pytest.mark.parametrize(("engine", "target"), WAYS)
def test_a_line_names_the_folder_whatever_its_name(engine: str, target: str) -> None:
    folder = Path("/models of $HOME/l'une; touch x/a\"b")
    content = content_for(target)
    line = servers.way(engine, content).line(Served(folder=folder, content=content, port=8123))
    assert "\n" not in line
    assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0
    words = shlex.split(line.replace("&&", " "))
    if words[0] == "python":
        code = words[words.index("-c") + 1]
        compile(code, "line", "exec")
        strings = [node for node in _strings(code) if str(folder) in node]
        assert strings
    else:
        assert str(folder) in words
        assert engine == "jexport" or any("8123" in word for word in words)
        assert engine == "jexport" or any("127.0.0.1" in word for word in words)


def _strings(code: str) -> list[str]:
    import ast

    return [
        node.value
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_the_line_of_onnx_runtime_runs(artifact: Path, tmp_path: Path) -> None:
    line = servers.way("onnxruntime", CONTENT).line(
        Served(folder=artifact, content=read(artifact).content)
    )
    assert in_shell(line, tmp_path).startswith("[array([[[")


def test_the_line_of_jexport_runs(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    content = read(artifact).content
    line = servers.way("jexport", content).line(Served(folder=artifact, content=content))
    assert in_shell(line, tmp_path).split() == ["vectors.npy"]
    assert (tmp_path / "vectors.npy").is_file()


def test_the_line_of_openvino_runs(cli: Callable[..., Any], small: Path, tmp_path: Path) -> None:
    quick = tmp_path / "quick.toml"
    quick.write_text('name = "small"\n[validate]\nbudget_tokens = 1\nmax_tokens = 64\n')
    built = cli(
        "build",
        "--recipe",
        quick,
        "--model",
        small,
        "--task",
        "separation",
        "--target",
        "openvino",
        "--out",
        tmp_path,
    )
    assert built.code == 0, built.err
    told = cli("serve-with", "openvino", built.path)
    assert told.code == 0
    assert "array([[[" in in_shell(told.out, tmp_path)


def test_bf16_is_pooled_in_fp32_by_sentence_transformers() -> None:
    content = {**CONTENT, "target": "hf", "precision": "bf16"}
    line = servers.way("sentence-transformers", content).line(
        Served(folder=Path("f"), content=content)
    )
    assert '"dtype": "float32"' in line


def test_the_prompt_is_asked_of_tei_by_name_only_where_there_is_one() -> None:
    one = Served(folder=Path("f"), content=CONTENT)
    assert "--default-prompt-name retrieval.query" in servers.way("tei", CONTENT).line(one)
    bare = {**CONTENT, "embedding": {**CONTENT["embedding"], "prompt": ""}}
    assert "prompt" not in servers.way("tei", bare).line(Served(folder=Path("f"), content=bare))


PROMPTED = {
    **CONTENT["embedding"],
    "task": "none",
    "prompt": "q: ",
    "prompts": {"query": "q: ", "document": "d: "},
    "default_prompt_name": "query",
    "normalize": False,
    "similarity": "dot",
    "truncate_dim": 16,
}


@pytest.mark.parametrize(("engine", "target"), WAYS)
def test_where_an_engine_does_otherwise_than_the_checkpoint_is_told(
    engine: str, target: str
) -> None:
    content = {**content_for(target), "embedding": PROMPTED}
    told = "\n".join(servers.notes(engine, content))
    assert ("d: " in told) != ("other prompts (document)" in told)
    one = servers.way(engine, content)
    assert ("16" in told) != one.cuts
    assert ("to length 1" in told) == (engine in ("tei", "vllm", "infinity"))
    line = one.line(Served(folder=Path("/m"), content=content))
    assert ("--default-prompt-name query" in line) == (engine == "tei")
    own_length = {
        "openvino-model-server": "--normalize false",
        "llama-index": "normalize=False",
        "openvino-genai": "c.normalize = False",
        "fastembed": "normalization=False",
    }
    assert own_length.get(engine, "") in line
    plain = {**content_for(target), "embedding": {**CONTENT["embedding"], "prompt": ""}}
    assert "length 1" not in "".join(servers.notes(engine, plain))
