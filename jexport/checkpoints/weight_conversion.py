"""pytorch_model.bin to safetensors: each file in a process of its own, put in place when all are.

Knows no layout. What reads a pickle is conversion_worker.py; here nothing of it is opened.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.artifacts.manifest import file_digest
from jexport.checkpoints import shards
from jexport.checkpoints.transformer_files import read_json
from jexport.errors import CheckpointError, DependencyError, OutputPathError
from jexport.workspace.run import WORK, disk_trouble, own_folder

PICKLED = {
    shards.PICKLED: shards.SINGLE,
    shards.PICKLED_INDEX: shards.INDEX,
    "adapter_model.bin": "adapter_model.safetensors",
}
"""Files that are converted, and what they become; of an index, its shards as well."""

WORKER = "jexport.checkpoints.conversion_worker"
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "OPENBLAS_CORETYPE")
"""What the process that reads a pickle keeps of the environment: no token is among them."""


@dataclass(frozen=True, kw_only=True)
class ConvertedFile:
    """One file that was written.

    Args:
        source: the pickled file.
        source_sha256: its SHA-256, in hex.
        path: the safetensors file.
        sha256: its SHA-256, in hex.
        tensors: how many it holds.
        repeated: names that shared the memory of another and are written in full.
        isolated: whether the process that read it had no network.
        limited: whether that process had a memory limit.
    """

    source: Path
    source_sha256: str
    path: Path
    sha256: str
    tensors: int
    repeated: tuple[str, ...]
    isolated: bool
    limited: bool


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What became of a folder.

    Args:
        written: the new files.
        there_already: safetensors files that were left as they are.
    """

    written: tuple[ConvertedFile, ...]
    there_already: tuple[Path, ...]


def convert(folder: Path, *, force: bool = False) -> Conversion:
    """Write safetensors beside every pickled weight file of a checkpoint.

    All files are put in place at the end, an index after its shards, so that what is stopped
    leaves the folder as it was.

    Args:
        folder: a checkpoint; folders of its modules are converted too.
        force: replace safetensors files that are there.

    Returns:
        What was written, and what was there.

    Raises:
        DependencyError: torch is missing.
        CheckpointError: there is nothing to convert, or a file is broken, or asks for code.
        OutputPathError: all safetensors files are there already, or nothing can be written here.
        DiskFullError, DiskError: the disk is full or broken; the folder is as before.
    """
    if importlib.util.find_spec("torch") is None:
        raise DependencyError(
            "reading pickled weights needs torch",
            evidence="it is not installed",
            fix='pip install "jexport[build]"',
        )
    sources = _sources(folder)
    there = {path: one for path in sources if (one := _safetensors_of(path)) is not None}
    chosen = sources if force else [path for path in sources if path not in there]
    if not chosen:
        raise OutputPathError(
            "the safetensors files are there already",
            evidence=shards.describe(str(path.relative_to(folder)) for path in there.values()),
            fix="build from this folder as it is, or replace them with --force",
        )
    try:
        with own_folder(folder / WORK) as work:
            staged = [
                _staged(path, work / str(number), folder) for number, path in enumerate(chosen)
            ]
            for files in staged:
                _put_in_place(files)
    except OSError as error:
        trouble = disk_trouble("convert-weights", folder / WORK, error)
        raise trouble or OutputPathError(
            f"cannot write below {folder}",
            evidence=str(error),
            fix="copy the checkpoint to a folder of your own",
        ) from error
    return Conversion(
        written=tuple(one for files in staged for one in files.converted),
        there_already=() if force else tuple(there.values()),
    )


def _safetensors_of(source: Path) -> Path | None:
    """The file that is read instead of a pickled one, where it is there."""
    names = {PICKLED[source.name]}
    if names <= {shards.SINGLE, shards.INDEX}:
        names = {shards.SINGLE, shards.INDEX}
    return next((path for name in names if (path := source.with_name(name)).exists()), None)


