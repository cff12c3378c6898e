"""`jexport convert-weights`: what torch reads is what safetensors reads, and no code runs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from jexport.checkpoints import conversion_worker, weight_conversion
from jexport.errors import (
    CheckpointError,
    DependencyError,
    DiskFullError,
    JexportError,
    OutputPathError,
)

PICKLED, SINGLE = "pytorch_model.bin", "model.safetensors"


class Harmful:
    """Runs a shell command when an ordinary pickle reader opens it."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.proof}",))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_tiny(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(5)}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / PICKLED)
    return tensors


def test_every_tensor_of_a_checkpoint_and_its_modules(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    table = torch.randn(7, 4)
    whole = {
        "embeddings.weight": table,
        "head.weight": table,
        "part": table[2:4],
        "turned": torch.randn(4, 6).T,
        "half": torch.randn(3).half(),
        "brain": torch.randn(3, 1, 2).bfloat16(),
        "positions": torch.arange(9)[None],
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(0.1, dtype=torch.float64),
        "nothing": torch.zeros(0, 4),
        "axes": torch.randn(*[1] * 7, 2),
        "nan": torch.tensor([float("nan"), 1.0]),
    }
    torch.save(whole, tmp_path / PICKLED)
    dense = tmp_path / "2_Dense"
    dense.mkdir()
    old = {"linear.weight": torch.randn(2, 4), "linear.bias": torch.randn(2)}
    torch.save(old, dense / PICKLED, _use_new_zipfile_serialization=False)
    before = names(tmp_path)
    answer = cli("convert-weights", tmp_path)
    assert answer.code == 0
    for folder, tensors in ((tmp_path, whole), (dense, old)):
        converted = load_file(folder / SINGLE)
        assert set(converted) == set(tensors)
        for name, tensor in tensors.items():
            assert converted[name].dtype == tensor.dtype, name
            assert torch.equal(converted[name].nan_to_num(7), tensor.nan_to_num(7)), name
        assert f"{sha256(folder / SINGLE)}  {folder / SINGLE}" in answer.out.splitlines()
        assert f"{folder / PICKLED}: sha256 {sha256(folder / PICKLED)}" in answer.err
    assert "shared memory, written in full: head.weight, part" in answer.err
    assert names(tmp_path) == sorted([*before, SINGLE, f"2_Dense/{SINGLE}"])
    assert not (tmp_path / ".work").exists()
    again = cli("convert-weights", tmp_path)
    assert again.code == OutputPathError.exit_code
    assert f"2_Dense/{SINGLE}, {SINGLE}" in again.err
    assert "--force" in again.err


@pytest.mark.rare
def test_force_replaces_and_what_lacks_is_added(tmp_path: Path) -> None:
    tensors = write_tiny(tmp_path)
    write_tiny(tmp_path / "2_Dense")
    (tmp_path / SINGLE).write_bytes(b"old")
    done = weight_conversion.convert(tmp_path)
    assert [one.path for one in done.written] == [tmp_path / "2_Dense" / SINGLE]
    assert done.there_already == (tmp_path / SINGLE,)
    assert (tmp_path / SINGLE).read_bytes() == b"old"
    (tmp_path / "2_Dense" / PICKLED).unlink()
    weight_conversion.convert(tmp_path, force=True)
    assert torch.equal(load_file(tmp_path / SINGLE)["b"], tensors["b"])


def test_shards_are_what_transformers_opens(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=60, num_hidden_layers=1, **sizes)
    torch.manual_seed(3)
    model = transformers.BertModel(config).eval()
    config.save_pretrained(tmp_path)
    weights = model.state_dict()
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    placed = {name: files[name.startswith("encoder")] for name in weights}
    for file in files:
        torch.save({n: t for n, t in weights.items() if placed[n] == file}, tmp_path / file)
    index = tmp_path / f"{PICKLED}.index.json"
    content = {"metadata": {"total_size": 1}, "weight_map": placed}
    index.write_text(json.dumps(content))
    done = weight_conversion.convert(tmp_path)
    assert [one.path.name for one in done.written] == [
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]
    for path in tmp_path.glob("pytorch_model*"):
        path.unlink()
    again, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(one, weights[name]) for name, one in again.state_dict().items())


