"""What an artifact says about itself: digests, the manifest, and verifying a folder against it.

Law: `verify(folder)` passes exactly when the folder holds the files that manifest.json lists, each
with its size and SHA-256, and nothing else. It opens no engine and imports no framework.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jexport.errors import ArtifactError
from jexport.flow import Embedding, FileDigest, Manifest

NAME = "manifest.json"
FORMAT = 1
"""Version of the manifest's own layout; raised when a reader of the old one would go wrong."""

SCHEMA = Path(__file__).with_name("manifest.schema.json")
CHUNK_BYTES = 1 << 22


def file_digest(path: Path, *, root: Path) -> FileDigest:
    """Size and SHA-256 of a file, named relative to `root`."""
    sha = hashlib.sha256()
    size = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            sha.update(chunk)
            size += len(chunk)
    return FileDigest(
        path=path.relative_to(root).as_posix(), size_bytes=size, sha256=sha.hexdigest()
    )


def sha256_of(value: object) -> str:
    """SHA-256 of a JSON-ready value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def listed(files: Iterable[FileDigest]) -> list[dict[str, Any]]:
    """File digests as the manifest lists them, ordered by path."""
    return [dataclasses.asdict(f) for f in sorted(files, key=lambda f: f.path)]


def embedding_space(weights: str, embedding: Embedding) -> str:
    """Id of the space that vectors live in: two indexes may be mixed only when it is equal.

    weights: a digest of the weights that were run (checkpoint files and adapter). The precision is
    left out: within its gate an fp16 artifact searches an fp32 index.
    """
    return sha256_of(
        {
            "weights": weights,
            "task": embedding.task,
            "prompt": embedding.prompt,
            "pooling": embedding.pooling,
            "normalize": embedding.normalize,
            "dimension": embedding.dimension,
        }
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as people read it: two spaces, UTF-8, a final newline."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Read a folder's manifest.json and check the keys that every reader needs.

    Raises ArtifactError when it is missing, not JSON, of a newer format or lacks a key.
    """
    path = folder / NAME
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is not a jexport artifact",
            evidence=f"there is no {NAME} in it" if folder.is_dir() else "there is no such folder",
            fix="give the folder that `jexport build` printed, or see `jexport list`",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(folder, f"{NAME} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _broken(folder, f"{NAME} is not a JSON object")
    if content.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder} was written in manifest format {content.get('format')!r}",
            evidence=f"this jexport reads format {FORMAT}",
            fix="use the jexport that wrote it, or build it again",
        )
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    absent = [key for key in schema["required"] if key not in content]
    if absent:
        raise _broken(folder, f"{NAME} lacks: {', '.join(absent)}")
    return Manifest(content=content)


def verify(folder: Path) -> Manifest:
    """Check every file of an artifact against its manifest; returns the manifest.

    Raises ArtifactError naming each changed, missing or extra file. Links and anything that is not
    a plain file are refused: an engine would follow them out of the folder.
    """
    manifest = read(folder)
    problems = _problems(folder, manifest)
    if problems:
        raise _broken(folder, "\n".join(problems))
    return manifest


def _problems(folder: Path, manifest: Manifest) -> list[str]:
    try:
        expected = {entry["path"]: entry for entry in manifest.content["files"]}
        sealed = manifest.content["sha256"]
    except (TypeError, KeyError) as error:
        return [f"{NAME} has a broken file list: {error!r}"]
    problems = []
    if sealed != seal(manifest.content):
        problems.append(f"changed: {NAME} (its own digest does not match)")
    found: set[str] = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            problems.append(f"extra: {name} (a link or special file)")
        elif path.is_file() and name != NAME:
            found.add(name)
    problems += [f"missing: {name}" for name in sorted(set(expected) - found)]
    problems += [f"extra: {name}" for name in sorted(found - set(expected))]
    for name in sorted(found & set(expected)):
        entry = expected[name]
        size = os.path.getsize(folder / name)
        if size != entry["size_bytes"]:
            problems.append(f"changed: {name} ({size} bytes, {entry['size_bytes']} listed)")
        elif file_digest(folder / name, root=folder).sha256 != entry["sha256"]:
            problems.append(f"changed: {name} (SHA-256 differs)")
    return problems


def seal(content: Mapping[str, Any]) -> str:
    """The manifest's digest over everything it says but the digest itself."""
    return sha256_of({key: value for key, value in content.items() if key != "sha256"})


def _broken(folder: Path, evidence: str) -> ArtifactError:
    return ArtifactError(
        f"artifact {folder} is not what was built",
        evidence=evidence,
        fix="fetch it again, or build it again with `jexport build`",
    )
