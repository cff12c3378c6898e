"""Which node may run a job, from what Ray says of its nodes."""

from __future__ import annotations

from typing import Any

import pytest

from jexport.errors import ClusterError
from jexport.jobs.matrix import Job
from jexport.jobs.ray import placement


def job(gpu: str = "") -> Job:
    return Job(task="a", target="trt", precision="fp16", gpu=gpu)


def node(**resources: float) -> Any:
    return {"Alive": True, "Resources": {"CPU": 4.0, "memory": 8.0 * 2**30, **resources}}


def test_a_job_without_a_gpu_takes_a_processor_anywhere() -> None:
    assert placement.options(job(), 0, [node()]) == {"num_cpus": 1}
    assert placement.options(job(), 2**30, [node(L4=1)]) == {"num_cpus": 1, "memory": 2**30}


def test_what_ray_found_goes_before_what_a_node_was_started_with() -> None:
    found = node(**{"accelerator_type:L4": 1.0, "GPU": 1.0})
    assert placement.options(job("L4"), 0, [node(), found]) == {
        "num_cpus": 1,
        "num_gpus": 1,
        "resources": {"accelerator_type:L4": 0.001},
    }
    assert placement.options(job("L4"), 0, [node(L4=2.0)]) == {
        "num_cpus": 1,
        "resources": {"L4": 1},
    }


def test_a_kind_that_no_node_has() -> None:
    others = [node(), node(**{"accelerator_type:T4": 1.0, "node:10.0.0.1": 1.0}), node(A10=1.0)]
    with pytest.raises(ClusterError) as caught:
        placement.options(job("L4"), 0, others)
    assert "3 nodes, which name: A10, T4" in str(caught.value)
    with pytest.raises(ClusterError):
        placement.options(job("L4"), 0, [node(L4=1.0, CPU=0.0)])
    with pytest.raises(ClusterError):
        placement.options(job("CPU2"), 0, [])


def test_memory_is_looked_for_where_the_kind_is() -> None:
    small, large = node(L4=1.0, memory=2.0 * 2**30), node(memory=64.0 * 2**30)
    placement.options(job(), 2**33, [small, large])
    with pytest.raises(ClusterError, match="no node has room") as caught:
        placement.options(job("L4"), 2**33, [small, large])
    assert "it takes 8.0 GiB" in str(caught.value)
    assert "offers 2.0 GiB" in str(caught.value)