@pytest.mark.rare
def test_an_index_of_other_shards_is_refused(tmp_path: Path) -> None:
    tensors = write_tiny(tmp_path)
    (tmp_path / PICKLED).rename(tmp_path / "pytorch_model-00001-of-00001.bin")
    placed = dict.fromkeys([*tensors, "more"], "pytorch_model-00001-of-00001.bin")
    (tmp_path / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": placed}))
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match="do not belong together"):
        weight_conversion.convert(tmp_path)
    assert names(tmp_path) == before


def test_code_in_a_pickle_is_named_and_does_not_run(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    proof = tmp_path / "proof"
    torch.save({"a": torch.zeros(2), "b": Harmful(proof)}, tmp_path / PICKLED)
    answer = cli("convert-weights", tmp_path)
    assert answer.code == CheckpointError.exit_code
    assert "asks for code" in answer.err
    assert "posix.system" in answer.err
    assert "weights_only=False" not in answer.err
    assert names(tmp_path) == [PICKLED]
    torch.load(tmp_path / PICKLED, weights_only=False)
    assert proof.exists()  # or the test above could not fail


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": torch.zeros(1).expand(10**12)}, "claims to hold more"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, r"a \(complex64, strided\)"),
        ({"a": torch.eye(3).to_sparse()}, r"a \(float32, sparse_coo\)"),
    ],
)
def test_what_is_no_weight_is_refused(tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        conversion_worker.check("x.bin", 1500, tensors)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(str(caught.value))


def in_process(code: str) -> str:
    source = f"from jexport.checkpoints import conversion_worker as worker\n{code}"
    root = Path(weight_conversion.__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
        timeout=60,
    )
    return ended.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_the_worker_has_no_network_and_no_more_memory_than_it_was_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ask = (
            "import socket\n"
            "try:\n"
            f"    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)\n"
            "    print('reached')\n"
            "except OSError:\n"
            "    print('nobody there')\n"
        )
        assert in_process(ask) == "reached"
        answer = in_process(f"print(worker.leave_network())\n{ask}").split("\n")
    assert answer in (["True", "nobody there"], ["False", "reached"])
    take = "try:\n    bytes(300 << 20)\n    print('taken')\nexcept MemoryError:\n    print('no')\n"
    assert in_process(take) == "taken"
    assert in_process(f"assert worker.limit_memory(200 << 20)\n{take}") == "no"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path)
    torch.save({"a": torch.randn(300_000)}, tmp_path / PICKLED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(JexportError, match="cannot write"):
            weight_conversion.convert(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == [PICKLED]
    full = {"errno": errno.ENOSPC, "evidence": "No space left on device"}
    monkeypatch.setattr(weight_conversion, "_answer", lambda *_: full)
    with pytest.raises(DiskFullError):
        weight_conversion.convert(tmp_path)
    assert names(tmp_path) == [PICKLED]


def test_what_was_put_in_place_goes_when_the_rest_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(b"new")
    paths = {tmp_path / "1": tmp_path / "model-1", tmp_path / "gone": tmp_path / "model-2"}
    with pytest.raises(FileNotFoundError):
        weight_conversion._put_in_place(weight_conversion._Staged(paths=paths, converted=()))
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the worker ends with its parent on Linux")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_it_leaves_no_weights_and_no_process(how: signal.Signals, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    source = (
        "from pathlib import Path\nfrom jexport.checkpoints import weight_conversion\n"
        f"weight_conversion.convert(Path({str(tmp_path)!r}))\n"
    )
    root = Path(weight_conversion.__file__).parents[2]
    running = subprocess.Popen(
        [sys.executable, "-c", source], cwd=root, stderr=subprocess.DEVNULL, start_new_session=True
    )
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    until = time.monotonic() + 60
    while not (workers := children.read_text().split()):
        assert time.monotonic() < until
        time.sleep(0.01)
    running.send_signal(how)
    running.wait(60)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.01)
    left = [name for name in names(tmp_path) if not name.startswith(".work")]
    assert left == [PICKLED]
    assert how == signal.SIGKILL or names(tmp_path) == [PICKLED]


def test_nothing_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError):
            weight_conversion.convert(folder)
    with pytest.raises(CheckpointError, match="another kind"):
        weight_conversion._shard_name("model.bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="torch"):
        weight_conversion.convert(tmp_path)
