"""The front door is light: `import jexport` and `jexport --help` load no framework."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jexport

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "sentence_transformers",
    "scipy",
    "jinja2",
)
COMMANDS = (
    "build",
    "embed",
    "matrix",
    "package",
    "verify",
    "inspect",
    "list",
    "recipe",
    "doctor",
    "toy",
)
PROGRAM = Path(sys.executable).with_name("jexport")


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running this code."""
    report = "import sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def running(*words: str) -> str:
    return (
        "import sys\nfrom jexport.cli import main\n"
        f"sys.argv = {['jexport', *words]!r}\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code"
    )


def test_import_loads_no_framework() -> None:
    found = loaded_after("import jexport")
    assert "jexport" in found
    assert not found & {*HEAVY, "numpy", "click"}


def test_help_loads_no_framework_and_no_numpy() -> None:
    assert not loaded_after(running("--help")) & {*HEAVY, "numpy"}
    assert not loaded_after(running("--version")) & {*HEAVY, "numpy"}


def test_help_of_every_command_loads_no_framework() -> None:
    code = "\n".join(running(command, "--help") for command in COMMANDS)
    assert not loaded_after(code) & {*HEAVY, "numpy"}


def test_refusals_that_need_no_framework_load_none() -> None:
    code = running("build", "--task", "none", "--target", "onxx").replace("== 0", "== 4")
    assert not loaded_after(code) & set(HEAVY)


def processor_s(command: list[str]) -> float:
    """The least processor time of five runs: what an idle machine takes, beside other tests."""
    took_s = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, capture_output=True, check=True)
        after = os.times()
        user_s = after.children_user - before.children_user
        took_s.append(user_s + after.children_system - before.children_system)
    return min(took_s)


@pytest.mark.parametrize("command", [[str(PROGRAM)], [sys.executable, "-m", "jexport"]])
def test_help_answers_at_once(command: list[str]) -> None:
    # Cores that are shared count more seconds for the same work, also for this yardstick.
    yardstick_s = processor_s([sys.executable, "-c", "import click, importlib.metadata"])
    assert processor_s([*command, "--help"]) < max(0.3, 3 * yardstick_s)
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


def test_names_of_the_front_door() -> None:
    from jexport.building.pipeline import build
    from jexport.recipe import Recipe
    from jexport.runtime.open import open_artifact

    assert jexport.build is build
    assert jexport.open_artifact is open_artifact
    assert jexport.Recipe is Recipe
    with pytest.raises(AttributeError, match="opne_artifact"):
        _ = jexport.opne_artifact


def test_version_is_the_installed_one() -> None:
    from importlib import metadata

    done = subprocess.run(
        [PROGRAM, "--version"], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == f"jexport {metadata.version('jexport')}\n"
    assert jexport.__version__ == metadata.version("jexport")
