"""Reading safetensors: names and shapes first, one tensor at a time when it is needed.

Knows no layout. A file is opened for each read and closed again, so that mapped pages do not add up
to the whole checkpoint in resident memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.errors import CheckpointError, NotFiniteError
from jexport.flow import WeightReader

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor on disk."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def find(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, from its index or the single file. Raises CheckpointError."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = sorted({folder / str(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{INDEX} cannot be read", evidence=repr(error), fix="download the checkpoint again"
            ) from error
        if any(path.parent != folder for path in paths):
            raise CheckpointError(
                f"{INDEX} names a file outside the checkpoint",
                evidence=", ".join(p.as_posix() for p in paths if p.parent != folder),
                fix="use a checkpoint from a source that you trust",
            )
        return paths
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    raise CheckpointError(
        f"no {SINGLE} in {folder}",
        evidence=f"found {', '.join(others)}: pickle, which jexport does not read"
        if others
        else "found no weight file at all",
        fix="give a checkpoint with safetensors weights",
    )


def entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor's name, dtype and shape. Raises CheckpointError on a broken file."""
    found: dict[str, Entry] = {}
    for path in paths:
        for name, meta in _header(path).items():
            if name == "__metadata__":
                continue
            if name in found:
                raise CheckpointError(
                    f"tensor '{name}' is in two files",
                    evidence=f"{found[name].path.name} and {path.name}",
                    fix="remove one of them",
                )
            found[name] = Entry(path=path, dtype=meta["dtype"], shape=tuple(meta["shape"]))
    return found


def _header(path: Path) -> dict[str, Any]:
    """The JSON header, checked against the file's size (github.com/huggingface/safetensors)."""
    if not path.is_file():
        raise CheckpointError(
            f"weight file {path.name} is missing",
            evidence=f"the checkpoint in {path.parent} needs it",
            fix="download the checkpoint again",
        )
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, 100_000_000):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header: dict[str, Any] = json.loads(stream.read(length))
        end = max(
            (meta["data_offsets"][1] for n, meta in header.items() if n != "__metadata__"),
            default=0,
        )
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"weight file {path.name} is truncated or not safetensors",
            evidence=str(error) or repr(error),
            fix="download the checkpoint again",
        ) from error
    return header


def reader(
    name: str,
    entry: Entry,
    *,
    index: int | None = None,
    rows: tuple[int, int] | None = None,
    transpose: bool = False,
) -> WeightReader:
    """A function that reads one tensor, or part of one, as float32.

    index: takes [index] of the first axis. rows: then takes that range of the next axis.
    Raises CheckpointError on a broken file and NotFiniteError on a NaN or infinity.
    """

    def read() -> torch.Tensor:
        import safetensors
        import torch

        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor '{name}' has dtype {entry.dtype}",
                evidence=f"in {entry.path.name}; readable: {', '.join(FLOATS)}",
                fix="give a checkpoint with float weights",
            )
        try:
            with safetensors.safe_open(entry.path, framework="pt") as stream:
                part = stream.get_slice(name)
                if index is not None:
                    raw = part[index] if rows is None else part[index, rows[0] : rows[1]]
                else:
                    raw = part[:] if rows is None else part[rows[0] : rows[1]]
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read tensor '{name}'",
                evidence=f"{entry.path.name}: {error}",
                fix="download the checkpoint again",
            ) from error
        tensor: torch.Tensor = raw.to(torch.float32, copy=True)
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NotFiniteError(
                f"weight '{name}' holds a NaN or an infinity",
                evidence=f"{bad} of {tensor.numel()} values in {entry.path.name} are not finite",
                fix="download the checkpoint again, or train it again",
            )
        return tensor.T.contiguous() if transpose else tensor

    return read


def shape_of(entry: Entry, *, indexed: bool) -> tuple[int, ...]:
    """A tensor's shape, without the first axis when it is a stack of adapters."""
    return entry.shape[1:] if indexed else entry.shape


def describe(names: Mapping[str, str] | Iterable[str], limit: int = 8) -> str:
    """The first few names of a list, and how many more there are."""
    listed = sorted(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
