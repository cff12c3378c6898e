"""How releases lie where there are only keys and bytes: a folder, a bucket.

jexport-registry.json             that this is one, and its format
blobs/sha256/<hex>                files, each once
releases/sha256/<hex>             documents; written when every blob is there
tags/<tag>                        a digest; written last, replaced when the tag moves
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jexport.errors import RegistryError
from jexport.publishing.registries import Listing, Store, no_release, no_tag
from jexport.publishing.release import DIGEST, LARGEST_DOCUMENT_BYTES, Blob, Release
from jexport.publishing.retry import call_with_retry

MARK = "jexport-registry.json"
FORMAT = 1
BLOBS, RELEASES, TAGS = "blobs/sha256", "releases/sha256", "tags"


@dataclass(frozen=True, kw_only=True)
class Objects:
    """Keys and bytes, as functions. A key holds all of its bytes or is not there.

    Args:
        holds: key, blob: whether it is there, as well as that can be seen without moving it.
        write: key, content: a small object.
        upload: key, path, blob, sent: a file; sent(n) means that n more bytes went out.
        read: key, limit: at most so many bytes, None when the key is not there.
        stream: key, size, start: the bytes from start on.
        names: those below a prefix.
    """

    holds: Callable[[str, Blob], bool]
    write: Callable[[str, bytes], None]
    upload: Callable[[str, Path, Blob, Callable[[int], None]], None]
    read: Callable[[str, int], bytes | None]
    stream: Callable[[str, int, int], Iterator[bytes]]
    names: Callable[[str], list[str]]


def store(objects: Objects, address: str, *, public: bool, writing: bool) -> Store:
    """A Store on keys and bytes. Raises RegistryError for a place of another format."""
    what = f"opening {address}"
    mark = call_with_retry(lambda: objects.read(MARK, 1 << 16), what=what)
    if mark is None:
        if not writing:
            raise RegistryError(
                f"{address} is not a registry",
                evidence=f"there is no {MARK} in it",
                fix="check the address; `jexport publish` makes one",
            )
        content = json.dumps({"format": FORMAT}).encode() + b"\n"
        call_with_retry(lambda: objects.write(MARK, content), what=what)
    else:
        _check_format(mark, address)

    def commit(release: Release, sources: Mapping[str, Path]) -> None:
        objects.write(f"{RELEASES}/{release.digest.removeprefix('sha256:')}", release.document)

    def document(digest: str) -> bytes:
        key = f"{RELEASES}/{digest.removeprefix('sha256:')}"
        content = objects.read(key, LARGEST_DOCUMENT_BYTES)
        if content is None:
            raise no_release(address, digest)
        return content

    def resolve(tag: str) -> str:
        content = objects.read(f"{TAGS}/{tag}", 256)
        if content is None:
            raise no_tag(address, tag, objects.names(TAGS))
        digest = content.decode(errors="replace")
        if not DIGEST.fullmatch(digest):
            raise RegistryError(
                f"{address}: the tag '{tag}' names no digest",
                evidence=f"it holds {digest!r:.100}",
                fix=f"publish with --tag {tag} again",
            )
        return digest

    def listing() -> Listing:
        digests = (f"sha256:{name}" for name in objects.names(RELEASES))
        return Listing(
            digests=tuple(sorted(each for each in digests if DIGEST.fullmatch(each))),
            tags=tuple(sorted(objects.names(TAGS))),
        )

    return Store(
        public=lambda: public,
        has=lambda release, blob: objects.holds(_key(blob), blob),
        put=lambda release, blob, path, sent: objects.upload(_key(blob), path, blob, sent),
        commit=commit,
        tag=lambda release, tag: objects.write(f"{TAGS}/{tag}", release.digest.encode()),
        document=document,
        read=lambda release, blob, start: objects.stream(_key(blob), blob.size_bytes, start),
        resolve=resolve,
        listing=listing,
    )


def _key(blob: Blob) -> str:
    return f"{BLOBS}/{blob.hex}"


def _check_format(mark: bytes, address: str) -> None:
    try:
        number = json.loads(mark)["format"]
    except (ValueError, KeyError, TypeError):
        number = None
    if number != FORMAT:
        raise RegistryError(
            f"{address} is a registry of another format",
            evidence=f"{MARK}: format {number!r:.40}; this jexport reads {FORMAT}",
            fix="use the jexport that wrote it, or another place",
        )
