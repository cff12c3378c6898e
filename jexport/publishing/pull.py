"""From a ref to an artifact's folder: resolve, fetch what lacks, check by digest, put in place.

Nothing has its final name before every byte is there and right. What was fetched before a pull
ended is kept below .pull/ and used by the next one. Knows no service: registries/ does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jexport.artifacts import identity, manifest
from jexport.artifacts.store import Slot, check_name, find, place, point_latest, sync
from jexport.errors import OutputPathError, SignatureError
from jexport.publishing import registries, signing
from jexport.publishing import release as releases
from jexport.publishing.registries import THREADS, Access, Ref, Store
from jexport.publishing.release import Blob, Release, refused
from jexport.publishing.retry import TransientError, call_with_retry
from jexport.publishing.transfers import Job, TransferControl, run_parallel
from jexport.types import Artifact
from jexport.workspace import locks
from jexport.workspace.run import NO_SPACE, Event, Listener, Run, silent

STAGE = "pull"
WORK = ".pull"
CHUNK_BYTES = 1 << 22
STALE_S = 7 * 24 * 3600.0
"""What a pull that was stopped left goes after a week."""


def run(
    ref: Ref,
    out: Path,
    *,
    access: Access = Access(),  # noqa: B008 (frozen)
    threads: int = THREADS,
    policy: signing.Policy | None = None,
    replace: bool = False,
    listen: Listener = silent,
) -> Artifact:
    """The release of a ref as an artifact below `out`, in the folders that a build would make.

    What is there and right is not fetched again. Raises RegistryError, ArtifactError (the version
    is there already and was changed), OutputPathError, DiskFullError.
    policy: whose signature the release must have, also where the artifact is there already; else
    SignatureError, and nothing of it is put below `out`. A release that has none is not fetched;
    whose it is, is known when every file is here, for it is about all of them.
    replace: its name may go from another checkpoint below `out` to this one.
    """
    if policy is not None:
        signing.check_policy(policy)
    with registries.opened(ref, access) as store, writable(out):
        release = resolved(store, ref)
        slot = _slot(out, release)
        with (
            own_work_dir(out, release.digest) as work_dir,
            _dropped_if_refused(work_dir),
            Run(folder=work_dir, listen=listen).stage(STAGE) as note,
        ):
            fetching = Fetching(
                store, release, work_dir, where=ref.address, threads=threads, listen=listen
            )
            artifact = _same(slot, release)
            if policy is not None:
                _check_signed(release, ref.address)
            content = artifact.manifest.content if artifact is not None else fetching.manifest()
            check_name(slot, identity.of_manifest(content), replace=replace)
            fetching.all(only_beside=artifact is not None)
            whole = slot.path if artifact is not None else fetching.assembled(work_dir / "artifact")
            if policy is not None:
                fetching.check(whole, policy)
            # First what is beside: an artifact is never seen without its signatures.
            fetching.place_beside(releases.beside(slot.path))
            if artifact is None:
                artifact = place(whole, slot, replace=replace)
                _same(slot, release)  # or that of another pull, which was faster
                note(f"{len(release.layers)} files, {release.size_bytes / 2**20:,.1f} MiB")
            else:
                # A pull may have been killed before it.
                point_latest(slot, work_dir=work_dir, replace=replace)
                note("there already")
            shutil.rmtree(work_dir, ignore_errors=True)
            return artifact


def _slot(out: Path, release: Release) -> Slot:
    """Where a build would put the release's artifact."""
    facts = release.facts
    return Slot(
        out=out,
        model=facts["name"],
        task=facts["task"],
        target=facts["target"],
        precision=facts["precision"],
        version=facts["version"],
    )


def resolved(store: Store, ref: Ref) -> Release:
    """The release that a ref names, its document checked.

    Args:
        store: the ref's destination, opened.
        ref: without a digest its tag counts, without a tag DEFAULT_TAG.

    Returns:
        The release.

    Raises:
        RegistryError: there is none, or its document is not what the digest names.
    """
    digest = ref.digest
    if not digest:
        tag = ref.tag or registries.DEFAULT_TAG
        digest = call_with_retry(
            lambda: store.resolve(tag), what=f"asking {ref.address} for '{tag}'"
        )
    document = call_with_retry(lambda: store.document(digest), what=f"reading from {ref.address}")
    return releases.read(document, digest, where=ref.address)


