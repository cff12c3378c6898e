"""A release: the files of an artifact and the document that lists them, whose SHA-256 names it.

The document is an OCI image manifest with the media types of the CNCF model spec (ModelPack,
github.com/modelpack/model-spec, docs/spec.md), the same bytes wherever it is published. So one
digest names an artifact in a folder, a bucket, an OCI registry and on a hub. Knows none of these.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.artifacts import manifest
from jexport.artifacts.store import LATEST
from jexport.errors import RegistryError
from jexport.types import Artifact

DOCUMENT = "application/vnd.oci.image.manifest.v1+json"
MODEL = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
SETTINGS = "application/vnd.cncf.model.weight.config.v1.raw"
PAPERS = "application/vnd.cncf.model.doc.v1.raw"
PATH = "org.cncf.model.filepath"

SUFFIXES = {
    ".json": SETTINGS,
    ".txt": SETTINGS,
    ".model": SETTINGS,
    ".jinja": SETTINGS,
    ".md": PAPERS,
    ".html": PAPERS,
}
"""What a file is by its suffix; any other is weights (a graph, a plan)."""

OURS = "dev.jexport."
FACTS = ("name", "task", "target", "precision", "version", "licence", "space", "cosine_min")
"""What `list` shows: kept as annotations, so that a listing reads one document a release."""

BESIDE = ".attest"
"""`<version>.attest/` beside an artifact's folder: signatures and provenance, published with it."""

LARGEST_DOCUMENT_BYTES = 4 << 20
"""What the OCI distribution spec asks registries to take."""

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Some bytes, by their SHA-256 and size.

    Args:
        digest: 'sha256:' and 64 hex digits.
        size_bytes: 0 or more.
    """

    digest: str
    size_bytes: int

    @property
    def hex(self) -> str:
        """The digest without its 'sha256:'."""
        return self.digest.removeprefix("sha256:")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A file of a release.

    Args:
        path: in the artifact's folder, or in `<version>.attest` for beside; forward slashes.
        blob: its bytes.
        beside: whether it lies in the second, as signatures and provenance do.
    """

    path: str
    blob: Blob
    beside: bool


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release: its document, as bytes, and what the document says.

    Args:
        document: the bytes that the digest is of.
        config: of the model, as the model spec has it.
        layers: every file, the artifact's and those beside it.
        facts: by the names in FACTS.
    """

    document: bytes
    config: Blob
    layers: tuple[Layer, ...]
    facts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """'sha256:...' of the document: the release's name everywhere."""
        return digest_of(self.document)

    @property
    def manifest(self) -> Layer:
        """The artifact's own manifest.json."""
        return next(each for each in self.layers if each.path == manifest.NAME and not each.beside)

    @property
    def blobs(self) -> list[Blob]:
        """Everything but the document, each once: the model config and the files."""
        return list(dict.fromkeys([self.config, *(layer.blob for layer in self.layers)]))

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(layer.blob.size_bytes for layer in self.layers)


def digest_of(content: bytes) -> str:
    """A digest as documents and refs have it.

    Args:
        content: any bytes.

    Returns:
        'sha256:' and 64 hex digits.
    """
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def beside(folder: Path) -> Path:
    """Where the signatures of an artifact's folder are.

    Args:
        folder: of the artifact; links such as `latest` are followed.

    Returns:
        `<version>.attest`, next to it, whether it is there or not.
    """
    whole = folder.resolve()
    return whole.with_name(whole.name + BESIDE)


