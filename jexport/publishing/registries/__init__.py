"""What a registry is: a record of functions; the folder is the list of kinds.

To add a kind: a file here that ends with `KIND = Kind(...)`; nothing else names the service.
A kind moves bytes: what they are, and whether they are right, is for release.py and pull.py.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from jexport import plugins
from jexport.errors import DependencyError, RegistryError, nearest
from jexport.publishing.release import DIGEST, Blob, Release
from jexport.redact import redact

THREADS = 4
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
RESERVED = re.compile(r"(release|sha256)-[0-9a-f]{64}")
"""Tags that say a digest: a registry's own."""

DEFAULT_TAG = "latest"


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A destination, and a release in it: by digest, by tag, or none of both.

    Args:
        kind: name of the kind of registry.
        address: with its scheme, in the form that the kind gives it.
        digest: 'sha256:' and 64 hex digits, '' for none.
        tag: '' for none.
    """

    kind: str
    address: str
    digest: str = ""
    tag: str = ""

    def at(self, digest: str) -> str:
        """The ref that `pull` takes for a release.

        Args:
            digest: of the release.

        Returns:
            ADDRESS@sha256:DIGEST.
        """
        return f"{self.address}@{digest}"


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a destination is reached.

    Args:
        plain_http: without TLS on other machines than this one.
        public: whether everybody can read it, where the service cannot be asked.
    """

    plain_http: bool = False
    public: bool = False


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a destination holds, by name.

    Args:
        digests: of the releases there are.
        tags: their names, a registry's own tags aside.
    """

    digests: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Store:
    """One destination, opened: functions.

    They raise TransientError for a fault that may pass, RegistryError for what is not there.

    Args:
        public: whether everybody can read what is published.
        has: whether a blob of a release is there, whole.
        put: uploads a file: release, blob, path, sent; sent(n) means that n more bytes went out.
        commit: makes a release visible, once every blob is there; takes the blobs' paths by digest.
        tag: a name for a release, from now on.
        document: its bytes by digest, not checked.
        read: release, blob, start: the blob's bytes from there on.
        resolve: the digest that a tag names.
        listing: all digests and tags.
    """

    public: Callable[[], bool]
    has: Callable[[Release, Blob], bool]
    put: Callable[[Release, Blob, Path, Callable[[int], None]], None]
    commit: Callable[[Release, Mapping[str, Path]], None]
    tag: Callable[[Release, str], None]
    document: Callable[[str], bytes]
    read: Callable[[Release, Blob, int], Iterator[bytes]]
    resolve: Callable[[str], str]
    listing: Callable[[], Listing]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of registry.

    Args:
        name: of its module.
        scheme: what stands before '://'.
        summary: what it is, in a few words.
        needs: modules that must be installed.
        address: the destination as refs show it, or RegistryError.
        open: address, access, writing: a Store; writing: whether the place may be created when it
            is not there.
    """

    name: str
    scheme: str
    summary: str
    needs: tuple[str, ...]
    address: Callable[[str], str]
    open: Callable[[str, Access, bool], AbstractContextManager[Store]]


def names() -> list[str]:
    """The kinds there are, without importing any."""
    return plugins.names(__name__)


def load(name: str) -> Kind:
    """Import one kind.

    Args:
        name: of the kind, one of `names()`.

    Returns:
        Its record.

    Raises:
        RegistryError: there is no such kind; names the nearest.
    """
    kind: Kind = plugins.load(
        __name__, name, record="KIND", kind="kind of registry", error=RegistryError
    )
    return kind


