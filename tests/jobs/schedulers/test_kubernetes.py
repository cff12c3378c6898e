"""Jobs for Kubernetes, against its own schema of a batch/v1 Job."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jexport import recipe
from jexport.errors import MatrixError
from jexport.jobs import matrix, schedulers
from jexport.jobs.schedulers import Origin, Wishes

RECIPE = recipe.read("jina-embeddings-v3")
DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
IMAGE = "host/jexport@sha256:" + "0" * 64


def written(gpus: tuple[str, ...] = ("L4",), **wishes: Any) -> list[dict[str, Any]]:
    steps = schedulers.steps(
        matrix.asked(RECIPE, gpus=gpus), Origin(name=RECIPE.name, words=("--recipe", RECIPE.name))
    )
    text = schedulers.load("kubernetes").write(steps, Wishes(**{"image": IMAGE, **wishes}))
    return list(yaml.safe_load_all(text))


def pod(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize(
    "wishes",
    [{}, {"publish": "oci://h/n", "secret": "reg"}, {"publish": "s3://b/f", "secret": "keys"}],
)
def test_every_job_is_as_the_schema_says(
    wishes: dict[str, str], job_problems: Callable[[Any], list[str]]
) -> None:
    jobs = written(("L4", "T4", "NVIDIA-A100-SXM4-40GB"), **wishes)
    assert len(jobs) > 60
    for job in jobs:
        assert not job_problems(job), job["metadata"]["name"]


def test_the_schema_sees_what_is_wrong(job_problems: Callable[[Any], list[str]]) -> None:
    """Guards the test above: a schema that takes anything would let it pass."""
    good = written()[0]
    for spoil in (
        lambda job: job["spec"].update(retries=3),
        lambda job: job["spec"].update(backoffLimit="two"),
        lambda job: job["spec"].pop("template"),
        lambda job: pod(job)["containers"][0].update(cmd=["x"]),
        lambda job: pod(job)["containers"][0].pop("name"),
        lambda job: job.update(kind="Jobs"),
    ):
        bad = copy.deepcopy(good)
        spoil(bad)
        assert job_problems(bad)


def test_names_are_valid_and_unique() -> None:
    names = [job["metadata"]["name"] for job in written(("L4", "NVIDIA-A100-SXM4-40GB"))]
    assert len(set(names)) == len(names)
    assert all(DNS_1123.fullmatch(name) and len(name) <= 63 for name in names)
    # A Job cannot be changed: another image is another name, the same one the same name.
    assert not set(names) & {job["metadata"]["name"] for job in written(image="other/image:2")}
    assert names == [job["metadata"]["name"] for job in written(("L4", "NVIDIA-A100-SXM4-40GB"))]


def test_gpus_are_asked_for_by_those_that_need_one() -> None:
    waiting = [job for job in written(("L4",)) if job["spec"]["suspend"]]
    running = [job for job in written(("L4",)) if not job["spec"]["suspend"]]
    assert len(waiting) == 5 * 3
    for job in waiting:
        assert pod(job)["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
        assert pod(job)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert pod(job)["tolerations"]
        assert job["metadata"]["labels"]["jexport/phase"] == "compile"
    for job in running:
        assert "nodeSelector" not in pod(job)
        assert "nvidia.com/gpu" not in pod(job)["containers"][0]["resources"]["limits"]
    for job in (*waiting, *running):
        assert pod(job)["restartPolicy"] == "Never"
        assert job["spec"]["backoffLimit"] == 2


def test_what_gke_calls_a_gpu() -> None:
    label = "cloud.google.com/gke-accelerator"
    jobs = written(("A100-80G",), gpu_label=label, phases=["compile"])
    assert {pod(job)["nodeSelector"][label] for job in jobs} == {"nvidia-a100-80gb"}
    own = written(("nvidia-h200-141gb",), gpu_label=label, phases=["compile"])
    assert {pod(job)["nodeSelector"][label] for job in own} == {"nvidia-h200-141gb"}
    with pytest.raises(MatrixError, match="GKE's name of A10G is not known here"):
        written(("A10G",), gpu_label=label)
    with pytest.raises(MatrixError, match="A100 is more than one product"):
        written(("A100",))


def test_what_jexport_refuses_is_not_tried_again() -> None:
    lost, refused = written()[0]["spec"]["podFailurePolicy"]["rules"]
    assert lost == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    codes = refused["onExitCodes"]["values"]
    assert {5, 6, 17} <= set(codes)
    assert not {0, 12, 18, 137} & set(codes)  # full disk, no network, killed: try again
    assert codes == sorted(set(codes))


@pytest.mark.parametrize("code", [0, 6])
def test_the_script_publishes_what_was_built_and_ends_with_its_code(
    code: int, tmp_path: Path
) -> None:
    """The real shell, with a stand-in for jexport that writes down what it was asked."""
    program = tmp_path / "jexport"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "a folder/latest"\n'
        f'[ "$1" = publish ] || exit {code}\n'
    )
    program.chmod(0o755)
    command = pod(written(publish="oci://h/n")[0])["containers"][0]["command"]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert done.returncode == code
    assert asked[0].startswith("build --recipe jina-embeddings-v3 --task retrieval.query")
    assert asked[1:] == ([] if code else ["publish a folder/latest oci://h/n"])


def test_the_licence_is_accepted_on_request_only() -> None:
    for wishes, words in (
        ({"publish": "oci://h/n", "accept_licence": True}, "oci://h/n --accept-licence"),
        ({"publish": "oci://h/n"}, "oci://h/n"),
    ):
        assert pod(written(**wishes)[0])["containers"][0]["command"][-1].endswith(words)
    alone = pod(written(accept_licence=True)[0])["containers"][0]["command"][-1]
    assert "licence" not in alone


def test_credentials_are_named_and_mounted_only() -> None:
    kept = pod(written(publish="oci://h/n", secret="reg")[0])
    assert kept["volumes"][1]["secret"]["secretName"] == "reg"
    assert {"name": "DOCKER_CONFIG", "value": "/registry"} in kept["containers"][0]["env"]
    bucket = pod(written(publish="s3://b/f", secret="keys")[0])["containers"][0]
    assert bucket["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert "envFrom" not in pod(written()[0])["containers"][0]


@pytest.mark.parametrize(
    "wishes", [{"image": ""}, {"image": "a b"}, {"claim": "My_Claim"}, {"secret": "a/b"}]
)
def test_what_kubernetes_could_not_take(wishes: dict[str, str]) -> None:
    with pytest.raises(MatrixError):
        written(**wishes)
