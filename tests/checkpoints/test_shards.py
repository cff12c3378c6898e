"""Weight files: broken in every way, and read no more than is asked for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jexport.checkpoints import shards
from jexport.errors import CheckpointError, NotFiniteError
from jexport.types import LoadedModel

SMALL = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
BYTES = (SMALL / "model.safetensors").read_bytes()
HEADER = 8 + int.from_bytes(BYTES[:8], "little")
Open = Callable[..., LoadedModel]


@pytest.mark.parametrize(
    "size", [0, 1, 7, 8, 9, 100, HEADER - 1, HEADER, HEADER + 1, len(BYTES) // 2, len(BYTES) - 1]
)
def test_a_truncated_file_is_refused_before_it_is_read(
    size: int, small_copy: Path, opened: Open
) -> None:
    (small_copy / "model.safetensors").write_bytes(BYTES[:size])
    with pytest.raises(CheckpointError, match="truncated or not safetensors") as caught:
        opened(small_copy, "separation")
    assert f"({size} bytes)" in caught.value.evidence


def file_of(header: Any, values: bytes = b"\0" * 4) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        BYTES + b"\0",
        b"PK\x03\x04" + b"\0" * 200,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1144685320\n",
        b"\x80\x02}q\x00.",
        struct.pack("<Q", 1 << 62) + b"{}",
        file_of(b"\xff\xfe{}"),
        file_of(b"[" * 100_000),
        file_of(b'{"a":'),
        file_of([1, 2]),
        file_of({"a": 3}),
        file_of({"a": {**ONE, "dtype": "F33"}}),
        file_of({"a": {**ONE, "shape": [2]}}),
        file_of({"a": {**ONE, "shape": [-1]}}),
        file_of({"a": {**ONE, "data_offsets": [4, 8]}}),
        file_of({"a": {**ONE, "data_offsets": "all"}}),
        file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}),
        file_of({"a": ONE, "b": ONE}),
    ],
)
def test_garbage_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        shards.tensors(tmp_path)


@pytest.mark.parametrize("name", ["other.bin", "model.pt", "weights.ckpt", "model.pth"])
def test_pickle_of_another_name_is_named_and_not_read(
    name: str, small_copy: Path, opened: Open
) -> None:
    (small_copy / "model.safetensors").rename(small_copy / name)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors") as caught:
        opened(small_copy)
    assert name in caught.value.evidence
    assert "save_pretrained" in caught.value.fix
    (small_copy / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        opened(small_copy)
    assert caught.value.evidence == "found no weight file at all"


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError):
        shards.tensors(tmp_path)


def split(folder: Path) -> dict[str, str]:
    """The small checkpoint in two shards and an index, the layers apart; the index's map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    listed = {name: parts["layers.1" in name] for name in tensors}
    for part in parts:
        held = {name: tensor for name, tensor in tensors.items() if listed[name] == part}
        save_file(held, folder / part, metadata={"format": "pt"})
    write_index(folder, listed)
    return listed


def write_index(folder: Path, listed: Any) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / shards.INDEX).write_text(json.dumps(content))


def test_shards_are_one_checkpoint(
    small_copy: Path, opened: Open, texts: list[str], reference_vectors: Any
) -> None:
    wanted = reference_vectors(opened(SMALL, "separation"), texts[:8])
    split(small_copy)
    model = opened(small_copy, "separation")
    assert np.array_equal(reference_vectors(model, texts[:8]), wanted)
    paths = [file.path for file in model.source.files]
    assert {shards.INDEX, *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))} <= {*paths}


def test_a_shard_is_read_when_it_is_needed(small_copy: Path, opened: Open) -> None:
    split(small_copy)
    model = opened(small_copy, "separation")
    (small_copy / "model-00002-of-00002.safetensors").unlink()
    assert model.weights["layers.0.mlp.fc1.weight"]().shape == (160, 64)
    with pytest.raises(CheckpointError, match=r"cannot read tensor 'roberta\.encoder\.layers\.1"):
        model.weights["layers.1.mlp.fc1.weight"]()


def test_a_part_of_a_tensor_is_read_alone(tmp_path: Path) -> None:
    """One adapter of five, and q of qkv: the rest may hold what it likes."""
    stack = torch.arange(60, dtype=torch.float32).view(5, 6, 2)
    stack[3] = torch.nan
    stack[2, 4:] = torch.inf
    save_file({"stack": stack}, tmp_path / "model.safetensors")
    entry = shards.tensors(tmp_path)["stack"]
    assert torch.equal(shards.reader("stack", entry, index=1)(), stack[1])
    assert torch.equal(shards.reader("stack", entry, index=2, rows=(2, 4))(), stack[2, 2:4])
    assert torch.equal(shards.reader("stack", entry, rows=(0, 2))(), stack[:2])
    whole = shards.reader("stack", entry, index=0, transpose=True)()
    assert torch.equal(whole, stack[0].T)
    assert whole.is_contiguous()
    for broken in ({}, {"index": 3}, {"index": 2}, {"rows": (3, 5)}):
        with pytest.raises(NotFiniteError, match="'stack' holds a NaN or an infinity"):
            shards.reader("stack", entry, **broken)()  # type: ignore[arg-type]


