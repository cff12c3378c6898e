"""A Triton model repository: what is in it, what Triton reads there, what is refused."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

import jexport
from jexport.artifacts import manifest, store
from jexport.errors import ArtifactError, DiskFullError, LayoutError, OutputPathError
from jexport.serving import layouts
from jexport.serving.layouts import Wishes, Written
from jexport.serving.layouts import triton as layout
from jexport.types import Artifact

TEXTS = ["one", "two words", "a longer text than the others " * 9]


def write(paths: Sequence[Path], out: Path, **wishes: Any) -> list[Written]:
    found = [Artifact(path=path, manifest=manifest.read(path)) for path in paths]
    return layouts.load("triton").write(found, out, Wishes(**wishes))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def both(builds: Callable[..., Any]) -> list[Path]:
    """Artifacts of two tasks, one of them fp16."""
    return [builds("retrieval.query").path, builds("retrieval.passage", "fp16").path]


@pytest.fixture(scope="session")
def repository(both: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of both that no test may change."""
    out = tmp_path_factory.mktemp("triton") / "models"
    write(both, out)
    return out


def test_a_repository_is_models_with_versions_that_are_the_artifacts(
    repository: Path, both: list[Path], triton: Any
) -> None:
    assert sorted(path.name for path in repository.iterdir()) == [
        "small_retrieval.passage",
        "small_retrieval.query",
    ]
    for path, name in zip(both, ("retrieval.query", "retrieval.passage"), strict=True):
        model = repository / f"small_{name}"
        assert sorted(p.name for p in model.iterdir()) == ["1", "config.pbtxt", "warmup"]
        assert triton.versions(model) == {1: model / "1"}
        assert snapshot(model / "1") == snapshot(path)
        assert manifest.verify(model / "1").content == manifest.read(path).content
        linked = [
            p for p in model.rglob("*") if p.is_symlink() or (p.is_file() and p.stat().st_nlink > 1)
        ]
        assert not linked


def test_the_config_is_what_the_graph_is(repository: Path, both: list[Path], triton: Any) -> None:
    for path in both:
        content = manifest.read(path).content
        model = repository / f"small_{content['task']}"
        config = triton.parsed(model / "config.pbtxt")
        assert (config.name, config.backend) == (model.name, "onnxruntime")
        assert config.platform == "onnxruntime_onnx"
        assert config.default_model_filename == "model.onnx"
        session = onnxruntime.InferenceSession(str(model / "1" / config.default_model_filename))
        for specs, values in (
            (config.input, session.get_inputs()),
            (config.output, session.get_outputs()),
        ):
            kinds = {"tensor(int64)": "INT64", "tensor(float)": "FP32", "tensor(float16)": "FP16"}
            assert {one.name: triton.kserve(one.data_type) for one in specs} == {
                value.name: kinds[value.type] for value in values
            }
            assert {one.name: list(one.dims) for one in specs} == {
                value.name: [-1 if isinstance(d, str) else d for d in value.shape[1:]]
                for value in values
            }
        said = {key: value.string_value for key, value in config.parameters.items()}
        assert said["jexport.version.1"].split() == [
            content["version"],
            content["precision"],
            content["sha256"],
        ]
        assert said["jexport.embedding_space"] == content["embedding"]["space"]
        assert said["intra_op_thread_count"] == "0"


def test_serving_on_the_cpu(repository: Path, triton: Any) -> None:
    config = triton.parsed(repository / "small_retrieval.query" / "config.pbtxt")
    [group] = config.instance_group
    assert (group.count, group.Kind.Name(group.kind), list(group.profile)) == (1, "KIND_CPU", [])
    assert config.optimization.graph.level == -1
    assert config.max_batch_size == 8
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert 0 < config.dynamic_batching.max_queue_delay_microseconds <= 10_000
    assert config.version_policy.latest.num_versions == 1
    assert not config.HasField("model_transaction_policy")
    assert not any(one.allow_ragged_batch for one in config.input)


def test_warm_ups_have_the_graphs_inputs_and_files_of_the_right_size(
    repository: Path, triton: Any
) -> None:
    model = repository / "small_retrieval.query"
    config = triton.parsed(model / "config.pbtxt")
    kinds = {one.name: one.data_type for one in config.input}
    shapes, padded = [], []
    for warmup in config.model_warmup:
        assert {name: one.data_type for name, one in warmup.inputs.items()} == kinds
        shapes.append((warmup.batch_size, *{tuple(one.dims) for one in warmup.inputs.values()}))
        mask = np.fromfile(
            model / "warmup" / warmup.inputs["attention_mask"].input_data_file, "<i8"
        )
        assert mask.shape == tuple(warmup.inputs["attention_mask"].dims)
        assert set(mask) <= {0, 1}
        assert mask[0] == 1
        padded.append(0 in mask)
        assert warmup.inputs["input_ids"].zero_data
    assert shapes == [(1, (32,)), (8, (128,))]
    assert padded == [False, True]  # each of the graph's two branches