def parse(text: str) -> Ref:
    """A destination or a ref: [SCHEME://]PLACE[:TAG][@sha256:DIGEST]; without a scheme a folder.

    Args:
        text: as a user gives it.

    Returns:
        The ref; nothing is opened.

    Raises:
        RegistryError: another scheme, a broken digest or tag, or credentials, which belong into
            the service's own settings.
    """
    scheme, there, place = text.partition("://")
    if not there:
        scheme, place = "folder", text
    kinds = {load(name).scheme: name for name in names()}
    if scheme not in kinds:
        raise RegistryError(
            f"there is no registry '{scheme}://'",
            evidence="there are: " + ", ".join(f"{known}://" for known in sorted(kinds)),
            fix=nearest(scheme, kinds),
        )
    whole = bool(there) or not Path(place).exists()
    place, at, digest = place.rpartition("@") if whole and "@" in place else (place, "", "")
    if at and not DIGEST.fullmatch(digest):
        _refuse_credentials(scheme, text)
        raise _broken(text, "a digest is sha256: and 64 hex digits")
    head, _, last = place.rpartition("/")
    last, colon, tag = (
        last.partition(":") if whole and (head or scheme != "oci") else (last, "", "")
    )
    if colon and not TAG.fullmatch(tag):
        raise _broken(text, "a tag is letters, digits, '.', '_' and '-', 128 at most")
    place = f"{head}/{last}" if "/" in place else last
    if "@" in place.split("/", 1)[0] and scheme != "folder":
        _refuse_credentials(scheme, text)
    kind = load(kinds[scheme])
    return Ref(kind=kind.name, address=kind.address(place), digest=digest, tag=tag)


def _refuse_credentials(scheme: str, text: str) -> None:
    authority = text.partition("://")[2].split("/", 1)[0]
    if scheme != "folder" and "@" in authority:
        raise RegistryError(
            "an address does not hold credentials",
            evidence=redact(f"{scheme}://***@{authority.rpartition('@')[2]}"),
            fix="log in with the service's own tool (docker login, aws configure, hf auth login)",
        )


def _broken(text: str, evidence: str) -> RegistryError:
    return RegistryError(
        f"cannot read the ref {redact(text)!r}",
        evidence=evidence,
        fix="`jexport list DEST` shows the refs of what is there",
    )


def check_tag(tag: str) -> None:
    """Refuse a tag that no registry takes, or that says a digest.

    Args:
        tag: a name for a release.

    Raises:
        RegistryError: it is one of those.
    """
    if not TAG.fullmatch(tag) or RESERVED.fullmatch(tag):
        raise RegistryError(
            f"'{tag:.200}' cannot be a tag",
            evidence="a tag is letters, digits, '.', '_' and '-', 128 at most, and no digest",
            fix="choose another --tag",
        )


def opened(ref: Ref, access: Access, *, writing: bool = False) -> AbstractContextManager[Store]:
    """The destination of a ref, for a `with` block.

    Args:
        ref: digest and tag do not count.
        access: how it is reached.
        writing: whether the place may be created when it is not there.

    Returns:
        A context manager that gives the Store.

    Raises:
        DependencyError: a module that the kind needs is missing.
        RegistryError: the place cannot be used.
    """
    kind = load(ref.kind)
    missing = [name for name in kind.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"{kind.scheme}:// needs {', '.join(missing)}",
            evidence="not installed in this environment",
            fix='pip install "jexport[publish]"',
        )
    return kind.open(ref.address, access, writing)


def no_tag(address: str, tag: str, known: Sequence[str]) -> RegistryError:
    """The error for a tag that is not there.

    Args:
        address: of the destination.
        tag: that was asked for.
        known: tags that are there; the first 20 are named.

    Returns:
        The error, to be raised.
    """
    return RegistryError(
        f"{address} has no tag '{tag}'",
        evidence=f"tags: {', '.join(sorted(known)[:20]) or 'none'}",
        fix="`jexport list` shows what is there; publish with --tag to give it that name",
    )


def no_release(address: str, digest: str) -> RegistryError:
    """The error for a digest that is not there.

    Args:
        address: of the destination.
        digest: that was asked for.

    Returns:
        The error, to be raised.
    """
    return RegistryError(
        f"{address} has no release {digest}",
        evidence="it was never published there, or not to its end",
        fix="`jexport list` shows what is there; publish again: what was sent is not sent again",
    )
