"""recipe: TOML -> frozen Recipe, and everything that is refused on the way."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jexport import recipe, targets
from jexport.errors import RecipeError

LEAST = 'name = "m"\n'


def write(folder: Path, text: str) -> str:
    path = folder / "r.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ('nmae = "m"', "'nmae'", "did you mean 'name'?"),
        (LEAST + "[exprot]\nopset = 20", "'exprot'", "did you mean 'export'?"),
        (LEAST + "[load]\nmodle = 'x'", "'load.modle'", "did you mean 'model'?"),
        (LEAST + "[export]\nopsset = 20", "'export.opsset'", "did you mean 'opset'?"),
        (LEAST + "[compile]\nfuze = true", "'compile.fuze'", "did you mean 'fuse'?"),
        (LEAST + "[compile]\nprofile = []", "'compile.profile'", "did you mean 'profiles'?"),
        (
            LEAST + "[[compile.profiles]]\nbatch = [1, 2, 3]\ntoken = [1, 2, 3]",
            "'compile.profiles[0].token'",
            "did you mean 'tokens'?",
        ),
        (LEAST + "[validate]\ntext = 'x'", "'validate.text'", "did you mean 'texts'?"),
        (
            LEAST + "[validate.gates.fp32]\ncosine_mim = 1",
            "'validate.gates.fp32.cosine_mim'",
            "did you mean 'cosine_min'?",
        ),
        (
            LEAST + "[validate.gates.fp61]\ncosine_min = 1",
            "'validate.gates.fp61'",
            "did you mean 'fp16'?",
        ),
        (LEAST + "[quantise]\nx = 1", "'quantise'", "did you mean 'quantize'"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(
    text: str, key: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.read(write(tmp_path, text))
    assert f"unknown recipe key {key}" in caught.value.what
    assert "r.toml" in caught.value.evidence
    assert caught.value.fix.startswith(hint)


@pytest.mark.parametrize(
    ("text", "key", "wanted"),
    [
        ("name = 3", "name", "type str"),
        (LEAST + "version = 1.0", "version", "type str"),
        (LEAST + "tasks = 'none'", "tasks", "a list"),
        (LEAST + "tasks = [1]", "tasks", "type str"),
        (LEAST + "load = 'x'", "load", "a table"),
        (LEAST + "load = [{}]", "load", "a table"),
        (LEAST + "[load]\nmax_tokens = '8192'", "load.max_tokens", "type int"),
        (LEAST + "[load]\nmax_tokens = true", "load.max_tokens", "type int"),
        (LEAST + "[load]\nmax_tokens = 8192.0", "load.max_tokens", "type int"),
        (LEAST + "[load]\ntrust_remote_code = 'yes'", "load.trust_remote_code", "type bool"),
        (LEAST + "[load]\ntrust_remote_code = 1", "load.trust_remote_code", "type bool"),
        (LEAST + "[load]\nprompts = ['a']", "load.prompts", "a table"),
        (LEAST + "[load.prompts]\nretrieval.query = 'a'", "load.prompts.retrieval", "type str"),
        (LEAST + "[export]\noutputs = 'last_hidden_state'", "export.outputs", "a list"),
        (LEAST + "[compile]\nprofiles = 3", "compile.profiles", "a list"),
        (LEAST + "[compile]\nprofiles = [[1, 2, 3]]", "compile.profiles[0]", "a table"),
        (
            LEAST + "[[compile.profiles]]\nbatch = 8\ntokens = [1, 2, 3]",
            "compile.profiles[0].batch",
            "a list",
        ),
        (
            LEAST + "[[compile.profiles]]\nbatch = [1, 2, 3.5]\ntokens = [1, 2, 3]",
            "compile.profiles[0].batch",
            "type int",
        ),
        (LEAST + "[compile]\ntiming_cache = true", "compile.timing_cache", "type str"),
        (LEAST + "[compile]\nweight_stripped = 1", "compile.weight_stripped", "type bool"),
        (LEAST + "[compile]\nworkspace_gib = '4'", "compile.workspace_gib", "type float"),
        (LEAST + "[validate]\ngates = 1", "validate.gates", "a table"),
        (LEAST + "[validate.gates]\nfp32 = 1", "validate.gates.fp32", "a table"),
        (
            LEAST + "[validate.gates.fp32]\ncosine_min = 'high'",
            "validate.gates.fp32.cosine_min",
            "type float",
        ),
        (
            LEAST + "[validate.gates.fp32]\ncosine_min = true",
            "validate.gates.fp32.cosine_min",
            "type float",
        ),
    ],
)
def test_wrong_types_are_refused(text: str, key: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="wrong type") as caught:
        recipe.read(write(tmp_path, text))
    assert f"'{key}'" in caught.value.what
    assert wanted in caught.value.fix


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('name = ""', "name"),
        ('name = "../escape"', "name"),
        ('name = ".hidden"', "name"),
        ('name = "a b"', "name"),
        ('name = "a\\u0000b"', "name"),
        (f'name = "{"x" * 300}"', "name"),
        (LEAST + 'version = "1/2"', "version"),
        (LEAST + 'version = ""', "version"),
        (LEAST + 'precisions = ["fp23"]', "precisions"),
        (LEAST + '[load]\nrevision = "main"', "load.revision"),
        (LEAST + f'[load]\nrevision = "{"G" * 40}"', "load.revision"),
        (LEAST + '[load]\ncode_revision = "abc123"', "load.code_revision"),
        (LEAST + "[load]\nmax_tokens = -1", "load.max_tokens"),
        (LEAST + 'tasks = ["a"]\n[load.prompts]\nb = "x"', "load.prompts"),
        (LEAST + 'tasks = ["a"]\nuses = ["c"]\n[load.prompts]\nb = "x"', "load.prompts"),
        (LEAST + "[model]\nparameters = -1", "model.parameters"),
        (LEAST + "[model]\ndimension = -1", "model.dimension"),
        (LEAST + "[export]\nopset = 17", "export.opset"),
        (LEAST + "[export]\nopset = 99", "export.opset"),
        (LEAST + "[export]\noutputs = []", "export.outputs"),
        (LEAST + '[export]\noutputs = ["pooler_output"]', "export.outputs"),
        (
            LEAST + '[export]\noutputs = ["last_hidden_state", "last_hidden_state"]',
            "export.outputs",
        ),
        (LEAST + "[export]\ndimension = -3", "export.dimension"),
        (LEAST + "[compile]\nworkspace_gib = -1", "compile.workspace_gib"),
        (LEAST + "[compile]\nworkspace_gib = inf", "compile.workspace_gib"),
        (LEAST + '[compile]\nhardware_compatible = "ampere"', "compile.hardware_compatible"),
        (
            LEAST + "[[compile.profiles]]\nbatch = [1, 2]\ntokens = [1, 2, 3]",
            "compile.profiles[0].batch",
        ),
        (
            LEAST + "[[compile.profiles]]\nbatch = [1, 2, 3]\ntokens = []",
            "compile.profiles[0].tokens",
        ),
        (LEAST + "[validate]\nbudget_tokens = 0", "validate.budget_tokens"),
        (LEAST + "[validate]\nmax_tokens = 2", "validate.max_tokens"),
        (LEAST + "[validate.gates.fp32]\ncosine_min = nan", "validate.gates.fp32.cosine_min"),
        (LEAST + "[validate.gates.fp16]\ncosine_min = -inf", "validate.gates.fp16.cosine_min"),
    ],
)
def test_values_that_cannot_be_used_are_refused(text: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be used") as caught:
        recipe.read(write(tmp_path, text))
    assert f"'{key}'" in caught.value.what
    assert caught.value.evidence.startswith(f"r.toml: {key} = ")
    assert caught.value.fix.startswith("allowed: ")


@pytest.mark.parametrize("text", ["name = ", "name = 'a'\nname = 'b'", "[load", 'name = "\\q"'])
def test_broken_toml_names_the_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.toml is not valid TOML") as caught:
        recipe.read(write(tmp_path, text + "\n\n"))
    assert re.search(r"at line [12], column", caught.value.evidence)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b'name = "\xff"\n')
    with pytest.raises(RecipeError, match="is not valid TOML"):
        recipe.read(str(tmp_path / "r.toml"))


def test_missing_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'name' is missing"):
        recipe.read(write(tmp_path, 'version = "1"'))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("jina-embedings-v3", "did you mean 'jina-embeddings-v3'?"),
        ("bge_m3", "did you mean 'bge-m3'?"),
        ("labse", "did you mean 'LaBSE'?"),
        ("BAAI/BGE-M3", "did you mean 'bge-m3'?"),
        ("Qwen3-Embedding", "did you mean 'Qwen3-Embedding-"),
        ("no/such.toml", "jexport recipe list"),
        ("x" * 5000, "jexport recipe list"),
        ("", "jexport recipe list"),
        (".", "jexport recipe list"),
    ],
)
def test_no_such_recipe(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match="no recipe") as caught:
        recipe.read(name)
    assert hint in caught.value.fix
    assert "path of a .toml file" in caught.value.fix


def test_shipped_recipes() -> None:
    assert len(recipe.names()) >= 27
    assert {"all-MiniLM-L6-v2", "jina-embeddings-v3", "bge-m3", "LaBSE"} < set(recipe.names())
    jina = recipe.read("jina-embeddings-v3")
    assert jina.load.model == "jinaai/jina-embeddings-v3"
    assert jina.load.licence == "CC-BY-NC-4.0"
    assert len(jina.tasks) == 5
    assert jina.validate.gates["fp32"]["cosine_min"] >= 0.99999
    assert jina.validate.gates["fp16"]["cosine_min"] >= 0.999
    for name in recipe.names():
        shipped = recipe.read(name)
        assert shipped.name == name
        assert shipped.load.model.rsplit("/", 1)[1] == name
        assert shipped.model.parameters > 10**6
        assert shipped.model.dimension >= 256
        assert shipped.model.languages
        assert set(shipped.load.prompts) <= set(shipped.uses)
        assert set(shipped.targets) <= set(targets.names())
        assert not shipped.load.revision
        assert not shipped.load.trust_remote_code


def test_the_list_of_recipes(cli: Callable[..., Any]) -> None:
    answer = cli("recipe", "list")
    assert answer.code == 0
    assert max(map(len, answer.out.splitlines())) <= 100
    lines = [line.split() for line in answer.out.splitlines() if not line.startswith(" ")]
    assert [line[0] for line in lines[1:]] == sorted(recipe.names(), key=str.lower)
    [bge] = (line for line in lines if line[0] == "bge-m3")
    assert bge[1:] == ["568", "M", "1024", "multilingual", "mit"]
    rows = json.loads(cli("recipe", "list", "--json").out)
    assert len(rows) == len(recipe.names())
    [e5] = (row for row in rows if row["name"] == "e5-base-v2")
    assert e5["model"] == "intfloat/e5-base-v2"
    assert (e5["uses"], e5["tasks"], e5["dimension"]) == (["query", "document"], ["none"], 768)


def test_a_file_does_not_shadow_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jina-embeddings-v3").write_text('name = "other"')
    assert recipe.read("jina-embeddings-v3").name == "jina-embeddings-v3"
    assert recipe.read("./jina-embeddings-v3").name == "other"


PROFILES = """
[compile]
timing_cache = "timings"
hardware_compatible = "ampere_plus"
version_compatible = true
workspace_gib = 4
weight_stripped = true
profiles = [
  {batch = [1, 8, 32], tokens = [1, 64, 128]},
  {batch = [1, 2, 8], tokens = [129, 256, 512]},
]
"""


def test_keys_for_tensorrt(tmp_path: Path) -> None:
    found = recipe.read(write(tmp_path, LEAST + PROFILES))
    assert found.compile == recipe.CompileSpec(
        profiles=(
            recipe.ProfileSpec(batch=(1, 8, 32), tokens=(1, 64, 128)),
            recipe.ProfileSpec(batch=(1, 2, 8), tokens=(129, 256, 512)),
        ),
        timing_cache="timings",
        hardware_compatible="ampere_plus",
        version_compatible=True,
        workspace_gib=4.0,
        weight_stripped=True,
    )
    plain = json.loads(json.dumps(found.resolved()["compile"]))
    assert plain["profiles"][1] == {"batch": [1, 2, 8], "tokens": [129, 256, 512]}
    # what a manifest keeps is a recipe again
    assert recipe.from_table(found.resolved(), origin="a manifest") == found
    changed = found.replace_compile(workspace_gib=1.0)
    assert changed.compile.workspace_gib == 1.0
    assert changed.compile.profiles == found.compile.profiles


def test_a_profile_needs_both_ranges(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'compile\.profiles\[0\]\.tokens' is missing"):
        recipe.read(write(tmp_path, LEAST + "[[compile.profiles]]\nbatch = [1, 2, 3]"))


def test_recipe_is_frozen(tmp_path: Path) -> None:
    made = recipe.read(write(tmp_path, LEAST + '[load.prompts]\nnone = "p: "'))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        made.load.prompts["none"] = "q"  # type: ignore[index]
    with pytest.raises(TypeError):
        made.validate.gates["fp32"]["cosine_min"] = 0.0  # type: ignore[index]


def test_one_gate_keeps_those_of_other_precisions(tmp_path: Path) -> None:
    made = recipe.read(write(tmp_path, LEAST + "[validate.gates.fp16]\ncosine_mean = 0.5"))
    assert dict(made.validate.gates["fp16"]) == {"cosine_mean": 0.5}
    assert made.validate.gates["fp32"]["cosine_min"] == 0.99999


def test_resolved_has_every_default_and_is_json(tmp_path: Path) -> None:
    made = recipe.read(write(tmp_path, LEAST))
    resolved = made.resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["export"] == {
        "opset": 20,
        "outputs": ["last_hidden_state"],
        "dimension": 0,
        "keep_fp32": [],
    }
    assert recipe.from_table(resolved, origin="itself") == made


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/some-model", "some-model"),
        ("owner/some model!", "some-model-"),
        ("owner/some-model/", "some-model"),
        ("/", "model"),
        ("x" * 400, "x" * 60),
    ],
)
def test_a_model_without_a_recipe_is_named_after_itself(model: str, name: str) -> None:
    assert recipe.for_model(model).name == name


def test_a_folder_is_named_after_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".my model (v2)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for model in (str(folder), ".", f"{folder}/"):
        assert recipe.for_model(model).name == "my-model--v2-"


@given(st.text(max_size=80))
def test_any_model_gives_a_recipe_that_can_be_built(model: str) -> None:
    made = recipe.for_model(model)
    assert recipe.checked(made, origin="test") == made


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@given(
    key=st.sampled_from(
        [
            "name",
            "version",
            "tasks",
            "targets",
            "precisions",
            "load",
            "export",
            "compile",
            "validate",
        ]
    ),
    value=values,
    inner=st.sampled_from(
        [
            "model",
            "revision",
            "max_tokens",
            "prompts",
            "opset",
            "outputs",
            "dimension",
            "keep_fp32",
            "fuse",
            "texts",
            "budget_tokens",
            "gates",
        ]
    ),
    nested=st.booleans(),
)
def test_whatever_a_table_holds_it_is_a_recipe_or_a_recipe_error(
    key: str, value: Any, inner: str, nested: bool
) -> None:
    table: dict[str, Any] = {"name": "m", key: {inner: value} if nested else value}
    try:
        made = recipe.from_table(table, origin="test")
    except RecipeError:
        return
    json.dumps(made.resolved(), allow_nan=False)


def test_recipe_show(cli: Callable[..., Any]) -> None:
    assert cli("recipe", "show").out.split() == recipe.names()
    for name in recipe.names():
        assert json.loads(cli("recipe", "show", name, "--json").out) == recipe.read(name).resolved()
        shown = dict(
            line.split(maxsplit=1) for line in cli("recipe", "show", name).out.splitlines()
        )
        assert json.loads(shown["name"]) == name
        assert json.loads(shown["export.opset"]) == 20
        assert json.loads(shown["validate.gates.fp32.cosine_min"]) == 0.99999


def test_recipe_show_refuses_with_the_error_of_a_build(cli: Callable[..., Any]) -> None:
    answer = cli("recipe", "show", "all-MiniLM")
    assert (answer.code, answer.out) == (5, "")
    assert "did you mean 'all-MiniLM-L6-v2'?" in answer.err


def test_the_symmetric_scheme_may_have_goals_of_its_own() -> None:
    table = {"name": "m", "quantize": {"cosine_mean": 0.999, "symmetric": {"cosine_mean": 0.998}}}
    spec = recipe.from_table(table, origin="here").quantize
    assert spec.goal("cosine_mean", "uint8") == 0.999
    assert spec.goal("cosine_mean", "symmetric") == 0.998
    assert spec.goal("max_share", "symmetric") == spec.max_share
    table["quantize"] = {"symmetric": {"smoothing": 0.5}}
    with pytest.raises(RecipeError, match=r"quantize\.symmetric") as caught:
        recipe.from_table(table, origin="here")
    assert "cosine_mean, cosine_p1, top10_overlap, max_share" in str(caught.value)
