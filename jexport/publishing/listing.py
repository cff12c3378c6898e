"""What is published in a place: one row a release, with the ref that `pull` takes.

Reads documents, no file of any artifact. Knows no service.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from jexport.errors import RegistryError
from jexport.publishing import registries
from jexport.publishing import release as releases
from jexport.publishing.registries import THREADS, Access, Ref, Store
from jexport.publishing.release import Release
from jexport.publishing.retry import call_with_retry

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One release and the tags that point to it now.

    Args:
        ref: by digest, as `pull` takes it.
        release: read from its document.
        tags: names that point to it.
    """

    ref: str
    release: Release
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a place holds, and what in it cannot be read.

    Args:
        rows: by the releases' facts, then by ref.
        troubles: what is wrong, a line for each release or tag that cannot be read.
    """

    rows: tuple[Row, ...]
    troubles: tuple[str, ...]


def read(ref: Ref, access: Access) -> Listing:
    """What a destination holds. One that its digest does not name is a trouble, no row.

    Args:
        ref: a destination; digest and tag do not count.
        access: how it is reached.

    Returns:
        Rows and troubles.

    Raises:
        DependencyError: a library that the kind of registry needs is missing.
        RegistryError: the destination cannot be opened or listed.
    """
    with registries.opened(ref, access) as store, ThreadPoolExecutor(THREADS) as pool:
        what = f"listing {ref.address}"
        listing = call_with_retry(store.listing, what=what)
        asked = [pool.submit(_tried, lambda t=tag: _target(store, t, what)) for tag in listing.tags]
        targets = [future.result() for future in asked]
        troubles = [each for each in targets if isinstance(each, RegistryError)]
        tags: dict[str, list[str]] = {}
        for tag, digest in zip(listing.tags, targets, strict=True):
            if isinstance(digest, str):
                tags.setdefault(digest, []).append(tag)
        digests = listing.digests
        asked_for = [pool.submit(_tried, lambda d=each: _read(store, d, ref)) for each in digests]
        answers = [future.result() for future in asked_for]
    rows = [
        Row(ref=ref.at(each.digest), release=each, tags=tuple(tags.get(each.digest, ())))
        for each in answers
        if isinstance(each, Release)
    ]
    troubles += [each for each in answers if isinstance(each, RegistryError)]
    rows.sort(key=lambda row: [*row.release.facts.values(), row.ref])
    lines = tuple(f"{trouble.what}: {trouble.evidence}" for trouble in troubles)
    return Listing(rows=tuple(rows), troubles=lines)


def _tried(call: Callable[[], T]) -> T | RegistryError:
    try:
        return call()
    except RegistryError as error:
        return error


def _target(store: Store, tag: str, what: str) -> str:
    return call_with_retry(lambda: store.resolve(tag), what=what)


def _read(store: Store, digest: str, ref: Ref) -> Release:
    document = call_with_retry(lambda: store.document(digest), what=f"reading from {ref.address}")
    return releases.read(document, digest, where=ref.address)
