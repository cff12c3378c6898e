"""The jobs of a recipe: every combination that a target takes, once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jexport import recipe
from jexport.errors import PrecisionError, UnknownTargetError, UnknownTaskError
from jexport.jobs import matrix

RECIPE = recipe.read("jina-embeddings-v3")


def test_tasks_by_targets_by_the_precisions_that_each_takes() -> None:
    found = matrix.jobs(RECIPE, tasks=["separation", "classification"], chosen=["hf", "onnx"])
    assert [job.key for job in found] == [
        f"{task}-{name}-{precision}"
        for task in ("separation", "classification")
        for name, precision in [
            ("hf", "fp32"),
            ("hf", "bf16"),
            ("onnx", "fp32"),
            ("onnx", "fp16"),
            ("onnx", "int8"),
            ("onnx", "int8-weights"),
        ]
    ]


def test_gpu_kinds_multiply_only_what_needs_a_gpu() -> None:
    found = matrix.jobs(
        RECIPE, tasks=["separation"], chosen=["onnx", "trt"], precisions=["fp16"], gpus=["L4", "T4"]
    )
    assert [(job.target, job.gpu) for job in found] == [("onnx", ""), ("trt", "L4"), ("trt", "T4")]
    assert len({job.key for job in found}) == 3


def test_a_precision_that_no_chosen_target_takes() -> None:
    with pytest.raises(PrecisionError, match="none of the targets has the precision 'int4'"):
        matrix.jobs(RECIPE, tasks=["separation"], chosen=["hf"], precisions=["int4"])
    only = matrix.jobs(RECIPE, tasks=["a"], chosen=["hf", "onnx"], precisions=["int8"])
    assert [job.target for job in only] == ["onnx"]


def test_an_unknown_target() -> None:
    with pytest.raises(UnknownTargetError):
        matrix.jobs(RECIPE, tasks=["separation"], chosen=["onxx"])


def test_nothing_named_is_all_that_the_recipe_ships() -> None:
    found = matrix.asked(RECIPE)
    assert {job.task for job in found} == set(RECIPE.tasks)
    assert {job.target for job in found} == set(RECIPE.targets)
    assert found == matrix.asked(RECIPE, tasks=["separation", "all"])
    assert len({job.key for job in found}) == len(found)
    twice = ["separation", "separation"]
    once = matrix.asked(RECIPE, tasks=twice, chosen=["hf", "hf"], precisions=["fp32", "fp32"])
    assert [job.key for job in once] == ["separation-hf-fp32"]


def test_what_the_recipe_does_not_ship() -> None:
    small = dataclasses.replace(RECIPE, targets=("hf",), precisions=("fp32",))
    with pytest.raises(UnknownTaskError, match="unknown task 'separatoin'"):
        matrix.asked(small, tasks=["separatoin"])
    with pytest.raises(UnknownTargetError, match="does not ship the target 'onnx'"):
        matrix.asked(small, chosen=["onnx"])
    with pytest.raises(PrecisionError, match="does not ship the precision 'bf16'"):
        matrix.asked(small, precisions=["bf16"])
    with pytest.raises(PrecisionError, match="no target takes a precision"):
        matrix.asked(dataclasses.replace(small, precisions=("int8",)))
    assert [job.task for job in matrix.asked(small, tasks=["none"])] == ["none"]


def test_all_tasks_of_a_recipe_that_lists_none() -> None:
    with pytest.raises(UnknownTaskError, match="does not say which tasks there are"):
        matrix.asked(dataclasses.replace(RECIPE, tasks=()))


def test_all_tasks_of_a_folder_are_those_of_its_adapters(small: Path, minilm: Path) -> None:
    assert matrix.every_task(recipe.for_model(str(small))) == (
        "retrieval.query",
        "retrieval.passage",
        "separation",
        "classification",
        "text-matching",
    )
    assert matrix.every_task(recipe.for_model(str(minilm))) == ("none",)
    only = dataclasses.replace(recipe.for_model(str(small)), tasks=("separation",))
    assert matrix.every_task(only) == ("separation",)
