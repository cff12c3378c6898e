"""publish: Artifact -> a release in a registry, by digest, that `pull` takes.

Files first, the document last: an upload that ends early is never visible, and what was sent is not
sent again. Does not know how any registry keeps them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jexport.artifacts import identity
from jexport.artifacts.model_card import NON_COMMERCIAL
from jexport.errors import RegistryError
from jexport.publishing import registries
from jexport.publishing import release as releases
from jexport.publishing.registries import THREADS, Access, Ref, Store
from jexport.publishing.release import Blob, Release
from jexport.publishing.retry import TransientError, call_with_retry
from jexport.publishing.transfers import Job, TransferControl, run_parallel
from jexport.types import Artifact
from jexport.workspace.run import Event, Listener, Run, silent

STAGE = "publish"


@dataclass(frozen=True, kw_only=True)
class PublishSpec:
    """How an artifact is published.

    Args:
        tags: names that point to it from then on.
        accept_licence: publish one of a non-commercial licence in public.
        repair: send also what seems to be there.
        replace: a tag may move from an artifact of another checkpoint to this one.
        threads: transfers at a time.
        access: how the destination is reached.
    """

    tags: tuple[str, ...] = ()
    accept_licence: bool = False
    repair: bool = False
    replace: bool = False
    threads: int = THREADS
    access: Access = Access()  # noqa: RUF009 (frozen)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A release that is there.

    Args:
        ref: what `pull` takes, by digest.
        digest: of the release's document.
        tags: those that point to it now, that of the destination among them.
        sent: files that were not there before.
        files: how many it has.
    """

    ref: str
    digest: str
    tags: tuple[str, ...]
    sent: int
    files: int


def run(
    artifact: Artifact, dest: str, spec: PublishSpec, *, listen: Listener = silent
) -> Published:
    """Publish an artifact, with what lies in `<version>.attest/` beside it.

    Args:
        artifact: what is published.
        dest: where to, with a tag or without.
        spec: how.
        listen: gets the stage's events.

    Returns:
        The release.

    Raises:
        ArtifactError: the artifact was changed.
        RegistryError: dest has a digest, the licence or a tag forbids it, or the registry refuses.
        DependencyError: what the registry needs is not installed.
    """
    ref = registries.parse(dest)
    tags = tuple(dict.fromkeys([*spec.tags, *([ref.tag] if ref.tag else [])]))
    for tag in tags:
        registries.check_tag(tag)
    if ref.digest:
        raise RegistryError(
            "a destination has no digest: it follows from the artifact",
            evidence=ref.at(ref.digest),
            fix=f"publish to {ref.address}",
        )
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="jexport-publish-")
        work_dir = Path(stack.enter_context(folder))
        note = stack.enter_context(Run(folder=work_dir, listen=listen).stage(STAGE))
        if spec.access.public:
            _check_licence(artifact, ref, spec)
        release, sources = releases.of(artifact, work_dir)
        store = stack.enter_context(registries.opened(ref, spec.access, writing=True))
        if call_with_retry(store.public, what=f"asking {ref.address}"):
            _check_licence(artifact, ref, spec)
        if not spec.replace:
            _check_tags(store, artifact, ref, tags)
        sent = _send(store, release, sources, ref, spec, listen)
        _commit(store, release, sources, ref, tags)
        many = len(release.blobs)
        note(f"{sent} of {many} files sent" if sent else f"all {many} files were there")
    return Published(
        ref=ref.at(release.digest), digest=release.digest, tags=tags, sent=sent, files=many
    )


def _check_licence(artifact: Artifact, ref: Ref, spec: PublishSpec) -> None:
    licence = str(artifact.manifest.content["licence"] or "")
    if licence.upper().startswith(NON_COMMERCIAL) and not spec.accept_licence:
        raise RegistryError(
            "a non-commercial model is about to become public",
            evidence=f"its licence is {licence}; everybody can read {ref.address}",
            fix="publish to a private place, or with --accept-licence where the licence allows it",
        )


def _check_tags(store: Store, artifact: Artifact, ref: Ref, tags: tuple[str, ...]) -> None:
    """Refuse to let a tag go from an artifact of one checkpoint to one of another."""
    checkpoint = identity.of_manifest(artifact.manifest.content)
    for tag in tags:
        tagged = _tagged(store, ref, tag)
        if tagged is not None and checkpoint.differences(tagged):
            raise RegistryError(
                f"the tag '{tag}' names an artifact of another checkpoint",
                evidence=f"{ref.address}: {tagged}\nthis one: {checkpoint}",
                fix="publish to another place or with another tag; where it is the next state of"
                " the same model, say so with --replace: the tag then moves to it",
            )


def _tagged(store: Store, ref: Ref, tag: str) -> identity.Checkpoint | None:
    """The checkpoint of what a tag names; None where there is no such tag, or nothing whole."""
    try:
        digest = call_with_retry(
            lambda: store.resolve(tag), what=f"asking {ref.address} for '{tag}'"
        )
        release = releases.read(store.document(digest), digest, where=ref.address)
        return identity.of_manifest(
            json.loads(b"".join(store.read(release, release.manifest.blob, 0)))
        )
    except (RegistryError, ValueError, LookupError, TypeError):
        return None


def _send(
    store: Store,
    release: Release,
    sources: Mapping[str, Path],
    ref: Ref,
    spec: PublishSpec,
    listen: Listener,
) -> int:
    """Send every blob that is not there; how many that were."""
    sent: list[Blob] = []

    def job(blob: Blob) -> Job:
        def send(line: TransferControl) -> None:
            what = f"sending {sources[blob.digest].name} to {ref.address}"
            there = not spec.repair and call_with_retry(
                lambda: store.has(release, blob), what=what, sleep=line.sleep
            )
            if there:
                line.moved(blob.size_bytes)
                return
            call_with_retry(
                lambda: _put(store, release, blob, sources, line), what=what, sleep=line.sleep
            )
            sent.append(blob)

        return send

    def show(done: int, total: int) -> None:
        text = f"{done / 2**20:,.1f} of {total / 2**20:,.1f} MiB"
        listen(Event(kind="progress", stage=STAGE, done=done, total=total, text=text))

    total = sum(blob.size_bytes for blob in release.blobs)
    jobs = [job(blob) for blob in release.blobs]
    run_parallel(jobs, threads=spec.threads, total_bytes=total, show=show)
    return len(sent)


def _put(
    store: Store, release: Release, blob: Blob, sources: Mapping[str, Path], line: TransferControl
) -> None:
    """One attempt; what it had sent when it failed does not count."""
    counted = 0

    def sent(count: int) -> None:
        nonlocal counted
        counted += count
        line.moved(count)

    try:
        store.put(release, blob, sources[blob.digest], sent)
    except TransientError:
        line.moved(-counted)
        raise


def _commit(
    store: Store, release: Release, sources: Mapping[str, Path], ref: Ref, tags: tuple[str, ...]
) -> None:
    """Make it visible, and see that it is."""
    what = f"publishing in {ref.address}"
    call_with_retry(lambda: store.commit(release, sources), what=what)
    for tag in tags:
        call_with_retry(functools.partial(store.tag, release, tag), what=what)
    document = call_with_retry(lambda: store.document(release.digest), what=what)
    releases.read(document, release.digest, where=ref.address)