def _same(slot: Slot, release: Release) -> Artifact | None:
    """The artifact in a slot when it is this release's, None when there is none."""
    existing = find(slot)
    if existing is not None:
        own = manifest.file_digest(slot.path / manifest.NAME, root=slot.path)
        if own.sha256 != release.manifest.blob.hex:
            raise OutputPathError(
                f"{slot.path} is another build of this version",
                evidence=f"its {manifest.NAME} has SHA-256 {own.sha256[:19]}..., the release's "
                f"{release.manifest.blob.hex[:19]}...",
                fix="move that folder away, or pull into another one",
            )
    return existing


@contextlib.contextmanager
def _dropped_if_refused(work_dir: Path) -> Iterator[None]:
    """What was fetched of a release that is not signed as asked is not kept for the next pull."""
    try:
        yield
    except SignatureError:
        shutil.rmtree(work_dir, ignore_errors=True)
        raise


def _check_signed(release: Release, where: str) -> None:
    """Refuse a release that has no signature, before anything large is fetched."""
    attached = {layer.path for layer in release.layers if layer.beside}
    absent = sorted({signing.SIGNATURE, signing.PROVENANCE} - attached)
    if absent:
        raise signing.unsigned(f"{where}@{release.digest}", f"it lacks {', '.join(absent)}")