def _sources(folder: Path) -> list[Path]:
    """The pickled files and indexes of a checkpoint and its modules. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint folder '{folder}'",
            evidence="it is not a folder",
            fix="give the folder that holds pytorch_model.bin",
        )
    sources = sorted(
        path
        for name in PICKLED
        for path in folder.rglob(name)
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    # As transformers does: a whole file goes before shards.
    sources = [
        path
        for path in sources
        if path.name != shards.PICKLED_INDEX or path.with_name(shards.PICKLED) not in sources
    ]
    if not sources:
        raise CheckpointError(
            "there are no pickled weights to convert",
            evidence=f"{folder}: no {', '.join(PICKLED)}, also in no folder of a module",
            fix="give the folder that holds pytorch_model.bin",
        )
    return sources


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """Files in the work folder, in the order in which they are put in place."""

    paths: Mapping[Path, Path]
    converted: tuple[ConvertedFile, ...]


def _staged(source: Path, work: Path, folder: Path) -> _Staged:
    """One weight file, or an index and its shards, converted below `work` and read back."""
    work.mkdir()
    home = source.parent
    names = {source.name: PICKLED[source.name]}
    index: dict[str, Any] = {}
    if source.name == shards.PICKLED_INDEX:
        index = read_json(source)
        listed = shards.weight_map(source)
        names = {name: _shard_name(name) for name in sorted(set(listed.values()))}
        index["weight_map"] = {weight: names[name] for weight, name in listed.items()}
    converted = []
    for old, new in names.items():
        if not (home / old).is_file():
            raise CheckpointError(
                f"weight file {old} is missing",
                evidence=f"the checkpoint in {home} needs it",
                fix="download the checkpoint again",
            )
        converted.append(_convert(home / old, work / new, home / new, folder))
    paths = {work / new: home / new for new in names.values()}
    if index:
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (work / shards.INDEX).write_text(text, encoding="utf-8")
        paths[work / shards.INDEX] = home / shards.INDEX
        shards.tensors(work)  # refuses an index that is not its shards'
    else:
        shards.entries(paths)
    for path in paths:
        _flush(path)
    return _Staged(paths=paths, converted=tuple(converted))


def _shard_name(name: str) -> str:
    stem = name.removesuffix(".bin")
    if stem == name or not stem.startswith("pytorch_model"):
        raise CheckpointError(
            f"{shards.PICKLED_INDEX} names a shard of another kind",
            evidence=f"{name!r}; they are called pytorch_model-00001-of-00002.bin",
            fix="save the checkpoint again (save_pretrained)",
        )
    return f"{stem.replace('pytorch_model', 'model', 1)}.safetensors"


def _convert(source: Path, target: Path, final: Path, folder: Path) -> ConvertedFile:
    """Run the worker on one file. Raises CheckpointError, and OSError where it met one."""
    digest = file_digest(source, root=folder).sha256
    answer = _answer(source, target)
    if "error" in answer:
        error = answer["error"]
        raise CheckpointError(error["what"], evidence=error["evidence"], fix=error["fix"])
    if "errno" in answer:
        raise OSError(answer["errno"], answer["evidence"])
    return ConvertedFile(
        source=source,
        source_sha256=digest,
        path=final,
        sha256=file_digest(target, root=target.parent).sha256,
        tensors=answer["tensors"],
        repeated=tuple(answer["repeated"]),
        isolated=answer["isolated"],
        limited=answer["limited"],
    )


def _answer(source: Path, target: Path) -> dict[str, Any]:
    """The worker's line. Raises CheckpointError where it ended without one."""
    words = [sys.executable, "-P", "-m", WORKER, str(source.absolute()), str(target.absolute())]
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    ended = _run(words, environment, cwd=target.parent)
    try:
        answer: dict[str, Any] = json.loads(ended.stdout)
    except ValueError:
        last = next(reversed(ended.stderr.splitlines()), "")
        raise CheckpointError(
            f"weight file {source.name} could not be read in a process of its own",
            evidence=f"it ended with status {ended.returncode}: {last:.300}",
            fix="download the checkpoint again; if that is what it is, get it as safetensors",
        ) from None
    return answer


def _run(
    words: Sequence[str], environment: Mapping[str, str], *, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a program without input; it is killed when this is interrupted."""
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        cwd=cwd,
        check=False,
    )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(files: _Staged) -> None:
    """Rename shards, then their index; on an error the new ones that are in place go again."""
    placed: list[Path] = []
    try:
        for staged, final in files.paths.items():
            new = not final.exists()
            staged.replace(final)
            placed += [final] if new else []
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
