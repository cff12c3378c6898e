"""Which checkpoint an artifact was made of: what a model's name stands for.

Two folders called `final`, or two hub ids that end alike, are told apart by what is in their files.
Reads manifests as they are; opens no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jexport.artifacts import manifest
from jexport.types import FileDigest, LoadedModel

NOT_THE_MODEL = ("README.md",)
"""Files of a checkpoint that decide no vector."""

WEIGHTS = (".safetensors", ".bin")
ADAPTER = "adapter_"
SHOWN = 12
"""Hex digits of a digest in a message."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The files that an artifact of one task was made of.

    Args:
        source: hub id or folder name.
        revision: the commit on a hub, '' for a folder.
        task: the task's name.
        files: SHA-256 by path, of weights, configs, tokenizer and code.
    """

    source: str
    revision: str
    task: str
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all files."""
        return manifest.sha256_of(dict(self.files))

    def differences(self, other: Checkpoint) -> list[str]:
        """Paths of the files that make this another checkpoint than `other`.

        A file that only one of them lists is no difference by itself, since versions of jexport
        list more or fewer, unless it holds weights. Adapters of another task are no difference.

        Args:
            other: the checkpoint that it may be.

        Returns:
            The paths, sorted; empty when it is the same checkpoint.
        """
        odd = {
            path
            for path in self.files.keys() & other.files.keys()
            if self.files[path] != other.files[path]
        }
        adapters = self.task == other.task
        odd |= set(self._weights(adapters)) ^ set(other._weights(adapters))
        return sorted(odd)

    def _weights(self, adapters: bool) -> Iterator[str]:
        for path in self.files:
            name = PurePosixPath(path).name
            if name.endswith(WEIGHTS) and (adapters or not name.startswith(ADAPTER)):
                yield path

    def __str__(self) -> str:
        commit = f"@{self.revision[:SHOWN]}" if self.revision else ""
        return f"checkpoint {self.digest[:SHOWN]} ({self.source}{commit})"


def of_loaded(loaded: LoadedModel) -> Checkpoint:
    """The checkpoint that was opened for a build.

    Args:
        loaded: the checkpoint as it is open.

    Returns:
        It by its files.
    """
    source = loaded.source
    return Checkpoint(
        source=source.name,
        revision=source.revision,
        task=loaded.embedding.task,
        files=_digests((*source.files, *source.code)),
    )


def of_manifest(content: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that an artifact says it was made of.

    Args:
        content: of a manifest.

    Returns:
        The checkpoint by its files.
    """
    checkpoint = content["checkpoint"]
    return Checkpoint(
        source=checkpoint["name"],
        revision=checkpoint["revision"],
        task=content["embedding"]["task"],
        files=_digests(FileDigest(**one) for one in (*checkpoint["files"], *checkpoint["code"])),
    )


def of_folder(folder: Path) -> Checkpoint | None:
    """The checkpoint of the artifact in a folder, which is not verified.

    One that was changed, or is of a format to come, still says what it was made of.

    Args:
        folder: of the artifact, or a link to it.

    Returns:
        The checkpoint; None where no manifest says it.
    """
    try:
        content = json.loads((folder / manifest.NAME).read_bytes())
        return of_manifest(content)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _digests(files: Iterable[FileDigest]) -> dict[str, str]:
    return {one.path: one.sha256 for one in files if one.path not in NOT_THE_MODEL}
