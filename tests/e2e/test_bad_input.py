"""Bad input: each is one clear error with its own exit code, and leaves no half-made artifact.

Checkpoints, recipes and words that are refused; texts and artifacts are in tests/cli, full disks
in test_atomic.py.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.toy import checkpoint

WEIGHTS = "model.safetensors"
LORA_A = "roberta.encoder.layers.0.mlp.fc1.parametrizations.weight.0.lora_A"


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(content) or content), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def nan_in(tensors: dict[str, Any], part: str) -> None:
    """In the last row of a matrix; of a stack of adapters, in that of `separation`."""
    name = next(name for name in tensors if part in name)
    (tensors[name][2] if tensors[name].ndim == 3 else tensors[name])[-1, 1] = float("nan")


def narrower(tensors: dict[str, Any]) -> None:
    tensors[LORA_A] = tensors[LORA_A][:, :2].clone()


BREAKS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "missing safetensors": (lambda f: (f / WEIGHTS).unlink(), 7, WEIGHTS),
    "truncated safetensors": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        7,
        "truncated",
    ),
    "empty safetensors": (lambda f: (f / WEIGHTS).write_bytes(b""), 7, "truncated"),
    "no safetensors at all": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 9999), 7, "truncated"),
    "a header that claims the world": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        7,
        "header",
    ),
    "pickle instead": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        7,
        "pytorch_model.bin",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), 7, "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), 7, "config.json"),
    "config of another size": (
        lambda f: edit_json(f / "config.json", lambda c: {**c, "num_hidden_layers": 3}),
        14,
        "",
    ),
    "a weight missing": (
        lambda f: edit_weights(f / WEIGHTS, lambda t: t.pop("roberta.emb_ln.bias")),
        14,
        "missing",
    ),
    "a weight too many": (
        lambda f: edit_weights(
            f / WEIGHTS, lambda t: t.update(stray=t["roberta.emb_ln.bias"].clone())
        ),
        14,
        "stray",
    ),
    "an adapter of another rank": (lambda f: edit_weights(f / WEIGHTS, narrower), 8, "lora_A"),
    "an adapter missing a matrix": (
        lambda f: edit_weights(f / WEIGHTS, lambda t: t.pop(LORA_A)),
        8,
        "lora_A",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), 9, "tokenizer.json"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), 9, "tokenizer.json"),
    "a tokenizer that does not fit": (
        lambda f: edit_json(
            f / "tokenizer.json",
            lambda c: c["added_tokens"].append(
                {**c["added_tokens"][0], "id": 331, "content": "<new>"}
            ),
        ),
        9,
        "331",
    ),
    "a NaN in the weights": (
        lambda f: edit_weights(f / WEIGHTS, lambda t: nan_in(t, "fc1.parametrizations.weight.o")),
        10,
        "NaN",
    ),
    "a NaN in the adapter": (
        lambda f: edit_weights(f / WEIGHTS, lambda t: nan_in(t, "fc1.parametrizations.weight.0")),
        10,
        "NaN",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint(
    name: str, small_copy: Path, cli: Callable[..., Any], nothing_left: Path
) -> None:
    break_it, code, said = BREAKS[name]
    break_it(small_copy)
    answer = cli(
        "build",
        "--model",
        small_copy,
        "--task",
        "separation",
        "--target",
        "onnx",
        "--out",
        nothing_left,
    )
    refused(answer, code, said)


def refused(answer: Any, code: int, said: str) -> None:
    """One error of three parts, on stderr alone."""
    assert answer.code == code, answer.err
    assert answer.out == ""
    [error] = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert said in answer.err
    assert "\n  fix: " in answer.err
    assert answer.err.index(error) < answer.err.index("\n  fix: ")
    assert "Traceback" not in answer.err


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return checkpoint.write(tmp_path / "native", layout="native")


ADAPTER = "retrieval_query"


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda f: shutil.rmtree(f / ADAPTER), 3),
        (lambda f: (f / ADAPTER / "adapter_config.json").unlink(), 8),
        (lambda f: (f / ADAPTER / "adapter_model.safetensors").unlink(), 7),
        (lambda f: edit_json(f / ADAPTER / "adapter_config.json", lambda c: {**c, "r": 8}), 8),
        (
            lambda f: edit_json(
                f / ADAPTER / "adapter_config.json", lambda c: {**c, "use_dora": 1}
            ),
            8,
        ),
        (
            lambda f: edit_weights(
                f / ADAPTER / "adapter_model.safetensors", lambda t: t.pop(next(iter(t)))
            ),
            8,
        ),
    ],
)
def test_a_broken_adapter_folder(
    break_it: Callable[[Path], Any],
    code: int,
    native: Path,
    cli: Callable[..., Any],
    nothing_left: Path,
) -> None:
    break_it(native)
    answer = cli(
        "build",
        "--model",
        native,
        "--task",
        "retrieval.query",
        "--target",
        "onnx",
        "--out",
        nothing_left,
    )
    refused(answer, code, "")


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"task": "retrieval.qury"}, 3, "did you mean 'retrieval.query'?"),
        ({"task": ""}, 3, "retrieval.passage"),
        ({"task": "none\n"}, 3, "did you mean 'none'?"),
        ({"target": "onxx"}, 4, "did you mean 'onnx'?"),
        ({"target": "coreml"}, 4, "there are: hf, onnx, openvino, trt, vllm"),
        ({"target": "../onnx"}, 4, "unknown target"),
        ({"precision": "int4"}, 17, "int8"),
        ({"precision": "pf16"}, 17, "did you mean 'fp16'?"),
        ({"precision": ""}, 17, "fp32"),
        ({"model": "no/such/folder"}, 7, "no checkpoint folder"),
        ({"model": "./nowhere"}, 7, "no checkpoint folder"),
        ({"recipe": "jina-embedings-v3"}, 5, "did you mean 'jina-embeddings-v3'?"),
        ({"recipe": "nowhere.toml"}, 5, "no recipe"),
        ({"validate-tokens": 2}, 5, "validate.max_tokens"),
    ],
)
def test_words_that_name_nothing(
    changes: dict[str, Any],
    code: int,
    said: str,
    small: Path,
    cli: Callable[..., Any],
    nothing_left: Path,
) -> None:
    words = {"model": small, "task": "none", "target": "onnx", "out": nothing_left, **changes}
    answer = cli("build", *(word for key, value in words.items() for word in (f"--{key}", value)))
    refused(answer, code, said)


def test_a_folder_that_is_no_checkpoint(
    tmp_path: Path, cli: Callable[..., Any], nothing_left: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    words = ("build", "--model", folder, "--task", "none", "--target", "onnx")
    refused(cli(*words, "--out", nothing_left), 7, "config.json")
    (folder / "config.json").write_text('{"model_type": "bert", "vocab_size": 9}')
    refused(cli(*words, "--out", nothing_left), 7, "no weight file")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_an_out_that_cannot_be_written_to(
    place: str, small: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    answer = cli(
        "build",
        "--model",
        small,
        "--task",
        "none",
        "--target",
        "onnx",
        "--out",
        tmp_path / place,
    )
    refused(answer, 26, "--out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_where_the_artifact_belongs_is_found_first(
    small: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / small.name).write_text("mine")
    answer = cli("build", "--model", small, "--task", "none", "--target", "onnx", "--out", tmp_path)
    refused(answer, 26, small.name)
    assert "\n  export" not in answer.err  # found before the work, not after
    assert [p.name for p in tmp_path.iterdir()] == [small.name]


@pytest.mark.parametrize(
    ("table", "code", "said"),
    [
        ("[export]\ndimension = 48", 23, "16, 32, 64"),
        ("[load]\nmax_tokens = 9000", 22, "8192"),
        ('[validate]\ntexts = "parties"', 24, "did you mean 'parity'?"),
        ("[exprot]", 5, "did you mean 'export'?"),
    ],
)
def test_recipes_that_ask_for_what_the_checkpoint_has_not(
    table: str,
    code: int,
    said: str,
    small: Path,
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'name = "r"\n{table}\n')
    out = tmp_path / "out"
    answer = cli(
        "build",
        "--recipe",
        path,
        "--model",
        small,
        "--task",
        "separation",
        "--target",
        "onnx",
        "--out",
        out,
    )
    refused(answer, code, said)
    assert not out.exists()


def test_a_failed_gate_in_a_real_build(
    small: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "strict.toml"
    path.write_text(
        'name = "strict"\n[validate]\nbudget_tokens = 1\nmax_tokens = 64\n'
        "[validate.gates.fp32]\nlargest_difference = 0.0\n"
    )
    out = tmp_path / "out"
    answer = cli(
        "build",
        "--recipe",
        path,
        "--model",
        small,
        "--task",
        "none",
        "--target",
        "onnx",
        "--out",
        out,
    )
    refused(answer, 6, "largest_difference")
    [report] = [p for p in out.glob("[!.]*/**/*") if p.is_file()]
    assert str(report) in answer.err
    assert json.loads(report.read_text())["passed"] is False
    assert not list(out.rglob("latest"))
