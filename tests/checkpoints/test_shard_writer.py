"""shard_writer: what the library reads is what was given, in equal bytes, split where asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from jexport.checkpoints import shard_writer, shards
from jexport.errors import NotFiniteError

generator = torch.Generator().manual_seed(3)
TENSORS = {
    name: torch.randn(shape, generator=generator)
    for name, shape in {"b.weight": (5, 3), "a": (7,), "scalar": (), "c.ü": (2, 2, 2)}.items()
}


def readers(tensors: dict[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    return {name: (lambda tensor=tensor: tensor.clone()) for name, tensor in tensors.items()}


def test_the_library_reads_what_was_given(tmp_path: Path) -> None:
    assert shard_writer.write(tmp_path, readers(TENSORS), "fp32") == ("model.safetensors",)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}


def test_the_data_is_where_the_library_itself_puts_it(tmp_path: Path) -> None:
    shard_writer.write(tmp_path, readers(TENSORS), "fp32")
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    size = 4 * sum(tensor.numel() for tensor in TENSORS.values())
    ours = (tmp_path / "model.safetensors").read_bytes()
    assert ours[-size:] == (tmp_path / "theirs.safetensors").read_bytes()[-size:]
    assert (len(ours) - size) % 64 == 0  # so that a map of the file is aligned


def test_bf16_is_cast_once_to_the_nearest(tmp_path: Path) -> None:
    shard_writer.write(tmp_path, readers(TENSORS), "bf16")
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in TENSORS.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor.to(torch.bfloat16))
    with pytest.raises(NotFiniteError, match="'big' does not fit bf16"):
        shard_writer.write(tmp_path, readers({"big": torch.tensor([3.4e38])}), "bf16")


def test_equal_weights_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    found = []
    for folder, names in (("one", list(TENSORS)), ("two", list(TENSORS)[::-1])):
        (tmp_path / folder).mkdir()
        shard_writer.write(tmp_path / folder, readers({n: TENSORS[n] for n in names}), "fp32")
        found.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_larger_than_a_shard(tmp_path: Path) -> None:
    files = shard_writer.write(tmp_path, readers(TENSORS), "fp32", shard_bytes=64)
    # by name: a 28 bytes, b.weight 60, c.ü 32 and the scalar 4
    assert files == (
        "model.safetensors.index.json",
        *(f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    index = json.loads((tmp_path / files[0]).read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 28 + 60 + 32 + 4}
    assert index["weight_map"] == {
        "a": files[1],
        "b.weight": files[2],
        "c.ü": files[3],
        "scalar": files[3],
    }
    found = shards.tensors(tmp_path)  # index and shards belong together
    for name, entry in found.items():
        assert torch.equal(shards.reader(name, entry)(), TENSORS[name])


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    files = shard_writer.write(tmp_path, readers(TENSORS), "fp32", shard_bytes=1)
    assert len(files) == 1 + len(TENSORS)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted:
        held = 0

    def read() -> torch.Tensor:
        tensor = torch.ones(1000)
        Counted.held += 1
        import weakref

        weakref.finalize(tensor, lambda: setattr(Counted, "held", Counted.held - 1))
        alive.append(Counted.held)
        return tensor

    shard_writer.write(tmp_path, {f"t{n}": read for n in range(8)}, "fp32")
    assert len(alive) == 8
    assert max(alive) <= 2  # the one before may go only when the next one is bound


def test_an_error_while_reading_goes_through(tmp_path: Path) -> None:
    def broken() -> torch.Tensor:
        raise NotFiniteError("weight 'x'", evidence="e", fix="f")

    with pytest.raises(NotFiniteError, match="weight 'x'"):
        shard_writer.write(tmp_path, {**readers(TENSORS), "z": broken}, "fp32")
    assert not (tmp_path / "model.safetensors").exists()
