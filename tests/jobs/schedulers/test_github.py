"""The GitHub matrix, and the workflow that reads it, against the schema of workflows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jexport import recipe
from jexport.cli.publish import publish as publishing
from jexport.cli.publish import pull as pulling
from jexport.cli.sign import policy, signer
from jexport.errors import MatrixError
from jexport.jobs import matrix, schedulers
from jexport.jobs.matrix import Job
from jexport.jobs.schedulers import Origin, Step, Wishes
from jexport.publishing import signing

RECIPE = recipe.read("jina-embeddings-v3")
FOLDER = Path(__file__).parents[3] / ".github" / "workflows"
STEPS = schedulers.steps(
    matrix.asked(RECIPE, gpus=["L4", "T4"]),
    Origin(name=RECIPE.name, words=("--recipe", RECIPE.name)),
)


def written(steps: Any = STEPS, **wishes: Any) -> dict[str, Any]:
    text = schedulers.load("github").write(steps, Wishes(**wishes))
    assert text.count("\n") == 1, "one line, for $GITHUB_OUTPUT"
    content: dict[str, Any] = json.loads(text)
    return content


def workflow(name: str) -> dict[str, Any]:
    """YAML 1.1 reads the key `on` as true; GitHub reads it as a word."""
    content = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in content.items()}


def test_the_matrix_is_one_of_a_workflow(workflow_problems: Callable[[Any], list[str]]) -> None:
    job = {"runs-on": "${{ matrix.runs_on }}", "steps": [{"run": "x"}]}
    whole: dict[str, Any] = {"on": "push", "jobs": {"build": job}}
    strategy = {"matrix": written()}
    assert not workflow_problems({**whole, "jobs": {"build": {**job, "strategy": strategy}}})
    # Guards the line above: the schema does look into a matrix, and at the labels of runners.
    assert workflow_problems(
        {**whole, "jobs": {"build": {**job, "strategy": {"matrix": {"include": ["a"]}}}}}
    )
    for entry in written()["include"]:
        assert not workflow_problems({**whole, "jobs": {"a": {**job, "runs-on": entry["runs_on"]}}})


def test_every_entry_carries_its_command() -> None:
    entries = written(publish="oci://h/n")["include"]
    assert [tuple(shlex.split(entry["command"])) for entry in entries] == [
        step.words for step in STEPS
    ]
    assert {entry["publish"] for entry in entries} == {"oci://h/n"}
    kinds = {tuple(entry["runs_on"]) for entry in entries if entry["phase"] == "compile"}
    assert kinds == {("self-hosted", "linux", "gpu", f"gpu-{kind}") for kind in ("l4", "t4")}


def test_two_matrices_where_the_second_needs_the_first() -> None:
    first, second = (written(phases=[phase])["include"] for phase in schedulers.PHASES)
    assert len(first) + len(second) == len(STEPS)
    carried = {entry["name"] for entry in first if entry["carry"]}
    assert carried == {entry["needs"] for entry in second}
    assert not any(entry["carry"] for entry in second)
    assert written(STEPS[:1], phases=["compile"]) == {"include": []}


def test_a_matrix_has_256_jobs_at_most() -> None:
    many = [
        Step(
            name=str(n),
            phase="build",
            words=("x",),
            artifact="",
            job=Job(task=str(n), target="onnx", precision="fp32"),
        )
        for n in range(257)
    ]
    assert len(written(many[:256])["include"]) == 256
    with pytest.raises(MatrixError, match="257 jobs do not fit one matrix"):
        written(many)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yml")))
def test_workflows_are_as_the_schema_says(
    name: str, workflow_problems: Callable[[Any], list[str]]
) -> None:
    content = workflow(name)
    assert not workflow_problems(content)
    job = next(iter(content["jobs"].values()))
    assert workflow_problems({**content, "jobs": {"a": {**job, "run-on": "x"}}})
    assert workflow_problems({**content, "permissions": {"contents": "everything"}})


def test_actions_of_the_build_are_pinned_to_commits() -> None:
    used = re.findall(r"uses: (\S+)(.*)", (FOLDER / "build.yml").read_text(encoding="utf-8"))
    assert len(used) >= 6
    for action, note in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action)
        assert re.search(r"# v\d+\.\d+\.\d+", note), "which release that commit is"


def test_the_build_grants_little_and_puts_no_input_into_a_script() -> None:
    content = workflow("build.yml")
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        publishes = {"contents": "read", "packages": "write", "id-token": "write"}
        assert job.get("permissions", {}) in ({}, publishes)
        assert job["timeout-minutes"] <= 360  # of a hosted runner
        for step in job["steps"]:
            assert "${{" not in step.get("run", ""), step["name"]
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
    assert "secrets." not in (FOLDER / "build.yml").read_text(encoding="utf-8")


def test_the_build_reads_only_what_the_matrix_says() -> None:
    content = workflow("build.yml")
    for phase in schedulers.PHASES:
        text = json.dumps(content["jobs"][phase])
        used = set(re.findall(r"(?<!needs\.)matrix\.(\w+)", text))
        assert used
        assert used <= set(written(phases=[phase])["include"][0]), phase
    listing = content["jobs"]["matrix"]["steps"][-1]
    inputs = content["on"]["workflow_dispatch"]["inputs"]
    assert set(listing["env"]) == {name.upper() for name in inputs} - {"SIGN"}


def script_of(job: str, step: str) -> str:
    steps = workflow("build.yml")["jobs"][job]["steps"]
    found: str = next(one["run"] for one in steps if one.get("name") == step)
    return found


def run_script(script: str, room: Path, program: str, **variables: str) -> dict[str, str]:
    """A step of the workflow in the shell that GitHub gives it; what it put out."""
    (room / "jexport").write_text(f"#!/bin/sh\n{program}\n")
    (room / "jexport").chmod(0o755)
    environ = {
        **os.environ,
        **variables,
        "PATH": f"{room}:{os.environ['PATH']}",
        "GITHUB_OUTPUT": str(room / "output"),
    }
    subprocess.run(["bash", "-e", "-c", script], env=environ, cwd=room, check=True)
    lines = (room / "output").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_the_workflow_lists_the_jobs(tmp_path: Path) -> None:
    """The step itself, with jexport itself."""
    source = str(Path(str(schedulers.__file__)).parents[3])
    out = run_script(
        script_of("matrix", "List the jobs"),
        tmp_path,
        f'exec "{sys.executable}" -m jexport "$@"',
        RECIPE=RECIPE.name,
        TASK="all",
        TARGET="",
        PRECISION="fp16",
        GPU="L4",
        PUBLISH="oci://h/n",
        ACCEPT_LICENCE="--accept-licence",
        PYTHONPATH=source,
    )
    assert set(out) == set(schedulers.PHASES)
    tasks = {entry["task"] for entry in json.loads(out["build"])["include"]}
    assert tasks == set(RECIPE.tasks)
    flags = {entry["publish_flags"] for entry in json.loads(out["build"])["include"]}
    assert flags == {"--accept-licence"}
    assert {entry["gpu"] for entry in json.loads(out["compile"])["include"]} == {"L4"}


@pytest.mark.parametrize("phase", schedulers.PHASES)
def test_the_workflow_runs_the_command_of_an_entry(phase: str, tmp_path: Path) -> None:
    entry = written(phases=[phase])["include"][0]
    out = run_script(
        script_of(phase, phase.capitalize()),
        tmp_path,
        f'echo "$@" > "{tmp_path}/asked"; echo made/it',
        COMMAND=entry["command"],
    )
    assert out == {"made": "made/it"}
    assert (tmp_path / "asked").read_text().split() == shlex.split(entry["command"])[1:]


@pytest.mark.parametrize("phase", schedulers.PHASES)
def test_the_workflow_signs_by_its_own_identity(phase: str) -> None:
    """Not run: it needs GitHub and Sigstore. What it says is what `jexport publish` takes."""
    content = workflow("build.yml")
    job = content["jobs"][phase]
    assert job["permissions"]["id-token"] == "write"
    step = next(one for one in job["steps"] if one.get("name") == "Publish")
    found = re.fullmatch(r"\$\{\{ inputs\.sign && '(.+)' \|\| '' \}\}", step["env"]["SIGN"])
    assert found is not None
    words = ["artifact", "oci://h/n", "--quiet", *found[1].split()]
    said = publishing.make_context("publish", words).params
    assert said["sign"]
    who = signer(
        key=said["key"],
        certificate=said["certificate"],
        chain=said["chain"],
        sigstore=said["sigstore"],
    )
    assert who == signing.Signer()  # no key: the machine's own identity
    assert content["on"]["workflow_dispatch"]["inputs"]["sign"]["default"] is True
    install = [one["run"] for one in job["steps"] if one.get("name", "").startswith("Install")]
    assert "requirements.lock" in install[0]
    assert ("[trt,sign]" in install[0]) == (phase == "compile")


def test_the_identity_that_the_workflow_names_can_be_asked_for() -> None:
    """The words in its comment are those of `jexport pull`, and make a policy."""
    text = (FOLDER / "build.yml").read_text(encoding="utf-8")
    told = re.search(r"jexport (pull REF DIR(?: \\\n#)? .+?)\n# \(", text, re.DOTALL)
    assert told is not None
    words = shlex.split(told[1].replace("\\\n#", " "))
    said = pulling.make_context("pull", words[1:]).params
    asked = policy(**{key: said[key] for key in ("key", "identity", "issuer", "chain")})
    assert asked is not None
    assert asked.identity.endswith("/.github/workflows/build.yml@refs/heads/main")
    assert asked.issuer == "https://token.actions.githubusercontent.com"
    named = "https://github.com/OWNER/REPO/.github/workflows/"
    assert asked.identity.startswith(named + Path(FOLDER / "build.yml").name)


@pytest.mark.parametrize("sign", ["", "--sign --sigstore"])
@pytest.mark.parametrize("phase", schedulers.PHASES)
def test_the_workflow_publishes_and_tells_the_ref(phase: str, sign: str, tmp_path: Path) -> None:
    (tmp_path / "output").touch()
    run_script(
        script_of(phase, "Publish"),
        tmp_path,
        f'echo "$@" > "{tmp_path}/asked"; echo a/ref@sha256:1',
        MADE="a folder/it",
        PUBLISH="oci://h/n",
        FLAGS="--accept-licence",
        SIGN=sign,
        GITHUB_STEP_SUMMARY=str(tmp_path / "summary"),
    )
    asked = (tmp_path / "asked").read_text()
    assert asked == f"publish a folder/it oci://h/n --quiet --accept-licence {sign}".strip() + "\n"
    assert (tmp_path / "summary").read_text() == "a/ref@sha256:1\n"
