"""`jexport report` and `compare`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest, store

QUANTIZATION = {
    "format": 1,
    "scheme": "uint8",
    "precision": "int8",
    "effort": "fast",
    "reached": True,
    "calibration": {"name": "retrieval.query", "sha256": "a" * 64, "texts": 300, "tokens": 20310},
    "held_out": {"name": "held out", "sha256": "b" * 64, "texts": 60, "tokens": 4001},
    "gates": {"cosine_mean": 0.996, "cosine_p1": 0.99, "overlap": 0.92},
    "tried": [
        {
            "what": "all int8",
            "wide": [],
            "share": 0.0,
            "cosine_mean": 0.9971,
            "cosine_p1": 0.992,
            "cosine_min": 0.99,
            "overlap": 0.93,
            "passed": True,
            "seconds": 3.1,
        }
    ],
    "curve": [],
    "matrices": [
        {
            "name": f"layer/{n}/MatMul",
            "shape": [64, 64],
            "share": 0.5,
            "treatment": "int8",
            "smoothing": 0.5,
            "clip": 1.0,
            "error_naive": 0.03,
            "error": 0.004,
        }
        for n in range(2)
    ],
    "bytes": {"fp32": 90000000, "int8": 23000000},
    "command": "jexport build --precision int8",
}


@pytest.fixture
def quantized(artifact_copy: Path) -> Path:
    """A real artifact with the two files of an int8 one beside its own."""
    (artifact_copy / "quantization.json").write_text(json.dumps(QUANTIZATION))
    (artifact_copy / "report.html").write_text("<!DOCTYPE html>")
    return artifact_copy


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an artifact's manifest and seal it again."""
    content = json.loads((folder / manifest.NAME).read_text(encoding="utf-8"))
    change(content)
    content["sha256"] = manifest.seal(content)
    manifest.write_json(folder / manifest.NAME, content)


def test_report(quantized: Path, cli: Callable[..., Any]) -> None:
    answer = cli("report", quantized)
    assert (answer.code, answer.err) == (0, "")
    assert answer.path == quantized / "report.html"
    overall = manifest.read(quantized).content["parity"]["cosine_mean"]
    for wanted in (
        "The gates were reached",
        "0.99710 >= 0.996",
        f"{overall:.5f}",
        "2 of 2 layers int8",
        "0.03 -> 0.004",
        QUANTIZATION["command"],
    ):
        assert str(wanted) in answer.out, wanted


def test_report_as_json(quantized: Path, cli: Callable[..., Any]) -> None:
    told = json.loads(cli("report", quantized, "--json").out)
    assert told["page"] == str(quantized / "report.html")
    assert told["quantization"] == QUANTIZATION
    assert told["parity"] == json.loads((quantized / "parity.json").read_text(encoding="utf-8"))


def test_report_without_its_page(quantized: Path, cli: Callable[..., Any]) -> None:
    (quantized / "report.html").unlink()
    (quantized / "parity.json").unlink()
    answer = cli("report", quantized)
    assert answer.code == 0
    assert "report.html" not in answer.out
    assert json.loads(cli("report", quantized, "--json").out)["page"] is None
    answer = cli("report", quantized, "--open")
    assert answer.code == 13
    assert "report.html is missing" in answer.err


@pytest.mark.parametrize("browser", [True, False])
def test_report_opens_a_browser_where_there_is_one(
    browser: bool, quantized: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or browser)
    answer = cli("report", quantized, "--open")
    assert answer.code == 0
    assert opened == [(quantized / "report.html").as_uri()]
    assert ("no browser here" in answer.err) != browser
    cli("report", quantized)
    assert len(opened) == 1


def test_report_of_an_artifact_that_was_not_quantized(
    artifact: Path, cli: Callable[..., Any]
) -> None:
    for words in ((), ("--json",), ("--open",)):
        answer = cli("report", artifact, *words)
        assert (answer.code, answer.out) == (13, "")
        assert answer.err.splitlines() == [
            f"error: {artifact} was not quantized",
            "  there is no quantization.json in it; its precision is fp32",
            "  fix: give an int8 artifact (see `jexport list`), or `jexport inspect` this one",
        ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting"),
        ("[]", "it is not a JSON object"),
        ("[" * 100_000, "recursion"),
        ('{"format": 2}', "this jexport reads format 1"),
        ('{"scheme": "uint8"}', "has format None"),
    ],
)
def test_a_quantization_that_cannot_be_read(
    content: str, why: str, quantized: Path, cli: Callable[..., Any]
) -> None:
    (quantized / "quantization.json").write_text(content)
    for words in (("report", quantized), ("compare", quantized, quantized)):
        answer = cli(*words)
        assert (answer.code, answer.out) == (13, "")
        assert why in answer.err
        assert "  fix: " in answer.err


def test_report_and_compare_of_none(
    tmp_path: Path, artifact: Path, cli: Callable[..., Any]
) -> None:
    assert cli("report", tmp_path / "nowhere").code == 13
    assert cli("compare", artifact, tmp_path / "nowhere").code == 13
    assert cli("compare", tmp_path / "nowhere", artifact).code == 13


def marked(out: str) -> dict[str, bool]:
    """Per row of `compare` whether it is marked, by name."""
    head, *lines = out.split("\n\n")[1].splitlines()
    width = head.index("A")
    named = [(line[2:width].strip(), line.startswith("*")) for line in lines]
    return {name: mark for name, mark in named if name}


def test_compare_with_itself(artifact: Path, cli: Callable[..., Any]) -> None:
    answer = cli("compare", artifact, artifact)
    assert answer.code == 0
    assert not any(marked(answer.out).values())
    assert "one embedding space" in answer.out
    assert "do not compare" not in answer.out
    told = json.loads(cli("compare", artifact, artifact, "--json").out)
    assert told["same_space"] is told["same_parity_texts"] is True
    assert not any(row["differs"] for row in told["rows"])


