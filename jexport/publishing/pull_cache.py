"""Releases that were pulled to be opened, in the user's cache folder: by digest, and bounded.

<cache>/pulled/sha256-<hex>/ holds release.json, <version>/ and <version>.attest/. Whoever has one
open shares its lock until it is closed or the process ends, for engines read their files late, too;
what nobody has open goes when the rest is over the limit, the least recently opened first. Knows
neither the services (registries/) nor what opens an artifact (runtime/).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jexport.artifacts import manifest
from jexport.artifacts.store import TAKEN, sync, sync_tree
from jexport.cache import entries
from jexport.cache.entries import USE, Entry
from jexport.errors import ArtifactError, CacheError, RegistryError
from jexport.publishing import pull, registries
from jexport.publishing import release as releases
from jexport.publishing.registries import Access, Ref
from jexport.publishing.release import Release
from jexport.workspace.run import Run, silent

FOLDER = "pulled"
RELEASE = "release.json"
NAME = re.compile(r"sha256-[0-9a-f]{64}")

LIMIT_GIB = 32
"""Ten or more releases of full size in fp32 (2.1 GiB and less each), as much as the stage cache."""

LIMIT_VARIABLE = "JEXPORT_CACHE_GIB"


def cache_folder() -> Path:
    """JEXPORT_CACHE, or the platform's place for caches."""
    configured = os.environ.get("JEXPORT_CACHE")
    if configured:
        return Path(configured).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jexport"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jexport"


def root() -> Path:
    """The folder of all pulled releases."""
    return cache_folder() / FOLDER


def limit_bytes() -> int:
    """How much may stay: JEXPORT_CACHE_GIB, else LIMIT_GIB.

    Returns:
        Bytes.

    Raises:
        CacheError: JEXPORT_CACHE_GIB is no number.
    """
    configured = os.environ.get(LIMIT_VARIABLE, "").strip() or str(LIMIT_GIB)
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", configured, re.ASCII):
        raise CacheError(
            f"{LIMIT_VARIABLE} is not a size",
            evidence=f"it is {configured!r:.40}",
            fix="give a number of GiB, such as 32 or 0.5, or unset it",
        )
    return int(float(configured) * (1 << 30))


@contextlib.contextmanager
def opened(text: str) -> Iterator[Path]:
    """The folder of a ref's artifact, fetched when it is not here; it stays while the block runs.

    A ref with a digest that is here asks no network. A tag is resolved first. What is over the
    limit then goes, so the disk has to hold that and one release more.

    Args:
        text: a ref.

    Yields:
        The artifact's folder.

    Raises:
        CacheError: JEXPORT_CACHE_GIB is no number. Also what pull.run() raises.
    """
    place, limit = root(), limit_bytes()
    ref = registries.parse(text)
    digest = ref.digest
    if not digest:
        with registries.opened(ref, Access()) as store:
            digest = pull.resolved(store, ref).digest
    home = place / digest.replace(":", "-")
    with contextlib.ExitStack() as stack:
        held = _held(place, home.name)
        if held is not None:
            stack.enter_context(held)
        if not home.is_dir():
            try:
                _fetch(Ref(kind=ref.kind, address=ref.address, digest=digest), home)
            except BaseException:
                stack.close()  # then the lock of what is not there can go
                entries.tidy(place)
                raise
        folder = _kept(home, digest)
        with contextlib.suppress(OSError):
            os.utime(home / RELEASE)  # when it was last used
        with contextlib.suppress(OSError):  # the release is here all the same
            shrink(place, limit)
        yield folder


def _held(place: Path, name: str) -> IO[str] | None:
    """A share of a release's lock; None where none can be made, as in a folder only to be read.

    There nothing can be removed either.
    """
    with contextlib.suppress(OSError):
        return entries.lock(place, name, USE, shared=True, wait=True)
    return None


def _fetch(ref: Ref, home: Path) -> None:
    out = home.parent
    with registries.opened(ref, Access()) as store, pull.writable(out):
        release = pull.resolved(store, ref)
        with (
            pull.own_work_dir(out, ref.digest) as work_dir,
            Run(folder=work_dir, listen=silent).stage(pull.STAGE),
        ):
            if not home.is_dir():
                _put(pull.Fetching(store, release, work_dir, where=ref.address), home)


