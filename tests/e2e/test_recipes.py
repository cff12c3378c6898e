"""Which recipe a command means, and that what is shipped builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest


def test_the_shipped_jina_recipe_builds(
    small: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    answer = cli(
        "build",
        "--recipe",
        "jina-embeddings-v3",
        "--model",
        small,
        "--task",
        "text-matching",
        "--target",
        "onnx",
        "--out",
        tmp_path,
        "--validate-tokens",
        64,
    )
    assert answer.code == 0, answer.err
    content = manifest.verify(answer.path).content
    assert answer.path.relative_to(tmp_path).parts[0] == "jina-embeddings-v3"
    assert content["version"].startswith("1.0.0-")
    assert content["licence"] == "CC-BY-NC-4.0"
    assert content["checkpoint"]["name"] == small.name
    assert content["recipe"]["load"]["model"] == small.name
    report = json.loads((answer.path / "parity.json").read_text())
    assert len(report["metrics"]["by_language"]) >= 30
    assert report["gates"]["cosine_min"] == 0.99999


def test_the_shipped_minilm_recipe_builds(minilm_artifact: Path) -> None:
    content = manifest.verify(minilm_artifact).content
    assert content["name"] == "all-MiniLM-L6-v2"
    assert content["version"].startswith("1.0.0-")


@pytest.mark.parametrize("words", [(), ("--recipe", "jina-embeddings-v3")])
def test_without_recipe_and_model_the_jina_recipe_is_meant(
    words: tuple[str, ...], cli: Callable[..., Any], nothing_left: Path
) -> None:
    """There is no hub here: one clear error that says what was asked for and what to do."""
    command = ("build", *words, "--target", "onnx", "--out", nothing_left)
    answer = cli(*command, "--task", "retrieval.passage")
    assert (answer.code, answer.out) == (18, "")
    assert "jinaai/jina-embeddings-v3" in answer.err
    assert "--model FOLDER" in answer.err
    assert "Traceback" not in answer.err
    assert cli(*command, "--task", "none").code == 18
    mistyped = cli(*command, "--task", "retrieval.pasage")
    assert mistyped.code == 3
    assert "did you mean 'retrieval.passage'?" in mistyped.err


def test_the_name_of_a_recipe_is_all_that_is_needed(
    cli: Callable[..., Any], nothing_left: Path
) -> None:
    """One task, so none is asked for; what is missing here is a hub to fetch the model from."""
    words = ("--target", "openvino", "--precision", "int8", "--out", nothing_left)
    answer = cli("build", "--recipe", "bge-m3", *words)
    assert (answer.code, answer.out) == (18, "")
    assert "BAAI/bge-m3" in answer.err
    assert "--model FOLDER" in answer.err
    assert "Traceback" not in answer.err
    mistyped = cli("build", "--recipe", "bge_m3", *words)
    assert mistyped.code == 5
    assert "did you mean 'bge-m3'?" in mistyped.err
    several = cli("build", "--recipe", "jina-embeddings-v3", *words)
    assert "retrieval.query" in several.err


def test_a_recipe_file(small: Path, cli: Callable[..., Any], canned: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\nversion = "7"\n[load]\nmodel = "{small}"\n')
    words = ("build", "--recipe", path, "--task", "separation", "--target", "onnx")
    answer = cli(*words, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert answer.path.relative_to(tmp_path / "out").parts[0] == "mine"
    assert answer.path.name.startswith("7-")


def test_a_recipe_file_of_other_tasks_is_asked_for_them(
    small_copy: Path, cli: Callable[..., Any], nothing_left: Path, tmp_path: Path
) -> None:
    """A recipe without a list of tasks leaves them to the checkpoint, whatever they are called."""
    config = json.loads((small_copy / "config.json").read_text())
    config["lora_adaptations"] = ["my.task", *config["lora_adaptations"][1:]]
    config["task_instructions"] = {"my.task": "p: "}
    (small_copy / "config.json").write_text(json.dumps(config))
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\n[load]\nmodel = "{small_copy}"\n')
    words = ("build", "--recipe", path, "--target", "onnx", "--out", nothing_left)
    answer = cli(*words, "--task", "my.tusk")
    assert answer.code == 3
    assert "did you mean 'my.task'?" in answer.err


def test_the_recipes_first_precision_is_the_default(
    small: Path, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jexport.building import pipeline

    asked: list[str] = []

    class Stop(Exception):
        pass

    def build(*_: Any, precision: str, **__: Any) -> None:
        asked.append(precision)
        raise Stop

    monkeypatch.setattr(pipeline, "build", build)
    path = tmp_path / "half.toml"
    path.write_text('name = "half"\nprecisions = ["fp16", "fp32"]\n')
    words = ("build", "--model", small, "--task", "none", "--target", "onnx")
    for more in (("--recipe", path), ("--recipe", path, "--precision", "fp32"), ()):
        with pytest.raises(Stop):
            cli(*words, *more)
    assert asked == ["fp16", "fp32", "fp32"]


def test_a_folder_has_no_revision(small: Path, cli: Callable[..., Any], nothing_left: Path) -> None:
    answer = cli(
        "build",
        "--model",
        small,
        "--task",
        "none",
        "--target",
        "onnx",
        "--out",
        nothing_left,
        "--revision",
        "0" * 40,
    )
    assert answer.code == 2
    assert "is a folder here" in answer.err
    assert "--revision" in answer.err


def test_a_model_overrides_the_recipes_model_and_its_revision(
    small: Path, cli: Callable[..., Any], canned: Any, tmp_path: Path
) -> None:
    path = tmp_path / "pinned.toml"
    path.write_text(f'name = "pinned"\n[load]\nmodel = "owner/model"\nrevision = "{"a" * 40}"\n')
    answer = cli(
        "build",
        "--recipe",
        path,
        "--model",
        small,
        "--task",
        "separation",
        "--target",
        "onnx",
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 0, answer.err
    content = manifest.read(answer.path).content
    assert content["recipe"]["load"]["revision"] == ""
    assert content["checkpoint"]["revision"] == ""


def test_a_folder_with_a_strange_name(
    small_copy: Path, cli: Callable[..., Any], canned: Any, tmp_path: Path
) -> None:
    folder = small_copy.rename(tmp_path / ".my model (v2)")
    answer = cli(
        "build",
        "--model",
        folder,
        "--task",
        "separation",
        "--target",
        "onnx",
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 0, answer.err
    assert answer.path.relative_to(tmp_path / "out").parts[0] == "my-model--v2-"
