"""The kept files of `make fuzz`, and a few new ones: each is read, or refused as a JexportError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

HERE = Path(__file__).parent
KEPT = [path for path in sorted((HERE / "corpus").glob("*/*")) if path.is_file()]
NAMES = (
    "calibration",
    "index",
    "manifest",
    "modules",
    "onnx",
    "provenance",
    "recipe",
    "release",
    "safetensors",
    "set",
    "signature",
)


@pytest.fixture(scope="module")
def tools(imported: Callable[[Path], Any]) -> Any:
    return imported(HERE / "readers.py")


@pytest.mark.parametrize("path", KEPT, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_kept(path: Path, tools: Any, tmp_path: Path) -> None:
    tools.tried(tools.readers()[path.parent.name], path.read_bytes(), tmp_path)


def test_every_reader_has_a_corpus_and_it_is_small(tools: Any) -> None:
    assert set(tools.readers()) == set(NAMES) == {path.parent.name for path in KEPT}
    assert sum(path.stat().st_size for path in KEPT) < 1 << 19


@pytest.mark.parametrize("name", NAMES)
def test_a_few_new_ones(name: str, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    reader, room = tools.readers()[name], tmp_path_factory.mktemp(name)

    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=tools.contents(name, reader))
    def one(content: bytes) -> None:
        tools.tried(reader, content, room)

    one()


def test_a_bug_is_no_refusal(tools: Any, tmp_path: Path) -> None:
    # Guards the tests above: whatever is not a JexportError comes through.
    def broken(content: bytes, folder: Path) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        tools.tried(tools.Reader(run=broken, near=None), b"", tmp_path)
