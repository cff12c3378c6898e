"""An int8 build, from the checkpoint to vectors, and those that leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import jexport
from jexport import recipe
from jexport.artifacts import manifest, store
from jexport.errors import ArtifactError, CalibrationError, ParityError, QuantizationError
from jexport.quantization.evaluator import Evaluator
from jexport.quantization.trial_log import TrialLog
from jexport.runtime.embedder import Embedder
from jexport.runtime.open import embedding_of
from jexport.runtime.tokenise import TextTokenizer
from jexport.serving import layouts
from jexport.stages import validate
from jexport.types import Artifact

TASK = "retrieval.passage"
GATES = {"cosine_mean": 0.9, "cosine_p1": 0.8, "batch_cosine_min": 0.999999}
SAMPLES = 64


def quick(small: Path, **changes: Any) -> recipe.Recipe:
    """Low goals, few texts: what is tested is the way, not the model."""
    low = {
        "cosine_mean": 0.9,
        "cosine_p1": 0.8,
        "top10_overlap": 0.3,
        "allow_slower": True,
        "pair_top10_overlap": 0.3,
    }
    made = recipe.for_model(str(small)).replace_quantize(**{**low, "samples": SAMPLES, **changes})
    gates = {**recipe.DEFAULT_GATES, "int8": GATES}
    return dataclasses.replace(
        made,
        validate=dataclasses.replace(made.validate, budget_tokens=1, max_tokens=64, gates=gates),
    )


@pytest.fixture(scope="module")
def int8(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One int8 artifact that no test may change."""
    return jexport.build(
        quick(small),
        task=TASK,
        target="onnx",
        precision="int8",
        out=tmp_path_factory.mktemp("int8"),
    ).path


def test_manifest_tells_precision_speed_and_stages(int8: Path) -> None:
    content, said = manifest.verify(int8).content, store.measured(int8)
    assert content["precision"] == "int8"
    assert int8.parent.name == "onnx-int8"
    assert [one["precision"] for one in said["speed"]] == ["fp32", "int8"]
    assert all(one["texts_per_second"] > 0 for one in said["speed"])
    stages = [record["stage"] for record in said["stages"]]
    assert stages == ["load", "merge", "export", "quantize", "compile", "validate", "package"]
    assert content["parity"]["passed"] is True
    assert content["engine"]["facts"]["fused"]["MatMulIntegerToFloat"] >= 8


