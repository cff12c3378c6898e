"""manifest: digests, the schema, and a folder verified against what it says of itself."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jexport
from jexport import types
from jexport.artifacts import manifest, store
from jexport.errors import ArtifactError, JexportError

SCHEMA = json.loads(manifest.SCHEMA.read_text(encoding="utf-8"))
FORMAT_1 = Path(__file__).parents[1] / "fixtures" / "manifest.format-1.json"
FILES = (
    "1_Pooling/config.json",
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "model.onnx",
    "model.onnx_data",
    "modules.json",
    "parity.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def refused(folder: Path) -> str:
    """The evidence of the one error that verify and open must both give, before an engine opens."""

    def opened(*_: object) -> None:
        raise AssertionError("the engine was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxruntime.InferenceSession", opened)
        with pytest.raises(ArtifactError) as caught:
            manifest.verify(folder)
        with pytest.raises(ArtifactError) as again:
            jexport.open_artifact(folder)
    assert caught.value.exit_code == 13
    assert str(again.value) == str(caught.value)
    return caught.value.evidence


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None], *, seal: bool) -> None:
    """Change manifest.json; seal: give it the digest of its new content, as an attacker would."""
    path = folder / manifest.NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    if seal:
        content["sha256"] = manifest.seal(content)
    manifest.write_json(path, content)


def test_the_same_content_in_other_bytes(artifact_copy: Path) -> None:
    path = artifact_copy / manifest.NAME
    text = path.read_text(encoding="utf-8")
    for other in (
        json.dumps(json.loads(text)),
        text.replace("  ", "\t", 1),
        text.replace("\n", "\r\n"),
        text + "\n",
        text.replace('"format": 3,', '"format": 3, "format": 3,'),
        text.replace('"task"', '"\\u0074ask"', 1),
    ):
        path.write_bytes(other.encode())
        with pytest.raises(ArtifactError, match="its bytes are not"):
            manifest.verify(artifact_copy)
    path.write_text(text, encoding="utf-8")
    manifest.verify(artifact_copy)


def test_a_good_artifact_passes_and_its_files_are_these(artifact: Path) -> None:
    content = manifest.verify(artifact).content
    assert tuple(entry["path"] for entry in content["files"]) == FILES
    assert sorted(p.name for p in artifact.iterdir() if p.is_file()) == sorted(
        [*(name for name in FILES if "/" not in name), "manifest.json"]
    )


def test_latest_moves_on_while_a_reader_checks_it(
    artifact: Path, artifact_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the link named at first is what is checked and opened."""
    rewritten(artifact_copy, lambda content: content.update(licence="another"), seal=True)
    (artifact_copy / "README.md").write_text("of the next version", encoding="utf-8")
    latest, read = tmp_path / "latest", manifest.read

    def and_then_moved(folder: Path) -> manifest.Manifest:
        made = read(folder)
        latest.unlink()
        latest.symlink_to(artifact_copy)
        return made

    latest.symlink_to(artifact)
    monkeypatch.setattr(manifest, "read", and_then_moved)
    assert manifest.verify(latest).content == read(artifact).content
    latest.unlink()
    latest.symlink_to(artifact)
    with jexport.open_artifact(latest) as model:
        assert model.encode(["a"]).shape[0] == 1


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte(name: str, artifact_copy: Path) -> None:
    path = artifact_copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert refused(artifact_copy) == f"changed: {name} (SHA-256 differs)"


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(name: str, artifact_copy: Path) -> None:
    path = artifact_copy / name
    os.truncate(path, path.stat().st_size - 1)
    assert refused(artifact_copy).startswith(f"changed: {name} (")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, artifact_copy: Path) -> None:
    (artifact_copy / name).unlink()
    assert f"missing: {name}" in refused(artifact_copy).splitlines()


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "1_Pooling/extra.json", "new/deep/x"])
def test_an_extra_file(name: str, artifact_copy: Path) -> None:
    path = artifact_copy / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert f"extra: {name}" in refused(artifact_copy).splitlines()


def test_an_extra_empty_folder(artifact_copy: Path) -> None:
    (artifact_copy / "2_Normalize").mkdir()
    assert refused(artifact_copy) == "extra: 2_Normalize (a folder)"


