"""Reading weight files: names and shapes first, one tensor at a time when it is needed.

safetensors, and pytorch_model.bin where there is nothing else: torch reads it with weights_only,
which builds tensors and runs no code.

Knows no layout. A file is opened for each read and closed again, so that mapped pages do not add up
to the whole checkpoint in resident memory.
"""

from __future__ import annotations

import functools
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.checkpoints.transformer_files import is_there
from jexport.errors import CheckpointError, NotFiniteError
from jexport.types import WeightReader

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPE_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
"""torch's name of a dtype -> safetensors'."""

PIECES = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor on disk.

    Args:
        path: of the file that holds it.
        dtype: safetensors' name of it, such as 'BF16'; also of floats in a pickle.
        shape: of the stored tensor.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]


def tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder: of its one file, else of the shards in its index.

    A folder with several is read as transformers reads it: model.safetensors, its shards,
    pytorch_model.bin, its shards.

    Args:
        folder: of the weight files.

    Returns:
        By the name in the file.

    Raises:
        CheckpointError: there is none of them, one is broken, or the index and its shards say
            different things.
    """
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).is_file():
            return entries([folder / single])
        if (folder / index).is_file():
            return _indexed(folder, index)
    raise _nothing(folder)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a folder's weight files.

    Args:
        folder: of the weights.

    Returns:
        By name.

    Raises:
        CheckpointError: as `tensors`.
    """
    return {name: entry.shape for name, entry in tensors(folder).items()}


def _nothing(folder: Path) -> CheckpointError:
    """What is there instead of weights that can be read."""
    pieces = sorted(path.name for path in folder.glob("*-of-*") if PIECES.fullmatch(path.name))
    if pieces:
        index = INDEX if pieces[0].endswith(".safetensors") else PICKLED_INDEX
        return CheckpointError(
            f"the weights are in pieces, and {index} is missing",
            evidence=f"{folder}: {describe(pieces)}; transformers does not open them either",
            fix="download the checkpoint again, or save it with save_pretrained",
        )
    pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
    return CheckpointError(
        f"no {SINGLE} in {folder}",
        evidence=f"found {describe(pickles)}: of these names jexport reads {PICKLED} only"
        if pickles
        else "found no weight file at all",
        fix="give a checkpoint with safetensors weights: "
        "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
        if pickles
        else "give a checkpoint with safetensors weights",
    )


def _indexed(folder: Path, index: str) -> dict[str, Entry]:
    """The tensors of the shards that an index names."""
    listed = weight_map(folder / index)
    by_name = entries(folder / name for name in sorted(set(listed.values())))
    lacking = [
        f"{name} in {file}"
        for name, file in listed.items()
        if name not in by_name or by_name[name].path.name != file
    ]
    unlisted = [f"{name} in {by_name[name].path.name}" for name in set(by_name) - set(listed)]
    if lacking or unlisted:
        raise CheckpointError(
            f"{index} and its shards do not belong together",
            evidence=f"listed, but not there: {describe(lacking) or 'none'}\n"
            f"there, but not listed: {describe(unlisted) or 'none'}",
            fix="download the checkpoint again",
        )
    return by_name


def files(folder: Path, weights: Mapping[str, Entry]) -> list[Path]:
    """The files that a folder's tensors came from.

    Args:
        folder: of the weight files.
        weights: as `tensors` gives them for it.

    Returns:
        In order of name, then the index, where it was needed.
    """
    paths = sorted({entry.path for entry in weights.values()})
    if {folder / SINGLE, folder / PICKLED} & set(paths):
        return paths
    return [*paths, folder / (INDEX if (folder / INDEX).is_file() else PICKLED_INDEX)]


def weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, as an index says.

    Args:
        index: the file.

    Returns:
        File name by tensor name.

    Raises:
        CheckpointError: it cannot be read, or names a file outside its folder.
    """
    evidence, listed = "its weight_map is empty, or no table", None
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        evidence = repr(error)
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(
            f"{index.name} cannot be read", evidence=evidence, fix="download the checkpoint again"
        )
    outside = [str(name) for name in listed.values() if not _is_plain_name(name)]
    if outside:
        raise CheckpointError(
            f"{index.name} names a file outside the checkpoint",
            evidence=describe(set(outside)),
            fix="use a checkpoint from a source that you trust",
        )
    return listed


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """Name, dtype and shape of every tensor in these files.

    Args:
        paths: safetensors, or pickles (.bin), which torch opens with weights_only.

    Returns:
        By the name in the file.

    Raises:
        CheckpointError: a file is missing or broken, or two have a tensor of the same name.
    """
    by_name: dict[str, Entry] = {}
    for path in paths:
        for name, entry in _header(path).items():
            if name in by_name:
                raise CheckpointError(
                    f"tensor '{name}' is in two files",
                    evidence=f"{by_name[name].path.name} and {path.name}",
                    fix="remove one of them",
                )
            by_name[name] = entry
    return by_name


def _header(path: Path) -> dict[str, Entry]:
    """A file's tensors; opening it checks header, dtypes, shapes and offsets against its size."""
    import safetensors

    if not is_there(path):
        raise CheckpointError(
            f"weight file {path.name:.200} is missing",
            evidence=f"the checkpoint in {path.parent} needs it",
            fix="download the checkpoint again",
        )
    if path.suffix == ".bin":
        return _pickled_header(path)
    header = {}
    try:
        with safetensors.safe_open(path, framework="np") as stream:
            for name in stream.keys():  # noqa: SIM118 (it is no dict)
                part = stream.get_slice(name)
                shape = tuple(part.get_shape())
                header[name] = Entry(path=path, dtype=part.get_dtype(), shape=shape)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weight file {path.name} is truncated or not safetensors",
            evidence=f"{error} ({path.stat().st_size} bytes)",
            fix="download the checkpoint again",
        ) from error
    return header


