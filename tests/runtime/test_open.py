"""open_artifact: verified first, then the tokenizer and the engine that its manifest names."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from jexport import targets
from jexport.errors import ArtifactError, DependencyError, DeviceError, UnknownTaskError
from jexport.runtime import open as opening
from jexport.types import Batching, CompiledModel, Runner


def test_path_may_be_a_str_or_a_link(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(artifact)
    found = []
    for path in (artifact, str(artifact), tmp_path / "latest", os.path.relpath(artifact)):
        with jexport.open_artifact(path) as model:
            found.append(model.encode("a text"))
    assert all(np.array_equal(found[0], other) for other in found)


def test_serving_imports_no_torch_and_no_transformers(artifact: Path) -> None:
    code = (
        "import sys, jexport\n"
        f"vectors = jexport.open_artifact({str(artifact)!r}).encode(['a', 'b'])\n"
        "assert vectors.shape == (2, 64)\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'onnx', 'onnx_ir', 'onnxscript',\n"
        "         'huggingface_hub', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_changed_artifact_is_refused_before_the_engine_is_imported(artifact_copy: Path) -> None:
    (artifact_copy / "model.onnx").write_bytes(b"not a graph")
    code = (
        "import sys, jexport\nfrom jexport.errors import ArtifactError\n"
        f"try:\n    jexport.open_artifact({str(artifact_copy)!r})\n"
        "except ArtifactError as error:\n    assert 'changed: model.onnx' in str(error)\n"
        "else:\n    raise SystemExit('it was opened')\n"
        "assert not {'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_verify_only_the_manifest_is_read(
    artifact_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (artifact_copy / "README.md").write_text("my own notes")
    with pytest.raises(ArtifactError, match=r"README\.md"):
        jexport.open_artifact(artifact_copy)
    with jexport.open_artifact(artifact_copy, verify=False) as model:
        assert model.encode("x").shape == (64,)


def test_a_graph_that_the_engine_cannot_read_names_the_artifact(artifact_copy: Path) -> None:
    (artifact_copy / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(Exception, match="INVALID_PROTOBUF") as caught:
        jexport.open_artifact(artifact_copy, verify=False)
    assert str(artifact_copy) in caught.value.__notes__[0]


def test_streams_are_opened_by_many_batches_and_closed_with_the_rest(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = targets.load("onnx")
    asked: list[tuple[str, int]] = []
    closed: list[bool] = []

    @contextlib.contextmanager
    def streams(compiled: CompiledModel, device: str, threads: int) -> Iterator[Sequence[Runner]]:
        asked.append((device, threads))
        with onnx.runner(compiled, device, 1) as one, onnx.runner(compiled, device, 1) as other:
            yield [one, other]
        closed.append(True)

    runtime = dataclasses.replace(onnx.runtime, streams=streams)
    parallel = dataclasses.replace(onnx, runtime=runtime)
    monkeypatch.setattr(opening.targets, "load", lambda name: parallel)
    several = [f"text {number} " + "word " * (number % 9) for number in range(60)]
    with jexport.open_artifact(artifact, device="cpu", threads=3) as model:
        few = [model.encode(text) for text in several]
        assert not asked
        many = model.encode(several, max_batch_tokens=4)
        assert asked == [("cpu", 3)]
        model.encode(several, max_batch_tokens=4)
        assert len(asked) == 1
        assert not closed
    assert closed
    np.testing.assert_allclose(many, np.stack(few), atol=1e-6)


def test_the_engine_says_how_many_tokens_one_pass_takes(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = opening.targets.load("onnx")
    texts = ["word " * 6] * 10
    passes: dict[int, list[int]] = {}
    for tokens in (Batching().tokens, 64):
        runtime = dataclasses.replace(
            onnx.runtime, batching=lambda compiled, device, most=tokens: Batching(tokens=most)
        )
        small = dataclasses.replace(onnx, runtime=runtime)
        monkeypatch.setattr(opening.targets, "load", lambda name, chosen=small: chosen)
        with jexport.open_artifact(artifact, device="cpu") as model:
            model.encode(texts, on_batch=passes.setdefault(tokens, []).append)
    assert passes[Batching().tokens] == [10]
    assert len(passes[64]) > 1
    assert sum(passes[64]) == 10


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_engine_whose_first_text_fails_is_freed(
    error: BaseException, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = opening.targets.load("onnx")
    freed: list[str] = []

    @contextlib.contextmanager
    def runner(*args: Any) -> Iterator[Any]:
        def fail(feeds: Any) -> Any:
            raise error

        yield fail
        freed.append("runner")

    broken = dataclasses.replace(onnx, runner=runner)
    monkeypatch.setattr(opening.targets, "load", lambda name: broken)
    with pytest.raises(type(error)) as caught:
        jexport.open_artifact(artifact, device="cpu")
    assert freed == ["runner"]
    if isinstance(error, RuntimeError):
        assert str(artifact) in "".join(caught.value.__notes__)


@pytest.mark.parametrize("device", ["gpu", "", "CUDA", "cuda:"])
def test_an_unknown_device(device: str, artifact: Path) -> None:
    with pytest.raises(ValueError, match="device is"):
        jexport.open_artifact(artifact, device=device)


def test_cuda_where_there_is_none(artifact: Path) -> None:
    with pytest.raises(DependencyError, match="no CUDA provider") as caught:
        jexport.open_artifact(artifact, device="cuda")
    assert "jexport[gpu]" in caught.value.fix


def test_an_engine_that_is_not_installed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        targets.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else 1
    )
    with pytest.raises(DependencyError, match="opening this artifact needs onnxruntime") as caught:
        jexport.open_artifact(artifact)
    assert caught.value.fix == 'pip install "jexport[onnx]"'


def test_closing_frees_the_engine(artifact: Path) -> None:
    model = jexport.open_artifact(artifact)
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.encode("x")


def test_what_the_manifest_says_is_what_is_opened(artifact: Path) -> None:
    from jexport.artifacts import manifest

    content = manifest.read(artifact).content
    embedding = opening.embedding_of(content)
    assert embedding.matryoshka == (16, 32, 64)
    assert embedding.prompt.endswith(": ")
    compiled = opening.compiled_model(artifact, content)
    assert [spec.name for spec in compiled.signature.inputs] == ["input_ids", "attention_mask"]
    assert compiled.signature.inputs[0].shape == ("batch", "sequence")
    assert compiled.signature.outputs[0].shape == ("batch", "sequence", 64)


def test_an_artifact_of_another_task_is_refused(artifact: Path) -> None:
    opening.open_artifact(artifact, task="retrieval.query").close()
    with pytest.raises(UnknownTaskError) as caught:
        opening.open_artifact(artifact, task="separation")
    assert "is not of the task 'separation'" in caught.value.what
    assert "retrieval.query" in caught.value.evidence
    assert "jexport build --task separation" in caught.value.fix


# other processes


def _embed(queue: Any, model: Any, texts: list[str]) -> None:
    queue.put(model.encode(texts))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_opens_it_again(method: str, artifact: Path) -> None:
    """Forked, the engine's threads are not there; spawned, nothing is."""
    texts = ["one text", "another one", "and a third"] * 5
    context: Any = multiprocessing.get_context(method)
    with jexport.open_artifact(artifact, device="cpu", threads=2) as model:
        wanted = model.encode(texts)
        queue = context.Queue()
        process = context.Process(target=_embed, args=(queue, model, texts))
        process.start()
        found = queue.get(timeout=120)
        process.join(30)
        assert process.exitcode == 0
        np.testing.assert_array_equal(model.encode(texts), wanted)
    np.testing.assert_array_equal(found, wanted)


