"""examples/memory_mem0.py in an environment of its own: Mem0, Milvus Lite, a jexport artifact."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport

EXAMPLE = "examples/memory_mem0.py"
ANSWERS = [
    ("ana", "I am allergic to peanuts and carry an adrenaline pen."),
    ("ana", "I cycle to work unless it rains."),
    ("ben", "I grow tomatoes on my balcony."),  # the only one of ben's: ana's are not his
]


@pytest.fixture(scope="module")
def memories() -> tuple[tuple[str, str], ...]:
    """What the example stores; read without importing it, which needs Mem0's environment."""
    source = (Path(__file__).parents[3] / EXAMPLE).read_text(encoding="utf-8")
    [told] = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MEMORIES"
    ]
    found: tuple[tuple[str, str], ...] = ast.literal_eval(told)
    return found


def check_stored(rows: list[dict[str, Any]], memories: Any, artifact: Path) -> None:
    """Everything is there once, under its person, with the artifact's own vector."""
    assert sorted((row["person"], row["text"]) for row in rows) == sorted(memories)
    with jexport.open_artifact(artifact) as model:
        wanted = model.encode([row["text"] for row in rows])
    vectors = np.array([row["vector"] for row in rows])
    assert vectors.shape == wanted.shape
    assert (vectors * wanted).sum(axis=1).min() >= 0.99999


@pytest.mark.parametrize("which", ["text-matching", "minilm"])
def test_memories_are_kept_with_the_artifacts_vectors(
    which: str,
    request: pytest.FixtureRequest,
    builds: Callable[..., Any],
    run: Callable[..., str],
    memories: Any,
    tmp_path: Path,
) -> None:
    minilm = which == "minilm"
    artifact = request.getfixturevalue("minilm_artifact") if minilm else builds(which).path
    kept, home = tmp_path / "kept", tmp_path / "home"
    kept.mkdir()
    home.mkdir()
    words = (EXAMPLE, artifact, "--folder", kept)
    told_at_first = run("mem0", *words, home=home)
    first, *answers = told_at_first.splitlines()
    assert artifact.name in first
    found = [line.split("  ", 2)[2].split(": ", 1) for line in answers]
    told = [(person, line.split("->  ")[1]) for person, line in found]
    assert [person for person, _ in told] == [person for person, _ in ANSWERS]
    assert set(told) <= set(memories)  # nobody is told what another said
    if minilm:  # trained weights, so what is found means something
        assert told == ANSWERS
    assert run("mem0", *words, home=home) == told_at_first  # another process remembers
    rows = json.loads(
        run("mem0", "tests/servers/mem0/stored.py", kept / "memories.db", "memories", home=home)
    )
    check_stored(rows, memories, artifact)
    assert not (home / ".mem0").exists()  # where Mem0 would keep its id and history


def test_only_an_artifact_for_both_is_taken(
    builds: Callable[..., Any], run: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"an artifact of retrieval\.query cannot embed both"):
        run("mem0", EXAMPLE, builds("retrieval.query").path, home=tmp_path)
