"""Writing safetensors, one tensor in memory at a time; the counterpart of shards.py.

The library's own save_file wants every tensor of a file at once: 2.24 GB at full size. Here room is
left for the header, the tensors follow as they are read, and the header is put in last; the format
lets a header end in spaces. Equal weights give equal bytes. Knows no layout.
Format: a little-endian u64 length, a JSON header of that length, then the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jexport.checkpoints.shards import DTYPE_NAMES, INDEX, SINGLE, is_finite
from jexport.errors import NotFiniteError
from jexport.types import WeightReader

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}
"""Precision -> the name in a safetensors header and torch's."""

SHARD_BYTES = 5_000_000_000
"""More than this is split, as transformers 4 did by default; version 5 reads both."""

ENTRY_BYTES = 160
"""Longest header entry but for the tensor's name: dtype, up to four sizes, two offsets."""

SIZE_BYTES = 21
"""Longest size of one more axis, with its comma."""

ALIGNMENT = 64


def write(
    folder: Path,
    weights: Mapping[str, WeightReader],
    precision: str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, ...]:
    """Write every weight, cast once: one file, or an index and its shards.

    Args:
        folder: that is there; the files get the names that transformers looks for.
        weights: by the name in the file; each is read when its turn comes, in the order of names.
        precision: 'fp32' or 'bf16', that they are cast to.
        shard_bytes: a file whose tensors would be larger is split; one tensor never is.

    Returns:
        The file names, the one to open first.

    Raises:
        NotFiniteError: the cast overflows, or a weight holds a NaN or an infinity.
        CheckpointError: a weight cannot be read.
    """
    header_bytes = sum(len(json.dumps(name)) + ENTRY_BYTES for name in weights)
    shards: list[_Shard] = []
    try:
        for name in sorted(weights):
            value = _cast(name, weights[name](), precision)
            size = value.numel() * value.element_size()
            if not shards or (shards[-1].entries and shards[-1].end + size > shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(folder / f"shard-{len(shards) + 1:05}.part", header_bytes))
            shards[-1].add(name, value, DTYPES[precision][0])
            del value
    finally:
        if shards:
            shards[-1].close()
    return _named(folder, shards)


def write_unchanged(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into one file, each in its own dtype; those that share memory become several.

    Args:
        path: of the file, whose folder is there.
        tensors: by the name in the file.

    Raises:
        KeyError: a dtype that safetensors has no name for.
        OSError: the file cannot be written.
    """
    header_bytes = sum(
        len(json.dumps(name)) + ENTRY_BYTES + SIZE_BYTES * one.ndim for name, one in tensors.items()
    )
    shard = _Shard(path, header_bytes)
    try:
        for name in sorted(tensors):
            one = tensors[name]
            shard.add(name, one.detach().contiguous(), DTYPE_NAMES[str(one.dtype)])
    finally:
        shard.close()


def _cast(name: str, weight: torch.Tensor, precision: str) -> torch.Tensor:
    import torch

    value = weight.to(getattr(torch, DTYPES[precision][1])).contiguous()
    if value.dtype != weight.dtype and not is_finite(value):
        raise NotFiniteError(
            f"weight '{name}' does not fit {precision}",
            evidence=f"its largest value is {float(weight.abs().max()):.6g}",
            fix="build it with --precision fp32",
        )
    return value


class _Shard:
    """One file being written: space for the header, then tensor after tensor."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path, self.end = path, 0
        self.entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = -(-(8 + ALIGNMENT + header_bytes) // ALIGNMENT) * ALIGNMENT - 8
        self._stream: IO[bytes] | None = path.open("wb")
        self._stream.write(b"\0" * (8 + self._header_bytes))

    def add(self, name: str, value: torch.Tensor, dtype: str) -> None:
        import torch

        assert self._stream is not None, "closed"
        begin = self.end
        self._stream.write(value.reshape(-1).view(torch.uint8).numpy().data)
        self.end += value.numel() * value.element_size()
        self.entries[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [begin, self.end],
        }

    def close(self) -> None:
        """Put the header in front; closing twice is harmless."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        with stream:
            header = json.dumps(self.entries, separators=(",", ":")).encode()
            assert len(header) <= self._header_bytes, "the header does not fit its space"
            stream.seek(0)
            stream.write(struct.pack("<Q", self._header_bytes))
            stream.write(header.ljust(self._header_bytes))


def _named(folder: Path, shards: list[_Shard]) -> tuple[str, ...]:
    """Rename to what transformers looks for, now that the number of files is known."""
    if len(shards) == 1:
        shards[0].path.rename(folder / SINGLE)
        return (SINGLE,)
    placed: dict[str, str] = {}
    files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for shard, file in zip(shards, files, strict=True):
        shard.path.rename(folder / file)
        placed |= {name: file for name in shard.entries if name != "__metadata__"}
    index = {"metadata": {"total_size": sum(s.end for s in shards)}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    return (INDEX, *files)
