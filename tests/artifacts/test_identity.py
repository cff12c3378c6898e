"""identity: two checkpoints of one name are two; one checkpoint stays one, whatever was listed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import identity, manifest, store
from jexport.artifacts.identity import Checkpoint
from jexport.errors import OutputPathError
from jexport.workspace.run import open_run

BASE = Checkpoint(
    source="final",
    revision="",
    task="none",
    files={"config.json": "c0", "model.safetensors": "w0", "tokenizer.json": "t0"},
)
NATIVE = {**BASE.files, "retrieval_query/adapter_model.safetensors": "q0"}


def having(task: str = "none", **changes: str | None) -> Checkpoint:
    files = {**BASE.files, **{key.replace("__", "."): sha for key, sha in changes.items()}}
    return dataclasses.replace(
        BASE, task=task, files={path: sha for path, sha in files.items() if sha is not None}
    )


@pytest.mark.parametrize(
    ("other", "files"),
    [
        (having(), []),
        (having(model__safetensors="w1"), ["model.safetensors"]),
        (having(config__json="c1"), ["config.json"]),
        (having(tokenizer__json="t1"), ["tokenizer.json"]),
        (having(modules__json="m0"), []),  # another jexport lists more
        (
            having(model__safetensors=None, pytorch_model__bin="w0"),
            ["model.safetensors", "pytorch_model.bin"],
        ),
        (having(adapter_model__safetensors="a0"), ["adapter_model.safetensors"]),
        (having("separation", adapter_model__safetensors="a0"), []),
        (having("separation", model__safetensors="w1"), ["model.safetensors"]),
    ],
)
def test_differences(other: Checkpoint, files: list[str]) -> None:
    assert BASE.differences(other) == other.differences(BASE) == files


def test_an_adapter_belongs_to_its_task() -> None:
    query = dataclasses.replace(BASE, task="retrieval.query", files=NATIVE)
    tuned = {**NATIVE, "retrieval_query/adapter_model.safetensors": "q1"}
    assert not query.differences(BASE)
    assert query.differences(dataclasses.replace(query, files=tuned))


def test_what_an_artifact_says_is_what_was_opened(artifact: Path, recorded: Any) -> None:
    built = identity.of_folder(artifact)
    opened = identity.of_loaded(recorded.loaded)  # of another task
    assert built is not None
    assert built.files == opened.files
    assert not built.differences(opened)
    assert built.digest[:12] in str(built)
    assert "README.md" not in built.files


def test_nothing_to_say(tmp_path: Path) -> None:
    for content in (None, "", "[]", "{}", '{"checkpoint": 3}', '{"checkpoint": {"files": [1]}}'):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        assert identity.of_folder(tmp_path) is None


@pytest.fixture
def as_other(artifact: Path, tmp_path: Path) -> Callable[..., Path]:
    """`as_other(sha)`: the artifact as if it had been made of other weights."""

    def written(sha: str) -> Path:
        folder = Path(shutil.copytree(artifact, tmp_path / f"other-{sha[:4]}"))
        content = json.loads((folder / manifest.NAME).read_text())
        content["checkpoint"]["files"][-1]["sha256"] = sha
        for one in content["checkpoint"]["files"]:
            if one["path"] == "model.safetensors":
                one["sha256"] = sha
        content.pop("sha256")
        manifest.write_json(
            folder / manifest.NAME, {**content, "sha256": manifest.sha256_of(content)}
        )
        manifest.verify(folder)
        return folder

    return written


def put(out: Path, artifact: Path, *, replace: bool = False, **slot: str) -> Path:
    place = {
        "model": "final",
        "task": "none",
        "target": "onnx",
        "precision": "fp32",
        "version": "1-a",
        **slot,
    }
    with open_run(out) as run:
        staged = Path(shutil.copytree(artifact, run.folder / "package"))
        return store.place(staged, store.Slot(out=out, **place), replace=replace).path


def test_latest_stays_with_its_checkpoint(
    tmp_path: Path, artifact: Path, as_other: Callable[..., Path]
) -> None:
    out, other = tmp_path / "out", as_other("ab" * 32)
    first = put(out, artifact)
    with pytest.raises(OutputPathError) as caught:
        put(out, other, version="1-b")
    said = str(caught.value)
    for folder in (artifact, other):
        found = identity.of_folder(folder)
        assert found is not None
        assert found.digest[:12] in said
    assert "model.safetensors" in said
    assert "--name" in caught.value.fix
    assert "--replace" in caught.value.fix
    latest = first.parent / store.LATEST
    assert latest.resolve() == first.resolve()
    assert sorted(path.name for path in first.parent.iterdir()) == ["1-a", "latest"]
    assert not (out / ".work").exists()
    put(out, artifact, version="2-a")  # the same checkpoint, another version
    put(out, other, version="1-b", replace=True)
    assert latest.resolve().name == "1-b"
    put(out, other, version="2-b")  # from now on the name is this one's
    with pytest.raises(OutputPathError):
        put(out, artifact, version="3-a")


def test_a_new_slot_belongs_to_its_model(
    tmp_path: Path, artifact: Path, as_other: Callable[..., Path]
) -> None:
    out, other = tmp_path / "out", as_other("ab" * 32)
    put(out, artifact)
    for slot in ({"target": "openvino"}, {"task": "separation"}, {"precision": "fp16"}):
        with pytest.raises(OutputPathError):
            put(out, other, version="1-b", **slot)
        put(out, artifact, **slot)
    put(out, other, version="1-b", model="other")
    # One slot went on to the next state, another was not built again: the first is not stopped.
    put(out, other, version="1-b", replace=True)
    put(out, other, version="2-b")
    put(out, other, version="1-b", precision="bf16")


def test_two_names_that_the_disk_holds_for_one(
    tmp_path: Path, artifact: Path, as_other: Callable[..., Path]
) -> None:
    """As Final and final on a file system that does not tell them apart: here by a link."""
    out = tmp_path / "out"
    put(out, artifact)
    (out / "Final").symlink_to("final")
    with pytest.raises(OutputPathError, match="'Final' is the name"):
        put(out, as_other("ab" * 32), version="1-b", model="Final")


def test_pointing_back_is_moving_too(
    tmp_path: Path, artifact: Path, as_other: Callable[..., Path]
) -> None:
    """A build that is there already moves `latest` as well."""
    out = tmp_path / "out"
    first = put(out, artifact)
    put(out, as_other("ab" * 32), version="1-b", replace=True)
    slot = store.Slot(
        out=out, model="final", task="none", target="onnx", precision="fp32", version="1-a"
    )
    with open_run(out) as run:
        with pytest.raises(OutputPathError):
            store.point_latest(slot, work_dir=run.folder)
        store.point_latest(slot, work_dir=run.folder, replace=True)
    assert (first.parent / store.LATEST).resolve() == first.resolve()


def test_what_latest_names_is_gone_or_broken(tmp_path: Path, artifact: Path) -> None:
    out = tmp_path / "out"
    first = put(out, artifact)
    shutil.rmtree(first)
    second = put(out, artifact, version="2-a")
    (second / manifest.NAME).write_text("{")
    put(out, artifact, version="3-a")
