"""Architectures of transformers, tiny and seeded, text to vector beside SentenceTransformer.

`make sweep` looks at all of them; here are those that published embedders have, with the settings
that they have, at lengths beyond their windows.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jexport import open_artifact, recipe
from jexport.building import pipeline
from jexport.errors import UnsupportedCheckpointError, UnsupportedGraphError

SWEEP = Path(__file__).parents[1] / "sweep"
tiny: Any = runpy.run_path(str(SWEEP / "tiny.py"))
one: Any = runpy.run_path(str(SWEEP / "one.py"))
LAST = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
AUTO_MAP = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def make(kind: str, folder: Path, *, pooling: Any = None, **config: Any) -> Path:
    """A tiny checkpoint that also names code of its own, as many published ones do."""
    tiny["make"](kind, folder, **config)
    edit(folder / "config.json", auto_map=AUTO_MAP)
    edit(folder / "1_Pooling" / "config.json", **(pooling or {}))
    return folder


def built(checkpoint: Path, out: Path, target: str = "onnx", **load: Any) -> Path:
    table = {
        "name": "x",
        "load": {"model": str(checkpoint), **load},
        "validate": {"budget_tokens": 400, "max_tokens": 128},
    }
    chosen = recipe.from_table(table, origin="a test")
    return pipeline.build(chosen, task="none", target=target, out=out).path


def compared(checkpoint: Path, artifact: Path) -> None:
    """Vectors of texts of 3 to 128 tokens are the library's, in batches of one and of all."""
    wanted = one["judged"](checkpoint)
    with open_artifact(artifact) as model:
        texts = list(one["TEXTS"])
        for given in (model.encode(texts), np.stack([model.encode(text) for text in texts])):
            cosine, share = one["distance"](given, wanted)
            assert cosine > 0.99999
            assert share <= one["SAME"]


WINDOW = {"sliding_window": 16}
DECODER = {"pooling": LAST}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text-both-ways": ("gemma3_text", {"use_bidirectional_attention": True, **WINDOW}),
    "nomic_bert": ("nomic_bert", {}),
    "gte": ("gte", {}),
    "eurobert": ("eurobert", {}),
    "modernbert": ("modernbert", {"local_attention": 16}),
    "gemma3_text": ("gemma3_text", {**DECODER, **WINDOW}),
    "qwen3": ("qwen3", DECODER),
    "qwen3-window": ("qwen3", {**DECODER, **WINDOW, "use_sliding_window": True}),
    "qwen2": ("qwen2", DECODER),
    "llama": ("llama", DECODER),
    "mistral-window": ("mistral", {**DECODER, **WINDOW}),
    "mpnet": ("mpnet", {}),
    "deberta": ("deberta", {}),
    "deberta-v2": ("deberta-v2", {"relative_attention": True, "position_buckets": 8}),
    "distilbert": ("distilbert", {}),
    "albert": ("albert", {}),
    "electra": ("electra", {}),
    "camembert": ("camembert", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "roberta": ("roberta", {}),
    "bloom-alibi": ("bloom", DECODER),
    "mpt-alibi": ("mpt", DECODER),
}
USUAL = ("gemma3_text-both-ways",)
"""What `make test` builds; the rest is built once a week."""

PARAMETERS = [
    pytest.param(*case, id=name, marks=() if name in USUAL else pytest.mark.rare)
    for name, case in CASES.items()
]


@pytest.mark.parametrize(("kind", "config"), PARAMETERS)
def test_vectors_are_sentence_transformers(kind: str, config: Any, tmp_path: Path) -> None:
    checkpoint = make(kind, tmp_path / "model", **config)
    compared(checkpoint, built(checkpoint, tmp_path / "out"))


@pytest.mark.rare
@pytest.mark.parametrize("target", ["openvino", "hf"])
@pytest.mark.parametrize("name", ["gemma3_text-both-ways", "nomic_bert", "qwen3", "deberta-v2"])
def test_vectors_of_other_targets(name: str, target: str, tmp_path: Path) -> None:
    kind, config = CASES[name]
    checkpoint = make(kind, tmp_path / "model", **config)
    compared(checkpoint, built(checkpoint, tmp_path / "out", target))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.rare) for kind in ("mixtral", "qwen3_moe", "gpt_oss")],
)
def test_experts_are_all_there_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    """No graph of those experts alone that the traced text happened to use."""
    checkpoint = make(kind, tmp_path / "model", pooling=LAST)
    with pytest.raises(UnsupportedGraphError, match="cannot be exported") as caught:
        built(checkpoint, tmp_path / "out")
    assert "a mixture of experts" in caught.value.evidence
    assert "--target hf" in caught.value.fix
    compared(checkpoint, built(checkpoint, tmp_path / "out", "hf"))


def test_a_type_that_transformers_lacks_is_refused_by_name(tmp_path: Path) -> None:
    """gte-multilingual-base is `new`, with code of its own."""
    checkpoint = make("gte", tmp_path / "model")
    edit(checkpoint / "config.json", model_type="new")
    with pytest.raises(Exception, match="unknown layout and brings code") as caught:
        built(checkpoint, tmp_path / "out")
    assert "--trust-remote-code" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_experts": 8, "moe_every_n_layers": 2, "moe_top_k": 2}, "no experts"),
        ({"n_head": 8}, "n_head = 8"),
        ({"rotary_emb_base": 10000}, "rotary_emb_base = 10000"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu'"),
        ({"prenorm": True}, "prenorm"),
    ],
)
def test_a_nomic_bert_that_is_another_network_is_refused(
    config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    checkpoint = make("nomic_bert", tmp_path / "model")
    same = {"n_embd": 32, "n_head": 4, "activation_function": "swiglu", "num_experts": 0}
    edit(checkpoint / "config.json", **(same | config))
    with pytest.raises(UnsupportedCheckpointError, match="another network") as caught:
        built(checkpoint, tmp_path / "out")
    assert named in caught.value.evidence
    assert "--trust-remote-code" in caught.value.fix


def sizes(checkpoint: Path) -> tuple[int, ...]:
    from jexport.recipe import LoadSpec
    from jexport.stages import load

    return load.run(LoadSpec(model=str(checkpoint)), task="none").embedding.matryoshka


def test_a_smaller_vector_that_is_no_cut_is_not_offered(tmp_path: Path) -> None:
    named = {"matryoshka_dimensions": [8, 16]}
    checkpoint = make("bert", tmp_path / "model", **named)
    assert sizes(checkpoint) == (8, 16)
    # nomic-embed-text-v1.5 normalises each vector's numbers (LayerNorm) before it cuts them.
    assert sizes(make("nomic_bert", tmp_path / "nomic", **named)) == ()
