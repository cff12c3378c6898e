"""Small seeded models of many architectures, and the inputs that graphs are compared on.

Tests are no package: a conftest opens this file with `runpy.run_path`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

from jexport.types import Embedding, LoadedModel, Source

PAD = 1
ROWS = 331
HIDDEN = 48
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 66,
    "pad_token_id": PAD,
}


def config(kind: str, **changes: Any) -> Any:
    """The configuration of a small model of this architecture."""
    sizes = SIZES | changes
    if kind == "bert":
        return transformers.BertConfig(**sizes)
    if kind == "xlm_roberta":
        return transformers.XLMRobertaConfig(**sizes, type_vocab_size=1)
    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=ROWS,
            dim=HIDDEN,
            n_layers=2,
            n_heads=4,
            hidden_dim=96,
            max_position_embeddings=66,
            pad_token_id=PAD,
        )
    if kind == "electra":
        return transformers.ElectraConfig(**sizes, embedding_size=32)
    if kind == "albert":
        return transformers.AlbertConfig(**sizes, embedding_size=32)
    if kind == "mpnet":
        return transformers.MPNetConfig(**sizes)
    if kind == "deberta":
        return transformers.DebertaV2Config(**sizes, relative_attention=True, position_buckets=16)
    if kind == "modernbert":
        # every second layer sees 4 tokens on either side
        return transformers.ModernBertConfig(
            **sizes,
            global_attn_every_n_layers=2,
            local_attention=8,
            bos_token_id=0,
            eos_token_id=2,
            cls_token_id=0,
            sep_token_id=2,
        )
    if kind == "nomic_bert":
        return transformers.NomicBertConfig(**sizes)
    assert kind == "jina", kind
    return transformers.JinaEmbeddingsV3Config(
        **sizes, type_vocab_size=1, rope_parameters={"rope_theta": 20_000.0, "rope_type": "default"}
    )


def build(kind: str, **changes: Any) -> Any:
    """A model with weights of order 1, so that a wrong rotation, mask or position is seen."""
    generator = torch.Generator().manual_seed(7)
    model = transformers.AutoModel.from_config(config(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                scale = 0.6 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(noise * scale)
            else:
                parameter.copy_(noise * 0.1 + (0.0 if name.endswith("bias") else 1.0))
    return model.eval().requires_grad_(False)


def as_loaded(
    make: Callable[[], Any],
    *,
    pooling: str = "mean",
    matryoshka: tuple[int, ...] = (),
    max_tokens: int = 64,
) -> LoadedModel:
    """A LoadedModel whose module `make` gives, as far as export looks at one."""
    unused: Any = None
    return LoadedModel(
        folder=Path(),
        config={},
        weights={},
        adapter={},
        assemble=lambda weights: make(),
        tokenize_reference=unused,
        reference=unused,
        tokenizer_files=(),
        embedding=Embedding(
            task="none",
            prompt="",
            pooling=pooling,
            normalize=True,
            dimension=HIDDEN,
            matryoshka=matryoshka,
            max_tokens=max_tokens,
        ),
        source=Source(
            name="seeded",
            layout="sentence_transformer",
            revision="",
            code_revision="",
            licence="",
            files=(),
            code=(),
        ),
    )


def feed(lengths: list[int], width: int, *, left: bool = False) -> dict[str, np.ndarray]:
    """Seeded ids [len(lengths), width] with so many real tokens in each row."""
    ids = np.random.default_rng(width).integers(5, ROWS, (len(lengths), width)).astype(np.int64)
    mask = np.arange(width) < np.array(lengths)[:, None]
    mask = mask[:, ::-1] if left else mask
    return {"input_ids": np.where(mask, ids, PAD), "attention_mask": mask.astype(np.int64)}


def feeds() -> dict[str, dict[str, np.ndarray]]:
    """Every padding pattern, and shapes on either side of the one that was traced (2 x 16)."""
    return {
        "one token": feed([1], 1),
        "one row": feed([3], 3),
        "longer than traced": feed([37], 37),
        "nothing padded": feed([9, 9], 9),
        "right padded": feed([17, 14, 1, 9, 16], 17),
        "left padded": feed([17, 14, 1, 9, 16], 17, left=True),
        "an empty row": feed([7, 0, 5], 7),
        "all rows empty": feed([0, 0], 4),
    }


def session(path: Path) -> Any:
    """Open a graph in onnxruntime, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One forward pass: output by name."""
    opened = session(path)
    names = [value.name for value in opened.get_outputs()]
    return dict(zip(names, opened.run(None, given), strict=True))


def torch_hidden(model: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    """What the model itself gives: float32 [batch, sequence, hidden]."""
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(value) for name, value in given.items()})
    found: np.ndarray = out.last_hidden_state.numpy()
    return found
