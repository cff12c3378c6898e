"""Real texts for measuring, that nothing is tuned on: English, white space folded, each once.

Docstrings of Python's standard library, which every machine has, and short literary texts (verse,
dialogue, aphorisms, riddles) of Debian's package `fortunes`, which `make literary` unpacks. Both
are read where they lie and never stored.
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


FORTUNES = (Path(".literary/usr/share/games/fortunes"), Path("/usr/share/games/fortunes"))
LITERARY = ("literature", "songs-poems", "wisdom", "love", "people", "riddles", "tao", "art")
SHORT = range(10, 401)


def literary(count: int, *, seed: int = 0) -> list[str]:
    """`count` short literary texts of SHORT characters, in a seeded order."""
    folder = next((place for place in FORTUNES if place.is_dir()), None)
    if folder is None:
        raise SystemExit("no literary texts here: make literary (Debian's package fortunes)")
    read = (text for name in LITERARY for text in (folder / name).read_text("utf-8").split("\n%\n"))
    folded = (" ".join(text.split()) for text in read)
    return _chosen((text for text in folded if len(text) in SHORT), count, seed)


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
