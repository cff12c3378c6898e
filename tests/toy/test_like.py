"""like: the files of known embedders, opened by the library that their users open them with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from jexport import recipe
from jexport.errors import OutputPathError, UnsupportedCheckpointError
from jexport.toy import like

TEXTS = (
    "Who repairs the clock in the tower?",
    "The ferry leaves at noon.",
    "Der Gärtner gießt die Rosen am Abend.",
    "Το καράβι φτάνει στο νησί.",
    "図書館は朝八時に開きます。",
    "The ferry leaves at nine, and then comes back with all the people who were waiting for it.",
)
FAMILIES = (
    "all-MiniLM-L6-v2",
    "multi-qa-mpnet-base-dot-v1",
    "distiluse-base-multilingual-cased-v2",
    "sentence-t5-base",
    "bge-m3",
    "snowflake-arctic-embed-m-v2.0",
    "nomic-embed-text-v1.5",
    "gte-modernbert-base",
    "Qwen3-Embedding-4B",
    "embeddinggemma-300m",
    "potion-base-8M",
    "static-retrieval-mrl-en-v1",
)
"""One model for each class and kind of file."""

JINA = re.compile(r"jina-embeddings-v\d.*")
"""Models with layouts of their own in jexport/toy."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_recipe_has_one() -> None:
    missing = {name for name in recipe.names() if not JINA.fullmatch(name)} - set(like.names())
    assert not missing, "describe them in jexport/toy/models/"
    for name in set(like.names()) - set(like.LAYOUTS):
        assert recipe.read(name).load.model == like.read(name).table["hub"], name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_library_opens_it_and_texts_differ(name: str, tmp_path: Path) -> None:
    folder = like.write(tmp_path / "m", name)
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors = np.asarray(model.encode(list(TEXTS)), dtype=np.float64)
    assert np.isfinite(vectors).all()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors @ vectors.T)[~np.eye(len(TEXTS), dtype=bool)]
    assert cosines.max() < 0.985, "texts are nearly the same vector"
    assert model.max_seq_length >= (recipe.read(name).load.max_tokens or np.inf)
    kinds = [type(module).__name__ for module in model]
    assert kinds == list(like.read(name).modules)


@pytest.mark.parametrize("name", sorted(set(like.names()) - set(like.LAYOUTS)))
def test_weights_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    """Nothing that transformers would have to make up, and nothing that it would leave over."""
    described = like.read(name)
    if "StaticEmbedding" in described.modules:
        pytest.skip("has no network")
    folder = like.write(tmp_path / "m", name)
    import transformers

    architecture = getattr(transformers, described.table.get("class", "AutoModel"))
    if architecture is not AutoModel:
        architecture._keys_to_ignore_on_load_unexpected = [r"^decoder"]
    model, report = architecture.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not {key for key in report["unexpected_keys"] if not key.endswith("position_ids")}
    stated = described.config.get("torch_dtype", described.config.get("dtype", "float32"))
    if "torch_dtype" in described.config:
        assert str(model.dtype) == f"torch.{stated}"


def test_bge_m3_has_the_pickled_file_alone_and_its_other_heads(tmp_path: Path) -> None:
    folder = like.write(tmp_path / "m", "bge-m3")
    files = {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.safetensors"))
    assert {"pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt"} <= files
    names = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert "embeddings.word_embeddings.weight" in names
    sparse = torch.load(folder / "sparse_linear.pt", weights_only=True)
    assert sparse["weight"].shape == (1, 128)


def test_old_names_of_weights(tmp_path: Path) -> None:
    """NomicBert and GTE are on the hub under the names of their authors' code."""
    nomic = load_file(like.write(tmp_path / "n", "nomic-embed-text-v1.5") / "model.safetensors")
    assert {"emb_ln.weight", "encoder.layers.0.attn.Wqkv.weight"} <= nomic.keys()
    gte = load_file(like.write(tmp_path / "g", "gte-multilingual-base") / "model.safetensors")
    assert "encoder.layer.0.attention.qkv_proj.weight" in gte


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("e5-base-v2", "[CLS]", "[SEP]"),
        ("all-mpnet-base-v2", "<s>", "</s>"),
        ("multilingual-e5-base", "<s>", "</s>"),
        ("gtr-t5-base", "", "</s>"),
        ("gte-modernbert-base", "[CLS]", "[SEP]"),
        ("Qwen3-Embedding-0.6B", "", "<|endoftext|>"),
        ("embeddinggemma-300m", "<bos>", "<eos>"),
    ],
)
def test_special_tokens_around_a_text(name: str, first: str, last: str, tmp_path: Path) -> None:
    folder = like.write(tmp_path / "m", name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(TEXTS[1])["input_ids"])
    special = set(tokenizer.all_special_tokens)
    assert tokens[-1] == last
    assert tokens[0] == first if first else tokens[0] not in special
    assert not {*tokens[1:-1]} & special
    assert tokenizer.padding_side == ("left" if name.startswith("Qwen") else "right")


def test_the_same_seed_is_the_same_bytes(tmp_path: Path) -> None:
    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    for name in ("LaBSE", "embeddinggemma-300m", "potion-base-8M"):
        one, same = (read(like.write(tmp_path / f"{name}{n}", name)) for n in (1, 2))
        assert one == same
        other = read(like.write(tmp_path / f"{name}3", name, seed=1))
        assert one != other
        assert one["tokenizer.json"] == other["tokenizer.json"]


def test_names_that_there_are_none_of(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="bge-m4") as caught:
        like.write(tmp_path / "m", "bge-m4")
    assert caught.value.fix == "did you mean 'bge-m3'?"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(OutputPathError):
        like.write(tmp_path / "full", "bge-m3")


def test_by_the_command_line(cli: Any, tmp_path: Path) -> None:
    answer = cli("toy", "--like", "bge-small-en-v1.5", tmp_path / "m")
    assert (answer.code, answer.path) == (0, tmp_path / "m")
    assert content(tmp_path / "m" / "config.json")["model_type"] == "bert"
    assert cli("toy", "--like", "bge-m3", "--full-size", tmp_path / "n").code == 2
    jina = cli("toy", "--like", "jina-embeddings-v3", tmp_path / "j")
    assert jina.code == 0
    assert content(tmp_path / "j" / "config.json")["lora_adaptations"]


def test_no_stand_in_is_taken_for_another_network() -> None:
    from jexport.checkpoints import native_mismatch

    for name in set(like.names()) - set(like.LAYOUTS):
        native_mismatch.check(like.read(name).config)
    rotary = {"model_type": "bert", "position_embedding_type": "rope"}
    with pytest.raises(UnsupportedCheckpointError, match="its network is another"):
        native_mismatch.check(rotary)
