"""OpenVINO artifacts, from the checkpoint to vectors: fp32, bf16 and int8, and edited folders."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from jexport import recipe
from jexport.artifacts import manifest
from jexport.errors import ArtifactError, DependencyError

TASK = "retrieval.passage"
LONG = "A sentence that goes on and on, about rivers and the towns along them. " * 40
GATES = {"cosine_mean": 0.9, "cosine_p1": 0.8, "batch_cosine_min": 0.999999}


def quick(small: Path) -> recipe.Recipe:
    """Low goals, few texts: what is tested is the way, not the model."""
    made = recipe.for_model(str(small)).replace_quantize(
        cosine_mean=0.9,
        cosine_p1=0.8,
        top10_overlap=0.3,
        pair_top10_overlap=0.3,
        samples=64,
        allow_slower=True,
    )
    gates = {**recipe.DEFAULT_GATES, "int8": GATES}
    return dataclasses.replace(
        made,
        validate=dataclasses.replace(made.validate, budget_tokens=1, max_tokens=64, gates=gates),
    )


@pytest.fixture(scope="module")
def built(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`built("int8")`: that artifact of the small checkpoint, which no test may change."""
    out = tmp_path_factory.mktemp("openvino")
    made: dict[str, Path] = {}

    def build(precision: str) -> Path:
        if precision not in made:
            made[precision] = jexport.build(
                quick(small), task=TASK, target="openvino", precision=precision, out=out
            ).path
        return made[precision]

    return build


@pytest.mark.parametrize(
    ("precision", "cosine", "largest"), [("fp32", 0.999999, 1e-6), ("fp16", 0.99999, 1e-2)]
)
def test_vectors_are_the_authors(
    built: Callable[[str], Path],
    small: Path,
    texts: list[str],
    precision: str,
    cosine: float,
    largest: float,
) -> None:
    truth = np.load(small.with_name(f"{small.name}.{TASK}.npy"))
    with jexport.open_artifact(built(precision)) as model:
        vectors = model.encode(texts)
    assert (vectors * truth).sum(axis=1).min() >= cosine
    assert np.abs(vectors - truth).max() <= largest


def test_bf16_is_near_and_not_fp32(built: Callable[[str], Path], texts: list[str]) -> None:
    with (
        jexport.open_artifact(built("fp32")) as exact,
        jexport.open_artifact(built("bf16")) as near,
    ):
        first, second = exact.encode(texts), near.encode(texts)
    assert (first * second).sum(axis=1).min() >= 0.999
    for name in ("openvino_model.xml", "openvino_model.bin"):  # a hint, not another graph
        assert (built("fp32") / name).read_bytes() == (built("bf16") / name).read_bytes()
    said = json.loads((built("bf16") / "sentence_bert_config.json").read_text())
    assert said["model_args"]["ov_config"] == {"INFERENCE_PRECISION_HINT": "bf16"}


def test_int8_runs_on_int8_kernels_and_keeps_its_table(built: Callable[[str], Path]) -> None:
    import openvino

    from jexport.targets.openvino import properties

    graph = openvino.Core().compile_model(
        str(built("int8") / "openvino_model.xml"), "CPU", properties("int8")
    )
    kinds: dict[str, list[str]] = {}
    for node in graph.get_runtime_model().get_ordered_ops():
        facts = {key: node.get_rt_info()[key] for key in ("layerType", "runtimePrecision")}
        kind, precision = (str(getattr(one, "value", one)) for one in facts.values())
        kinds.setdefault(kind, []).append(precision)
    assert len(kinds["FullyConnected"]) == 12  # of two layers, query, key and value apart
    assert set(kinds["FullyConnected"]) <= {"u8", "i8"}
    # 1024 rows and more are stored in int8; the small checkpoint has fewer and stays float
    assert manifest.read(built("int8")).content["precision"] == "int8"


def test_int8_vectors_are_near(built: Callable[[str], Path], small: Path, texts: list[str]) -> None:
    truth = np.load(small.with_name(f"{small.name}.{TASK}.npy"))
    with jexport.open_artifact(built("int8")) as model:
        vectors = model.encode(texts)
    cosines = (vectors * truth).sum(axis=1)
    assert np.median(cosines) >= 0.9999
    assert np.abs(vectors - truth).max() > 1e-5  # it is not the float graph
    facts = manifest.read(built("int8")).content["engine"]["facts"]
    assert facts["attention_in_whole_vectors"] == 2
    assert facts["products_split"] == 2


