"""inputs: what the digest of the code and the versions of the tools depend on.

Which inputs decide a version is told in test_pipeline.py, by builds.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

import jexport
from jexport import recipe, targets
from jexport.building import cache_keys


def test_code_digest_depends_on_the_sources_and_on_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(str(jexport.__file__)).parent
    assert Path(str(cache_keys.__file__)).parents[1] == source  # the digest is of all that is below
    installed = Path(shutil.copytree(source, tmp_path / "site-packages" / "jexport"))
    monkeypatch.setattr(cache_keys, "__file__", str(installed / "building" / "cache_keys.py"))
    for folder in sorted(installed.rglob("__pycache__")):
        shutil.rmtree(folder)
    without_caches = cache_keys.code_digest()
    (installed / "__pycache__").mkdir()
    (installed / "__pycache__" / "run.cpython-311.pyc").write_bytes(b"x")
    (installed / "notes.txt").touch()
    assert cache_keys.code_digest() == without_caches
    monkeypatch.setattr(cache_keys, "__file__", str(source / "building" / "cache_keys.py"))
    assert cache_keys.code_digest() == without_caches
    monkeypatch.setattr(cache_keys, "__file__", str(installed / "building" / "cache_keys.py"))
    (installed / "tasks.py").rename(installed / "task.py")
    renamed = cache_keys.code_digest()
    (installed / "task.py").rename(installed / "tasks.py")
    (installed / "tasks.py").write_text((installed / "tasks.py").read_text() + "\n")
    changed = cache_keys.code_digest()
    [template, *_] = sorted(installed.rglob("*.j2"))
    template.write_text(template.read_text() + "\n")
    assert len({without_caches, renamed, changed, cache_keys.code_digest()}) == 4


def test_tools_are_those_installed() -> None:
    from importlib import metadata

    found = cache_keys.tools()
    assert found["onnx-ir"] == metadata.version("onnx-ir")
    assert "onnxruntime-gpu" not in found or metadata.version("onnxruntime-gpu")
    assert found["python"]


def test_what_decides_the_engine_of_a_portable_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe.for_model("acme/model")
    content = {
        "sha256": "a" * 64,
        "name": "m",
        "task": "none",
        "target": "trt",
        "precision": "fp16",
    }
    engine = targets.load("onnx")

    def name(content: Any = content, spec: Any = chosen, where: str = "here") -> str:
        here = dataclasses.replace(engine, fingerprint=lambda: {"device": where})
        key = cache_keys.portable_build_key(content, spec, here)
        assert key.inputs is not None
        assert key.stage == "compile"
        assert key.description == "m none trt-fp16"
        return key.name

    first = name()
    assert name(spec=chosen.replace_compile(timing_cache="/somewhere")) == first
    others = [
        name(content={**content, "sha256": "b" * 64}),
        name(spec=chosen.replace_compile(weight_stripped=True)),
        name(spec=chosen.replace_compile(workspace_gib=2.0)),
        name(where="there"),
    ]
    monkeypatch.setattr(cache_keys, "tools", lambda: {"tensorrt": "99"})
    others.append(name())
    monkeypatch.setattr(cache_keys, "code_digest", lambda: "c" * 64)
    others.append(name())
    assert len({first, *others}) == 7
    refitted = cache_keys.portable_build_key(
        content, chosen.replace_compile(refit_from="x"), engine
    )
    assert refitted.inputs is None  # another artifact decides it, and that one may change
