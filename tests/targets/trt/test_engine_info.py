"""Which plans may be opened here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from jexport.errors import ArtifactError, DeviceError, EngineError, JexportError
from jexport.targets.trt import engine_info, profiles
from jexport.targets.trt.device import Gpu, Machine
from jexport.targets.trt.engine_info import EngineInfo

PLAN = b"a plan"
HERE = Machine(
    gpu=Gpu(name="RTX 3090", capability="8.6", driver_cuda="13.0", total_bytes=24 << 30),
    tensorrt="11.4.0.106",
    system="linux-x86_64",
)
MADE = EngineInfo(
    tensorrt="11.4.0.106",
    gpu="RTX 3090",
    capability="8.6",
    system="linux-x86_64",
    hardware_compatible="",
    version_compatible=False,
    profiles=profiles.standard(512),
    sha256=hashlib.sha256(PLAN).hexdigest(),
)


def on(**changes: Any) -> Machine:
    gpu = dataclasses.replace(HERE.gpu, **{k: v for k, v in changes.items() if k == "capability"})
    rest = {k: v for k, v in changes.items() if k != "capability"}
    return dataclasses.replace(HERE, gpu=gpu, **rest)


@pytest.mark.parametrize(
    ("made", "here", "kind"),
    [
        ({}, {}, None),
        ({}, {"tensorrt": "11.4.1.5"}, None),
        ({}, {"tensorrt": "11.5.0.1"}, EngineError),
        ({}, {"tensorrt": "11.3.0.99"}, EngineError),
        ({}, {"tensorrt": "10.16.1.11"}, EngineError),
        ({"version_compatible": True}, {"tensorrt": "11.5.0.1"}, None),
        ({"version_compatible": True}, {"tensorrt": "11.3.0.99"}, EngineError),
        ({"version_compatible": True}, {"tensorrt": "12.0.0.1"}, EngineError),
        ({}, {"capability": "8.9"}, DeviceError),
        ({}, {"capability": "8.0"}, DeviceError),
        ({"hardware_compatible": "same_compute_capability"}, {"capability": "8.9"}, DeviceError),
        ({"hardware_compatible": "same_compute_capability"}, {}, None),
        ({"hardware_compatible": "ampere_plus"}, {"capability": "8.0"}, None),
        ({"hardware_compatible": "ampere_plus"}, {"capability": "12.0"}, None),
        ({"hardware_compatible": "ampere_plus"}, {"capability": "7.5"}, DeviceError),
        ({"capability": "12.0"}, {"capability": "8.6"}, DeviceError),
        ({}, {"system": "windows-amd64"}, DeviceError),
        ({"version_compatible": True}, {"system": "linux-aarch64"}, DeviceError),
    ],
)
def test_what_fits(
    made: dict[str, Any], here: dict[str, Any], kind: type[JexportError] | None
) -> None:
    info, path = dataclasses.replace(MADE, **made), Path("artifacts/x/model.plan")
    if kind is None:
        engine_info.check(info, on(**here), path=path)
        return
    with pytest.raises(kind, match=r"model\.plan was built") as caught:
        engine_info.check(info, on(**here), path=path)
    assert "jexport compile artifacts/x" in caught.value.fix
    assert caught.value.evidence


def test_facts_and_back() -> None:
    plain = json.loads(json.dumps(MADE.to_dict()))
    assert engine_info.from_facts(plain | {"opset": 20, "notes": []}) == MADE


@pytest.mark.parametrize(
    "key",
    [
        "tensorrt",
        "capability",
        "system",
        "sha256",
        "profiles",
        "version_compatible",
        "hardware_compatible",
        "gpu",
    ],
)
def test_a_manifest_that_does_not_say(key: str) -> None:
    plain = MADE.to_dict()
    for wrong in ({k: v for k, v in plain.items() if k != key}, plain | {key: 7}):
        with pytest.raises(ArtifactError, match="does not say") as caught:
            engine_info.from_facts(wrong)
        assert key in caught.value.evidence


def test_the_digest_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    path.write_bytes(PLAN)
    assert engine_info.read(MADE, path) == PLAN
    path.write_bytes(PLAN + b".")
    with pytest.raises(ArtifactError, match="not the plan") as caught:
        engine_info.read(MADE, path)
    assert MADE.sha256[:16] in caught.value.evidence
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        engine_info.read(MADE, path)
