"""`jexport embed`: .txt, .jsonl and stdin to .npy and .jsonl, and what it refuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport

TEXTS = ["one", "", "drei Wörter hier", "四", "a rather longer text than the others " * 5]


@pytest.fixture(scope="module")
def wanted(artifact: Path) -> np.ndarray:
    with jexport.open_artifact(artifact) as model:
        return model.encode(TEXTS)


def as_txt(texts: list[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def as_jsonl(texts: list[str]) -> bytes:
    lines = [json.dumps(t if n % 2 else {"text": t, "id": n}) for n, t in enumerate(texts)]
    return "".join(f"{line}\n" for line in lines).encode()


def read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    lines = path.read_text().splitlines()
    return np.array([json.loads(line) for line in lines], dtype=np.float32)


@pytest.mark.parametrize("output", ["out.npy", "out.jsonl"])
@pytest.mark.parametrize("source", ["in.txt", "in.jsonl", "-", "- as jsonl", "other --format"])
def test_every_input_to_every_output(
    source: str,
    output: str,
    artifact: Path,
    cli: Callable[..., Any],
    wanted: np.ndarray,
    tmp_path: Path,
) -> None:
    words: list[object] = ["embed", artifact, "--output", tmp_path / output]
    content = as_jsonl(TEXTS) if "jsonl" in source else as_txt(TEXTS)
    if source.startswith("in."):
        (tmp_path / source).write_bytes(content)
        answer = cli(*words, "--input", tmp_path / source)
    elif source.startswith("other"):
        (tmp_path / "other").write_bytes(content)
        answer = cli(*words, "--input", tmp_path / "other", "--format", "txt")
    else:
        kind = ["--format", "jsonl"] if "jsonl" in source else []
        answer = cli(*words, "--input", "-", *kind, stdin=content)
    assert answer.code == 0, answer.err
    assert answer.out == f"{tmp_path / output}\n"
    assert "5 texts in" in answer.err
    vectors = read(tmp_path / output)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)


def test_quiet_prints_the_path_alone(
    artifact: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    long = as_txt(["word " * 9000])
    words = ("embed", artifact, "--input", "-", "--output", tmp_path / "o.npy", "--quiet")
    answer = cli(*words, stdin=long)
    assert (answer.code, answer.err, answer.out) == (0, "", f"{tmp_path / 'o.npy'}\n")
    told = cli(*words[:-1], stdin=long)
    assert "truncated 1 texts to 8,192 tokens" in told.err


def test_options(
    artifact: Path, cli: Callable[..., Any], wanted: np.ndarray, tmp_path: Path
) -> None:
    def vectors(*options: object) -> np.ndarray:
        words = ("embed", artifact, "--input", "-", "--output", tmp_path / "o.npy", *options)
        answer = cli(*words, stdin=as_txt(TEXTS))
        assert answer.code == 0, answer.err
        return read(tmp_path / "o.npy")

    with jexport.open_artifact(artifact) as model:
        cut = model.encode(TEXTS, dimensions=32)
        raw = model.encode(TEXTS, normalize=False)
        bare = model.encode(TEXTS, prompt=False)
    np.testing.assert_allclose(vectors("--dimensions", 32), cut, atol=1e-6)
    np.testing.assert_allclose(vectors("--no-normalize"), raw, atol=1e-5)
    np.testing.assert_allclose(vectors("--no-prompt"), bare, atol=1e-6)
    np.testing.assert_allclose(vectors("--batch-tokens", 1), wanted, atol=1e-6)
    np.testing.assert_allclose(vectors("--threads", 1, "--device", "cpu"), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "options", "code", "said"),
    [
        (b"good\n\xff\xfebad\n", [], 11, "line 2"),
        (b'"good"\n{"text": 3}\n', ["--format", "jsonl"], 11, "line 2"),
        (b'{"no": "text"}\n', ["--format", "jsonl"], 11, 'no "text"'),
        (b"not json\n", ["--format", "jsonl"], 11, "not JSON"),
        (b"ok\n" + b"word " * 9000, ["--no-truncate"], 21, "text 1 is too long"),
        (b"ok\n", ["--dimensions", 0], 23, "16, 32, 64"),
        (b"ok\n", ["--dimensions", 65], 23, "16, 32, 64"),
        (b"ok\n", ["--dimensions", -1], 23, "16, 32, 64"),
        (b"ok\n", ["--device", "cuda"], 15, "jexport[gpu]"),
    ],
)
def test_bad_input_is_one_error_and_leaves_the_old_output(
    content: bytes,
    options: list[object],
    code: int,
    said: str,
    artifact: Path,
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    output = tmp_path / "out.npy"
    output.write_bytes(b"kept")
    answer = cli("embed", artifact, "--input", "-", "--output", output, *options, stdin=content)
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.startswith("error: ")
    assert said in answer.err
    assert "  fix: " in answer.err
    assert [p.name for p in tmp_path.iterdir()] == ["out.npy"]
    assert output.read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("source", "output", "code", "said"),
    [
        ("nowhere.txt", "o.npy", 2, "there is no file"),
        (".", "o.npy", 2, "there is no file"),
        ("in.pdf", "o.npy", 2, "--format"),
        ("in.txt", "o.parquet", 26, ".npy"),
        ("in.txt", "no/such/folder/o.npy", 26, "folder that exists"),
        ("in.txt", "in.txt/o.npy", 26, "cannot be written"),
        ("in.jsonl", "in.jsonl", 2, "would replace the input"),
    ],
)
def test_wrong_files(
    source: str,
    output: str,
    code: int,
    said: str,
    artifact: Path,
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    for name in ("in.txt", "in.pdf", "in.jsonl"):
        (tmp_path / name).write_text('"x"\n')
    before = sorted(p.name for p in tmp_path.iterdir())
    answer = cli("embed", artifact, "--input", tmp_path / source, "--output", tmp_path / output)
    assert (answer.code, answer.out) == (code, "")
    assert said in answer.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "in.jsonl").read_text() == '"x"\n'


@pytest.mark.parametrize("name", [".", "nowhere", "file"])
def test_what_is_no_artifact(name: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = cli("embed", tmp_path / name, "--input", "-", "--output", tmp_path / "o.npy")
    assert answer.code == 13
    assert "is not a jexport artifact" in answer.err


def test_a_changed_artifact_is_refused(
    artifact_copy: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    (artifact_copy / "tokenizer.json").write_text("{}")
    answer = cli("embed", artifact_copy, "--input", "-", "--output", tmp_path / "o.npy")
    assert answer.code == 13
    assert "changed: tokenizer.json" in answer.err


def test_nothing_in_nothing_out(artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    answer = cli("embed", artifact, "--input", "-", "--output", tmp_path / "o.npy")
    assert answer.code == 0
    assert read(tmp_path / "o.npy").shape == (0, 64)


def test_a_terminal_gets_a_progress_bar(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a short text\n" * 3000)
    seen = in_terminal(
        "embed",
        str(artifact),
        "--input",
        str(tmp_path / "in.txt"),
        "--output",
        str(tmp_path / "o.npy"),
        "--batch-tokens",
        "64",
    )
    assert "#" in seen
    assert " %" in seen
    assert "texts, " in seen
    assert "3,000 texts in" in seen.splitlines()[-1]
    assert len(read(tmp_path / "o.npy")) == 3000


def in_terminal(*words: str) -> str:
    """What a command writes to a terminal on stderr."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jexport", *words], stderr=theirs, stdout=subprocess.DEVNULL
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says EIO when the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait() == 0
    return seen.decode()


def test_an_artifact_of_another_task(cli: Any, artifact: Path, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("one\n")
    words = ("embed", artifact, "--input", source, "--output", tmp_path / "v.npy")
    answer = cli(*words, "--task", "classification")
    assert answer.code == 3
    assert "is not of the task 'classification'" in answer.err
    assert not (tmp_path / "v.npy").exists()
    assert cli(*words, "--task", "retrieval.query").code == 0