class Fetching:
    """One release on its way into a work folder of this pull only."""

    def __init__(
        self,
        store: Store,
        release: Release,
        work_dir: Path,
        *,
        where: str,
        threads: int = THREADS,
        listen: Listener = silent,
    ) -> None:
        self.store, self.release, self.work_dir, self.where = store, release, work_dir, where
        self.threads, self.listen = threads, listen

    def all(self, *, only_beside: bool = False) -> None:
        """Fetch what lacks: the manifest first, so that nothing large comes in vain.

        Args:
            only_beside: signatures and provenance only, for an artifact that is there already.

        Raises:
            RegistryError: a file is missing or has other bytes, or the manifest lists others.
        """
        layers = [each for each in self.release.layers if each.beside or not only_beside]
        if not only_beside:
            self.manifest()
        self._move(list(dict.fromkeys(layer.blob for layer in layers)))

    def manifest(self) -> Mapping[str, Any]:
        """Fetch the manifest alone, and see that it is of this release."""
        self._move([self.release.manifest.blob])
        probe = self.work_dir / "probe"
        probe.mkdir(exist_ok=True)
        shutil.copyfile(self._whole(self.release.manifest.blob), probe / manifest.NAME)
        content = manifest.read(probe).content
        releases.check_files(self.release, content, where=self.where)
        return content

    def _move(self, blobs: list[Blob]) -> None:
        def show(done: int, total: int) -> None:
            text = f"{done / 2**20:,.1f} of {total / 2**20:,.1f} MiB"
            self.listen(Event(kind="progress", stage=STAGE, done=done, total=total, text=text))

        jobs: list[Job] = [lambda line, blob=blob: self._fetch(blob, line) for blob in blobs]  # type: ignore[misc]
        total = sum(blob.size_bytes for blob in blobs)
        run_parallel(jobs, threads=self.threads, total_bytes=total, show=show)

    def _whole(self, blob: Blob) -> Path:
        return self.work_dir / blob.hex

    def _fetch(self, blob: Blob, line: TransferControl) -> None:
        """One blob, whole and right, at its place in the work folder."""
        whole, part = self._whole(blob), self.work_dir / f"{blob.hex}.part"
        if whole.is_file() and _digest(whole) == blob.hex:
            line.moved(blob.size_bytes)
            return
        resumed = part.is_file()
        while not self._completed(blob, part, line):
            part.unlink()
            line.moved(-blob.size_bytes)
            if not resumed:
                raise refused(self.where, self.release.digest, f"{blob.digest} has other bytes")
            resumed = False  # what an earlier pull left may be what was wrong
        os.replace(part, whole)

    def _completed(self, blob: Blob, part: Path, line: TransferControl) -> bool:
        """Fetch the rest of a blob; whether its digest is right then."""
        sha = hashlib.sha256()
        part.touch()
        with open(part, "r+b") as target:
            if part.stat().st_size > blob.size_bytes:
                target.truncate(0)
            while chunk := target.read(CHUNK_BYTES):
                sha.update(chunk)
                line.moved(len(chunk))

            def rest() -> None:
                for chunk in self.store.read(self.release, blob, target.tell()):
                    if target.tell() + len(chunk) > blob.size_bytes:
                        evidence = f"{blob.digest} has more than {blob.size_bytes} bytes"
                        raise refused(self.where, self.release.digest, evidence)
                    target.write(chunk)
                    sha.update(chunk)
                    line.moved(len(chunk))
                if target.tell() < blob.size_bytes:
                    raise TransientError(f"{self.where}: {blob.digest[:19]}... ended early")

            what = f"reading {blob.digest[:19]}... from {self.where}"
            call_with_retry(rest, what=what, reached=target.tell, sleep=line.sleep)
        return sha.hexdigest() == blob.hex

    def assembled(self, folder: Path) -> Path:
        """The artifact's files under their names, and nothing else; verified.

        Args:
            folder: is written anew; all files must have been fetched.

        Returns:
            The folder.

        Raises:
            ArtifactError: the files are not those of the manifest.
        """
        shutil.rmtree(folder, ignore_errors=True)
        for layer in self.release.layers:
            if not layer.beside:
                target = folder / layer.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._give(layer.blob, target)
        manifest.verify(folder)
        return folder

    def check(self, folder: Path, policy: signing.Policy) -> None:
        """Whether this release's own signature is about a folder, and by whom the policy says.

        Args:
            folder: of the artifact.
            policy: whose signature is asked for.

        Raises:
            ArtifactError: a file was changed.
            SignatureError: it is missing, broken, of somebody else or of something else.
        """
        attest = self.work_dir / "attest"
        shutil.rmtree(attest, ignore_errors=True)
        self.place_beside(attest)
        called = f"{self.where}@{self.release.digest}"
        signing.verify(folder, policy, attest=attest, called=called)
        shutil.rmtree(attest)

    def _give(self, blob: Blob, target: Path) -> None:
        """A blob under another name: the same bytes on the disk, for its first name."""
        whole = self._whole(blob)
        try:
            if whole.stat().st_nlink == 1:
                os.link(whole, target)
                return
        except OSError as error:  # a file system without links
            if error.errno in NO_SPACE:
                raise
        shutil.copyfile(whole, target)

    def place_beside(self, folder: Path) -> None:
        """Signatures and provenance into `<version>.attest`, each whole or not at all.

        Args:
            folder: that one, or another to check them in; what is there and right stays.
        """
        for layer in self.release.layers:
            target = folder / layer.path
            if layer.beside and not (target.is_file() and _digest(target) == layer.blob.hex):
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = self.work_dir / "beside"
                staged.unlink(missing_ok=True)
                self._give(layer.blob, staged)
                sync(staged)
                os.replace(staged, target)


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def writable(out: Path) -> Iterator[None]:
    """Report what the disk below `out` refuses as an OutputPathError; a full one stays what it is.

    Args:
        out: the folder of all artifacts; created when it is missing.

    Yields:
        Nothing.

    Raises:
        OutputPathError: in place of an OSError about a file below `out`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        ours = str(error.filename or "").startswith(str(out))
        if error.errno in NO_SPACE or not ours:
            raise
        raise OutputPathError(
            f"cannot write below {out}", evidence=str(error), fix="choose another folder"
        ) from error


@contextlib.contextmanager
def own_work_dir(out: Path, digest: str) -> Iterator[Path]:
    """A release's folder below .pull/, locked: two pulls of one release take turns.

    Args:
        out: the folder of all artifacts.
        digest: of the release.

    Yields:
        The folder, with what an earlier pull has left; it goes at the end when it is empty.
    """
    above = out / WORK
    path = above / digest.replace(":", "-")
    lock = locks.acquire(path.with_name(f"{path.name}.lock"))
    assert lock is not None
    try:
        sweep(above, but=path.name)
        path.mkdir(exist_ok=True)
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()  # only when nothing is in it
        if not path.exists():  # nothing was left to go on with
            Path(lock.name).unlink(missing_ok=True)
        lock.close()
        with contextlib.suppress(OSError):
            above.rmdir()


def sweep(above: Path, *, but: str = "", stale_s: float = STALE_S) -> None:
    """Remove what pulls that nobody took up again left below a .pull folder.

    Args:
        above: the .pull folder.
        but: a name in it that stays.
        stale_s: seconds since its last change before something counts as left.
    """
    for path in above.iterdir():
        if path.stem == but or path.suffix == ".lock":
            continue
        with contextlib.suppress(OSError):
            lock = locks.acquire(above / f"{path.name}.lock", wait=False)
            if lock is None:
                continue
            with lock:
                if time.time() - path.stat().st_mtime >= stale_s:
                    shutil.rmtree(path, ignore_errors=True)
                    Path(lock.name).unlink(missing_ok=True)