def of(artifact: Artifact, work_dir: Path) -> tuple[Release, dict[str, Path]]:
    """The release of an artifact. Every file is read and checked first.

    Args:
        artifact: to be published.
        work_dir: a folder for what is a blob and no file yet.

    Returns:
        The release, and where each of its blobs is, by digest.

    Raises:
        ArtifactError: a file was changed.
        RegistryError: a file's name is not plain, or a link or special file lies beside the
            artifact.
    """
    content = manifest.verify(artifact.path).content
    layers, sources = [], {}
    inside = [manifest.file_digest(artifact.path / manifest.NAME, root=artifact.path)]
    attached = list(_attached(beside(artifact.path)))
    files = [(_layer(each.path, each.sha256, each.size_bytes), artifact.path) for each in inside]
    for entry in content["files"]:
        layer = _layer(entry["path"], entry["sha256"], entry["size_bytes"])
        files.append((layer, artifact.path))
    for each in attached:
        layer = _layer(each.path, each.sha256, each.size_bytes, beside=True)
        files.append((layer, beside(artifact.path)))
    for layer, root in files:
        if not is_plain(layer.path):
            raise RegistryError(
                f"cannot publish a file named {layer.path!r:.80}",
                evidence=f"in {root}",
                fix="rename it; names are plain, with forward slashes",
            )
        layers.append(layer)
        sources[layer.blob.digest] = root / layer.path
    settings = _text(_config(content, layers))
    release = _written(content, layers, settings)
    config_path = work_dir / "config.json"
    config_path.write_bytes(settings)
    sources[release.config.digest] = config_path
    return release, sources