@pytest.mark.parametrize("name", FILES)
def test_a_link_instead_of_a_file(name: str, artifact: Path, artifact_copy: Path) -> None:
    """The content is right; but a link can be made to point elsewhere after it was checked."""
    (artifact_copy / name).unlink()
    (artifact_copy / name).symlink_to(artifact / name)
    assert f"extra: {name} (a link or special file)" in refused(artifact_copy).splitlines()


def test_a_linked_folder(artifact: Path, artifact_copy: Path) -> None:
    shutil.rmtree(artifact_copy / "1_Pooling")
    (artifact_copy / "1_Pooling").symlink_to(artifact / "1_Pooling")
    assert "extra: 1_Pooling (a link or special file)" in refused(artifact_copy)


def test_a_linked_manifest(artifact: Path, artifact_copy: Path) -> None:
    (artifact_copy / "manifest.json").unlink()
    (artifact_copy / "manifest.json").symlink_to(artifact / "manifest.json")
    assert "extra: manifest.json (a link" in refused(artifact_copy)


def test_special_files(artifact_copy: Path) -> None:
    os.mkfifo(artifact_copy / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(artifact_copy / "socket"))
        found = refused(artifact_copy)
    assert "extra: pipe (a link or special file)" in found
    assert "extra: socket (a link or special file)" in found


def test_a_pipe_in_place_of_a_file_does_not_hang(artifact_copy: Path) -> None:
    for name in ("config.json", "manifest.json"):
        (artifact_copy / name).unlink()
        os.mkfifo(artifact_copy / name)
        assert refused(artifact_copy)


def test_a_hard_link_is_a_plain_file(artifact_copy: Path, tmp_path: Path) -> None:
    """Its content is checked like any other, and onnxruntime opens it."""
    (tmp_path / "elsewhere").hardlink_to(artifact_copy / "model.onnx_data")
    manifest.verify(artifact_copy)
    with jexport.open_artifact(artifact_copy) as model:
        assert model.encode("a text").shape == (64,)


def test_two_files_swapped(artifact_copy: Path) -> None:
    one, two = artifact_copy / "config.json", artifact_copy / "modules.json"
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    assert [line.split(" (")[0] for line in refused(artifact_copy).splitlines()] == [
        "changed: config.json",
        "changed: modules.json",
    ]


def test_the_manifest_of_another_artifact(builds: Callable[..., Any], artifact_copy: Path) -> None:
    shutil.copy(builds("classification").path / "manifest.json", artifact_copy)
    found = refused(artifact_copy)
    assert "changed: model.onnx_data" in found
    assert "changed: README.md" in found


def test_the_weights_of_another_artifact(builds: Callable[..., Any], artifact_copy: Path) -> None:
    shutil.copy(builds("classification").path / "model.onnx_data", artifact_copy)
    assert refused(artifact_copy) == "changed: model.onnx_data (SHA-256 differs)"


