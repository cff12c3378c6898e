"""tables: what is written as a table is read back the same; what a recipe refuses, test_recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from jexport import recipe
from jexport.errors import RecipeError
from jexport.recipe_schema import plain, read_table


@dataclass(frozen=True, kw_only=True)
class Leaf:
    sizes: tuple[int, ...]
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...] = ()
    nested: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    first: Leaf = field(default_factory=lambda: Leaf(sizes=(1,)))


TREES = (
    Tree(name="bare"),
    Tree(
        name="full",
        leaves=(Leaf(sizes=()), Leaf(sizes=(1, 2), share=1.0)),
        nested={"a": {"b": 0.25}, "c": {}},
        first=Leaf(sizes=(3,), share=0.0),
    ),
)


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
def test_what_is_written_is_read_back_the_same(tree: Tree) -> None:
    written = json.loads(json.dumps(plain(tree)))
    assert read_table(Tree, written, origin="here") == tree
    assert plain(read_table(Tree, written, origin="here")) == written


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_are_read_back_the_same(name: str) -> None:
    shipped = recipe.read(name)
    written = json.loads(json.dumps(shipped.resolved()))
    assert recipe.from_table(written, origin="a manifest") == shipped


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"name": "x", "leafs": []}, "leafs"),
        (
            {"name": "x", "leaves": [{"sizes": [1]}, {"sizes": [1], "shares": 1.0}]},
            "leaves[1].shares",
        ),
        ({"name": "x", "first": {}}, "first.sizes"),
        ({"leaves": []}, "name"),
    ],
)
def test_the_key_is_named_with_the_way_to_it(table: dict[str, object], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_table(Tree, table, origin="here")
    assert f"'{key}'" in caught.value.what
    assert caught.value.evidence == "in here"
