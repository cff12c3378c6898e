"""SLSA provenance: what went in, and nothing of the machine that built."""

from __future__ import annotations

import base64
import copy
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest
from jexport.errors import SignatureError
from jexport.publishing import signing
from jexport.publishing.signing import envelope, provenance


@pytest.fixture
def stated(signed: Path) -> Any:
    [line] = (signing.attest_folder(signed) / signing.PROVENANCE).read_bytes().splitlines()
    return json.loads(base64.b64decode(json.loads(line)["payload"]))


def test_the_library_of_in_toto_takes_it(stated: Any) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement, statement_pb2

    parsed = json_format.ParseDict(stated, statement_pb2.Statement())
    statement.Statement.copy_from_pb(parsed).validate()


def test_sigstore_takes_it(stated: Any) -> None:
    # What keyless.seal gives it; signing itself needs a network.
    from sigstore import dsse

    assert dsse.Statement(json.dumps(stated).encode())


def test_what_it_says(stated: Any, signed: Path, small: Path) -> None:
    content = manifest.read(signed).content
    subjects = {one["name"]: one["digest"]["sha256"] for one in stated["subject"]}
    assert subjects == {
        path.relative_to(signed).as_posix(): manifest.file_digest(path, root=signed).sha256
        for path in signed.rglob("*")
        if path.is_file()
    }
    definition = stated["predicate"]["buildDefinition"]
    went_in = {one["name"]: one["digest"]["sha256"] for one in definition["resolvedDependencies"]}
    for path in (small / "model.safetensors", small / "1_Pooling" / "config.json"):
        digest = manifest.file_digest(path, root=small)
        assert went_in[f"checkpoint/{digest.path}"] == digest.sha256
    assert went_in["texts/texts"] == content["inputs"]["texts"]
    asked = definition["externalParameters"]
    assert (asked["task"], asked["target"]) == ("retrieval.query", "onnx")
    assert asked["recipe"]["validate"] == content["recipe"]["validate"]
    builder = stated["predicate"]["runDetails"]["builder"]
    assert builder["version"] == {"jexport": content["tools"]["jexport"]}
    [code] = builder["builderDependencies"]
    assert code == {"name": "jexport", "digest": {"sha256": content["inputs"]["jexport"]}}


def test_it_says_nothing_of_the_machine(stated: Any, signed: Path, small: Path) -> None:
    content = copy.deepcopy(dict(manifest.read(signed).content))
    content["recipe"]["load"]["model"] = str(small)
    content["recipe"]["quantize"]["calibration"] = "/home/anna/texts/"
    content["recipe"]["compile"] |= {"timing_cache": "/home/anna/t", "refit_from": "C:\\anna\\old"}
    text = json.dumps([stated, provenance.statement(content, {})])
    for told in (
        str(small.parent),
        str(signed.parent),
        "/home/anna",
        "timing_cache",
        socket.gethostname() + '"',
    ):
        assert told not in text
    recipe = provenance.statement(content, {})["predicate"]["buildDefinition"]
    assert recipe["externalParameters"]["recipe"]["quantize"]["calibration"] == "texts"
    assert content["recipe"]["load"]["model"] == str(small)  # the manifest's own was not changed


def test_commits_are_dependencies(signed: Path) -> None:
    content = copy.deepcopy(dict(manifest.read(signed).content))
    content["checkpoint"] |= {"revision": "a" * 40, "code_revision": "b" * 40}
    found = provenance.statement(content, {})["predicate"]["buildDefinition"]
    commits = [one["digest"].get("gitCommit") for one in found["resolvedDependencies"]]
    assert {"a" * 40, "b" * 40} <= set(commits)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["subject"].pop(),
        lambda s: s["subject"].append(s["subject"][0]),
        lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
        lambda s: s["subject"][0].pop("digest"),
        lambda s: s.update(subject="all of it"),
        lambda s: s.update(predicateType="https://slsa.dev/provenance/v0.2"),
        lambda s: s.pop("_type"),
    ],
)
def test_other_statements(change: Any, stated: Any) -> None:
    files = {one["name"]: one["digest"]["sha256"] for one in stated["subject"]}
    provenance.check(stated, files)
    change(stated)
    with pytest.raises(SignatureError):
        provenance.check(stated, files)


@pytest.mark.parametrize("said", [None, [], "x", 3])
def test_no_statement(said: object) -> None:
    with pytest.raises(SignatureError):
        provenance.check(said, {})


def test_an_envelope_of_something_else(keys: Any) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(keys.private.read_bytes(), None)
    line = envelope.seal({"a": 1}, key)
    assert envelope.opened(line, key.public_key()) == {"a": 1}
    other = json.loads(line) | {"payloadType": "text/plain"}
    for bad in (other, json.loads(line) | {"signatures": []}):
        with pytest.raises(SignatureError):
            envelope.opened(json.dumps(bad).encode(), key.public_key())