def _put(fetching: pull.Fetching, home: Path) -> None:
    release = fetching.release
    fetching.all()
    whole = fetching.work_dir / "home"
    shutil.rmtree(whole, ignore_errors=True)  # of a pull that was cut off here
    whole.mkdir()
    (whole / RELEASE).write_bytes(release.document)
    artifact = fetching.assembled(whole / release.facts["version"])
    fetching.place_beside(releases.beside(artifact))
    sync_tree(whole)
    try:
        os.rename(whole, home)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
    sync(home.parent)
    shutil.rmtree(fetching.work_dir, ignore_errors=True)


def _kept(home: Path, digest: str) -> Path:
    """The artifact's folder in a cached release, whose manifest is the one that was published."""
    try:
        release = releases.read((home / RELEASE).read_bytes(), digest, where=str(home))
        folder = home / release.facts["version"]
        right = manifest.file_digest(folder / manifest.NAME, root=folder).sha256
    except (OSError, RegistryError) as error:
        raise _changed(home, str(error)) from error
    if right != release.manifest.blob.hex:
        raise _changed(home, f"{folder.name}/{manifest.NAME} is another one")
    return folder


def _changed(home: Path, evidence: str) -> ArtifactError:
    return ArtifactError(
        f"the cached release {home} is not what was pulled",
        evidence=evidence,
        fix="remove that folder, or run `jexport cache verify --pulled --remove`: it is pulled "
        "again",
    )


def listed(place: Path) -> list[Entry]:
    """All releases, the least recently opened first; damaged ones too.

    Args:
        place: the folder of all pulled releases.

    Returns:
        An entry a release.
    """
    entries_here = entries.listed(place, record_name=RELEASE, about=_about)
    return [one for one in entries_here if NAME.fullmatch(one.name)]


def _about(record: Path) -> str:
    try:
        facts = _release(record.parent).facts
    except (OSError, RegistryError):
        return "damaged"
    return " ".join(facts[name] for name in ("name", "task", "target", "precision", "version"))


def _release(home: Path) -> Release:
    document = (home / RELEASE).read_bytes()
    return releases.read(document, home.name.replace("-", ":"), where=str(home))


def shrink(place: Path, limit: int) -> list[Entry]:
    """Remove what was opened least recently until the rest fits; never what somebody has open.

    Args:
        place: the folder of all pulled releases.
        limit: bytes that may stay.

    Returns:
        What was removed.
    """
    return entries.shrink(place, limit, listing=listed)


def clean(place: Path) -> None:
    """Remove what pulls that were stopped left to be taken up again.

    Args:
        place: the folder of all pulled releases.
    """
    with contextlib.suppress(OSError):
        pull.sweep(place / pull.WORK, stale_s=0)
    for folder in (place / pull.WORK, place):
        with contextlib.suppress(OSError):
            folder.rmdir()  # only when nothing is in it


def verify(place: Path) -> Iterator[tuple[str, str]]:
    """Read every release.

    Args:
        place: the folder of all pulled releases.

    Yields:
        Its name and what is wrong with it, '' for nothing.
    """
    for one in listed(place):
        held = _held(place, one.name)
        with held if held is not None else contextlib.nullcontext():
            problem = _problem(place / one.name)
        yield one.name, problem


def remove_damaged(place: Path, name: str) -> bool:
    """Remove one release, unless somebody has it open.

    Args:
        place: the folder of all pulled releases.
        name: of the release's folder in it.

    Returns:
        Whether it was removed.
    """
    return entries.remove_damaged(place, name)


def _problem(home: Path) -> str:
    try:
        release = _release(home)
        version = release.facts["version"]
        expected = {
            f"{version}{releases.BESIDE if layer.beside else ''}/{layer.path}": layer.blob.hex
            for layer in release.layers
        }
        paths = [path for path in home.rglob("*") if path.is_symlink() or not path.is_dir()]
        present = {path.relative_to(home).as_posix(): path for path in paths}
        present.pop(RELEASE)
        if set(present) != set(expected):
            return f"its files are not those listed: {sorted(set(present) ^ set(expected))[:3]}"
        for name, sha256 in expected.items():
            if present[name].is_symlink() or not present[name].is_file():
                return f"{name} is a link or a special file"
            if manifest.file_digest(present[name], root=home).sha256 != sha256:
                return f"{name} was changed"
    except RegistryError as error:
        return error.evidence
    except OSError as error:
        return "it was removed meanwhile" if not home.exists() else str(error)
    return ""
