"""S3-compatible storage through fsspec and s3fs: s3://BUCKET[/PREFIX].

Credentials, region and endpoint come from where AWS's own tools take them (AWS_ENDPOINT_URL names
another service). A key appears when its last byte is there: S3's own promise, multipart included.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.errors import RegistryError
from jexport.publishing.registries import Access, Kind, Store, _objects
from jexport.publishing.release import Blob
from jexport.publishing.retry import TransientError
from jexport.redact import brief

CHUNK_BYTES = 8 << 20
PART_BYTES = 16 << 20
"""Of a large upload, two at a time a file: s3fs alone would hold ten of 50 MiB in memory."""

CONNECT_S, READ_S = 5, 60
PASSING = (errno.EIO, errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO))
"""How s3fs says 500, 503 and SlowDown (its errors.py)."""

PASSING_NAMES = (
    "ConnectionError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseStreamingError",
    "ClientPayloadError",
    "ServerDisconnectedError",
    "ClientOSError",
    "FSTimeoutError",
)
"""Of botocore, aiohttp and fsspec, which share no base class."""

LOST_NAMES = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError")


def _address(place: str) -> str:
    bucket, _, prefix = place.strip("/").partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise RegistryError(
            "s3:// needs a bucket", evidence=f"{bucket!r} is none", fix="s3://bucket/prefix"
        )
    return f"s3://{bucket}/{prefix}".rstrip("/")


@contextlib.contextmanager
def _open(address: str, access: Access, writing: bool) -> Iterator[Store]:
    import s3fs

    # A request is tried three times by botocore, which knows the parts of a large file; a file by
    # retry.py. Not five times more by s3fs.
    system = s3fs.S3FileSystem(
        config_kwargs={
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "retries": {"mode": "standard", "total_max_attempts": 3},
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    system.retries = 1
    bucket = _Bucket(system, address.removeprefix("s3://"), address)
    yield _objects.store(bucket.objects(), address, public=access.public, writing=writing)


@dataclass(frozen=True)
class _Bucket:
    """Objects below one address. system: of s3fs. root: bucket and prefix, as it takes them."""

    system: Any
    root: str
    address: str

    def objects(self) -> _objects.Objects:
        """Its functions, as a store is made of."""
        return _objects.Objects(
            holds=self.holds,
            write=self.write,
            upload=self.upload,
            read=self.read,
            stream=self.stream,
            names=self.names,
        )

    def write(self, key: str, content: bytes) -> None:
        """Put a small object."""
        with _wrapped_errors(self.address):
            self.system.pipe_file(f"{self.root}/{key}", content)

    def upload(self, key: str, path: Path, blob: Blob, sent: Callable[[int], None]) -> None:
        """Put a file, in parts. sent: told bytes that arrived since it was last called."""
        from fsspec.callbacks import Callback

        class Sent(Callback):  # type: ignore[misc, unused-ignore]
            def relative_update(self, inc: int = 1) -> None:
                sent(inc)

        with _wrapped_errors(self.address):
            self.system.put_file(
                str(path),
                f"{self.root}/{key}",
                callback=Sent(),
                chunksize=PART_BYTES,
                max_concurrency=2,
            )
        if not self.holds(key, blob):
            raise TransientError(f"{self.address}/{key} did not arrive whole")

    def size_of(self, key: str) -> int | None:
        """Bytes of an object, None where there is none."""
        with _wrapped_errors(self.address):
            try:
                return int(self.system.info(f"{self.root}/{key}")["size"])
            except FileNotFoundError:
                return None

    def holds(self, key: str, blob: Blob) -> bool:
        """Whether an object is there whole."""
        return self.size_of(key) == blob.size_bytes

    def read(self, key: str, limit: int) -> bytes | None:
        """The first `limit` bytes of an object, None where there is none."""
        with _wrapped_errors(self.address):
            try:
                content: bytes = self.system.cat_file(f"{self.root}/{key}")
            except FileNotFoundError:
                return None
            return content[:limit]

    def stream(self, key: str, size_bytes: int, start: int) -> Iterator[bytes]:
        """The bytes of an object from `start` on."""
        size = self.size_of(key)
        if size != size_bytes:  # a range beyond the end is an error that says nothing
            raise RegistryError(
                f"{self.address} does not hold what was published",
                evidence=f"{key} has {size} bytes, not {size_bytes}"
                if size is not None
                else f"{key} is gone",
                fix="publish that artifact again with --repair",
            )
        for begin in range(start, size_bytes, CHUNK_BYTES):
            with _wrapped_errors(self.address):
                yield self.system.cat_file(
                    f"{self.root}/{key}", start=begin, end=min(begin + CHUNK_BYTES, size_bytes)
                )

    def names(self, prefix: str) -> list[str]:
        """Names of the objects below a prefix."""
        with _wrapped_errors(self.address):
            try:
                keys = self.system.ls(f"{self.root}/{prefix}", detail=False, refresh=True)
            except FileNotFoundError:
                return []
            return sorted(name.rsplit("/", 1)[-1] for name in keys)


@contextlib.contextmanager
def _wrapped_errors(address: str) -> Iterator[None]:
    """Errors of s3fs, botocore and aiohttp, as TransientError or RegistryError, without secrets."""
    try:
        yield
    except (RegistryError, TransientError):
        raise
    except Exception as error:
        kinds = {base.__name__ for base in type(error).__mro__}
        number = getattr(error, "errno", None)
        if isinstance(error, TimeoutError) or kinds & set(PASSING_NAMES) or number in PASSING:
            raise TransientError(f"{address}: {brief(error)}") from error
        if not isinstance(error, OSError) and not kinds & {*LOST_NAMES, "BotoCoreError"}:
            raise
        raise RegistryError(
            f"cannot use {address}",
            evidence=brief(error),
            fix="check the bucket, the credentials (AWS_PROFILE ...) and AWS_ENDPOINT_URL",
        ) from error


KIND = Kind(
    name="s3",
    scheme="s3",
    summary="S3-compatible storage",
    needs=("s3fs",),
    address=_address,
    open=_open,
)