def test_compare_marks_what_differs(
    artifact: Path, quantized: Path, cli: Callable[..., Any]
) -> None:
    def as_int8(content: dict[str, Any]) -> None:
        content["precision"] = "int8"
        content["version"] = "9.9.9-0123456789ab"
        content["parity"]["cosine_mean"] = 0.99712
        content["files"][0]["size_bytes"] += 5 << 20

    changed(quantized, as_int8)
    answer = cli("compare", artifact, quantized)
    assert answer.code == 0, answer.err
    assert answer.out.startswith(f"A  {artifact}\nB  {quantized}\n\n")
    differing = {name for name, mark in marked(answer.out).items() if mark}
    assert differing == {
        "precision",
        "version",
        "size",
        "cosine, mean",
        "scheme",
        "matrices",
        "held-out cosine",
        "held-out top-10",
        "calibrated with",
    }
    assert {"name", "task", "target", "dimension", "embedding space", "cosine, lowest"} <= set(
        marked(answer.out)
    )
    [line] = [line for line in answer.out.splitlines() if line[2:].startswith("matrices")]
    assert line.split() == ["*", "matrices", "-", "2", "int8"]
    assert "one embedding space" in answer.out
    told = json.loads(cli("compare", artifact, quantized, "--json").out)
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["precision"] == {
        "name": "precision",
        "a": "fp32",
        "b": "int8",
        "differs": True,
    }
    assert rows["matrices"]["b"] == {"int8": 2}
    assert rows["matrices"]["a"] is None
    assert rows["size"]["b"] - rows["size"]["a"] == 5 << 20
    # the other way round, the rows that only one has are still there
    assert set(marked(cli("compare", quantized, artifact).out)) == set(rows)


def test_compare_of_two_spaces_and_two_sets_of_texts(
    artifact: Path, artifact_copy: Path, cli: Callable[..., Any]
) -> None:
    changed(artifact_copy, lambda content: content["embedding"].update(space="0" * 64))
    parity = json.loads((artifact_copy / "parity.json").read_text(encoding="utf-8"))
    parity["texts"]["sha256"] = "1" * 64
    (artifact_copy / "parity.json").write_text(json.dumps(parity), encoding="utf-8")
    answer = cli("compare", artifact, artifact_copy)
    assert {name for name, mark in marked(answer.out).items() if mark} == {
        "embedding space",
        "parity texts",
    }
    assert "the embedding spaces differ" in answer.out
    assert "its numbers do not compare" in answer.out
    told = json.loads(cli("compare", artifact, artifact_copy, "--json").out)
    assert told["same_space"] is told["same_parity_texts"] is False


def test_compare_shows_the_speed_of_its_own_precision(
    artifact: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = [
        {"precision": "int8", "texts_per_second": 241.77},
        {"precision": "fp32", "texts_per_second": 103.2},
    ]
    monkeypatch.setattr(store, "measured", lambda folder: {"speed": speed})
    out = cli("compare", artifact, artifact).out
    assert "103.2 texts/s" in out
    assert "241.8" not in out


def test_compare_says_what_follows(
    artifact: Path, quantized: Path, cli: Callable[..., Any]
) -> None:
    speed = [
        {"precision": "fp32", "texts_per_second": 100.0},
        {"precision": "int8", "texts_per_second": 250.0},
    ]

    def as_int8(content: dict[str, Any]) -> None:
        content.update(precision="int8")
        for entry in content["files"]:
            entry["size_bytes"] *= 2

    changed(quantized, as_int8)
    place = store.Artifact(path=quantized, manifest=manifest.read(quantized))
    store.keep_measured(place, {"speed": speed}, work_dir=quantized.parent)
    out = cli("compare", artifact, quantized).out
    assert "B takes 200.0 % of the bytes of A" in out
    # the float artifact measured nothing itself: both rates are of the int8 one's build
    assert "B does 2.50 times the texts per second of A" in out
    out = cli("compare", quantized, artifact).out
    assert "B takes 50.0 % of the bytes of A" in out
    assert "B does 0.40 times the texts per second of A" in out
    out = cli("compare", artifact, artifact).out
    assert "times the texts" not in out
    assert "of the bytes" not in out
    changed(quantized, lambda content: content.update(task="another"))
    assert "times the texts" not in cli("compare", artifact, quantized).out


@pytest.mark.parametrize("columns", [60, 80])
def test_no_line_is_wider_than_the_terminal(
    columns: int, quantized: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def worded(content: dict[str, Any]) -> None:
        content["embedding"]["prompt"] = "a prompt of so many words " * 9
        content["checkpoint"]["name"] = "x" * 200

    changed(quantized, worded)
    monkeypatch.setenv("COLUMNS", str(columns))
    told = cli("compare", quantized, quantized).out
    lines = [line for line in told.splitlines() if str(quantized) not in line]
    assert max(map(len, lines)) <= columns
    assert told.count("x") >= 400, "nothing is left out"
    assert told.count("\x1b") == 0
    lines = [
        line
        for line in cli("report", quantized).out.splitlines()
        if str(quantized) not in line and not line.startswith("jexport build")
    ]
    assert max(map(len, lines)) <= columns


def test_a_link_named_latest_is_as_good(quantized: Path, cli: Callable[..., Any]) -> None:
    (quantized.parent / "latest").symlink_to(quantized.name)
    assert cli("report", quantized.parent / "latest").code == 0
    shutil.rmtree(quantized)
    assert cli("report", quantized.parent / "latest").code == 13
