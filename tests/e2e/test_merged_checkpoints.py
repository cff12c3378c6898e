"""Merged checkpoints (targets hf and vllm): each task gives the authors' vectors, in each reader.

vLLM and TEI are not installed here: a vllm artifact is opened by jexport's own reader of that
layout. sentence-transformers and transformers open hf artifacts themselves.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from jexport.artifacts import manifest, store

TARGETS = ("hf", "vllm")
TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
TOLERANCE = 1e-6
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def built(
    cli: Callable[..., Any], small: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`built("hf", "separation", "bf16")`: that build of the small checkpoint, made once.

    `built("hf")` is that of all-MiniLM-L6-v2.
    """
    out = tmp_path_factory.mktemp("merged")
    quick = out / "quick.toml"
    limits = "[validate]\nbudget_tokens = 1\nmax_tokens = 64\n"
    quick.write_text(f'name = "small"\n{limits}')
    other = out / "minilm.toml"
    other.write_text(f'name = "minilm"\n[load]\nmax_tokens = 256\n{limits}')
    made: dict[tuple[str, ...], Any] = {}

    def build(target: str, task: str = "none", precision: str = "fp32", model: Any = None) -> Any:
        key = (target, task, precision, str(model))
        if key not in made:
            recipe = other if task == "none" else quick
            folder = model or (minilm if task == "none" else small)
            made[key] = cli(
                *("build", "--recipe", recipe, "--model", folder, "--task", task),
                *("--target", target, "--precision", precision, "--out", out / "artifacts"),
                *(() if model is None else ("--name", "another")),
            )
        assert made[key].code == 0, made[key].err
        return made[key]

    return build


def authors(small: Path, task: str) -> np.ndarray:
    vectors: np.ndarray = np.load(small.with_name(f"{small.name}.{task}.npy"))
    return vectors


def encoded(path: Path, texts: list[str]) -> np.ndarray:
    with jexport.open_artifact(path) as model:
        return model.encode(texts)


