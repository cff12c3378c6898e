"""examples/rag_*.py: run as a user runs them, on real trained weights, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = ("examples/rag_langchain.py", "examples/rag_llama_index.py")


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_right_texts_are_found(
    example: str, minilm_artifact: Path, offline: Callable[..., str]
) -> None:
    first, *answers = offline(example, minilm_artifact).splitlines()
    assert first == f"all-MiniLM-L6-v2 (none/onnx-fp32/{minilm_artifact.name})"
    found = [line.split("->  ")[1].split(":")[0] for line in answers]
    assert found == ["harbour", "kitchen", "library"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_pair_is_taken(
    example: str, pair: tuple[Path, Path], offline: Callable[..., str]
) -> None:
    first, *answers = offline(example, *pair).splitlines()
    assert "retrieval.query/" in first
    assert "retrieval.passage/" in first
    assert len(answers) == 3  # random weights: which texts means nothing


def test_the_guard_sees_a_connection(offline: Callable[..., str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    for line in ("socket.create_connection(('192.0.2.1', 9), 1)", "socket.gethostbyname('a.test')"):
        script.write_text(f"import socket\n{line}\n")
        with pytest.raises(AssertionError, match="AssertionError: "):
            offline(str(script))