def test_pickled_it_is_opened_as_it_was(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "latest"
    link.symlink_to(artifact)
    with jexport.open_artifact(link, device="cpu", threads=3, verify=False) as model:
        raw = pickle.dumps(model)
        wanted = model.encode("a text")
    link.unlink()  # the name may stand for another artifact by now
    asked: list[tuple[str, int]] = []
    onnx = targets.load("onnx")

    def runner(compiled: CompiledModel, device: str, threads: int) -> Any:
        asked.append((device, threads))
        return onnx.runner(compiled, device, threads)

    monkeypatch.setattr(
        opening.targets, "load", lambda name: dataclasses.replace(onnx, runner=runner)
    )
    monkeypatch.setattr(opening.manifest, "verify", lambda folder: pytest.fail("verify=False"))
    with pickle.loads(raw) as again:
        np.testing.assert_array_equal(again.encode("a text"), wanted)
    assert asked == [("cpu", 3)]
    with pytest.raises(RuntimeError, match="closed"):
        pickle.dumps(model)


def test_a_parents_gpu_is_refused_by_name(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opening._Source(str(artifact), "auto", 0, True, False)
    monkeypatch.setattr(opening, "_holds_a_parents_gpu", lambda: True)
    with pytest.raises(DeviceError, match="forked") as caught:
        source()
    assert "spawn" in caught.value.fix
    dataclasses.replace(source, device="cpu")().close()


def test_a_ref_is_opened_again_by_its_digest(tmp_path: Path) -> None:
    folder = tmp_path / f"sha256-{'0' * 64}" / "1.0.0"
    folder.mkdir(parents=True)
    digest = "sha256:" + "0" * 64
    assert opening._pinned("oci://127.0.0.1:1/a/b:newest", folder).endswith(f"/a/b@{digest}")
    assert opening._pinned(folder, folder) == str(folder)
