"""Jobs on a real Ray cluster of four nodes on this machine, in an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest

STAGES = ["load", "merge", "compile", "validate", "package"]
"""Of a build for the target hf."""


@pytest.fixture(scope="module")
def told(run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What cluster.py saw, once for all checks; artifacts are still there."""
    room = tmp_path_factory.mktemp("ray")
    home = tmp_path_factory.mktemp("home")
    printed = run("ray", "tests/servers/ray/cluster.py", room, home=home)
    return json.loads(printed.splitlines()[-1])


def test_each_job_ran_where_it_has_what_it_needs(told: Any) -> None:
    placed = told["placed"]
    assert len(placed["spots"]) == 6
    for key, spot in placed["spots"].items():
        if key.endswith("L4"):
            assert spot["kinds"] == ["L4"]
            assert spot["resources"]["L4"] == 1
        if key.endswith("T4"):
            assert spot["kinds"] == ["accelerator_type:T4"]
            assert spot["resources"]["GPU"] == 1
        assert spot["resources"]["memory"] == 2**28


def test_artifacts_came_back_whole_and_events_in_order(told: Any) -> None:
    placed = told["placed"]
    for key, result in placed["results"].items():
        assert (result["error"], result["attempts"]) == ("", 1)
        found = manifest.verify(Path(result["artifact"])).content
        assert found["sha256"] == result["digest"]
        assert placed["heard"][key] == [" begin", "cluster note", "compile note", " end"]
    assert placed["latest"] in ("1.0.0-cpu", "1.0.0-L4", "1.0.0-T4")
    assert placed["left"] == [], "a node keeps nothing of a job"


def test_an_artifact_that_is_here_is_not_sent_again(told: Any) -> None:
    [(key, again)] = told["placed"]["again"].items()
    assert again == told["placed"]["results"][key]


def test_errors_of_a_job_come_whole_and_are_not_tried_again(told: Any) -> None:
    results = told["refused"]["results"]
    refused = results["refused-hf-fp32"]
    assert (refused["error"], refused["exit_code"], refused["attempts"]) == ("ParityError", 6, 1)
    text, report = refused["text"].split("\n  report: ")
    assert text == "validate: a gate failed\n  cosine 0.5\n  in 'xx'\n  fix: mend"
    assert Path(report).read_text() == "{}", "it came along, and the error says where it is here"
    bug = results["bug-hf-fp32"]
    assert bug["attempts"] == 1
    assert "in raises" in bug["text"], "the traceback of the node"
    assert "ValueError: what nobody foresaw" in bug["text"]


def test_a_job_that_is_killed_each_time_ends(told: Any) -> None:
    killed = told["refused"]["results"]["killed-hf-fp32"]
    assert (killed["error"], killed["attempts"]) == ("ClusterError", 2)
    assert "was lost 2 times" in killed["text"]


def test_what_no_node_has_is_refused_before_any_job_starts(told: Any) -> None:
    never = told["refused"]["never"]
    assert "no node has a GPU of the kind H100" in never["kind"]
    assert "which name: L4, T4" in never["kind"]
    assert "it takes 1024.0 GiB" in never["memory"]
    assert "never" not in told["refused"]["out"], "a folder that nothing was put into"
    assert "no Ray cluster at '127.0.0.1:9'" in told["nowhere"]


def test_a_checkpoint_is_sent_once_by_digest(told: Any) -> None:
    shipped = told["shipped"]
    assert shipped["same"]
    assert shipped["once"]
    assert shipped["own"], "a node that has it at the same path reads that"
    assert Path(shipped["name"]).name == "toy"
    assert shipped["left"] == ["toy"]
    assert shipped["stranger"] == "refused"


def test_a_build_on_the_cluster_makes_the_same_files(told: Any) -> None:
    assert told["built"]["stages"] == STAGES
    assert told["built"]["ends"] == ["begin", "end", True]
    assert told["built"]["sha256"] == told["local"]
    manifest.verify(Path(told["built"]["path"]))


def test_ctrl_c_ends_the_jobs_on_the_nodes(told: Any) -> None:
    interrupted = told["interrupted"]
    assert interrupted["ended"] == "interrupted"
    assert interrupted["seconds"] < 60
    assert len(interrupted["beats"]) == 2
    assert min(interrupted["beats"]) >= 1, "both were at work"
    assert interrupted["later"] == interrupted["beats"], "and neither is any more"
    assert interrupted["left"] == []
    assert not interrupted["out"]


def test_the_job_of_a_killed_node_runs_again_on_the_other(told: Any) -> None:
    lost, undisturbed = told["lost"], told["placed"]["results"]
    kept, moved = "a-hf-fp32-L4", "b-hf-fp32-L4"
    assert [lost["results"][key]["attempts"] for key in (kept, moved)] == [1, 2]
    first, second = lost["at"][moved]
    assert first != second
    assert second == lost["at"][kept][0], "the only node of that kind that was left"
    assert any("was lost (" in note for note in lost["notes"])
    for key in (kept, moved):
        assert lost["results"][key]["digest"] == undisturbed[key]["digest"]


def test_a_kind_that_is_gone_ends_its_job_only(told: Any) -> None:
    results = told["gone"]["results"]
    assert results["a-hf-fp32-T4"]["error"] == "ClusterError"
    assert "no node has a GPU of the kind T4" in results["a-hf-fp32-T4"]["text"]
    assert results["b-hf-fp32"]["artifact"]
