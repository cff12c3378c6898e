"""`jexport serve-with`: one line on stdout, everything else beside it, and clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest

SERVING, CHANGED = 32, 13


def test_one_line_and_what_to_know_beside_it(cli: Callable[..., Any], artifact: Path) -> None:
    answer = cli("serve-with", "infinity", artifact, "--port", 9001)
    assert answer.code == 0
    assert answer.out == (
        f"cd {artifact} && INFINITY_HOME=~ infinity_emb v2 --model-id . --engine optimum "
        "--device cpu --pooling-method mean --onnx-disable-optimize --host 127.0.0.1 --port 9001\n"
    )
    assert "needs infinity-emb >=0.0.78" in answer.err
    assert "put there yourself: 'Represent the query for retrieving evidence doc" in answer.err
    assert cli("serve-with", "infinity", artifact, "--quiet").err == ""


def test_a_relative_folder_becomes_one_that_works_from_anywhere(
    cli: Callable[..., Any], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifact.parent)
    assert str(artifact) in cli("serve-with", "infinity", artifact.name).out


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vlm", ["no engine is called 'vlm'", "did you mean 'vllm'?"]),
        ("vllm", ["vLLM does not load artifacts of the target 'onnx'", "--target vllm"]),
        ("transformers", ["does not load artifacts of the target 'onnx'", "--target hf"]),
    ],
)
def test_an_engine_that_cannot(
    cli: Callable[..., Any], artifact: Path, engine: str, words: list[str]
) -> None:
    answer = cli("serve-with", engine, artifact)
    assert (answer.code, answer.out) == (SERVING, "")
    for word in words:
        assert word in answer.err


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ("transformers==5.5.4", SERVING, "versions that do: >=4.36,<4.58"),
        ("transformers==4.57.6", 0, ""),
        ("sentence-transformers==6.2.0", SERVING, "versions that do: >=3.2,<6"),
        ("sentence-transformers==new", SERVING, "'new' is no version"),
        ("torch==2.0", SERVING, "it depends on: sentence-transformers, optimum-onnx, transformers"),
        ("sentence-transformers", 2, "is not like vllm==0.32.0"),
    ],
)
def test_versions_of_what_is_installed_there(
    cli: Callable[..., Any], artifact: Path, given: str, code: int, words: str
) -> None:
    answer = cli("serve-with", "sentence-transformers", artifact, "--version", given)
    assert answer.code == code
    assert words in answer.err
    assert bool(answer.out) == (code == 0)


def test_versions_for_jina_and_for_others(cli: Callable[..., Any], artifact_copy: Path) -> None:
    """A merged jina-embeddings-v3 needs transformers 5.4; a merged BERT does not."""
    from jexport.serving import servers

    content = dict(manifest.read(artifact_copy).content)
    for kind, known in (("jina_embeddings_v3", {"transformers": ">=5.4"}), ("bert", {})):
        content |= {"target": "hf", "engine": {"facts": {"model_type": kind}}}
        assert servers.versions("transformers", content) == known


def test_an_edited_folder_is_refused(cli: Callable[..., Any], artifact_copy: Path) -> None:
    with (artifact_copy / "config.json").open("a") as stream:
        stream.write(" ")
    answer = cli("serve-with", "onnxruntime", artifact_copy)
    assert (answer.code, answer.out) == (CHANGED, "")
    assert "config.json" in answer.err


def test_pooling_that_an_engine_lacks(
    cli: Callable[..., Any], artifact: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "max"))
    content = json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))
    content["embedding"]["pooling"] = "max"
    content["sha256"] = manifest.seal(content)
    manifest.write_json(folder / manifest.NAME, content)
    answer = cli("serve-with", "fastembed", folder)
    assert answer.code == SERVING
    assert "pools 'max', fastembed: mean, cls" in answer.err