def test_reports_are_in_the_artifact(int8: Path) -> None:
    listed = {entry["path"] for entry in manifest.read(int8).content["files"]}
    assert {"quantization.json", "report.html", "parity.json"} <= listed
    report = json.loads((int8 / "quantization.json").read_text(encoding="utf-8"))
    assert report["precision"] == "int8"
    assert report["scheme"] == "uint8"
    assert report["reached"] is True
    assert report["calibration"]["texts"] == SAMPLES + 1  # the empty text
    assert len(report["matrices"]) == 8
    assert sum(one["share"] for one in report["matrices"]) == pytest.approx(1.0)
    assert all(0 < one["error"] < one["error_naive"] for one in report["matrices"])
    for name, goal in report["gates"].items():
        assert report["chosen"][name] >= goal
    assert f"--task {TASK} --target onnx --precision int8" in report["command"]
    page = (int8 / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert report["command"] in page


@pytest.mark.parametrize("name", ["quantization.json", "report.html"])
@pytest.mark.parametrize("change", ["longer", "gone"])
def test_reports_are_verified(int8: Path, name: str, change: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(int8, tmp_path / "copy"))
    manifest.verify(copy)
    if change == "gone":
        (copy / name).unlink()
    else:
        (copy / name).write_text((copy / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(ArtifactError, match=name):
        manifest.verify(copy)


def test_vectors_are_near_the_authors_and_not_the_same(
    int8: Path, small: Path, texts: list[str]
) -> None:
    truth = np.load(small.with_name(f"{small.name}.{TASK}.npy"))
    with jexport.open_artifact(int8) as model:
        vectors = model.encode(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == truth.shape
    cosines = (vectors * truth).sum(axis=1)
    assert np.median(cosines) >= 0.9999
    assert cosines.min() >= 0.998  # "repeat repeat repeat ...": no calibration text is like it
    assert np.abs(vectors - truth).max() > 1e-5  # it is not the float graph


def test_a_text_alone_is_the_text_in_a_batch(int8: Path, texts: list[str]) -> None:
    several = [*texts, "a", "word " * 150, "Ein Satz, der etwas länger ist."]
    with jexport.open_artifact(int8) as model:
        together = model.encode(several)
        alone = np.concatenate([model.encode([text]) for text in several])
    assert (together.astype(np.float64) * alone).sum(axis=1).min() >= 1 - 1e-6
    assert np.linalg.norm(together - alone, axis=1).max() <= 1e-4


def test_only_a_quantized_graph_keeps_to_one_attention_kernel(
    int8: Path, builds: Callable[..., Any]
) -> None:
    def long_only(folder: Path) -> bool:
        operators = manifest.read(folder).content["engine"]["facts"]["operators"]
        return "Greater" in operators and "And" in operators

    assert long_only(int8)
    assert not long_only(builds(TASK).path)


def test_triton_serves_the_same_vectors(int8: Path, texts: list[str], tmp_path: Path) -> None:
    """As its backend opens it: the basic optimizations alone, onnxruntime's own operators."""
    found = Artifact(path=int8, manifest=manifest.read(int8))
    [one] = layouts.load("triton").write([found], tmp_path / "models", layouts.Wishes())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(str(one.path / "model.onnx"), options)
    tokenizer = TextTokenizer.open(one.path, max_tokens=8192)
    embedding = embedding_of(found.manifest.content)
    outputs = [value.name for value in session.get_outputs()]
    served = Embedder(
        tokenizer=tokenizer,
        runner=lambda feeds: dict(zip(outputs, session.run(outputs, dict(feeds)), strict=True)),
        embedding=embedding,
        outputs=outputs,
    )
    with jexport.open_artifact(int8) as model:
        wanted = model.encode(texts)
    assert (served.encode(texts) * wanted).sum(axis=1).min() > 0.999999


def test_weights_are_int8(int8: Path) -> None:
    import onnx

    graph = onnx.load(int8 / "model.onnx").graph
    matrices = {w.name: w for w in graph.initializer if len(w.dims) == 2 and min(w.dims) >= 64}
    read = [n.input[1] for n in graph.node if n.op_type == "MatMulIntegerToFloat"]
    assert len(read) == 8
    assert {matrices[name].data_type for name in read} == {onnx.TensorProto.INT8}


def test_too_few_calibration_texts(small: Path, tmp_path: Path, nothing_left: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("".join(f"text number {n}\n" for n in range(20)), encoding="utf-8")
    with pytest.raises(CalibrationError) as caught:
        jexport.build(
            quick(small, calibration=str(own)),
            task=TASK,
            target="onnx",
            precision="int8",
            out=nothing_left,
        )
    assert "16 to calibrate on" in str(caught.value)
    assert "4 held out" in str(caught.value)


class Counted:
    """Counts the graphs that are put on trial; stops the build at one of them when asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trials, self.stop_at = 0, -1
        real = Evaluator.vectors

        def vectors(evaluator: Evaluator, *args: Any) -> Any:
            self.trials += 1
            if self.trials == self.stop_at:
                raise KeyboardInterrupt
            return real(evaluator, *args)

        monkeypatch.setattr(Evaluator, "vectors", vectors)


def build_int8(made: recipe.Recipe, out: Path, task: str = TASK) -> Path:
    return jexport.build(made, task=task, target="onnx", precision="int8", out=out).path


def test_goals_out_of_reach_keep_what_was_measured_and_nothing_else(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, out = Counted(monkeypatch), tmp_path / "out"
    with pytest.raises(QuantizationError) as caught:
        build_int8(quick(small, cosine_mean=0.9999999), out)
    assert "does not reach the goals" in str(caught.value)
    assert "< 0.9999999" in str(caught.value)
    left = [path for path in out.glob("[!.]*/**/*") if not path.is_dir()]
    assert len(left) == 1
    assert left[0].name.startswith(".search-")
    measured = counted.trials
    assert measured == len(TrialLog(left[0])) > 2
    built = build_int8(quick(small), out)  # goals that it reaches: nothing is measured again
    assert counted.trials == measured + 1  # but for the groups of the one that is shipped
    assert not left[0].exists()
    manifest.verify(built)


@pytest.mark.rare
def test_a_search_that_was_stopped_goes_on_and_ends_the_same(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = quick(
        small, cosine_mean=0.9999978, max_share=1.0
    )  # some layers fall back, by sensitivity
    undisturbed = build_int8(hard, tmp_path / "undisturbed")
    counted, out = Counted(monkeypatch), tmp_path / "out"
    counted.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        build_int8(hard, out)
    assert counted.trials == 4
    counted.stop_at, counted.trials = -1, 0
    resumed = build_int8(hard, out)
    tried = json.loads((undisturbed / "quantization.json").read_text(encoding="utf-8"))["tried"]
    again = json.loads((resumed / "quantization.json").read_text(encoding="utf-8"))["tried"]
    assert [trial["wide"] for trial in again] == [trial["wide"] for trial in tried]
    assert resumed.name == undisturbed.name
    for name in ("model.onnx", "model.onnx_data"):
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()


def test_queries_and_passages_are_validated_together(
    small: Path, int8: Path, tmp_path: Path
) -> None:
    def pair(folder: Path) -> Any:
        return store.measured(folder)["pair"]

    alone = pair(int8)  # passages first: no int8 queries yet
    assert alone["with"] == "retrieval.query"
    assert alone["queries_int8_passages_fp32"] is None
    assert alone["queries_int8_passages_int8"] is None
    assert 0.5 < alone["queries_fp32_passages_int8"]["top10_overlap"] <= 1
    out = tmp_path / "out"
    shutil.copytree(int8.parents[3], out, symlinks=True)
    both = pair(build_int8(quick(small), out, "retrieval.query"))
    assert both["with"] == "retrieval.passage"
    for name in (
        "queries_int8_passages_fp32",
        "queries_fp32_passages_int8",
        "queries_int8_passages_int8",
    ):
        assert 0.5 < both[name]["top10_overlap"] <= 1
        assert 0 < both[name]["top1"] <= 1
    assert both["queries_fp32_passages_int8"] == pytest.approx(alone["queries_fp32_passages_int8"])
    with pytest.raises(QuantizationError, match="does not keep the ranking of passages"):
        build_int8(quick(small, pair_top10_overlap=1.0001), tmp_path / "strict", "retrieval.query")


@pytest.mark.rare
def test_a_task_without_a_counterpart_has_no_pair(small: Path, tmp_path: Path) -> None:
    built = build_int8(quick(small), tmp_path, "separation")
    assert "pair" not in store.measured(built)


def test_quality_of_the_held_out_texts_is_told_by_group(int8: Path) -> None:
    report = json.loads((int8 / "quantization.json").read_text(encoding="utf-8"))
    quality = report["held_out_quality"]
    assert len(quality["by_language"]) == 30
    assert len(quality["by_length"]) >= 3
    assert quality["texts"] == report["held_out"]["texts"]
    for name in ("cosine_mean", "cosine_p1", "top10_overlap"):
        assert quality["overall"][name] == pytest.approx(report["chosen"][name])
    sizes = manifest.read(int8).content["embedding"]["matryoshka"]
    assert set(quality["by_dimension"]) == set(map(str, sizes))


def refusing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Validate's own run refuses the first candidates: those that its engine alone does worse."""
    real, seen = validate.run, list[int]()

    def run(*args: Any, **kwargs: Any) -> Any:
        report = real(*args, **kwargs)
        seen.append(len(seen))
        if len(seen) <= times:
            error = ParityError("validate: refused", evidence="planted", fix="none")
            error.missed_gates = (f"planted {len(seen)}",)
            raise error
        return report

    monkeypatch.setattr(validate, "run", run)
    return seen


@pytest.mark.rare
def test_what_the_engine_refuses_leads_to_the_next_candidate(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = refusing(monkeypatch, 1)
    built = build_int8(quick(small, max_share=0.5), tmp_path)
    report = json.loads((built / "quantization.json").read_text(encoding="utf-8"))
    assert len(seen) == 2
    assert [trial["passed"] for trial in report["tried"]] == [False, True]
    assert report["tried"][0]["failures"] == ["planted 1"]
    assert report["chosen"]["wide"]
    manifest.verify(built)


@pytest.mark.rare
def test_the_search_is_judged_by_what_validate_judges(small: Path, tmp_path: Path) -> None:
    """A gate of [validate] alone, which the held-out texts of the search never meet."""
    strict = quick(small, max_share=0.0)
    gates = {**strict.validate.gates, "int8": {**GATES, "edge_cosine_min": 0.9999999}}
    strict = dataclasses.replace(strict, validate=dataclasses.replace(strict.validate, gates=gates))
    with pytest.raises(QuantizationError) as caught:
        build_int8(strict, tmp_path)
    assert "validate, edge: cosine_min" in str(caught.value)
    assert "is below 0.9999999" in str(caught.value)


@pytest.mark.rare
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_minilm_with_nothing_but_its_folder(minilm: Path, tmp_path: Path, target: str) -> None:
    """No recipe, all defaults: real weights, an English vocabulary, the empty text."""
    made = recipe.for_model(str(minilm)).replace_quantize(allow_slower=True)
    built = jexport.build(made, task="none", target=target, precision="int8", out=tmp_path).path
    metrics = json.loads((built / "parity.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["overall"]["cosine_min"] > 0.995
    groups = [*metrics["by_language"].values(), *metrics["by_length"].values()]
    assert max(one["loss_low"] for one in groups if one["texts"] >= 7) < 0.003
