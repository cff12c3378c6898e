"""Real texts of mixed length that every machine has: docstrings of Python's standard library.

They are read where Python is installed and never stored; English, 5 to 300 words.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path


def docstrings(count: int, *, seed: int = 0) -> list[str]:
    """`count` distinct docstrings in a seeded order, white space folded."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if 5 <= len(text.split()) <= 300:
                    found[text] = None
    texts = list(found)
    random.Random(seed).shuffle(texts)
    if len(texts) < count:
        raise SystemExit(f"only {len(texts)} docstrings here, {count} wanted")
    return texts[:count]
