"""Architectures of transformers, tiny and seeded, text to vector beside SentenceTransformer.

`make sweep` looks at all of them; here are those that published embedders have, with the settings
that they have, at lengths beyond their windows.
"""

from __future__ import annotations

import json
import runpy
import shutil
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


GEMMA2 = {
    "embedding_dim": 48,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 3,
}
"""As EmbeddingGemma 2 has it: a projection behind the last layer to more than its layers' width,
wider heads where a layer sees the whole text, and a window to both sides where it does not."""

GEMMA2_PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "STS": "task: sentence similarity | query: ",
}


def embeddinggemma_2(folder: Path) -> tuple[Path, Path]:
    """The whole model without its towers, and the text model as an error tells one to save it."""
    from transformers import AutoModel, EmbeddingGemma2Config, EmbeddingGemma2Model

    text = folder / "text"
    tiny["make"]("embedding_gemma2_text", text, **GEMMA2)
    edit(text / "config.json", matryoshka_dimensions=[16, 32])
    classes = (
        "base.modules.transformer.Transformer",
        "sentence_transformer.modules.pooling.Pooling",
        "base.modules.normalize.Normalize",
    )
    homes = ("", "1_Pooling", "2_Normalize")
    listed = [
        {"idx": n, "name": str(n), "path": home, "type": f"sentence_transformers.{name}"}
        for n, (home, name) in enumerate(zip(homes, classes, strict=True))
    ]
    (text / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    pooling = {"embedding_dimension": 48, "pooling_mode": "mean", "include_prompt": True}
    (text / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    settings = {"prompts": GEMMA2_PROMPTS, "default_prompt_name": None}
    (text / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    modality = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    (text / "sentence_bert_config.json").write_text(
        json.dumps(
            {
                "transformer_task": "feature-extraction",
                "modality_config": modality,
                "module_output_name": "token_embeddings",
            }
        ),
        encoding="utf-8",
    )
    inner = AutoModel.from_pretrained(text, dtype=torch.float32)
    whole = EmbeddingGemma2Model(EmbeddingGemma2Config(text_config=inner.config.to_dict())).eval()
    whole.language_model.load_state_dict(inner.state_dict())
    shutil.copytree(text, folder / "whole")
    (folder / "whole" / "model.safetensors").unlink()
    whole.save_pretrained(folder / "whole")
    return folder / "whole", text


@pytest.mark.parametrize("target", ["hf", pytest.param("onnx", marks=pytest.mark.rare)])
def test_the_text_model_of_embeddinggemma_2(target: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import EmbeddingGemma2Model

    whole, text = embeddinggemma_2(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match="several modalities") as caught:
        built(whole, tmp_path / "refused", target)
    assert "model.language_model.save_pretrained" in caught.value.fix
    artifact = built(text, tmp_path / "out", target)
    compared(text, artifact)
    library = SentenceTransformer(str(text), device="cpu", local_files_only=True)
    composite = EmbeddingGemma2Model.from_pretrained(whole, dtype=torch.float32)
    texts = list(one["TEXTS"])
    with open_artifact(artifact) as model:
        for use in ("encode_query", "encode_document"):
            wanted = getattr(library, use)(texts)
            assert one["distance"](getattr(model, use)(texts), wanted)[1] <= one["SAME"]
        cut = library.encode(texts, truncate_dim=16, normalize_embeddings=True)
        assert one["distance"](model.encode(texts, dimensions=16), cut)[1] <= one["SAME"]
        ids = library.tokenizer(texts[-1], return_tensors="pt", truncation=True)
        with torch.inference_mode():
            states = composite(**ids).last_hidden_state[0].mean(dim=0)
        states = states / states.norm()
        assert float(states @ torch.from_numpy(model.encode(texts[-1]))) > 0.99999


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
