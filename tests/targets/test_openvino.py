"""The openvino target: what it writes and refuses, in which precision it runs, that it lets go."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from openvino import opset13 as ops

from jexport import targets
from jexport.datasets import calibration
from jexport.errors import DependencyError, UnsupportedGraphError
from jexport.recipe import CompileSpec
from jexport.runtime.parallel import in_order
from jexport.runtime.tokenise import TextTokenizer
from jexport.targets import PackageContext
from jexport.targets import openvino as target
from jexport.targets.openvino import tokenizer
from jexport.types import CompiledModel, OnnxModel, Signature

IDS = np.array([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]], dtype=np.int64)
FEED = {"input_ids": IDS, "attention_mask": (IDS != 1).astype(np.int64)}


@pytest.fixture(scope="module")
def built(standard: OnnxModel, tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """The fp32 graph as OpenVINO IR, that no test may change."""
    return target.build(standard, CompileSpec(), tmp_path_factory.mktemp("built"))


def rewrite(model: OnnxModel, edit: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(model.path, load_external_data=False)
    edit(proto)
    model.path.write_bytes(proto.SerializeToString())


# --- check --------------------------------------------------------------------------------------


def test_a_good_graph_passes(exported: OnnxModel) -> None:
    target.check(exported)


def test_an_operator_that_openvino_lacks_is_named(exported: OnnxModel) -> None:
    def bogus(proto: onnx.ModelProto) -> None:
        proto.graph.node[3].op_type = "Bogus"

    rewrite(exported, bogus)
    with pytest.raises(UnsupportedGraphError, match="cannot read") as caught:
        target.check(exported)
    assert "Bogus" in caught.value.evidence
    assert caught.value.exit_code == 16


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("model.onnx", None),
        ("model.onnx", 0),
        ("model.onnx", 1000),
        ("model.onnx_data", None),
        ("model.onnx_data", 1000),
    ],
)
def test_a_file_that_is_cut_or_gone_is_refused(
    name: str, size: int | None, exported: OnnxModel
) -> None:
    path = exported.path.with_name(name)
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UnsupportedGraphError) as caught:
        target.check(exported)
    assert caught.value.evidence.strip()


def test_a_newer_opset_is_refused(exported: OnnxModel) -> None:
    with pytest.raises(UnsupportedGraphError, match="opset 24") as caught:
        target.check(dataclasses.replace(exported, opset=24))
    assert "export.opset" in caught.value.fix


# --- build --------------------------------------------------------------------------------------


def test_two_builds_are_the_same_bytes(
    standard: OnnxModel, built: CompiledModel, tmp_path: Path
) -> None:
    again = target.build(standard, CompileSpec(), tmp_path)
    assert again.files == ("openvino_model.xml", "openvino_model.bin")
    for name in again.files:
        assert (tmp_path / name).read_bytes() == (built.folder / name).read_bytes()


def test_the_graph_names_no_place_of_this_machine(built: CompiledModel) -> None:
    text = (built.folder / target.GRAPH).read_text(encoding="utf-8")
    assert str(built.folder) not in text
    assert "/tmp" not in text
    assert "last_hidden_state" in text


def test_weights_stay_what_they_are(standard: OnnxModel, built: CompiledModel) -> None:
    # save_model would make float16 of them by default
    weights = standard.path.with_name("model.onnx_data").stat().st_size
    assert (built.folder / target.WEIGHTS).stat().st_size > 0.95 * weights


# --- runner -------------------------------------------------------------------------------------


def test_vectors_are_onnxruntimes(
    standard: OnnxModel, built: CompiledModel, compiled: CompiledModel
) -> None:
    with target.runner(built, "auto", 1) as run:
        found = dict(run(FEED))
        first = {name: value.copy() for name, value in found.items()}
        run({name: value[:1] for name, value in FEED.items()})
        # answers are the caller's own: the next batch does not write over them
        np.testing.assert_array_equal(found["last_hidden_state"], first["last_hidden_state"])
    with targets.load("onnx").runner(compiled, "cpu", 1) as run:
        wanted = run(FEED)["last_hidden_state"]
    real = FEED["attention_mask"].astype(bool)
    assert np.abs(found["last_hidden_state"] - wanted)[real].max() <= 2e-6


@pytest.mark.parametrize(
    ("precision", "hint"), [("fp32", "f32"), ("int8", "bf16"), ("bf16", "bf16")]
)
def test_the_precision_is_asked_for(
    precision: str, hint: str, built: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    compile_model = openvino.Core.compile_model

    def remember(self: Any, path: str, device: str, wanted: dict[str, Any]) -> Any:
        asked.append({"device": device, **wanted})
        return compile_model(self, path, device, wanted)

    monkeypatch.setattr(openvino.Core, "compile_model", remember)
    with target.runner(dataclasses.replace(built, precision=precision), "cpu", 3):
        pass
    assert asked[0]["INFERENCE_PRECISION_HINT"] == hint
    assert asked[0]["INFERENCE_NUM_THREADS"] == 3
    assert asked[0]["device"] == "CPU"
    assert target.properties(precision) == {"INFERENCE_PRECISION_HINT": hint}


def test_the_engine_is_freed(built: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []
    compile_model = openvino.Core.compile_model

    def remember(*words: Any) -> Any:
        made = compile_model(*words)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(openvino.Core, "compile_model", remember)
    with target.runner(built, "cpu", 1) as run:
        assert run(FEED)
    gc.collect()
    assert kept[0]() is None
    with pytest.raises(RuntimeError, match="closed"):
        run(FEED)
    with pytest.raises(KeyError), target.runner(built, "cpu", 1) as run:
        raise KeyError("stop")
    gc.collect()
    assert kept[1]() is None


def test_only_outputs_that_the_graph_has_are_given(built: CompiledModel) -> None:
    more = dataclasses.replace(built.signature.outputs[0], name="logits")
    wide = dataclasses.replace(built.signature, outputs=(*built.signature.outputs, more))
    with target.runner(dataclasses.replace(built, signature=wide), "cpu", 1) as run:
        assert list(run(FEED)) == ["last_hidden_state"]


# --- streams --------------------------------------------------------------------------------------


two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="one core has no two streams"
)


has_bfloat16 = pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="no bfloat16 here",
)


@has_bfloat16
def test_int8_gives_token_vectors_in_bfloat16_as_float32(built: CompiledModel) -> None:
    with target.runner(built, "cpu", 1) as run:
        exact = run(FEED)["last_hidden_state"]
    with target.runner(dataclasses.replace(built, precision="int8"), "cpu", 1) as run:
        made = run(FEED)["last_hidden_state"]
    assert made.dtype == np.float32
    assert made.shape == exact.shape
    assert not (made.view(np.uint32) & 0xFFFF).any()  # the lower half of the bits
    assert (exact.view(np.uint32) & 0xFFFF).any()
    real = FEED["attention_mask"].astype(bool)
    assert np.abs(made - exact)[real].max() < 0.02 * np.abs(exact[real]).max()


@has_bfloat16
def test_only_token_vectors_do(tmp_path: Path) -> None:
    rows = ops.parameter([-1, -1, 8], np.float32, name="rows")
    text = ops.reduce_mean(rows, ops.constant(np.array([1])))
    graph = openvino.Model([ops.result(ops.relu(rows)), ops.result(text)], [rows], "two")
    openvino.save_model(graph, str(tmp_path / target.GRAPH), compress_to_fp16=False)
    compiled = CompiledModel(
        target="openvino",
        precision="int8",
        folder=tmp_path,
        files=(target.GRAPH, target.WEIGHTS),
        signature=Signature(inputs=(), outputs=()),
        facts={},
    )
    made = target._prepared(openvino.Core(), compiled)
    assert [port.get_element_type().get_type_name() for port in made.outputs] == ["bf16", "f32"]


@pytest.mark.parametrize(
    ("precision", "known"), [("int8", ["FP32", "INT8"]), ("bf16", ["BF16"]), ("fp32", ["BF16"])]
)
def test_elsewhere_the_file_is_opened_as_it_is(
    precision: str, known: list[str], built: CompiledModel
) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return known

    compiled = dataclasses.replace(built, precision=precision)
    assert target._prepared(Core(), compiled) == str(built.folder / target.GRAPH)


@two_cores
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_streams_at_the_same_time_give_the_runners_bits(
    precision: str, built: CompiledModel
) -> None:
    compiled = dataclasses.replace(built, precision=precision)
    rng = np.random.default_rng(0)
    feeds = []
    for rows, longest in [(1, 3), (5, 17), (2, 64), (9, 30), (1, 50), (16, 8)] * 4:
        lengths = rng.integers(1, longest + 1, rows)
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        feeds.append({"input_ids": rng.integers(5, 30, mask.shape) * mask, "attention_mask": mask})
    with target.runner(compiled, "cpu", 2) as run:
        wanted = [run(feed)["last_hidden_state"] for feed in feeds]
    with target.streams(compiled, "cpu", 2) as streams:
        assert len(streams) == 2
        found = list(
            in_order(feeds, streams, lambda stream, feed: dict(stream(feed))["last_hidden_state"])
        )
    for feed, ours, theirs in zip(feeds, found, wanted, strict=True):
        real = feed["attention_mask"].astype(bool)
        np.testing.assert_array_equal(ours[real], theirs[real])


def test_one_thread_has_no_streams(built: CompiledModel) -> None:
    with target.streams(built, "cpu", 1) as streams:
        assert streams == ()


@two_cores
def test_streams_are_asked_for_and_freed(
    built: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    kept: list[weakref.ref[Any]] = []
    compile_model = openvino.Core.compile_model

    def remember(self: Any, path: str, device: str, wanted: dict[str, Any]) -> Any:
        made = compile_model(self, path, device, wanted)
        asked.append(wanted)
        kept.append(weakref.ref(made))
        return made

    monkeypatch.setattr(openvino.Core, "compile_model", remember)
    with target.streams(dataclasses.replace(built, precision="int8"), "cpu", 2) as streams:
        assert streams[1](FEED)
    assert asked[0] == {
        "INFERENCE_PRECISION_HINT": "bf16",
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_NUM_THREADS": 2,
        "CPU_RUNTIME_CACHE_CAPACITY": target.CACHED,
    }
    gc.collect()
    assert kept[0]() is None
    with pytest.raises(RuntimeError, match="closed"):
        streams[1](FEED)


def test_devices(built: CompiledModel) -> None:
    with pytest.raises(DependencyError, match="no CUDA") as caught, target.runner(built, "cuda", 0):
        pass
    assert "--device cpu" in caught.value.fix
    for opened in (target.runner, target.streams):
        with pytest.raises(ValueError, match="'gpu'"), opened(built, "gpu", 0):
            pass


def test_a_too_old_openvino_is_refused(
    built: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.metadata, "version", lambda name: "2025.4.1")
    for call in (target.ready, lambda: target.runner(built, "cpu", 0).__enter__()):
        with pytest.raises(DependencyError, match=r"OpenVINO 2025\.4\.1 is too old") as caught:
            call()
        assert "2026.4" in caught.value.evidence
        assert caught.value.exit_code == 15


def test_a_missing_openvino_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = targets.importlib.util.find_spec
    monkeypatch.setattr(
        targets.importlib.util, "find_spec", lambda name: None if "openvino" in name else find(name)
    )
    with pytest.raises(DependencyError, match="openvino_tokenizers") as caught:
        target.ready()
    assert 'pip install "jexport[openvino]"' in caught.value.fix


def test_version_names_the_package() -> None:
    assert openvino.__version__.split("-")[0] in target.version()


# --- the tokenizer as a graph -------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path: Path) -> Callable[..., PackageContext]:
    """`packaged(folder, max_tokens)`: a packaged folder with that checkpoint's tokenizer."""

    def made(source: Path, max_tokens: int, **changes: Any) -> PackageContext:
        for path in (*source.glob("*token*"), source / "config.json"):
            shutil.copy(path, tmp_path)
        (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
        opened = TextTokenizer.open(tmp_path, max_tokens=max_tokens)
        texts = [sample.text for sample in calibration.read("parity", "none").samples]
        plain = PackageContext(
            folder=tmp_path,
            precision="fp32",
            texts=texts,
            pad_id=opened.pad_id,
            tokenize=lambda many: [opened.truncate(ids) for ids in opened.token_ids(many)],
            max_tokens=max_tokens,
            cut=opened.cut,
        )
        return dataclasses.replace(plain, **changes)

    return made


def ids_of(folder: Path, texts: list[str]) -> Iterator[list[int]]:
    import openvino_tokenizers  # noqa: F401  registers its operators

    run = openvino.Core().compile_model(str(folder / "openvino_tokenizer.xml"), "CPU")
    assert [port.any_name for port in run.outputs] == ["input_ids", "attention_mask"]
    for text in texts:
        yield run([text])["input_ids"][0].tolist()


def test_real_bert_ids_in_30_languages_and_odd_texts(
    minilm: Path, packaged: Callable[..., PackageContext]
) -> None:
    context = packaged(minilm, 256)
    facts = tokenizer.write(context)
    assert facts == {
        "written": True,
        "texts_compared": 302,
        "differs_on": [],
        "differs_on_characters": [],
    }
    # final sigma; Japanese marks; words over 100 characters; cut to the limit
    hard = ["ΟΔΟΣ ς", "時々〆切 〇", "ア" * 60, "é" * 101, "ok " * 400, ""]
    wanted = context.tokenize(hard)
    assert max(map(len, wanted)) == 256
    assert list(ids_of(context.folder, hard)) == wanted


def test_a_unigram_tokenizer_tells_where_it_differs(
    small: Path, packaged: Callable[..., PackageContext]
) -> None:
    context = packaged(small, 64)
    facts = tokenizer.write(context)
    first = [path.read_bytes() for path in sorted(context.folder.glob("openvino_*"))]
    assert tokenizer.write(context) == facts
    assert [path.read_bytes() for path in sorted(context.folder.glob("openvino_*"))] == first
    assert facts["written"] is True
    assert "  two  spaces " in facts["differs_on"]
    assert facts["differs_on_characters"] == ["U+0020"]
    more = tokenizer.write(dataclasses.replace(context, edge=["a \u2581 b", "plain"]))
    assert more["differs_on"] == [*facts["differs_on"], "a \u2581 b"]
    assert more["differs_on_characters"] == ["U+0020", "U+2581"]
    texts = ["Ein Satz.", "", "word " * 80]
    assert list(ids_of(context.folder, texts)) == context.tokenize(texts)


def test_a_graph_that_gives_other_ids_is_not_kept(
    small: Path, packaged: Callable[..., PackageContext]
) -> None:
    honest = packaged(small, 64)

    def shifted(many: list[str]) -> list[list[int]]:
        return [[one + 1 for one in ids] for ids in honest.tokenize(many)]

    facts = tokenizer.write(dataclasses.replace(honest, tokenize=shifted))
    assert facts["written"] is False
    assert len(facts["differs_on"]) == 10
    assert not list(honest.folder.glob("openvino_tokenizer*"))


def test_sentence_transformers_is_told_the_precision(
    small: Path, packaged: Callable[..., PackageContext]
) -> None:
    context = packaged(small, 64)
    target.finalize_package(context)
    said = json.loads((context.folder / "sentence_bert_config.json").read_text())
    assert said == {
        "max_seq_length": 7,
        "model_args": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
    }
