"""`jexport cache`: what it lists, removes and finds damaged; and how builds use the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jexport.cache import entries
from jexport.stages import compile as compile_stage
from jexport.stages import export as export_stage
from jexport.stages import validate as validate_stage


def test_a_second_build_takes_finished_stages_from_the_cache(
    canned: Any,
    cli: Callable[..., Any],
    as_separation: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    assert cli(*as_separation, "--out", tmp_path / "a", "--cache", tmp_path / "c").code == 0

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished stage was done again")

    with monkeypatch.context() as patch:
        patch.setattr(export_stage, "run", again)
        patch.setattr(compile_stage, "run", again)
        patch.setattr(validate_stage, "run", again)
        second = cli(*as_separation, "--out", tmp_path / "b", "--cache", tmp_path / "c")
    assert second.code == 0, second.err
    assert second.err.count("from the cache") == 3
    names = {(path / "a").parent.name for path in (tmp_path / "a", tmp_path / "b")}
    assert names == {"a", "b"}
    assert not (tmp_path / "a" / ".cache").exists()
    assert cli("verify", second.path).code == 0
    assert [problem for _, problem in entries.verify(tmp_path / "c")] == ["", "", ""]


def test_no_cache(
    canned: Any, cli: Callable[..., Any], as_separation: tuple[object, ...], tmp_path: Path
) -> None:
    assert cli(*as_separation, "--out", tmp_path, "--no-cache").code == 0
    assert not (tmp_path / ".cache").exists()


def test_list_remove_verify(
    canned: Any, cli: Callable[..., Any], as_separation: tuple[object, ...], tmp_path: Path
) -> None:
    out = ("--out", tmp_path)
    assert cli("cache", "ls", *out).out == ""
    assert cli("cache", "verify", *out).out == "0 entries, all as they were kept\n"
    assert cli(*as_separation, *out).code == 0
    rows = json.loads(cli("cache", "ls", "--json", *out).out)
    assert {row["stage"] for row in rows} == {"export", "compile", "validate"}
    assert all("separation" in row["about"] and row["size_bytes"] > 1000 for row in rows)
    told = cli("cache", "ls", *out)
    assert [line.split()[0] for line in told.out.splitlines()] == [row["stage"] for row in rows]
    assert told.err.startswith("3 entries, ")
    assert cli("list", tmp_path).out.count("separation") == 1  # the cache is no model
    assert cli("cache", "verify", *out).code == 0
    victim = tmp_path / ".cache" / rows[0]["name"] / entries.CONTENT / "model.onnx"
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.write_bytes(content)
    damaged = cli("cache", "verify", *out)
    assert (damaged.code, damaged.out) == (37, "")
    assert f"{rows[0]['name']}: model.onnx was changed" in damaged.err
    assert cli("cache", "verify", "--remove", *out).code == 0
    assert len(json.loads(cli("cache", "ls", "--json", *out).out)) == 2
    assert cli("cache", "gc", *out).out.startswith("0 entries removed")
    assert cli("cache", "gc", "--limit", "0", *out).out.startswith("2 entries removed")
    assert not (tmp_path / ".cache").exists()


def test_a_damaged_entry_is_built_again_with_a_note(
    canned: Any, cli: Callable[..., Any], as_separation: tuple[object, ...], tmp_path: Path
) -> None:
    words = (*as_separation, "--cache", tmp_path / "c")
    assert cli(*words, "--out", tmp_path / "a").code == 0
    [entry] = (tmp_path / "c").glob("export-*")
    (entry / entries.CONTENT / "model.onnx").unlink()
    answer = cli(*words, "--out", tmp_path / "b")
    assert answer.code == 0, answer.err
    assert "made again, for the cache's was damaged" in answer.err
    assert [problem for _, problem in entries.verify(tmp_path / "c")] == ["", "", ""]
