"""A folder as a registry: on a disk that is shared, or carried.

Files are copied beside their place, synced, checked by digest and renamed. Knows no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jexport.artifacts.store import sync
from jexport.errors import RegistryError
from jexport.publishing.registries import Access, Kind, Store, _objects
from jexport.publishing.release import Blob
from jexport.workspace.run import NO_SPACE

CHUNK_BYTES = 1 << 22
UPLOADS = "uploads"
STALE_S = 24 * 3600.0
"""Leavings of publishers that were killed are removed after a day."""


def is_registry(folder: Path) -> bool:
    """Whether a folder is a registry, and not a folder of artifacts.

    Args:
        folder: any path.

    Returns:
        False also where there is no folder.
    """
    return (folder / _objects.MARK).is_file()


def _address(place: str) -> str:
    if not place:
        raise RegistryError(
            "folder:// needs a path", evidence="there is none", fix="folder:///srv/models"
        )
    return f"folder://{Path(place).expanduser().absolute()}"


@contextlib.contextmanager
def _open(address: str, access: Access, writing: bool) -> Iterator[Store]:
    root = Path(address.removeprefix("folder://"))
    with _wrapped_errors(address):
        if writing:
            _sweep(root / UPLOADS)
            if (
                root.is_dir()
                and not is_registry(root)
                and {p.name for p in root.iterdir()} - {UPLOADS}
            ):
                raise RegistryError(
                    f"{address} is a folder of something else",
                    evidence=f"it is not empty, and there is no {_objects.MARK} in it",
                    fix="publish to an empty folder, or a new one: it is made",
                )
    yield _objects.store(_objects_in(root, address), address, public=access.public, writing=writing)


def _objects_in(root: Path, address: str) -> _objects.Objects:
    def write(key: str, content: bytes) -> None:
        with _wrapped_errors(address), _placed(root, key) as staged:
            staged.write_bytes(content)

    def upload(key: str, path: Path, blob: Blob, sent: Callable[[int], None]) -> None:
        with _wrapped_errors(address), _placed(root, key) as staged:
            digest = _copy(path, staged, sent)
            if digest != blob.hex:
                raise RegistryError(
                    f"{path} changed while it was published",
                    evidence=f"it was to have SHA-256 {blob.hex}, and has {digest}",
                    fix="publish again when nothing writes there",
                )

    def holds(key: str, blob: Blob) -> bool:
        path = root / key
        with _wrapped_errors(address):
            return path.is_file() and _digest(path) == blob.hex

    def read(key: str, limit: int) -> bytes | None:
        with _wrapped_errors(address):
            try:
                with open(root / key, "rb") as stream:
                    return stream.read(limit)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def stream(key: str, size_bytes: int, start: int) -> Iterator[bytes]:
        with _wrapped_errors(address), open(root / key, "rb") as source:
            source.seek(start)
            while chunk := source.read(CHUNK_BYTES):
                yield chunk

    def listed(prefix: str) -> list[str]:
        with _wrapped_errors(address):
            folder = root / prefix
            return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    return _objects.Objects(
        holds=holds, write=write, upload=upload, read=read, stream=stream, names=listed
    )


@contextlib.contextmanager
def _placed(root: Path, key: str) -> Iterator[Path]:
    """A file to write, which gets its name when the block ends well and goes when it does not."""
    staged = root / UPLOADS / f"{os.getpid()}-{secrets.token_hex(8)}"
    staged.parent.mkdir(parents=True, exist_ok=True)
    final = root / key
    try:
        yield staged
        sync(staged)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, final)
        sync(final.parent)
    finally:
        staged.unlink(missing_ok=True)


def _copy(source: Path, target: Path, sent: Callable[[int], None]) -> str:
    sha = hashlib.sha256()
    with open(source, "rb") as reading, open(target, "wb") as writing:
        while chunk := reading.read(CHUNK_BYTES):
            sha.update(chunk)
            writing.write(chunk)
            sent(len(chunk))
    return sha.hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sweep(uploads: Path) -> None:
    for path in uploads.iterdir() if uploads.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()


@contextlib.contextmanager
def _wrapped_errors(address: str) -> Iterator[None]:
    """What the disk says, as a RegistryError; a full one stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise RegistryError(
            f"cannot use {address}",
            evidence=f"{type(error).__name__}: {error}",
            fix="check the path, and who may write there",
        ) from error


KIND = Kind(
    name="folder",
    scheme="folder",
    summary="a folder, shared or carried",
    needs=(),
    address=_address,
    open=_open,
)