def test_an_edited_manifest(artifact_copy: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["embedding"]["prompt"] = "another prompt: "

    rewritten(artifact_copy, edit, seal=False)
    assert "its own digest does not match" in refused(artifact_copy)
    with pytest.raises(ArtifactError, match="is not what was built"):
        jexport.open_artifact(artifact_copy, verify=False)


@pytest.mark.parametrize(
    "name",
    ["../elsewhere", "/etc/passwd", "a/../../b", "..", "..\\up", "\\windows", "", "manifest.json"],
)
def test_a_file_list_that_leaves_the_folder(name: str, artifact_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"x")
    entry = {"path": name, "size_bytes": 1, "sha256": "0" * 64}
    rewritten(artifact_copy, lambda c: c["files"].append(entry), seal=True)
    refused(artifact_copy)
    if name != "..\\up":  # a legal file name here, and simply missing
        with pytest.raises(ArtifactError):
            manifest.read(artifact_copy)


@pytest.mark.parametrize(
    "name", ["../artifact/model.onnx", "/tmp/model.onnx", "other.onnx", "", "manifest.json", "."]
)
def test_an_engine_file_that_is_not_listed_is_never_opened(
    name: str, artifact: Path, artifact_copy: Path
) -> None:
    """Digests are checked of listed files only, so no other may reach the engine."""
    rewritten(artifact_copy, lambda c: c["engine"].update(files=[name]), seal=True)
    assert "which is not a listed file" in refused(artifact_copy)
    with pytest.raises(ArtifactError):
        jexport.open_artifact(artifact_copy, verify=False)


def test_a_file_listed_twice(artifact_copy: Path) -> None:
    rewritten(artifact_copy, lambda c: c["files"].append(dict(c["files"][0])), seal=True)
    assert "lists 1_Pooling/config.json more than it should" in refused(artifact_copy)


def test_an_engine_that_this_jexport_lacks(artifact_copy: Path) -> None:
    rewritten(artifact_copy, lambda c: c.update(target="../onnx"), seal=True)
    with pytest.raises(ArtifactError, match="for an engine that this jexport does not have"):
        jexport.open_artifact(artifact_copy)


def test_a_graph_that_is_gone_when_files_are_not_checked(artifact_copy: Path) -> None:
    (artifact_copy / "model.onnx_data").unlink()
    with pytest.raises(ArtifactError, match="is not whole"):
        jexport.open_artifact(artifact_copy, verify=False)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"\xff\xfe",
        b'{"format": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": 1}',
        b'{"format": true}',
        b'{"format": "1"}',
        b'{"format": 2}',
        b'{"format": 1e999}',
        b"{}",
        b'{"format": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_manifest_that_is_not_one(text: bytes, artifact_copy: Path) -> None:
    (artifact_copy / "manifest.json").write_bytes(text)
    refused(artifact_copy)
    with pytest.raises(ArtifactError):
        manifest.read(artifact_copy)


def test_a_newer_format_is_told_from_damage(artifact_copy: Path) -> None:
    rewritten(artifact_copy, lambda c: c.update(format=4), seal=True)
    with pytest.raises(ArtifactError, match="written in manifest format 4") as caught:
        manifest.read(artifact_copy)
    assert "build it again" in caught.value.fix


def test_format_1_is_still_read(tmp_path: Path, artifact_copy: Path) -> None:
    """A manifest that jexport wrote before seconds and speeds left it."""
    (tmp_path / "old").mkdir()
    shutil.copy(FORMAT_1, tmp_path / "old" / "manifest.json")
    content = manifest.read(tmp_path / "old").content
    assert (content["format"], content["target"]) == (1, "openvino")
    stages = store.measured(tmp_path / "old")["stages"]
    assert [one["stage"] for one in stages] == ["load", "merge", "export", "compile", "validate"]
    for format_, key in ((2, "stages"), (1, "speed")):  # each format has its own schema
        rewritten(
            artifact_copy, lambda c, f=format_, k=key: c.update({"format": f, k: []}), seal=True
        )
        with pytest.raises(ArtifactError, match="is not what was built"):
            manifest.read(artifact_copy)


def test_what_was_measured_stands_beside_the_artifact(artifact: Path, artifact_copy: Path) -> None:
    said = store.measured(artifact)
    assert said["stages"][-1]["stage"] == "package"
    assert said == store.measured(artifact.parent / "latest")
    assert "stages" not in manifest.read(artifact).content
    assert store.measured(artifact_copy) == {}  # it did not come along
    beside = artifact_copy.parent / f"{artifact_copy.name}.{store.RUN}"
    beside.write_text(json.dumps({**said, "artifact": "0" * 64}))  # of another build
    assert store.measured(artifact_copy) == {}
    beside.write_text("[" * 100_000)
    assert store.measured(artifact_copy) == {}


def test_folders_that_are_no_artifacts(tmp_path: Path, artifact: Path) -> None:
    for path, said in (
        (tmp_path, "there is no manifest.json in it"),
        (tmp_path / "nowhere", "there is no such folder"),
        (artifact / "model.onnx", "it is a file"),
    ):
        with pytest.raises(ArtifactError, match="is not a jexport artifact") as caught:
            manifest.verify(path)
        assert caught.value.evidence == said


def test_the_artifact_that_was_meant_is_named(artifact_copy: Path) -> None:
    room = artifact_copy.parent
    for path, said in (
        (artifact_copy / "model.onnx", f"give its folder: {artifact_copy}"),
        (room, f"give one of the 1 that are in it, such as {artifact_copy}"),
        (room / f"{artifact_copy.name}x", f"did you mean {artifact_copy}?"),
        (room / "zzzzzzzzzzzzzzz", "give the folder that `jexport build` printed, or see"),
    ):
        with pytest.raises(ArtifactError) as caught:
            manifest.read(path)
        assert caught.value.fix.startswith(said)
    (room / "latest").symlink_to(artifact_copy)
    with pytest.raises(ArtifactError, match="is not a jexport artifact") as caught:
        manifest.read(room)
    assert caught.value.fix.endswith(f"such as {room / 'latest'}")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    inner: list[tuple[Any, ...]] = []
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            inner += [(*path, key), *places(item, (*path, key))]
    return inner


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["../x", "onnx", "trt", "\ud800", 0, 1, -1, "0" * 64, 10**400]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=3,
)


