"""The models that check_layouts.py runs in vLLM: a row for each architecture it is written for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LIKE = (
    "LaBSE",
    "bge-m3",
    "mdbr-leaf-ir",
    "Qwen3-Embedding-0.6B",
    "embeddinggemma-300m",
    "gte-modernbert-base",
    "granite-embedding-english-r2",
    "gte-multilingual-base",
    "snowflake-arctic-embed-m-v2.0",
    "nomic-embed-text-v1.5",
)
"""Recipes on a checkpoint with their model's own files and keys (`toy --like`)."""

JINA_V5 = (
    ("jina-embeddings-v5-text-small", "jina-v5-small", "retrieval"),
    ("jina-embeddings-v5-text-small", "jina-v5-small", "clustering"),
    ("jina-embeddings-v5-text-nano", "jina-v5-nano", "text-matching"),
)
"""Recipe, layout of the toy, task."""

LAST = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
CLS = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
ENCODER = {"hidden_size": 64, "num_attention_heads": 2}
DECODER = {**ENCODER, "num_key_value_heads": 1}
HEAD = {"head_dim": 32}
"""vLLM's attention on a CPU has no smaller heads."""

TINY: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "qwen2": ("qwen2", LAST, DECODER),
    "llama": ("llama", LAST, DECODER | HEAD),
    "mistral": ("mistral", LAST, DECODER | HEAD | {"sliding_window": None}),
    "qwen3-mean": ("qwen3", {}, DECODER | HEAD),
    "qwen3-both-ways": ("qwen3", {}, DECODER | HEAD | {"is_causal": False}),
    "gemma3-both-ways": (
        "gemma3_text",
        {},
        DECODER | HEAD | {"use_bidirectional_attention": True, "sliding_window": 16},
    ),
    "gemma3-causal": ("gemma3_text", LAST, DECODER | HEAD | {"sliding_window": 16}),
    "modernbert": ("modernbert", {}, ENCODER | {"local_attention": 16}),
    "nomic_bert": ("nomic_bert", CLS, ENCODER | HEAD),
    "gte": ("gte", {}, ENCODER | HEAD),
    "eurobert": ("eurobert", {}, DECODER | HEAD),
    "roberta": ("roberta", {}, ENCODER),
    "xlm-roberta": ("xlm-roberta", {}, ENCODER),
    "bert-cls": ("bert", CLS, ENCODER),
}
"""model_type, poolings and config of tests/sweep/tiny.py: as transformers itself saves them."""
