"""README is short, the pages made from the code are current, and the site has every page."""

from __future__ import annotations

import re
import runpy
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
README_BYTES = 6 * 1024


@pytest.fixture(scope="module")
def architecture() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "architecture.py"))


def site() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8"))
    return found


def test_readme_is_short() -> None:
    assert (PROJECT / "README.md").stat().st_size <= README_BYTES


def test_readme_links_to_what_there_is() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        text = (PROJECT / name).read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
        assert not [link for link in links if not (PROJECT / link).is_file()], name
        assert links or name != "README.md"


def test_the_drawing_is_made_from_the_imports(architecture: dict[str, Any]) -> None:
    """`python docs/architecture.py` writes both files again."""
    assert architecture["DRAWING"].read_text(encoding="utf-8") == architecture["drawing"]()
    page = architecture["PAGE"].read_text(encoding="utf-8")
    assert architecture["page"](page) == page


def test_arrows_that_a_path_says_are_left_out(architecture: dict[str, Any]) -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert architecture["reduced"](graph) == [("a", "b"), ("b", "c"), ("d", "c")]
    arrows = architecture["reduced"](architecture["imports"]())
    assert 20 < len(arrows) < 60


def test_troubleshooting_is_made_from_the_errors() -> None:
    """`python docs/exit_codes.py` writes it again."""
    made = runpy.run_path(str(DOCS / "exit_codes.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["text"]()


def test_the_site_has_every_page_once() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [page for child in children for page in pages(child)]

    written = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(pages(site()["nav"])) == written


def test_a_warning_fails_the_site() -> None:
    """With --quiet mkdocs counts no warning; without `validation` a missing anchor is none."""
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    [line] = re.findall(r"mkdocs build .*", makefile)
    assert "--strict" in line
    assert "--quiet" not in line
    assert {*site()["validation"]["links"].values(), *site()["validation"]["nav"].values()} == {
        "warn"
    }


def test_what_the_site_needs_is_pinned_within_the_extra() -> None:
    lines = (DOCS / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    for text in extras["project"]["optional-dependencies"]["docs"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name]), text


def test_the_package_is_typed() -> None:
    assert resources.files("jexport").joinpath("py.typed").is_file()


def test_the_table_of_models_names_recipes_and_rounds_down() -> None:
    """`make test-recipes` writes it again."""
    from jexport import recipe

    models = runpy.run_path(str(DOCS / "models.py"))
    page = models["PAGE"].read_text(encoding="utf-8")
    rows = page.partition(models["START"])[2].partition(models["END"])[0].splitlines()[2:]
    assert {row.split("`")[1] for row in rows} <= set(recipe.names())
    row = {"name": "a", "kind": "bert", "target": "hf", "precision": "fp32", "direct": 0.99999951}
    other = {**row, "precision": "bf16", "direct": 1.0, "cosine_min": 0.5}
    text = models["page"](page, [other, {**row, "cosine_min": 1.0000001}])
    assert "| hf fp32 | hf bf16 |" in text
    assert "| `a` | bert | 0.999999 | 0.500000 |" in text