def mutated(content: dict[str, Any], draw: Any) -> dict[str, Any]:
    """One value replaced, removed, or added."""
    changed = copy.deepcopy(content)
    *above, last = draw(st.sampled_from(places(changed)))
    parent = changed
    for key in above:
        parent = parent[key]
    how = draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "replace":
        parent[last] = draw(json_values)
    elif how == "remove":
        del parent[last]
    elif isinstance(parent, dict):
        parent[draw(st.text(max_size=4))] = draw(json_values)
    else:
        parent.append(draw(json_values))  # type: ignore[attr-defined]
    return changed


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), sealed=st.booleans())
def test_a_broken_manifest_gives_nothing_but_an_artifact_error(
    data: st.DataObject, sealed: bool, artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """read, verify and open: an ArtifactError, or a manifest with which an engine can be opened."""
    good = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    content = mutated(good, data.draw)
    if sealed and isinstance(content.get("sha256"), str):
        content["sha256"] = manifest.seal(content)
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        manifest.write_json(folder / "manifest.json", content)
    except ValueError:  # a NaN, or half a character: jexport would not write it
        (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    for attempt in (manifest.verify, jexport.open_artifact):
        with pytest.raises(ArtifactError):  # the files are missing, at the least
            attempt(folder)
    try:
        found = manifest.read(folder)
    except ArtifactError:
        return
    assert found.content["embedding"]["dimension"] >= 1
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(artifact / name)
    try:
        jexport.open_artifact(folder, verify=False).close()
    except JexportError:
        return
    except Exception as error:  # sealed again, it may name another listed file as the graph
        assert "jexport: opening" in "".join(error.__notes__), error  # noqa: PT017


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_our_reading_of_the_schema_is_that_of_a_real_validator(
    data: st.DataObject, artifact: Path
) -> None:
    content = mutated(
        json.loads((artifact / "manifest.json").read_text(encoding="utf-8")), data.draw
    )
    wanted = jsonschema.Draft202012Validator(SCHEMA).is_valid(content)
    ours = not manifest.schema_problem(content)
    if wanted != ours:  # the one difference: to JSON Schema 3.0 is an integer, to Python it is not
        assert any(type(value_at(content, path)) is float for path in places(content))
        assert not ours


def value_at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def test_schema_is_a_schema_and_every_built_manifest_follows_it(
    builds: Callable[..., Any], minilm_artifact: Path
) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for folder in (builds("retrieval.query").path, builds("none").path, minilm_artifact):
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        jsonschema.validate(content, SCHEMA)


def test_schema_uses_only_words_that_our_reader_knows() -> None:
    known = {
        "$schema",
        "$id",
        "$defs",
        "$ref",
        "title",
        "description",
        "type",
        "required",
        "additionalProperties",
        "properties",
        "items",
        "minItems",
        "minimum",
        "maximum",
        "pattern",
        "not",
        "enum",
        "const",
        "minLength",
    }

    def words(rule: Any) -> set[str]:
        if not isinstance(rule, dict):
            return set()
        found = set(rule)
        for key in ("properties", "$defs"):
            for inner in rule.get(key, {}).values():
                found |= words(inner)
        for key in ("items", "additionalProperties", "not"):
            found |= words(rule.get(key))
        return found

    assert words(SCHEMA) <= known


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("embedding", "dimension"), 0, "'embedding.dimension' is 0"),
        (("embedding", "pooling"), "median", "'embedding.pooling' is 'median'"),
        (("embedding", "normalize"), 1, "'embedding.normalize' is int, not boolean"),
        (("parity", "passed"), False, "'parity.passed' is False, not True"),
        (("parity", "cosine_min"), 2, "'parity.cosine_min' is 2"),
        (("engine", "inputs"), [], "'engine.inputs' is empty"),
        (("checkpoint", "revision"), "main", "'checkpoint.revision' is 'main'"),
        (("unknown",), 1, "it has an unknown key 'unknown'"),
        (("engine", "inputs", 0, "name"), "token_type_ids", "'engine.inputs[0].name'"),
        (("files", 0, "path"), "/x", "'files[0].path' is '/x'"),
    ],
)
def test_a_deviation_is_named(path: tuple[Any, ...], value: Any, said: str, artifact: Path) -> None:
    content = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    value_at(content, path[:-1])[path[-1]] = value
    assert said in manifest.schema_problem(content)


