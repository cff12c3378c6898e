"""The command line that a report gives builds the same again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from jexport import recipe
from jexport.artifacts import store
from jexport.building.build_command import build_command


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (recipe.for_model("my folder/model"), ["--model", "the name"]),
        (recipe.read("jina-embeddings-v3"), ["--recipe", "jina-embeddings-v3"]),
        (
            recipe.read("jina-embeddings-v3").replace_load(model="here"),
            ["--recipe", "jina-embeddings-v3", "--model", "the name"],
        ),
    ],
)
def test_the_command_builds_the_same_again(chosen: recipe.Recipe, wanted: list[str]) -> None:
    from jexport.cli.build import build

    slot = store.Slot(
        out=Path("artifacts"),
        model=chosen.name,
        task="separation",
        target="onnx",
        precision="int8",
        version="1",
    )
    words = shlex.split(build_command(chosen.replace_quantize(allow_slower=True), slot, "the name"))
    assert words[:2] == ["jexport", "build"]
    assert words[2 : 2 + len(wanted)] == wanted
    given = build.make_context("build", words[2:]).params
    assert (given["tasks"], given["precisions"], given["calibration"]) == (
        ("separation",),
        ("int8",),
        "everyday",
    )
    assert given["allow_slower"] is True
    assert given["effort"] == "fast"
    assert given["until"] is None
    words = shlex.split(build_command(chosen, slot, "the name", "compile"))
    assert build.make_context("build", words[2:]).params["until"] == "compile"
