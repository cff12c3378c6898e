"""--trust-remote-code: never a default, pinned, digested, and checked against the vectors."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from jexport.artifacts import manifest

WORDS = ("--target", "onnx", "--validate-tokens", 64)


def forget_modules(folder: Path) -> None:
    """Remote code is imported under its folder's name: another folder of that name is another."""
    for name in [name for name in sys.modules if folder.name in name]:
        del sys.modules[name]


@pytest.fixture
def unknown(write_unknown: Callable[..., Path], tmp_path: Path) -> Path:
    folder = write_unknown(tmp_path / "jexport_e2e_unknown")
    forget_modules(folder)
    return folder


@pytest.fixture
def original_with_code(small: Path, tmp_path: Path) -> Path:
    """The small checkpoint with the authors' code beside it."""
    folder = Path(shutil.copytree(small, tmp_path / "jexport_e2e_original"))
    forget_modules(folder)
    for path in (small.parent / "remote_original").glob("*.py"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": "modeling_lora.XLMRobertaLoRA",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.py")
    }


def test_an_unknown_layout_is_refused_by_default(
    unknown: Path, cli: Callable[..., Any], nothing_left: Path
) -> None:
    marker = unknown / "was_run"
    code = unknown / "modeling_tiny.py"
    code.write_text(f"open({str(marker)!r}, 'w')\n" + code.read_text())
    answer = cli("build", "--model", unknown, "--task", "none", *WORDS, "--out", nothing_left)
    assert (answer.code, answer.out) == (19, "")
    assert "--trust-remote-code" in answer.err
    assert not marker.exists()


def test_an_unknown_layout_is_exported_through_its_own_class(
    unknown: Path, cli: Callable[..., Any], texts: list[str], tmp_path: Path
) -> None:
    answer = cli(
        "build",
        "--model",
        unknown,
        "--task",
        "none",
        *WORDS,
        "--trust-remote-code",
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 0, answer.err
    content = manifest.verify(answer.path).content
    assert content["checkpoint"]["layout"] == "remote_code"
    listed = {entry["path"]: entry["sha256"] for entry in content["checkpoint"]["code"]}
    assert listed == digests(unknown)
    assert len(listed) >= 2
    assert not list(answer.path.rglob("*.py"))
    assert "auto_map" not in json.loads((answer.path / "config.json").read_text())
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(unknown), device="cpu", trust_remote_code=True)
    with jexport.open_artifact(answer.path) as model:
        vectors = model.encode(texts)
    assert np.abs(vectors - reference.encode(texts)).max() <= 1e-6


def test_the_authors_own_code_as_the_reference(
    original_with_code: Path,
    cli: Callable[..., Any],
    small: Path,
    texts: list[str],
    tmp_path: Path,
) -> None:
    answer = cli(
        "build",
        "--model",
        original_with_code,
        "--task",
        "retrieval.query",
        *WORDS,
        "--trust-remote-code",
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 0, answer.err
    content = manifest.verify(answer.path).content
    assert content["checkpoint"]["layout"] == "jina_v3_original"
    listed = {entry["path"]: entry["sha256"] for entry in content["checkpoint"]["code"]}
    assert listed == digests(original_with_code)
    assert content["recipe"]["load"]["trust_remote_code"] is True
    assert content["parity"]["cosine_min"] > 1 - 1e-6
    truth = np.load(small.with_name(f"{small.name}.retrieval.query.npy"))
    with jexport.open_artifact(answer.path) as model:
        assert np.abs(model.encode(texts) - truth).max() <= 1e-6


def test_code_in_another_repository_must_be_pinned(
    small: Path, cli: Callable[..., Any], nothing_left: Path
) -> None:
    """The small checkpoint's own auto_map names the authors' repository on the hub."""
    words = ("build", "--model", small, "--task", "none", *WORDS, "--out", nothing_left)
    answer = cli(*words, "--trust-remote-code")
    assert answer.code == 19
    assert "pinned" in answer.err
    assert "code_revision" in answer.err
    pinned = cli(*words, "--trust-remote-code", "--code-revision", "0" * 40)
    assert pinned.code == 18  # asked for, and there is no hub here


def test_a_hub_checkpoint_with_code_must_be_pinned(
    cli: Callable[..., Any], nothing_left: Path
) -> None:
    words = ("build", "--model", "owner/model", "--task", "none", *WORDS, "--out", nothing_left)
    answer = cli(*words, "--trust-remote-code")
    assert answer.code == 19
    assert "revision" in answer.err
    for revision in ("main", "v1.0", "abc123", "Z" * 40):
        assert cli(*words, "--revision", revision).code == 5
    assert cli(*words, "--trust-remote-code", "--revision", "0" * 40).code == 18
