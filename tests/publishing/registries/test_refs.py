"""Refs, tags, kinds: what is read from a text, and what is refused before anything is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.errors import RegistryError
from jexport.publishing import registries
from jexport.publishing import release as releases
from jexport.publishing.registries import Ref
from jexport.types import Artifact

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize("name", registries.names())
def test_a_kind_says_what_it_is(name: str) -> None:
    kind = registries.load(name)
    assert kind.name == name
    assert kind.summary


def test_kinds_are_files_and_schemes_are_unique() -> None:
    assert registries.names() == ["folder", "hub", "oci", "s3"]
    assert len({registries.load(name).scheme for name in registries.names()}) == 4
    with pytest.raises(RegistryError, match="unknown kind of registry 'folders'"):
        registries.load("folders")


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("folder:///srv/m", Ref(kind="folder", address="folder:///srv/m")),
        ("/srv/m:latest", Ref(kind="folder", address="folder:///srv/m", tag="latest")),
        (f"/srv/m@{DIGEST}", Ref(kind="folder", address="folder:///srv/m", digest=DIGEST)),
        ("s3://bucket/a/b:1.0", Ref(kind="s3", address="s3://bucket/a/b", tag="1.0")),
        ("s3://bucket:v", Ref(kind="s3", address="s3://bucket", tag="v")),
        (
            f"oci://here:5000/a/b:t@{DIGEST}",
            Ref(kind="oci", address="oci://here:5000/a/b", digest=DIGEST, tag="t"),
        ),
        ("oci://[::1]:5000/a", Ref(kind="oci", address="oci://[::1]:5000/a")),
        (f"hf://o/r@{DIGEST}", Ref(kind="hub", address="hf://o/r", digest=DIGEST)),
    ],
)
def test_refs(text: str, ref: Ref) -> None:
    assert registries.parse(text) == ref
    if ref.digest:
        assert registries.parse(ref.at(ref.digest)).digest == ref.digest


@pytest.mark.parametrize(
    "text",
    [
        "gs://bucket",
        "oci://host",
        "oci://host/UPPER",
        "oci://host/a/../b",
        "s3://",
        "s3://B_/x",
        "hf://repo",
        "hf://o/r/x",
        "folder://",
        f"/x@{DIGEST}0",
        "/x@sha256:abc",
        "s3://bucket/a:b c",
        "oci://host/a:",
        f"oci://host/a@{DIGEST.upper()}",
    ],
)
def test_what_is_no_ref(text: str) -> None:
    with pytest.raises(RegistryError):
        registries.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "oci://ana:pass1word@host/r:t",
        f"oci://ana:pass1word@host/r@{DIGEST}",
        "s3://AKIAXXXXXXXXXXXXXXXX:pass1word@bucket/p",
        "hf://ana:pass1word@o/r",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(RegistryError) as caught:
        registries.parse(text)
    assert "pass1word" not in str(caught.value)
    assert "AKIAX" not in str(caught.value)


def test_tags_that_say_a_digest_are_the_registrys_own() -> None:
    for tag in ("latest", "1.0", "v_1-a"):
        registries.check_tag(tag)
    for tag in ("", ".x", "a b", "a/b", "x" * 129, "release-" + "a" * 64, "sha256-" + "a" * 64):
        with pytest.raises(RegistryError, match="cannot be a tag"):
            registries.check_tag(tag)


def test_the_document_is_a_model_manifest_of_the_cncf_spec(
    made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made(licence="Apache-2.0", attest={"model.sig": b"signed"})
    release, sources = releases.of(artifact, tmp_path)
    said = json.loads(release.document)
    assert said["schemaVersion"] == 2
    assert said["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert said["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert said["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    kinds = {
        each["annotations"]["org.cncf.model.filepath"]: each["mediaType"].split(".model.")[1]
        for each in said["layers"]
    }
    assert kinds == {
        "manifest.json": "weight.config.v1.raw",
        "tokenizer.json": "weight.config.v1.raw",
        "1_Pooling/config.json": "weight.config.v1.raw",
        "README.md": "doc.v1.raw",
        "copy.md": "doc.v1.raw",
        "model.onnx": "weight.v1.raw",
        f"{artifact.path.name}.attest/model.sig": "doc.v1.raw",
    }
    config = json.loads(sources[release.config.digest].read_bytes())
    assert set(config) == {"descriptor", "config", "modelfs"}  # the spec allows no more
    assert config["descriptor"]["licenses"] == ["Apache-2.0"]
    assert config["config"]["precision"] == "fp32"
    assert config["modelfs"]["type"] == "layers"
    assert config["modelfs"]["diff_ids"] == [each["digest"] for each in said["layers"]]
    for blob in release.blobs:
        assert releases.digest_of(sources[blob.digest].read_bytes()) == blob.digest
    assert releases.read(release.document, release.digest, where="here") == release
    (tmp_path / "again").mkdir()
    assert releases.of(artifact, tmp_path / "again")[0].digest == release.digest


def _layer(said: dict[str, Any], **changes: Any) -> None:
    said["layers"][0] |= changes


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another type": lambda said: said.update(artifactType="application/x"),
    "no layers": lambda said: said.update(layers=[]),
    "no annotations": lambda said: said.pop("annotations"),
    "a path that leads out": lambda said: _layer(
        said, annotations={"org.cncf.model.filepath": "../x"}
    ),
    "an absolute path": lambda said: _layer(said, annotations={"org.cncf.model.filepath": "/x"}),
    "a backslash": lambda said: _layer(said, annotations={"org.cncf.model.filepath": "a\\..\\x"}),
    "a path twice": lambda said: said["layers"].append(said["layers"][0]),
    "a broken digest": lambda said: _layer(said, digest="sha256:../../x"),
    "another digest": lambda said: _layer(said, digest="md5:" + "a" * 32),
    "a negative size": lambda said: _layer(said, size=-1),
    "a size that is none": lambda said: _layer(said, size=True),
    "a text for layers": lambda said: said.update(layers="abc"),
    "a version that leads out": lambda said: said["annotations"].update(
        {"dev.jexport.version": "../../x"}
    ),
    "a version that is a link": lambda said: said["annotations"].update(
        {"dev.jexport.version": "latest"}
    ),
    "a hidden name": lambda said: said["annotations"].update({"dev.jexport.name": ".work"}),
    "an empty name": lambda said: said["annotations"].update({"dev.jexport.name": ""}),
    "a name with a slash": lambda said: said["annotations"].update({"dev.jexport.name": "a/b"}),
    "a cosine that is none": lambda said: said["annotations"].update(
        {"dev.jexport.cosine_min": "high"}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_document_that_lies_is_refused(
    change: str, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    said = json.loads(releases.of(made(), tmp_path)[0].document)
    CHANGES[change](said)
    document = json.dumps(said).encode()
    with pytest.raises(RegistryError, match="does not hold what"):
        releases.read(document, releases.digest_of(document), where="here")


def test_a_document_of_another_digest_or_no_json_is_refused() -> None:
    for document in (b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(RegistryError, match="does not hold what"):
            releases.read(document, releases.digest_of(document), where="here")
    with pytest.raises(RegistryError, match="its document has the digest"):
        releases.read(b"{}", DIGEST, where="here")


def test_files_that_the_manifest_does_not_list_are_refused(
    made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made()
    release, _ = releases.of(artifact, tmp_path)
    content = dict(artifact.manifest.content)
    releases.check_files(release, content, where="here")
    for changed in (
        {"files": content["files"][1:]},
        {"files": [*content["files"], content["files"][0] | {"path": "x"}]},
        {"licence": "another"},
    ):
        with pytest.raises(RegistryError, match="does not hold what"):
            releases.check_files(release, content | changed, where="here")