def test_options_reach_the_config(artifact: Path, tmp_path: Path, triton: Any) -> None:
    [one] = write([artifact], tmp_path / "models", device="gpu", max_batch=64)
    config = triton.parsed(one.path.parent / "config.pbtxt")
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert config.max_batch_size == 64
    assert max(warmup.batch_size for warmup in config.model_warmup) == 64
    assert not config.HasField("optimization")


def test_vectors_from_the_version_folder_are_the_artifacts(
    repository: Path, both: list[Path]
) -> None:
    for path in both:
        model = repository / f"small_{manifest.read(path).content['task']}"
        with jexport.open_artifact(path) as ours, jexport.open_artifact(model / "1") as theirs:
            np.testing.assert_array_equal(ours.encode(TEXTS), theirs.encode(TEXTS))


def test_every_profile_of_an_engine_is_served(
    trt: Callable[..., Path], tmp_path: Path, triton: Any
) -> None:
    path = trt()
    [one] = write([path], tmp_path / "models")
    assert one.path.parent.name == "small_retrieval.query"
    assert filecmp.cmp(path / "model.plan", one.path / "model.plan", shallow=False)
    config = triton.parsed(one.path.parent / "config.pbtxt")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == "model.plan"
    [group] = config.instance_group
    assert (group.Kind.Name(group.kind), list(group.profile)) == ("KIND_GPU", ["0", "1"])
    assert config.max_batch_size == 16
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    assert "intra_op_thread_count" not in config.parameters
    shapes = [(w.batch_size, *w.inputs["input_ids"].dims) for w in config.model_warmup]
    assert shapes == [(8, 32), (8, 128)]
    assert all(
        (one.path.parent / "warmup" / w.inputs["attention_mask"].input_data_file).stat().st_size
        == 8 * w.inputs["attention_mask"].dims[0]
        for w in config.model_warmup
    )
    assert "a profile takes 32" in one.notes[0]


def test_the_same_artifact_keeps_its_number_and_another_gets_the_next(
    artifact: Path, artifact_copy: Path, changed: Callable[..., Path], tmp_path: Path, triton: Any
) -> None:
    out = tmp_path / "models"
    [first] = write([artifact], out)
    before = snapshot(out)
    [again] = write([artifact], out)
    assert (again.version, again.new, first.new) == (1, False, True)
    assert snapshot(out) == before
    later = changed(artifact_copy, lambda content: content.update(version="9.9.9-new"))
    [second] = write([later], out)
    assert (second.version, second.new) == (2, True)
    assert triton.versions(out / second.name) == {n: out / second.name / str(n) for n in (1, 2)}
    config = triton.parsed(out / second.name / "config.pbtxt")
    assert config.parameters["jexport.version.2"].string_value.startswith("9.9.9-new fp32 ")
    assert config.parameters["jexport.version.1"].string_value.startswith("0.1.0-")
    [older] = write([artifact], out)
    assert older.version == 1
    assert "Triton serves 2" in older.notes[-1]
    assert not list(out.glob(".work"))


