"""The Hugging Face Hub: hf://OWNER/REPO, through huggingface_hub and the user's own login there.

One commit holds a release: its files where people look for them, its document below .jexport/. So
it is visible whole or not at all. Large files go up before, which nobody sees.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jexport.errors import RegistryError
from jexport.publishing.registries import Access, Kind, Listing, Store, no_release, no_tag
from jexport.publishing.release import DIGEST, LARGEST_DOCUMENT_BYTES, Blob, Release
from jexport.publishing.retry import TransientError
from jexport.redact import brief

CHUNK_BYTES = 8 << 20
BACKED_OFF = 3
OURS = ".jexport"
PASSING = (408, 425, 429, 500, 502, 503, 504)
PASSING_NAMES = ("TransportError", "ConnectionError", "Timeout", "TimeoutError", "TimeoutException")
"""Base classes of httpx, httpx2 and requests, of which huggingface_hub uses one or another."""


def _address(place: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", place):
        raise RegistryError(
            "hf:// needs an owner and a repository", evidence=f"{place!r}", fix="hf://owner/repo"
        )
    return f"hf://{place}"


@contextlib.contextmanager
def _open(address: str, access: Access, writing: bool) -> Iterator[Store]:
    import huggingface_hub

    there = _Repository(
        address.removeprefix("hf://"),
        api=huggingface_hub.HfApi(),
        files=huggingface_hub.HfFileSystem(use_listings_cache=False, skip_instance_cache=True),
        public=access.public,
    )
    yield there.store()


class _Repository:
    """One model repository on the Hub. api, files: huggingface_hub's HfApi and HfFileSystem."""

    def __init__(self, name: str, *, api: Any, files: Any, public: bool) -> None:
        self.name, self.api, self.files, self._public = name, api, files, public
        self._created = False

    def store(self) -> Store:
        """Its functions."""
        return Store(
            public=self.public,
            has=self.has,
            put=self.put,
            commit=self.commit,
            tag=self.tag,
            document=self.document,
            read=self.read,
            resolve=self.resolve,
            listing=self.listing,
        )

    def public(self) -> bool:
        """What the Hub says; of a repository to be made, what was asked for."""
        repository = self._repository()
        return self._public if repository is None else not repository.private

    def _repository(self) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        with self.wrapped_errors():
            try:
                return self.api.repo_info(self.name, repo_type="model")
            except RepositoryNotFoundError:
                return None

    def has(self, release: Release, blob: Blob) -> bool:
        """Whether every place of a blob holds it; what git keeps itself is sent again."""
        expected = {place: blob for place in places(release, blob)}
        return self._held(expected) == set(expected)

    def _held(self, expected: Mapping[str, Blob]) -> set[str]:
        """Which places hold their blob, in one request."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self.wrapped_errors():
            try:
                infos = self.api.get_paths_info(self.name, list(expected), repo_type="model")
            except RepositoryNotFoundError:
                return set()
        return {each.path for each in infos if _holds(each, expected[each.path])}

    def put(self, release: Release, blob: Blob, path: Path, sent: Callable[[int], None]) -> None:
        """Send what the Hub keeps as a large file; what it has already it does not take twice."""
        from huggingface_hub import CommitOperationAdd

        with self.wrapped_errors():
            if not self._created:
                self.api.create_repo(
                    self.name, repo_type="model", private=not self._public, exist_ok=True
                )
                self._created = True
            addition = CommitOperationAdd(places(release, blob)[0], path)
            self.api.preupload_lfs_files(self.name, [addition], repo_type="model")
        sent(blob.size_bytes)

    def commit(self, release: Release, sources: Mapping[str, Path]) -> None:
        from huggingface_hub import CommitOperationAdd

        uploads = {place: blob for blob in release.blobs for place in places(release, blob)}
        held = self._held(uploads)
        added = [
            CommitOperationAdd(place, sources[blob.digest])
            for place, blob in uploads.items()
            if place not in held
        ]
        added.append(CommitOperationAdd(_document(release.digest), release.document))
        self._commit(added, f"{root(release)} {release.digest[:19]}")

    def tag(self, release: Release, tag: str) -> None:
        from huggingface_hub import CommitOperationAdd

        added = CommitOperationAdd(f"{OURS}/tags/{tag}", release.digest.encode())
        self._commit([added], f"{tag}: {release.digest[:19]}")

    def _commit(self, added: list[Any], message: str) -> None:
        with self.wrapped_errors():
            self.api.create_commit(self.name, added, commit_message=message, repo_type="model")

    def document(self, digest: str) -> bytes:
        content = self._small(_document(digest))
        if content is None:
            raise no_release(f"hf://{self.name}", digest)
        return content

    def _small(self, place: str) -> bytes | None:
        with self.wrapped_errors():
            try:
                with self.files.open(f"{self.name}/{place}", "rb") as stream:
                    content: bytes = stream.read(LARGEST_DOCUMENT_BYTES)
            except FileNotFoundError:
                return None
            return content

    def read(self, release: Release, blob: Blob, start: int) -> Iterator[bytes]:
        place = f"{self.name}/{places(release, blob)[0]}"
        with (
            self.wrapped_errors(tries=BACKED_OFF),
            self.files.open(place, "rb", block_size=CHUNK_BYTES) as stream,
        ):
            stream.seek(start)
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def resolve(self, tag: str) -> str:
        digest = (self._small(f"{OURS}/tags/{tag}") or b"").decode(errors="replace")
        if not DIGEST.fullmatch(digest):
            raise no_tag(f"hf://{self.name}", tag, self.listing().tags)
        return digest

    def listing(self) -> Listing:
        """Raises RegistryError for a repository that is not there, or not for us."""
        from huggingface_hub.errors import EntryNotFoundError

        with self.wrapped_errors(tries=BACKED_OFF):
            try:
                tree = self.api.list_repo_tree(self.name, OURS, recursive=True, repo_type="model")
                held = [each.path for each in tree if hasattr(each, "blob_id")]
            except EntryNotFoundError:
                held = []
        names = {name.rpartition("/") for name in held}
        digests = (f"sha256:{last}" for folder, _, last in names if folder.endswith("releases"))
        return Listing(
            digests=tuple(sorted(each for each in digests if DIGEST.fullmatch(each))),
            tags=tuple(sorted(last for folder, _, last in names if folder == f"{OURS}/tags")),
        )

    @contextlib.contextmanager
    def wrapped_errors(self, *, tries: int = 1) -> Iterator[None]:
        """What huggingface_hub says, as TransientError or RegistryError, without credentials.

        tries: how many it makes itself (its http_backoff waits 23 s over six), so that a Hub that
        is away is not asked for minutes.
        """
        try:
            yield
        except (RegistryError, TransientError):
            raise
        except Exception as error:
            from huggingface_hub.errors import HfHubHTTPError

            kinds = {base.__name__ for base in type(error).__mro__}
            code = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            offline = "OfflineModeIsEnabled" in kinds
            if not offline and (code in PASSING or kinds & set(PASSING_NAMES)):
                raise TransientError(f"hf://{self.name}: {brief(error)}", tries=tries) from error
            if not isinstance(error, (OSError, HfHubHTTPError)):
                raise
            raise RegistryError(
                f"cannot use hf://{self.name}",
                evidence=brief(error),
                fix="check the name, HF_HUB_OFFLINE and the login (hf auth login)",
            ) from error


def root(release: Release) -> str:
    """Where a release's files are; builds of one version that differ do not meet.

    Args:
        release: its facts and its manifest's digest count.

    Returns:
        A path in the repository.
    """
    facts, own = release.facts, release.manifest.blob.hex[:12]
    return (
        f"{facts['name']}/{facts['task']}/{facts['target']}-{facts['precision']}"
        f"/{facts['version']}-{own}"
    )


def places(release: Release, blob: Blob) -> list[str]:
    """Every path at which a blob stands in the repository.

    Args:
        release: that has the blob.
        blob: a file's, or the model config.

    Returns:
        The paths, several for files with equal bytes.
    """
    paths = []
    for layer in release.layers:
        if layer.blob == blob and layer.beside:
            paths.append(f"{root(release)}.attest/{release.digest[7:19]}/{layer.path}")
        elif layer.blob == blob:
            paths.append(f"{root(release)}/{layer.path}")
    if blob == release.config:
        paths.append(f"{OURS}/config/{blob.hex}")
    return paths


def _document(digest: str) -> str:
    return f"{OURS}/releases/{digest.removeprefix('sha256:')}"


def _holds(info: Any, blob: Blob) -> bool:
    large = getattr(info, "lfs", None)
    return large is not None and (large.sha256, large.size) == (blob.hex, blob.size_bytes)


KIND = Kind(
    name="hub",
    scheme="hf",
    summary="the Hugging Face Hub",
    needs=("huggingface_hub",),
    address=_address,
    open=_open,
)
