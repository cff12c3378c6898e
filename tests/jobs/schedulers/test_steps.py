"""The steps of a matrix: each job's command, what it makes and what it needs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from jexport import recipe
from jexport.cli.build import build
from jexport.cli.compile import compile_
from jexport.errors import MatrixError
from jexport.jobs import matrix, schedulers
from jexport.jobs.matrix import Job
from jexport.jobs.schedulers import Origin, Wishes

RECIPE = recipe.read("jina-embeddings-v3")
ORIGIN = Origin(name=RECIPE.name, words=("--recipe", RECIPE.name))


def job(**changes: str) -> Job:
    return Job(**{"task": "separation", "target": "trt", "precision": "fp16", **changes})


def test_one_command_a_job() -> None:
    (step,) = schedulers.steps([job(target="onnx")], ORIGIN)
    assert step.words == (
        "jexport",
        "build",
        "--recipe",
        RECIPE.name,
        "--task",
        "separation",
        "--target",
        "onnx",
        "--precision",
        "fp16",
        "--out",
        "artifacts",
        "--quiet",
    )
    assert (step.name, step.phase, step.needs, step.gpu) == (step.job.key, "build", "", "")
    assert step.artifact == f"artifacts/{RECIPE.name}/separation/onnx-fp16/latest"


def test_an_engine_is_prepared_once_and_completed_on_each_kind_of_gpu() -> None:
    found = schedulers.steps([job(gpu="L4"), job(gpu="T4")], ORIGIN)
    portable, first, second = found
    assert portable.words[-5:] == ("--until", "compile", "--out", "portable", "--quiet")
    assert (portable.phase, portable.gpu) == ("build", "")
    for step, kind in ((first, "L4"), (second, "T4")):
        assert step.words[:3] == ("jexport", "compile", portable.artifact)
        assert (step.phase, step.gpu, step.needs) == ("compile", kind, portable.name)
    assert first.artifact != second.artifact
    assert [step.phase for step in schedulers.steps([job()], ORIGIN)] == ["build"]


def test_steps_stand_after_what_they_need() -> None:
    every = matrix.asked(RECIPE, gpus=["L4", "A100"])
    found = schedulers.steps(every, ORIGIN)
    seen: set[str] = set()
    for step in found:
        assert not step.needs or step.needs in seen
        assert step.name not in seen
        seen.add(step.name)
    assert {one.key for one in every} <= seen


def test_the_command_line_takes_every_command() -> None:
    """Click reads the words as they are: an option that is no more would be refused here."""
    words = {step.words for step in schedulers.steps(matrix.asked(RECIPE, gpus=["L4"]), ORIGIN)}
    assert len(words) > 50
    for program, command, *rest in words:
        assert program == "jexport"
        known: Any = {"build": build, "compile": compile_}[command]
        known.make_context(command, list(rest)).close()
    with pytest.raises(Exception, match="No such option"):
        build.make_context("build", ["--task", "a", "--target", "onnx", "--untill", "compile"])


@pytest.mark.parametrize("kind", ["../x", "L4 ", "a/b", "-L4", "x" * 64])
def test_kinds_that_can_be_no_folder_and_no_label(kind: str) -> None:
    with pytest.raises(MatrixError, match="cannot be a kind of GPU"):
        schedulers.steps([job(gpu=kind)], ORIGIN)


def test_a_destination_with_a_password_is_refused_and_not_repeated() -> None:
    for good in ("", "oci://host:5000/name", "s3://bucket/folder", "hf://me/model", "/some/folder"):
        schedulers.check_place(good)
    for bad in ("oci://me:hunter2@host/name", "me:hunter2@host", "s3://a b", "oci://a\nb"):
        with pytest.raises(MatrixError) as caught:
            schedulers.check_place(bad)
        assert "hunter2" not in str(caught.value)


def test_an_unknown_format() -> None:
    with pytest.raises(MatrixError, match="unknown format 'gitlab'"):
        schedulers.load("gitlab")
    assert schedulers.names() == ["github", "json", "kubernetes"]
    assert [schedulers.load(name).name for name in schedulers.names()] == schedulers.names()


def test_json_has_the_words_as_they_are() -> None:
    found = schedulers.steps([job(gpu="L4")], ORIGIN)
    listed = json.loads(schedulers.load("json").write(found, Wishes(publish="oci://h/n")))["steps"]
    assert [tuple(entry["command"]) for entry in listed] == [step.words for step in found]
    assert [entry["needs"] for entry in listed] == ["", found[0].name]
    assert {entry["publish"] for entry in listed} == {"oci://h/n"}
    only = json.loads(schedulers.load("json").write(found, Wishes(phases=["compile"])))["steps"]
    assert [entry["name"] for entry in only] == [found[1].name]


def test_the_page_of_help() -> None:
    from jexport.cli.matrix import matrix as command

    answer = CliRunner().invoke(command, ["--help"])
    assert answer.exit_code == 0
    for name in schedulers.names():
        assert name in answer.output