def test_numbers_are_never_used_twice(
    artifact: Path, artifact_copy: Path, changed: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "models"
    [first] = write([artifact], out)
    os.rename(first.path, first.path.with_name("7"))
    [second] = write([changed(artifact_copy, lambda c: c.update(version="2-x"))], out)
    assert second.version == 8


def test_whoever_was_stopped_before_the_config_is_helped_by_the_next_run(
    artifact: Path,
    artifact_copy: Path,
    changed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    triton: Any,
) -> None:
    out = tmp_path / "models"
    [first] = write([artifact], out)
    later = changed(artifact_copy, lambda content: content.update(version="9.9.9-new"))
    real = os.replace

    def stopped(source: Path, place: Path) -> None:
        if Path(place).name == "config.pbtxt":
            raise KeyboardInterrupt
        real(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            write([later], out)
    manifest.verify(first.path.with_name("2"))
    assert not list(out.glob(".work"))
    [second] = write([later], out)
    assert second.version == 2
    config = triton.parsed(first.path.parent / "config.pbtxt")
    assert "jexport.version.2" in config.parameters


def test_two_artifacts_of_one_task_are_refused_and_nothing_is_written(
    artifact: Path, artifact_copy: Path, nothing_left: Path
) -> None:
    with pytest.raises(LayoutError, match=r"would be the Triton model 'small_retrieval\.query'"):
        write([artifact, artifact_copy], nothing_left)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_changed_artifact_is_refused(
    name: str, artifact_copy: Path, both: list[Path], nothing_left: Path
) -> None:
    with open(artifact_copy / name, "ab") as stream:
        stream.write(b" ")
    with pytest.raises(ArtifactError, match="is not what was built"):
        write([both[1], artifact_copy], nothing_left)


def test_a_changed_version_in_the_repository_is_refused(artifact: Path, tmp_path: Path) -> None:
    [one] = write([artifact], tmp_path / "models")
    (one.path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"models/small_retrieval\.query/1 is not what"):
        write([artifact], tmp_path / "models")


def test_other_targets_are_refused(
    artifact_copy: Path, changed: Callable[..., Path], nothing_left: Path
) -> None:
    other = changed(artifact_copy, lambda content: content.update(target="hf"))
    with pytest.raises(LayoutError, match="does not take artifacts of target 'hf'"):
        write([other], nothing_left)


def test_an_engine_that_is_not_compiled_yet_is_refused(
    artifact_copy: Path, changed: Callable[..., Path], nothing_left: Path
) -> None:
    portable = changed(artifact_copy, lambda content: content.update(target="trt"))
    with pytest.raises(LayoutError, match="no engine that Triton opens") as caught:
        write([portable], nothing_left)
    assert "jexport compile" in caught.value.fix


def test_a_graph_with_a_fixed_batch_is_refused(
    artifact_copy: Path, changed: Callable[..., Path], nothing_left: Path
) -> None:
    def fix(content: dict[str, Any]) -> None:
        content["engine"]["inputs"][0]["shape"][0] = 1

    with pytest.raises(LayoutError, match="cannot batch 'input_ids'"):
        write([changed(artifact_copy, fix)], nothing_left)


@pytest.mark.parametrize("name", ["ärger", "a b", "..", "-x", "a%2f"])
def test_a_name_that_does_not_fit_a_url_is_refused(
    name: str, artifact_copy: Path, changed: Callable[..., Path], nothing_left: Path
) -> None:
    with pytest.raises(LayoutError, match="cannot be a model's name"):
        write([changed(artifact_copy, lambda c: c.update(name=name))], nothing_left)


def test_the_task_none_is_the_models_name_alone() -> None:
    assert layout.model_name({"name": "all-MiniLM-L6-v2", "task": "none"}) == "all-MiniLM-L6-v2"


def test_the_notes_name_every_prompt_that_a_client_has_to_put_there(
    artifact_copy: Path, changed: Callable[..., Path], tmp_path: Path
) -> None:
    """A Triton server is sent token ids; what it drops is said."""
    own = manifest.read(artifact_copy).content["embedding"]["prompt"]
    [one] = write([artifact_copy], tmp_path / "own")
    assert own
    assert [note for note in one.notes if "prompt" in note] == [
        f"the client puts the prompt before each text: {own!r}"
    ]

    def change(content: dict[str, Any]) -> None:
        content["embedding"] |= {
            "prompt": "",
            "default_prompt_name": "",
            "prompts": {"query": "Q: ", "document": "", "code": "C: "},
        }

    [one] = write([changed(artifact_copy, change)], tmp_path / "named")
    [note] = [note for note in one.notes if "prompt" in note]
    assert note.endswith("the client puts it before each text: query 'Q: ', code 'C: '")


def test_both_targets_in_one_model_are_refused(
    artifact: Path, trt: Callable[..., Path], tmp_path: Path
) -> None:
    write([artifact], tmp_path / "models")
    before = snapshot(tmp_path / "models")
    with pytest.raises(LayoutError, match="serves target 'onnx', this artifact is for 'trt'"):
        write([trt()], tmp_path / "models")
    assert snapshot(tmp_path / "models") == before


def test_a_folder_that_is_no_repository_is_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "photos").mkdir(parents=True)
    (tmp_path / "file").touch()
    for out in (tmp_path / "a", tmp_path / "file", artifact.parents[3]):
        before = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
        with pytest.raises(OutputPathError, match="is not a Triton model repository"):
            write([artifact], out)
        assert not before or sorted(p.name for p in out.iterdir()) == before


def test_other_models_and_files_in_a_repository_are_left_alone(
    artifact: Path, tmp_path: Path
) -> None:
    other = tmp_path / "models" / "resnet"
    (other / "1").mkdir(parents=True)
    (other / "config.pbtxt").write_text('name: "resnet"')
    (tmp_path / "models" / "README").write_text("ours")
    before = snapshot(tmp_path / "models")
    write([artifact], tmp_path / "models")
    after = snapshot(tmp_path / "models")
    assert {name: after[name] for name in before} == before


def test_a_config_that_somebody_changed_is_not_replaced(
    artifact: Path, artifact_copy: Path, changed: Callable[..., Path], tmp_path: Path
) -> None:
    [one] = write([artifact], tmp_path / "models")
    config = one.path.parent / "config.pbtxt"
    config.write_text(config.read_text().replace("microseconds: 1000", "microseconds: 500"))
    before = snapshot(tmp_path / "models")
    [again] = write([artifact], tmp_path / "models")
    assert "left as it is" in again.notes[-1]
    assert snapshot(tmp_path / "models") == before
    later = changed(artifact_copy, lambda content: content.update(version="9.9.9-new"))
    with pytest.raises(OutputPathError, match="was changed since jexport wrote it"):
        write([later], tmp_path / "models")
    assert snapshot(tmp_path / "models") == before


@pytest.mark.parametrize("there", ["a file", "no version", "a version of another maker"])
def test_a_model_of_that_name_that_is_not_jexports_is_left_alone(
    there: str, artifact: Path, tmp_path: Path
) -> None:
    model = tmp_path / "models" / "small_retrieval.query"
    model.parent.mkdir()
    if there == "a file":
        model.write_text("mine")
    else:
        model.mkdir()
        (model / "config.pbtxt").write_text('name: "small_retrieval.query"')
    if there == "a version of another maker":
        (model / "1").mkdir()
        (model / "1" / "model.onnx").write_text("mine")
    before = snapshot(tmp_path / "models")
    with pytest.raises(OutputPathError, match="is not a Triton model of jexport's"):
        write([artifact], tmp_path / "models")
    assert snapshot(tmp_path / "models") == before


@pytest.mark.parametrize("first", [True, False])
def test_another_run_that_was_faster_is_not_overwritten(
    first: bool,
    artifact: Path,
    artifact_copy: Path,
    changed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "models"
    if not first:
        write([artifact], out)
    later = changed(artifact_copy, lambda content: content.update(version="9.9.9-new"))
    theirs = out / "small_retrieval.query" / ("1" if first else "2")
    real = store.sync_tree

    def meanwhile(folder: Path) -> None:
        real(folder)
        theirs.mkdir(parents=True)
        (theirs / "model.onnx").write_text("theirs")

    monkeypatch.setattr(store, "sync_tree", meanwhile)
    with pytest.raises(OutputPathError, match="cannot put small_retrieval"):
        write([later], out)
    assert snapshot(theirs) == {"model.onnx": b"theirs"}
    assert not list(out.glob(".work"))


def test_a_repository_inside_an_artifact_is_refused(artifact_copy: Path) -> None:
    with pytest.raises(OutputPathError, match="inside an artifact"):
        write([artifact_copy], artifact_copy / "models")
    manifest.verify(artifact_copy)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_told_and_leaves_nothing(
    wrapped: bool, both: list[Path], nothing_left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shutil.copytree, []

    def full(source: Path, place: Path) -> Any:
        calls.append(source)
        if len(calls) == 1:
            return real(source, place)
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise shutil.Error([(str(source), str(place), str(error))]) if wrapped else error

    monkeypatch.setattr(layout, "shutil", SimpleNamespace(copytree=full, Error=shutil.Error))
    with pytest.raises(DiskFullError, match="package: no space left"):
        write(both, nothing_left)
    assert len(calls) == 2


def test_an_artifact_that_changes_while_it_is_copied_is_noticed(
    artifact_copy: Path, nothing_left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copytree

    def meanwhile(source: Path, place: Path) -> Any:
        (artifact_copy / "tokenizer.json").write_text("{}")
        return real(source, place)

    monkeypatch.setattr(layout, "shutil", SimpleNamespace(copytree=meanwhile, Error=shutil.Error))
    with pytest.raises(ArtifactError, match=r"changed: tokenizer\.json|is not what was built"):
        write([artifact_copy], nothing_left)


def test_a_model_stays_with_its_checkpoint(
    both: list[Path], changed: Callable[..., Path], tmp_path: Path
) -> None:
    def of_other_weights(content: dict[str, Any]) -> None:
        for file in content["checkpoint"]["files"]:
            file["sha256"] = "ab" * 32

    out = tmp_path / "models"
    write(both[:1], out)
    other = changed(Path(shutil.copytree(both[0], tmp_path / "other")), of_other_weights)
    with pytest.raises(LayoutError, match="serves another checkpoint") as caught:
        write([other], out)
    assert "--name" in caught.value.fix
    assert [one.version for one in write([other], out, replace=True)] == [2]
    assert [one.version for one in write(both[:1], out)] == [1]  # it stands there already
