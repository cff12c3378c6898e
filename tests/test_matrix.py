"""The jobs of a recipe: every combination that a target takes, once."""

from __future__ import annotations

import pytest

from jexport import matrix, recipe
from jexport.errors import PrecisionError, UnknownTargetError

RECIPE = recipe.read("jina-embeddings-v3")


def test_tasks_by_targets_by_the_precisions_that_each_takes() -> None:
    found = matrix.jobs(RECIPE, tasks=["separation", "classification"], chosen=["hf", "onnx"])
    assert [job.key for job in found] == [
        f"{task}-{name}-{precision}"
        for task in ("separation", "classification")
        for name, precision in [
            ("hf", "fp32"), ("hf", "bf16"),
            ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("onnx", "int8-weights"),
        ]
    ]  # fmt: skip


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
