"""The words of the field in code: no name says it in a word that only this house knew.

WORDS is the left column of the glossary's change: what once stood in names, and what stands there
now. Names are read by ast: of functions, classes, parameters, variables, attributes and modules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[2]
PAGE = PROJECT / "docs" / "glossary.md"

WORDS = {
    "aim": "QuantizationTarget",
    "catalogue": "listing",
    "compensated": "gptq",
    "damage": "sensitivity",
    "flowing": "activations",
    "found": "what it is",
    "furnish": "finalize_package",
    "furnishing": "PackageContext",
    "heed": "handle, check",
    "journal": "trial log",
    "judge": "reference library, reference runtime",
    "lane": "stream",
    "lanes": "streams",
    "made": "result, artifact",
    "patience": "timeout",
    "patiently": "retry",
    "product": "matmul, LinearLayer",
    "products": "matmuls, linear layers",
    "room": "work_dir",
    "rooms": "packages",
    "said": "config",
    "scratch": "work_dir",
    "site": "observer",
    "told": "listener, wrapped errors",
    "treatment": "LayerQuantization",
    "truth": "reference vectors",
    "wanted": "expected",
    "wide": "fallback",
}

STAY = {
    ("graph/traceable.py", "scaled_dot_product_attention"): "a name of torch",
    ("jobs/schedulers/__init__.py", "PRODUCT"): "NVIDIA's label, nvidia.com/gpu.product",
}
"""Names that stay, and why."""


def names(tree: ast.AST) -> Iterator[str]:
    """Every name that a module gives."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def parts(name: str) -> set[str]:
    """Words of a name in snake_case or CamelCase."""
    return set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))


def private_words(path: Path, package: Path) -> Iterator[str]:
    """Names in a file that are put in a word of the left column."""
    place = path.relative_to(package).as_posix()
    given = {path.stem, *names(ast.parse(path.read_text(encoding="utf-8")))}
    for name in sorted(given):
        for word in sorted(parts(name) & set(WORDS)):
            if (place, name) not in STAY:
                yield f"{place}: {name}: say {WORDS[word]}"


def test_names_are_the_fields() -> None:
    package = PROJECT / "jexport"
    assert [text for path in package.rglob("*.py") for text in private_words(path, package)] == []


def test_a_private_word_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "lanes.py").write_text(
        "class ToldTwice:\n    def f(self, said_so): self.room = 1\n"
    )
    assert len(list(private_words(tmp_path / "lanes.py", tmp_path))) == 4
    first = next(private_words(tmp_path / "lanes.py", tmp_path))
    assert first == "lanes.py: ToldTwice: say listener, wrapped errors"


def test_names_on_the_glossary_page_are_in_the_code() -> None:
    known = set()
    for path in (PROJECT / "jexport").rglob("*.py"):
        known |= {path.stem, path.parent.name, *names(ast.parse(path.read_text(encoding="utf-8")))}
    rows = [line.rsplit("|", 2)[1] for line in PAGE.read_text(encoding="utf-8").splitlines()[6:]]
    shown = [part for row in rows for part in re.findall(r"[\w.]+", row.replace("`", ""))]
    assert len(shown) > 60
    assert [name for name in shown if not set(name.split(".")) <= known] == []