def test_a_tensor_is_a_copy_of_its_own(tmp_path: Path) -> None:
    """Merging writes into what it reads: the file, and the next reader, must not see it."""
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    read = shards.reader("a", shards.tensors(tmp_path)["a"])
    read().zero_()
    assert read().tolist() == [1.0] * 4
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([[1.0, -2.5], [0.125, 3.0]], dtype=dtype)
    save_file({"a": values, "b": values.sum()}, tmp_path / "model.safetensors")
    found = shards.tensors(tmp_path)
    read = shards.reader("a", found["a"])()
    assert read.dtype == torch.float32
    assert read.tolist() == [[1.0, -2.5], [0.125, 3.0]]
    assert shards.reader("b", found["b"])().item() == 1.625


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
def test_another_dtype_is_refused_when_it_is_opened(
    dtype: torch.dtype, small_copy: Path, opened: Open, edit_weights: Callable[..., None]
) -> None:
    key = "roberta.encoder.layers.0.mlp.fc1.bias"
    edit_weights(small_copy, lambda ts: ts | {key: ts[key].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"tensor '{key}' has dtype"):
        opened(small_copy)


def test_a_float64_that_overflows_float32_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "model.safetensors")
    with pytest.raises(NotFiniteError):
        shards.reader("a", shards.tensors(tmp_path)["a"])()


def test_a_missing_shard_is_named(small_copy: Path, opened: Open) -> None:
    split(small_copy)
    (small_copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        opened(small_copy)


def test_a_truncated_shard_is_named(small_copy: Path, opened: Open) -> None:
    split(small_copy)
    path = small_copy / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{path.name} is truncated"):
        opened(small_copy)


def test_an_index_that_its_shards_contradict_is_refused(small_copy: Path, opened: Open) -> None:
    listed = split(small_copy)
    first, second = "roberta.emb_ln.bias", "roberta.encoder.layers.1.norm1.bias"
    for wrong in (
        {**listed, "roberta.more": listed[first]},
        {**listed, first: listed[second]},
        {name: file for name, file in listed.items() if name != second},
    ):
        write_index(small_copy, wrong)
        with pytest.raises(CheckpointError, match="do not belong together") as caught:
            opened(small_copy)
        named = {"roberta.more", first, second}
        assert any(name in caught.value.evidence for name in named)


def test_a_tensor_in_two_shards_is_refused(small_copy: Path, opened: Open) -> None:
    listed = split(small_copy)
    name = "roberta.encoder.layers.1.norm1.bias"
    path = small_copy / "model-00001-of-00002.safetensors"
    save_file({**load_file(path), name: torch.zeros(64)}, path)
    assert listed[name] != path.name
    with pytest.raises(CheckpointError, match=rf"'{name}' is in two files"):
        opened(small_copy)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "", 3, None, ["a"]],
)
def test_an_index_that_leaves_the_folder_is_refused(
    name: Any, small_copy: Path, opened: Open
) -> None:
    listed = split(small_copy)
    (small_copy.parent / "model.safetensors").write_bytes(BYTES)
    write_index(small_copy, {**listed, "roberta.emb_ln.bias": name})
    with pytest.raises(CheckpointError, match="outside the checkpoint") as caught:
        opened(small_copy)
    assert caught.value.evidence == str(name)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_refused(text: str, small_copy: Path, opened: Open) -> None:
    split(small_copy)
    (small_copy / shards.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        opened(small_copy)


def test_one_file_goes_before_an_index(small_copy: Path, opened: Open) -> None:
    """As transformers does, which the remote route reads its weights with."""
    split(small_copy)
    (small_copy / "model.safetensors").write_bytes(BYTES)
    for path in small_copy.glob("model-*"):
        path.unlink()
    files = [file.path for file in opened(small_copy).source.files]
    assert "model.safetensors" in files
    assert shards.INDEX not in files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    tensor = ((torch.arange(60.0) - 30) * 1e37).reshape(3, 20).to(dtype)
    assert shards.is_finite(tensor)
    for place in (0, 31, 59):
        broken = tensor.clone()
        broken.view(-1)[place] = value
        assert not shards.is_finite(broken)
    assert shards.is_finite(torch.zeros(0, 4))
