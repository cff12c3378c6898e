"""An OCI registry: oci://HOST[:PORT]/REPOSITORY, by the OCI distribution spec.

As ORAS lays artifacts down: a blob a file, one image manifest, which is the release's document. The
tag release-<hex> lists it; other tags point to it. Without TLS only on this machine, or when asked.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlencode

from jexport.errors import RegistryError
from jexport.publishing.registries import RESERVED, Access, Kind, Listing, Store, no_release, no_tag
from jexport.publishing.registries._http import Client
from jexport.publishing.release import DOCUMENT, LARGEST_DOCUMENT_BYTES, Blob, Release, digest_of

CHUNK_BYTES = 1 << 20
PAGE = 1000
LISTED = "release-"
REPOSITORY = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")


def _address(place: str) -> str:
    host, _, repository = place.strip("/").partition("/")
    if not host or not REPOSITORY.fullmatch(repository):
        raise RegistryError(
            "oci:// needs a host and a repository in lower case",
            evidence=f"host {host!r}, repository {repository!r}",
            fix="oci://registry.example/team/model",
        )
    return f"oci://{host}/{repository}"


@contextlib.contextmanager
def _open(address: str, access: Access, writing: bool) -> Iterator[Store]:
    host, _, repository = address.removeprefix("oci://").partition("/")
    client = Client(host, plain_http=access.plain_http)
    there = _Repository(client, repository, address)
    try:
        yield Store(
            public=lambda: access.public,
            has=lambda release, blob: there.has(blob),
            put=lambda release, blob, path, sent: there.put(blob, path, sent),
            commit=there.commit,
            tag=there.tag,
            document=there.document,
            read=lambda release, blob, start: there.read(blob, start),
            resolve=there.resolve,
            listing=there.listing,
        )
    finally:
        client.close()


class _Repository:
    """One repository of a registry: the distribution spec's paths."""

    def __init__(self, client: Client, repository: str, address: str) -> None:
        self.client, self.root, self.address = client, f"/v2/{repository}", address

    def has(self, blob: Blob) -> bool:
        answer = self.client.ask("HEAD", f"{self.root}/blobs/{blob.digest}", good=(200, 404))
        return (
            answer.status_code == 200
            and int(answer.headers.get("Content-Length", blob.size_bytes)) == blob.size_bytes
        )

    def put(self, blob: Blob, path: Path, sent: Callable[[int], None]) -> None:
        """One POST and one PUT: what every registry takes; it checks the digest itself."""
        started = self.client.ask("POST", f"{self.root}/blobs/uploads/", good=(202,), body=b"")
        place = started.headers.get("Location", "")
        if not place:
            raise RegistryError(
                f"{self.address}: no place to send a file to",
                evidence="the registry's answer has no Location",
                fix="check the host: it may be no OCI registry",
            )
        place += ("&" if "?" in place else "?") + urlencode({"digest": blob.digest})
        with contextlib.ExitStack() as stack:

            def body() -> object:
                if not blob.size_bytes:
                    return b""
                return stack.enter_context(_Body(path, sent))

            self.client.ask(
                "PUT",
                place,
                good=(201, 204),
                headers={"Content-Type": "application/octet-stream"},
                body=body,
            )

    def commit(self, release: Release, sources: Mapping[str, Path]) -> None:
        """Under a tag of its own: a registry lists tags only."""
        self.tag(release, LISTED + release.digest.removeprefix("sha256:"))

    def tag(self, release: Release, tag: str) -> None:
        self.client.ask(
            "PUT",
            f"{self.root}/manifests/{tag}",
            good=(201, 204),
            headers={"Content-Type": DOCUMENT},
            body=release.document,
        )

    def document(self, digest: str) -> bytes:
        content = self._manifest(digest)
        if content is None:
            raise no_release(self.address, digest)
        return content

    def _manifest(self, name: str) -> bytes | None:
        """By digest or tag; one byte more than a document may have is enough to refuse it."""
        answer = self.client.ask(
            "GET",
            f"{self.root}/manifests/{name}",
            good=(200, 404),
            headers={"Accept": DOCUMENT},
            stream=True,
        )
        with contextlib.closing(answer), self.client.wrapped_errors():
            if answer.status_code == 404:
                return None
            content = b""
            for chunk in answer.iter_content(CHUNK_BYTES):
                content += chunk
                if len(content) > LARGEST_DOCUMENT_BYTES:
                    break
            return content

    def read(self, blob: Blob, start: int) -> Iterator[bytes]:
        """From `start` on, also when the registry sends everything."""
        if start >= blob.size_bytes:
            return
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        place = f"{self.root}/blobs/{blob.digest}"
        answer = self.client.ask("GET", place, good=(200, 206, 404), headers=headers, stream=True)
        with contextlib.closing(answer), self.client.wrapped_errors():
            if answer.status_code == 404:
                raise RegistryError(
                    f"{self.address} lacks a file of this release",
                    evidence=blob.digest,
                    fix="publish that artifact again with --repair",
                )
            skip = start if answer.status_code == 200 else 0
            for chunk in answer.iter_content(CHUNK_BYTES):
                yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def resolve(self, tag: str) -> str:
        content = self._manifest(tag)
        if content is None:
            raise no_tag(self.address, tag, self.listing().tags)
        return digest_of(content)

    def listing(self) -> Listing:
        tags: list[str] = []
        place = f"{self.root}/tags/list?n={PAGE}"
        while place:
            answer = self.client.ask("GET", place, good=(200, 404))
            if answer.status_code == 404:  # a repository that nobody has pushed to
                break
            tags += self.client.json(answer).get("tags") or []
            place = answer.links.get("next", {}).get("url", "")
        digests = [tag for tag in tags if RESERVED.fullmatch(tag) and tag.startswith(LISTED)]
        return Listing(
            digests=tuple(sorted(f"sha256:{tag.removeprefix(LISTED)}" for tag in digests)),
            tags=tuple(sorted(tag for tag in tags if not RESERVED.fullmatch(tag))),
        )


class _Body:
    """A file as requests wants a body of known length; tells how much of it went out."""

    def __init__(self, path: Path, sent: Callable[[int], None]) -> None:
        self._file: io.BufferedReader = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        self._size = path.stat().st_size
        self._sent = sent

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(CHUNK_BYTES):
            yield chunk

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        chunk = self._file.read(size)
        self._sent(len(chunk))
        return chunk


KIND = Kind(
    name="oci",
    scheme="oci",
    summary="an OCI registry",
    needs=("requests",),
    address=_address,
    open=_open,
)