def sentence_transformer(path: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", **options)


# --- the authors' vectors -----------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("target", TARGETS)
def test_artifact_gives_the_authors_vectors(
    target: str, task: str, built: Callable[..., Any], small: Path, texts: list[str]
) -> None:
    path = built(target, task).path
    assert np.abs(encoded(path, texts) - authors(small, task)).max() <= TOLERANCE
    assert path.parts[-4:-1] == ("small", task, f"{target}-fp32")
    manifest.verify(path)


@pytest.mark.parametrize("target", TARGETS)
def test_the_five_tasks_differ_from_one_another(
    target: str, built: Callable[..., Any], small: Path, texts: list[str]
) -> None:
    found = {task: encoded(built(target, task).path, texts) for task in TASKS}
    for one, other in itertools.combinations(TASKS, 2):
        assert np.abs(found[one] - found[other]).max() > 100 * TOLERANCE, (one, other)
        assert np.abs(found[one] - authors(small, other)).max() > 100 * TOLERANCE
    weights = {manifest_digest(built(target, task).path) for task in TASKS}
    assert len(weights) == len(TASKS)


def manifest_digest(path: Path) -> str:
    files = {entry["path"]: entry["sha256"] for entry in manifest.read(path).content["files"]}
    return str(files[WEIGHTS])


@pytest.mark.parametrize("target", TARGETS)
def test_bf16_is_near_and_half_the_size(
    target: str, built: Callable[..., Any], small: Path, texts: list[str]
) -> None:
    half = built(target, "retrieval.passage", "bf16").path
    full = built(target, "retrieval.passage").path
    truth = authors(small, "retrieval.passage")
    vectors = encoded(half, texts)
    assert (vectors * truth).sum(1).min() >= 0.9999  # measured: 0.99999
    assert np.abs(vectors - truth).max() > TOLERANCE  # it is not fp32 under another name
    assert (half / WEIGHTS).stat().st_size < 0.6 * (full / WEIGHTS).stat().st_size
    assert half.parent.name == f"{target}-bf16"


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_exported(target: str, built: Callable[..., Any]) -> None:
    path = built(target, "separation").path
    content = manifest.read(path).content
    assert [r["stage"] for r in store.measured(path)["stages"]] == [
        "load",
        "merge",
        "compile",
        "validate",
        "package",
    ]
    assert content["engine"]["files"] == [WEIGHTS, "config.json"]
    assert content["licence"] == "CC-BY-NC-4.0"
    assert content["checkpoint"]["layout"] == "jina_v3_original"
    assert not list(path.rglob("*.onnx"))
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "CC-BY-NC-4.0" in card
    assert "The graph" not in card


def test_building_again_is_the_same_artifact(
    built: Callable[..., Any], cli: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    path = built("hf", "separation").path
    recipe = path.parents[4] / "quick.toml"
    words = ("build", "--recipe", recipe, "--model", small, "--task", "separation")
    again = cli(*words, "--target", "hf", "--out", path.parents[3])
    assert again.path == path
    assert "already built of the same inputs" in again.err
    elsewhere = cli(*words, "--target", "hf", "--out", tmp_path)
    for name in (WEIGHTS, "config.json", "modules.json"):
        assert (elsewhere.path / name).read_bytes() == (path / name).read_bytes()


def test_late_chunking_and_dimensions(
    built: Callable[..., Any], artifact: Path, texts: list[str]
) -> None:
    chunks = ["The tower is tall. ", "It was built in 1889. "]
    with (
        jexport.open_artifact(built("hf", "retrieval.query").path) as ours,
        jexport.open_artifact(artifact) as graph,
    ):
        assert np.abs(ours.late_chunking(chunks) - graph.late_chunking(chunks)).max() <= 1e-6
        cut = ours.encode(texts, dimensions=16)
        assert np.abs(cut - graph.encode(texts, dimensions=16)).max() <= 1e-6


def test_outputs_of_a_graph_mean_nothing_here(
    cli: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    """A recipe that cuts its graph's vectors must not make a checkpoint say they are cut."""
    recipe = tmp_path / "cut.toml"
    recipe.write_text(
        'name = "cut"\n[export]\noutputs = ["sentence_embedding"]\ndimension = 32\n'
        "[validate]\nbudget_tokens = 1\nmax_tokens = 64\n"
    )
    words = ("build", "--recipe", recipe, "--model", small, "--task", "separation")
    path = cli(*words, "--target", "hf", "--out", tmp_path / "out").path
    assert manifest.read(path).content["embedding"]["dimension"] == 64
    with jexport.open_artifact(path) as model:
        assert model.encode("a text").shape == (64,)


# --- other readers ------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["retrieval.query", "retrieval.passage", "classification"])
def test_sentence_transformers_opens_it(
    task: str, built: Callable[..., Any], small: Path, texts: list[str]
) -> None:
    model = sentence_transformer(built("hf", task).path)
    truth = authors(small, task)
    assert model.max_seq_length == 8192
    assert np.abs(model.encode(texts) - truth).max() <= TOLERANCE  # the prompt is the default
    if task == "retrieval.query":
        assert np.abs(model.encode_query(texts) - truth).max() <= TOLERANCE
    if task == "retrieval.passage":
        assert np.abs(model.encode_document(texts) - truth).max() <= TOLERANCE
    if task.startswith("retrieval"):
        assert np.abs(model.encode(texts, prompt="") - truth).max() > 1e-2


def test_sentence_transformers_opens_bf16(
    built: Callable[..., Any], small: Path, texts: list[str]
) -> None:
    path = built("hf", "retrieval.query", "bf16").path
    truth = authors(small, "retrieval.query")
    plain = sentence_transformer(path).encode(texts)
    wide = sentence_transformer(path, model_kwargs={"dtype": "float32"}).encode(texts)
    assert (plain * truth).sum(1).min() >= 0.997  # measured 0.9983: it pools in bfloat16 as well
    assert (wide * truth).sum(1).min() >= 0.9999


def test_transformers_opens_it_with_nothing_made_up(built: Callable[..., Any]) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = built("hf", "text-matching").path
    model, report = AutoModel.from_pretrained(path, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.jina_embeddings_v3")
    assert not any(report.values()), report
    tokens = AutoTokenizer.from_pretrained(path)(["a text"], return_tensors="pt")
    assert model(**tokens).last_hidden_state.shape[-1] == 64


def test_jexport_builds_from_it_again(
    built: Callable[..., Any],
    cli: Callable[..., Any],
    small: Path,
    tmp_path: Path,
    texts: list[str],
) -> None:
    """A merged checkpoint is a checkpoint: its only task is `none`, and it has no prompt."""
    path = built("hf", "separation").path
    words = ("build", "--recipe", path.parents[4] / "quick.toml", "--model", path)
    answer = cli(*words, "--task", "none", "--target", "vllm", "--out", tmp_path)
    assert answer.code == 0, answer.err
    assert np.abs(encoded(answer.path, texts) - authors(small, "separation")).max() <= TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_minilm(target: str, built: Callable[..., Any], minilm: Path, texts: list[str]) -> None:
    path = built(target).path
    reference = sentence_transformer(minilm).encode([*texts, ""])
    assert np.abs(encoded(path, [*texts, ""]) - reference).max() <= TOLERANCE
    # MiniLM stays BERT in both, so sentence-transformers opens both.
    assert np.abs(sentence_transformer(path).encode([*texts, ""]) - reference).max() <= TOLERANCE


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "precision", "hint"),
    [
        ("hf", "int8", "fp32, bf16"),
        ("vllm", "int8-weights", "fp32, bf16"),
        ("hf", "fp16", "fp32, bf16"),
        ("onnx", "bf16", "fp32, fp16"),
    ],
)
def test_a_precision_that_a_target_lacks(
    target: str,
    precision: str,
    hint: str,
    cli: Callable[..., Any],
    small: Path,
    nothing_left: Path,
) -> None:
    words = ("build", "--model", small, "--task", "separation", "--target", target)
    answer = cli(*words, "--precision", precision, "--out", nothing_left)
    assert answer.code == 17
    assert hint in answer.err


def test_a_task_of_another_adapter(
    built: Callable[..., Any], cli: Callable[..., Any], nothing_left: Path
) -> None:
    path = built("hf", "retrieval.query").path
    words = ("build", "--model", path, "--task", "separation", "--target", "hf")
    answer = cli(*words, "--out", nothing_left)
    assert answer.code == 3
    assert "separation" in answer.err


def test_a_relabelled_checkpoint_is_no_checkpoint_for_transformers(
    built: Callable[..., Any], cli: Callable[..., Any], nothing_left: Path
) -> None:
    path = built("vllm", "retrieval.query").path
    words = ("build", "--model", path, "--task", "none", "--target", "onnx")
    answer = cli(*words, "--out", nothing_left)
    assert answer.code == 22
    assert "another network" in answer.err


@pytest.mark.parametrize("target", TARGETS)
def test_an_edited_folder(
    target: str, built: Callable[..., Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built(target, "separation").path, tmp_path / "edited"))
    path = folder / "config.json"
    path.write_text(path.read_text().replace("20000.0", "10000.0"))
    assert cli("verify", folder).code == 13
    lines = tmp_path / "texts.txt"
    lines.write_text("a text\n")
    answer = cli("embed", folder, "--input", lines, "--output", tmp_path / "v.npy")
    assert answer.code == 13
    assert "config.json" in answer.err
    assert not (tmp_path / "v.npy").exists()


@pytest.fixture(scope="module")
def albert(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ALBERT as sentence-transformers saves it."""
    from transformers import AlbertConfig, AlbertModel

    folder = tmp_path_factory.mktemp("albert") / "checkpoint"
    config = AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=30522,
    )
    AlbertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "modules.json"):
        shutil.copy(minilm / name, folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_an_architecture_that_only_transformers_has(
    albert: Path,
    built: Callable[..., Any],
    cli: Callable[..., Any],
    texts: list[str],
    nothing_left: Path,
) -> None:
    words = ("build", "--model", albert, "--task", "none", "--out", nothing_left)
    answer = cli(*words, "--target", "vllm")
    assert answer.code == 22
    assert "'albert'" in answer.err
    assert "--target hf" in answer.err
    path = built("hf", "none", model=albert).path
    reference = sentence_transformer(albert).encode(texts)
    assert np.abs(encoded(path, texts) - reference).max() <= TOLERANCE
