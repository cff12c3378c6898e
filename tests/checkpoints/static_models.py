"""Static embeddings and Routers as sentence-transformers itself saves them, tiny and seeded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import Tokenizer

SMALL = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
WIDTH = 32
PROMPTS = {"query": "search: ", "document": "text: ", "other": "a: "}


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SMALL / "tokenizer.json"))


def static(width: int = WIDTH) -> StaticEmbedding:
    torch.manual_seed(5)
    own = tokenizer()
    return StaticEmbedding(own, embedding_weights=torch.randn(own.get_vocab_size(), width))


def encoder(folder: Path) -> Transformer:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=331,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=130,
        pad_token_id=1,
    )
    transformers.BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, folder)
    return Transformer(str(folder), max_seq_length=60)


def save(folder: Path, *modules: Any, **settings: Any) -> Path:
    SentenceTransformer(modules=list(modules), device="cpu", **settings).save(
        str(folder), create_model_card=False
    )
    return folder


def save_static(folder: Path, *, prompts: dict[str, str] | None = None) -> Path:
    return save(folder, static(), Normalize(), prompts=prompts)


def save_router(folder: Path, **settings: Any) -> Path:
    document = encoder(folder.with_name("encoder"))
    router = Router.for_query_document([static()], [document, Pooling(WIDTH, "mean")], **settings)
    return save(folder, router, Normalize(), prompts={"query": "search: "})


def save_potion(folder: Path, *, dtype: torch.dtype = torch.float16, mapped: bool = True) -> Path:
    """As model2vec writes it: module path '.', its own config.json, half precision."""
    folder.mkdir()
    torch.manual_seed(6)
    own = tokenizer()
    rows = own.get_vocab_size()
    tensors = {"embeddings": torch.randn(100 if mapped else rows, 24).to(dtype)}
    if mapped:
        tensors |= {"mapping": torch.randint(0, 100, (rows,)), "weights": torch.rand(rows).double()}
    save_file(tensors, folder / "model.safetensors")
    own.save(str(folder / "tokenizer.json"))
    modules = [
        {
            "idx": 0,
            "name": "0",
            "path": ".",
            "type": "sentence_transformers.models.StaticEmbedding",
        },
        {"idx": 1, "name": "1", "path": "1_N", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
