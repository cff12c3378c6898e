"""`jexport verify`, `inspect` and `list`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest


def test_verify(artifact: Path, cli: Callable[..., Any]) -> None:
    answer = cli("verify", artifact)
    assert answer.code == 0
    assert answer.out.startswith(f"{artifact}: 11 files, ")
    assert cli("verify", artifact, "--quiet").out == ""
    assert cli("verify", artifact.parent / "latest").code == 0


@pytest.mark.parametrize("change", ["changed", "missing", "extra"])
def test_verify_names_the_file(change: str, artifact_copy: Path, cli: Callable[..., Any]) -> None:
    path = artifact_copy / "config.json"
    if change == "changed":
        path.write_text(path.read_text() + " ")
    elif change == "missing":
        path.unlink()
    else:
        path = artifact_copy / "pytorch_model.bin"
        path.touch()
    answer = cli("verify", artifact_copy)
    assert (answer.code, answer.out) == (13, "")
    assert f"{change}: {path.name}" in answer.err
    assert "  fix: " in answer.err


def test_inspect(artifact: Path, cli: Callable[..., Any]) -> None:
    content = json.loads((artifact / "manifest.json").read_text())
    told = cli("inspect", artifact)
    assert told.code == 0
    for value in (
        "retrieval.query",
        "jina_v3_original",
        "CC-BY-NC-4.0",
        "mean, normalised",
        "64 (Matryoshka: 16, 32, 64)",
        "8192 tokens",
        content["version"],
        content["embedding"]["space"][:16],
        "last_hidden_state",
        "validate",
        f"{content['parity']['cosine_min']:.8f}",
        repr("Represent the query for retrieving evidence documents: "),
    ):
        assert value in told.out, value
    for entry in content["files"]:
        assert entry["path"] in told.out
        assert entry["sha256"][:16] in told.out
    assert json.loads(cli("inspect", artifact, "--json").out) == content


def test_inspect_of_none(tmp_path: Path, cli: Callable[..., Any]) -> None:
    assert cli("inspect", tmp_path).code == 13


def test_list(builds: Callable[..., Any], cli: Callable[..., Any]) -> None:
    path = builds("retrieval.query").path
    out = path.parents[3]
    rows = json.loads(cli("list", out, "--json").out)
    [row] = [row for row in rows if row["path"] == str(path)]
    content = manifest.read(path).content
    assert row == {
        "path": str(path),
        "name": "small",
        "task": "retrieval.query",
        "target": "onnx",
        "precision": "fp32",
        "version": path.name,
        "latest": True,
        "size_bytes": sum(entry["size_bytes"] for entry in content["files"]),
        "cosine_min": content["parity"]["cosine_min"],
        "space": content["embedding"]["space"],
        "licence": "CC-BY-NC-4.0",
    }
    table = cli("list", out).out.splitlines()
    assert len(table) == 1 + len(rows)
    assert any("retrieval.query" in line and "(latest)" in line for line in table)
    assert "licence" in table[0]
    assert all("CC-BY-NC-4.0 " in line for line in table[1:])


def test_list_of_nothing(tmp_path: Path, cli: Callable[..., Any]) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        answer = cli("list", folder)
        assert (answer.code, answer.out) == (0, "")
        assert "no artifacts below" in answer.err
        assert json.loads(cli("list", folder, "--json").out) == []


def test_list_says_which_is_latest(artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    parent = tmp_path / "a" / "b" / "c"
    for name in ("1", "2"):
        shutil.copytree(artifact, parent / name)
    (parent / "latest").symlink_to("1")
    rows = json.loads(cli("list", tmp_path, "--json").out)
    assert [(Path(row["path"]).name, row["latest"]) for row in rows] == [("1", True), ("2", False)]