@pytest.mark.parametrize("key", SCHEMA["required"])
def test_no_top_level_key_may_be_missing(key: str, artifact_copy: Path) -> None:
    rewritten(artifact_copy, lambda c: c.pop(key), seal=False)
    with pytest.raises(ArtifactError) as caught:
        manifest.read(artifact_copy)
    assert ("format None" if key == "format" else f"lacks '{key}'") in str(caught.value)


EMBEDDING = types.Embedding(
    task="retrieval.query",
    prompt="p: ",
    pooling="mean",
    normalize=True,
    dimension=64,
    matryoshka=(16, 64),
    max_tokens=512,
)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"task": "separation"}, False),
        ({"prompt": ""}, False),
        ({"pooling": "cls"}, False),
        ({"normalize": False}, False),
        ({"dimension": 32}, False),
        ({"max_tokens": 8192}, True),
        ({"matryoshka": ()}, True),
    ],
)
def test_embedding_space_depends_on_what_moves_vectors(change: dict[str, Any], same: bool) -> None:
    import dataclasses

    base = manifest.embedding_space("weights", EMBEDDING)
    other = manifest.embedding_space("weights", dataclasses.replace(EMBEDDING, **change))
    assert (other == base) is same
    assert manifest.embedding_space("other weights", EMBEDDING) != base


def test_embedding_space_of_real_builds(builds: Callable[..., Any]) -> None:
    def space(task: str, precision: str = "fp32") -> str:
        content = manifest.read(builds(task, precision).path).content
        found: str = content["embedding"]["space"]
        return found

    assert space("retrieval.query", "fp16") == space("retrieval.query")
    assert len({space(task) for task in ("retrieval.query", "separation", "none")}) == 3


def test_digest_of_a_value_does_not_depend_on_the_order_of_keys() -> None:
    assert manifest.sha256_of({"a": 1, "b": [1, 2]}) == manifest.sha256_of({"b": [1, 2], "a": 1})
    assert manifest.sha256_of({"b": [1, 2]}) != manifest.sha256_of({"b": [2, 1]})


def test_file_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    import hashlib

    content = os.urandom(manifest.CHUNK_BYTES + 17)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(content)
    found = manifest.file_digest(tmp_path / "a" / "b", root=tmp_path)
    assert (found.path, found.size_bytes) == ("a/b", len(content))
    assert found.sha256 == hashlib.sha256(content).hexdigest()


def test_format_2_is_still_read(artifact_copy: Path) -> None:
    """It knew one prompt, and neither similarity nor truncate_dim."""
    from jexport.runtime.open import embedding_of

    def older(content: dict[str, Any]) -> None:
        content["format"] = 2
        for key in (
            "prompts",
            "default_prompt_name",
            "similarity",
            "truncate_dim",
            "include_prompt",
        ):
            del content["embedding"][key]

    now = embedding_of(manifest.read(artifact_copy).content)
    rewritten(artifact_copy, older, seal=True)
    content = manifest.read(artifact_copy).content
    assert content["format"] == 2
    assert embedding_of(content) == now
