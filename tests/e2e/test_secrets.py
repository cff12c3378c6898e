"""No secret comes into a manifest, a log line or an error, wherever it was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jexport.errors import HubError, RecipeError
from jexport.recipe import LoadSpec, Recipe
from jexport.redact import hidden

TOKEN = "hf_" + "Abc123XYZ789defG"
PASSWORD = "s3cret-pw"
ADDRESS = f"https://anna:{PASSWORD}@models.example.org/acme/model"


def told(answer: Any) -> str:
    return str(answer.out + answer.err)


def test_a_token_in_the_environment_is_nowhere_in_an_artifact(
    canned: Any,
    as_separation: Sequence[object],
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("HTTPS_PROXY", f"http://anna:{PASSWORD}@proxy.example.org:3128")
    answer = cli(*as_separation, "--json", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 8
    for secret in (TOKEN, PASSWORD):
        assert secret not in told(answer)
        assert not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("model", [ADDRESS, f"acme/model?token={TOKEN}", f"acme/{TOKEN}"])
@pytest.mark.parametrize("json_lines", [False, True])
def test_a_model_with_a_secret_is_refused_unsaid(
    model: str, json_lines: bool, cli: Callable[..., Any], nothing_left: Path
) -> None:
    words = ("--json",) if json_lines else ()
    answer = cli(
        "build",
        "--model",
        model,
        "--task",
        "none",
        "--target",
        "onnx",
        "--out",
        nothing_left,
        *words,
    )
    assert answer.code == 5
    assert "holds a password or a token" in answer.err
    assert "***" in answer.err
    assert PASSWORD not in told(answer)
    assert TOKEN not in told(answer)


@pytest.mark.parametrize(
    "line",
    [
        f'[load]\nmodel = "{ADDRESS}"',
        f'[load]\nmodel = "acme/model"\nlicence = "{TOKEN}"',
        f'[quantize]\ncalibration = "{ADDRESS}"',
        f'[export]\nkeep_fp32 = ["{TOKEN}"]',
        f'[load]\nprompts = {{none = "{TOKEN}"}}',
        f'tasks = ["{TOKEN}"]',
    ],
)
def test_a_recipe_with_a_secret_is_refused_unsaid(
    line: str, cli: Callable[..., Any], tmp_path: Path, nothing_left: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'name = "r"\n{line}')
    answer = cli(
        "build", "--recipe", recipe, "--task", "none", "--target", "onnx", "--out", nothing_left
    )
    assert answer.code == 5, answer.err
    assert PASSWORD not in told(answer)
    assert TOKEN not in told(answer)


def test_nor_through_the_library() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(name="r", load=LoadSpec(model=ADDRESS))
    assert PASSWORD not in str(caught.value) + repr(caught.value) + repr(vars(caught.value))
    with pytest.raises(RecipeError):
        Recipe(name="r").replace_load(model=ADDRESS)


def test_errors_of_others_are_quoted_without_them() -> None:
    error = HubError(
        f"cannot get {ADDRESS}",
        evidence=f"401 for {ADDRESS}?token=abcdef, Authorization: Bearer {'x' * 20}, {TOKEN}",
        fix=f"look at {ADDRESS}",
    )
    error.add_note(f"  seen at {ADDRESS}")
    shown = str(error) + repr(error) + json.dumps(vars(error))
    for secret in (PASSWORD, TOKEN, "abcdef", "x" * 20):
        assert secret not in shown
    assert "https://***@models.example.org/acme/model" in shown


@pytest.mark.parametrize(
    "text",
    [
        "acme/model",
        "https://models.example.org/a@b",
        "anna@example.org",
        "hf_hub",
        "bearer of news",
        "/home/anna/models",
        "query: ",
        "what is a token=?",
        "s3://bucket/key@sha256:00",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hidden(text) == text
