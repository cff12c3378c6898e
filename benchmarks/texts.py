"""Real texts of mixed length that every machine has: docstrings of Python's standard library.

They are read where Python is installed and never stored; English, white space folded, each once.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def docstrings(count: int, *, seed: int = 0) -> list[str]:
    """`count` whole docstrings, from one word to several pages, in a seeded order."""
    return _chosen((" ".join(text.split()) for text in _read()), count, seed)


def paragraphs(count: int, *, seed: int = 0) -> list[str]:
    """`count` paragraphs of docstrings, which is how long texts are cut for retrieval."""
    parts = (part for text in _read() for part in re.split(r"\n\s*\n", text))
    return _chosen((" ".join(part.split()) for part in parts), count, seed)


def _chosen(found: Iterator[str], count: int, seed: int) -> list[str]:
    texts = [text for text in dict.fromkeys(found) if text]
    random.Random(seed).shuffle(texts)
    if len(texts) < count:
        raise SystemExit(f"only {len(texts)} texts here, {count} wanted")
    return texts[:count]


def _read() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""