def test_int8_alone_is_int8_in_a_batch(built: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(0)
    several = [
        " ".join(["word", "rivers", "ein", "città"][n] for n in rng.integers(0, 4, size))
        for size in (1, 2, 5, 9, 14, 15, 16, 17, 23, 40, 70, 120, 300)
    ]
    with jexport.open_artifact(built("int8")) as model:
        alone = np.stack([model.encode(text, prompt=False) for text in several])
        together = model.encode(several, prompt=False, max_batch_tokens=1 << 20)
        # planned batches keep lengths apart: here all are in one
        ids = model._tokenizer.pad(model._tokenizer.token_ids(several))
        with model._engine.in_use() as run:
            hidden = run(ids)["last_hidden_state"]
    assert (alone * together).sum(axis=1).min() >= 0.999999
    mask = ids["attention_mask"][..., None]
    pooled = (hidden * mask).sum(axis=1)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    assert (alone * pooled).sum(axis=1).min() >= 0.999999


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no two streams")
def test_int8_of_many_batches_is_int8_one_by_one(built: Callable[[str], Path]) -> None:
    """Enough batches for streams: same bits, in the order given, as one thread gives them."""
    rng = np.random.default_rng(0)
    several = [
        " ".join(["word", "rivers", "ein", "città"][n] for n in rng.integers(0, 4, size))
        for size in rng.integers(1, 40, 400)
    ]
    with (
        jexport.open_artifact(built("int8"), threads=2) as wide,
        jexport.open_artifact(built("int8"), threads=1) as narrow,
    ):
        many = wide.encode(several, max_batch_tokens=128)
        assert len(wide._engine._streams) == 2
        alone = np.stack([wide.encode(text) for text in several[:40]])
        one_by_one = narrow.encode(several, max_batch_tokens=128)
        assert not narrow._engine._streams
    np.testing.assert_array_equal(many, one_by_one)
    assert (many[:40] * alone).sum(axis=1).min() >= 0.999999


def test_what_servers_read_is_in_the_folder(built: Callable[[str], Path]) -> None:
    content = manifest.verify(built("fp32")).content
    listed = {entry["path"] for entry in content["files"]}
    assert {
        "openvino_model.xml",
        "openvino_model.bin",
        "openvino_tokenizer.xml",
        "openvino_tokenizer.bin",
        "tokenizer.json",
        "modules.json",
        "config.json",
    } <= listed
    assert content["engine"]["files"] == ["openvino_model.xml", "openvino_model.bin"]
    assert content["engine"]["facts"]["tokenizer_graph"]["written"] is True
    assert content["tools"]["openvino"]


@pytest.mark.parametrize("name", ["openvino_model.xml", "openvino_tokenizer.bin"])
def test_an_edited_folder_is_refused(
    built: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(built("fp32"), tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=name):
        jexport.open_artifact(copy)


def test_a_gpu_that_openvino_does_not_have(built: Callable[[str], Path]) -> None:
    with pytest.raises(DependencyError, match="no CUDA"):
        jexport.open_artifact(built("fp32"), device="cuda")


def test_a_precision_it_lacks(cli: Callable[..., Any], small: Path, nothing_left: Path) -> None:
    answer = cli(
        *("build", "--model", small, "--task", "none", "--target", "openvino"),
        *("--precision", "int8-weights", "--out", nothing_left),
    )
    assert answer.code == 17
    assert "fp32, fp16, bf16, int8" in answer.err


def test_minilm_is_sentence_transformers(minilm: Path, texts: list[str], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    shipped = recipe.read("all-MiniLM-L6-v2").replace_load(model=str(minilm))
    brief = dataclasses.replace(
        shipped, validate=dataclasses.replace(shipped.validate, budget_tokens=1000)
    )
    made = jexport.build(brief, task="none", target="openvino", out=tmp_path)
    several = [*texts, LONG, ""]
    reference = SentenceTransformer(str(minilm), device="cpu").encode(several)
    with jexport.open_artifact(made.path) as model:
        vectors = model.encode(several)
    assert (vectors * reference).sum(axis=1).min() >= 0.99999
    assert np.abs(vectors - reference).max() <= 1e-6
    facts = made.manifest.content["engine"]["facts"]["tokenizer_graph"]
    assert (facts["written"], facts["texts_compared"]) == (True, 302)
    assert facts["differs_on_characters"] == ["U+E000", "U+FFFD"]


@pytest.mark.rare
def test_minilm_in_int8_needs_no_wide_product(minilm: Path, tmp_path: Path) -> None:
    """By the shipped recipe: outliers are copied, and a text keeps its vector in any batch."""
    shipped = recipe.read("all-MiniLM-L6-v2").replace_load(model=str(minilm))
    brief = dataclasses.replace(
        shipped.replace_quantize(allow_slower=True),
        validate=dataclasses.replace(shipped.validate, budget_tokens=1000),
    )
    made = jexport.build(brief, task="none", target="openvino", precision="int8", out=tmp_path)
    report = json.loads((made.path / "quantization.json").read_text(encoding="utf-8"))
    assert report["chosen"]["wide"] == []
    assert report["chosen"]["cosine_mean"] >= 0.9988
    assert report["chosen"]["cosine_p1"] >= 0.995
    assert report["chosen"]["cosine_min"] >= 0.985
    assert report["chosen"]["top10_overlap"] >= 0.95
    layers = [one["activation"].split("/")[2] for one in report["copied"]]
    assert layers == ["0", "1", "2", "3"]
    assert all(max(one["channels"].values()) >= 8 for one in report["copied"])
    with jexport.open_artifact(made.path) as model:
        together = model.encode(["one text", LONG, "", "and another one"])
        alone = np.stack([model.encode(text) for text in ("one text", LONG, "", "and another one")])
    assert (together * alone).sum(axis=1).min() >= 0.999999