def _attached(folder: Path) -> Iterator[Any]:
    """Plain files only: a link would publish what it points to."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise RegistryError(
                f"{path} is a link or special file, which is not published",
                evidence=f"everything in {folder} is published with the artifact",
                fix="put the file itself there, or remove it",
            )
        if path.is_file():
            yield manifest.file_digest(path, root=folder)


def _layer(path: str, sha256: str, size_bytes: int, *, beside: bool = False) -> Layer:
    blob = Blob(digest=f"sha256:{sha256}", size_bytes=size_bytes)
    return Layer(path=path, blob=blob, beside=beside)


def _written(content: Mapping[str, Any], layers: list[Layer], settings: bytes) -> Release:
    facts = {name: str(content[name]) for name in FACTS[:6]}
    facts["space"] = content["embedding"]["space"]
    facts["cosine_min"] = repr(float(content["parity"]["cosine_min"]))
    config = Blob(digest=digest_of(settings), size_bytes=len(settings))
    document = {
        "schemaVersion": 2,
        "mediaType": DOCUMENT,
        "artifactType": MODEL,
        "config": {"mediaType": CONFIG, **_descriptor(config)},
        "layers": [
            {
                "mediaType": _media_type(layer),
                **_descriptor(layer.blob),
                "annotations": {PATH: _shown(layer, facts["version"])},
            }
            for layer in layers
        ],
        "annotations": {OURS + name: value for name, value in facts.items()},
    }
    return Release(document=_text(document), config=config, layers=tuple(layers), facts=facts)


def _descriptor(blob: Blob) -> dict[str, Any]:
    return {"digest": blob.digest, "size": blob.size_bytes}


def _shown(layer: Layer, version: str) -> str:
    return f"{version}{BESIDE}/{layer.path}" if layer.beside else layer.path


def _media_type(layer: Layer) -> str:
    return PAPERS if layer.beside else SUFFIXES.get(Path(layer.path).suffix, WEIGHT)


def _config(content: Mapping[str, Any], layers: Iterable[Layer]) -> dict[str, Any]:
    """The model spec's config (docs/config.md); no date, so that equal files give equal bytes."""
    config = {
        "name": f"{content['name']}-{content['task']}",
        "version": content["version"],
        "revision": content["checkpoint"]["revision"],
    }
    descriptor: dict[str, Any] = {key: value for key, value in config.items() if value}
    if content["licence"]:
        descriptor["licenses"] = [content["licence"]]
    return {
        "descriptor": descriptor,
        "config": {
            "architecture": "transformer",
            "format": content["target"],
            "precision": content["precision"],
        },
        "modelfs": {"type": "layers", "diff_ids": [layer.blob.digest for layer in layers]},
    }


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read(document: bytes, digest: str, *, where: str) -> Release:
    """What a document says, once its digest is right and nothing in it leads out of a folder.

    Args:
        document: its bytes.
        digest: that they must have.
        where: the place that errors name.

    Returns:
        The release.

    Raises:
        RegistryError: another digest, or no document of a model.
    """
    if digest_of(document) != digest:
        raise refused(where, digest, f"its document has the digest {digest_of(document)}")
    try:
        content = json.loads(document)
        release = _understood(document, content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refused(where, digest, f"its document is not a model's: {error!r:.200}") from error
    return release


def _understood(document: bytes, content: Any) -> Release:
    if content["artifactType"] != MODEL:
        raise ValueError(f"artifactType is {content['artifactType']!r:.80}")
    notes = content["annotations"]
    facts = {name: _string(notes[OURS + name]) for name in FACTS}
    float(facts["cosine_min"])
    for name in FACTS[:5]:
        # Not .work or .pull, which are not artifacts, and not `latest`, which is a link to one.
        if not is_plain(facts[name]) or "/" in facts[name] or facts[name][0] == ".":
            raise ValueError(f"its {name} is {facts[name]!r:.80}")
        if facts[name] == LATEST:
            raise ValueError(f"its {name} is {facts[name]!r:.80}")
    prefix = f"{facts['version']}{BESIDE}/"
    layers = []
    for each in content["layers"]:
        shown = _string(each["annotations"][PATH])
        layer = Layer(
            path=shown.removeprefix(prefix), blob=_blob(each), beside=shown.startswith(prefix)
        )
        if not is_plain(layer.path):
            raise ValueError(f"it names a file {layer.path!r:.80}")
        layers.append(layer)
    places = [(layer.beside, layer.path) for layer in layers]
    if len(set(places)) != len(places) or (False, manifest.NAME) not in places:
        raise ValueError("a file is listed twice, or there is no manifest.json")
    return Release(
        document=document, config=_blob(content["config"]), layers=tuple(layers), facts=facts
    )


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a text")
    return value


def _blob(descriptor: Mapping[str, Any]) -> Blob:
    digest, size_bytes = descriptor["digest"], descriptor["size"]
    if not DIGEST.fullmatch(digest) or type(size_bytes) is not int or size_bytes < 0:
        raise ValueError(f"{digest!r:.80} of {size_bytes!r:.40} bytes")
    return Blob(digest=digest, size_bytes=size_bytes)


def is_plain(path: str) -> bool:
    """Whether a path stays in its folder: relative, forward slashes, no '.' or '..' in it.

    Args:
        path: as a document or a manifest has it.

    Returns:
        False also for a backslash or a control character.
    """
    parts = path.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(
        r"[\\\x00-\x1f\x7f]", path
    )


def check_files(release: Release, content: Mapping[str, Any], *, where: str) -> None:
    """Refuse a release whose files or facts are not those of the artifact's manifest.

    Args:
        release: what was published.
        content: of the manifest.
        where: the place that errors name.

    Raises:
        RegistryError: they differ.
    """
    listed = {entry["path"]: (entry["sha256"], entry["size_bytes"]) for entry in content["files"]}
    held = {
        layer.path: (layer.blob.hex, layer.blob.size_bytes)
        for layer in release.layers
        if not layer.beside and layer.path != manifest.NAME
    }
    if listed != held:
        odd = sorted(set(listed.items()) ^ set(held.items()))
        raise refused(where, release.digest, f"not as its manifest.json says: {odd[0][0]}")
    expected = {name: str(content[name]) for name in FACTS[:6]}
    if any(release.facts[name] != value for name, value in expected.items()):
        raise refused(where, release.digest, f"its manifest.json says {expected}")


def refused(where: str, digest: str, evidence: str) -> RegistryError:
    """The error for content that is not what its digest names.

    Args:
        where: the place that holds it.
        digest: of the release.
        evidence: what shows that.

    Returns:
        The error, to be raised.
    """
    return RegistryError(
        f"{where} does not hold what {digest[:19]}... names",
        evidence=evidence,
        fix="nothing of it was kept; publish that artifact again with --repair",
    )