def _pickled_header(path: Path) -> dict[str, Entry]:
    """A pickled file's tensors, under the names of safetensors' dtypes."""
    return {
        name: Entry(
            path=path, dtype=DTYPE_NAMES.get(str(one.dtype), str(one.dtype)), shape=tuple(one.shape)
        )
        for name, one in unpickled(path, path.stat().st_mtime_ns).items()
    }


CODE = re.compile(r"GLOBAL ([\w.]+)")
"""How torch's text names what a pickle asks for."""


@functools.lru_cache(maxsize=4)
def unpickled(path: Path, changed: int) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, mapped into memory where its format allows.

    Args:
        path: of a pytorch_model.bin or one of its shards.
        changed: when the file was, so that another file of the same name is another entry.

    Returns:
        By name; tensors may share memory with each other.

    Raises:
        CheckpointError: it holds anything but named tensors, or asks for code; none of it runs.
    """
    import torch

    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_named_tensors(content)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        code = CODE.search(str(error))
        if code:  # the first line of torch's own text says how to let it run
            raise CheckpointError(
                f"weight file {path.name} asks for code, not only for weights; nothing of it ran",
                evidence=f"it names {code[1]}, which torch.load(weights_only=True) does not call",
                fix="do not open it in any other way; get the checkpoint from its authors, or as "
                "safetensors",
            ) from error
        first = next(iter(str(error).splitlines()), repr(error))
        raise CheckpointError(
            f"weight file {path.name} is truncated, or holds more than weights",
            evidence=f"{first:.300} ({path.stat().st_size} bytes)",
            fix="download the checkpoint again, or save it as safetensors: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)",
        ) from error
    return content  # type: ignore[no-any-return]


def _check_named_tensors(content: Any) -> None:
    """Raise ValueError unless a pickle's content is tensors by name."""
    import torch

    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not tensors by name")
    odd = [str(name) for name, one in content.items() if not isinstance(one, torch.Tensor)]
    if odd:
        raise ValueError(f"these are no tensors: {describe(odd)}")


def reader(
    name: str,
    entry: Entry,
    *,
    index: int | None = None,
    rows: tuple[int, int] | None = None,
    transpose: bool = False,
) -> WeightReader:
    """A function that reads one tensor, or part of one, when it is called.

    index: takes [index] of the first axis. rows: then takes that range of the next axis.

    Returns:
        Reads float32; raises CheckpointError (a broken file), NotFiniteError (a NaN, an infinity).

    Raises:
        CheckpointError: at once, for a dtype that holds no weights.
    """
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor '{name}' has dtype {entry.dtype}",
            evidence=f"in {entry.path.name}; readable: {', '.join(FLOATS)}",
            fix="give a checkpoint with float weights",
        )

    def read() -> torch.Tensor:
        import safetensors
        import torch

        def of(part: Any) -> Any:
            if index is not None:
                return part[index] if rows is None else part[index, rows[0] : rows[1]]
            return part[:] if rows is None else part[rows[0] : rows[1]]

        try:
            if entry.path.suffix == ".bin":
                whole = unpickled(entry.path, entry.path.stat().st_mtime_ns)[name]
                raw = of(whole) if entry.shape else whole
            else:
                with safetensors.safe_open(entry.path, framework="pt") as stream:
                    raw = of(stream.get_slice(name)) if entry.shape else stream.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise _unreadable(name, entry, error) from error
        tensor: torch.Tensor = raw.to(torch.float32, copy=True)
        del raw  # at full size half a GB that the check below need not stand beside
        if not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NotFiniteError(
                f"weight '{name}' holds a NaN or an infinity",
                evidence=f"{bad} of {tensor.numel()} values in {entry.path.name} are not finite",
                fix="download the checkpoint again, or train it again",
            )
        return tensor.T.contiguous() if transpose else tensor

    return read


def stored(name: str, entry: Entry) -> torch.Tensor:
    """One tensor in the dtype of its file: numbers of rows, say, which are no weights.

    Args:
        name: in the file.
        entry: where it is.

    Returns:
        A copy.

    Raises:
        CheckpointError: the file cannot be read.
    """
    import safetensors

    if entry.path.suffix == ".bin":
        tensors = unpickled(entry.path, entry.path.stat().st_mtime_ns)
        return tensors[name].clone()
    try:
        with safetensors.safe_open(entry.path, framework="pt") as stream:
            tensor: torch.Tensor = stream.get_tensor(name)
            return tensor
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(name, entry, error) from error


def _unreadable(name: str, entry: Entry, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read tensor '{name}'",
        evidence=f"{entry.path.name}: {error}",
        fix="download the checkpoint again",
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity.

    Args:
        tensor: of any float dtype; torch.isfinite(tensor) would take a copy, this does not.

    Returns:
        True also for one without elements.
    """
    import torch

    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # a NaN anywhere makes both NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def describe(names: Mapping[str, str] | Iterable[str], limit: int = 8) -> str:
    """The first few names, for the evidence of an error.

    Args:
        names: in any order; of a mapping its keys.
        limit: how many are written out.

    Returns:
        In alphabetical order, and how many more there are; '' for none.
    """
    listed = sorted(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
