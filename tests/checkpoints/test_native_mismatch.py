"""jina-embeddings-v2 and its like: called `bert`, and no BERT. Refused, or run by its own code."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from jexport import checkpoints
from jexport.errors import JexportError, UnsupportedCheckpointError
from jexport.evaluation import reference_library
from jexport.recipe import LoadSpec
from jexport.stages import load

TESTS = Path(__file__).parents[1]
FIXTURES = TESTS / "fixtures"
SMALL = FIXTURES / "jina_original_small"
TEXTS = ["the harbour at night", "SHIPS and Boats, 1923!", "", "the harbour " * 60]
HUB = "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"

as_built = runpy.run_path(str(Path(__file__).with_name("test_jina_v5.py")))["embedder"]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A seeded BERT: weights under BERT's own names, so that only config.json can tell."""
    folder = tmp_path / "plain"
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(
        vocab_size=331, num_hidden_layers=2, max_position_embeddings=130, pad_token_id=1, **sizes
    )
    transformers.BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, folder)
    return folder


@pytest.fixture
def alibi(tmp_path: Path) -> Path:
    """A seeded checkpoint with ALiBi and GEGLU, with its code beside the weights."""
    folder = Path(shutil.copytree(FIXTURES / "remote_alibi", tmp_path / "jexport_alibi"))
    code = runpy.run_path(str(folder / "configuration_alibi.py"))["AlibiBertConfig"]
    config = code(architectures=["AlibiBertModel"]).to_dict() | {
        "auto_map": {
            "AutoConfig": "configuration_alibi.AlibiBertConfig",
            "AutoModel": "modeling_alibi.AlibiBertModel",
        }
    }
    (folder / "config.json").write_text(json.dumps(config))
    width, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"words.weight": (rows, width), "norm.bias": (width,)}
    for n in range(config["num_hidden_layers"]):
        block = f"blocks.{n}"
        shapes |= {f"{block}.qkv.weight": (3 * width, width), f"{block}.qkv.bias": (3 * width,)}
        shapes |= {f"{block}.out.weight": (width, width), f"{block}.out.bias": (width,)}
        shapes |= {f"{block}.gated.weight": (2 * inner, width)}
        shapes |= {f"{block}.down.weight": (width, inner), f"{block}.down.bias": (width,)}
        shapes |= {f"{block}.{norm}_norm.bias": (width,) for norm in ("attention", "output")}
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: torch.randn(shape, generator=generator) * (1.5 * shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }
    weights |= {
        name.replace(".bias", ".weight"): torch.ones(width) for name in shapes if "norm" in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, folder)
    library = "sentence_transformers.models"
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"{library}.{kind}"}
        for n, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    limit = {"max_seq_length": 512, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(limit))
    return folder


def opened(folder: Path, **spec: Any) -> Any:
    return load.run(LoadSpec(model=str(folder), **spec), task="none")


@pytest.mark.parametrize(
    "keys",
    [
        {"position_embedding_type": "alibi"},
        {"feed_forward_type": "geglu"},
        {"feed_forward_type": "reglu", "position_embedding_type": "absolute"},
        {"auto_map": {"AutoModel": HUB}},
        {"auto_map": {"AutoModel": HUB.replace("implementation", "v2-qk-post-norm")}},
    ],
)
def test_is_refused_by_name(
    keys: dict[str, Any], plain: Path, edit_json: Callable[..., None]
) -> None:
    assert opened(plain).source.layout == "sentence_transformer"
    edit_json(plain / "config.json", **keys)
    with pytest.raises(UnsupportedCheckpointError, match="'bert', and its network") as caught:
        opened(plain)
    assert str(next(iter(keys))) in caught.value.evidence
    assert "--trust-remote-code" in caught.value.fix
    assert checkpoints.known_tasks(plain) == ("none",)


@pytest.mark.parametrize("value", [None, "absolute"])
def test_plain_positions_are_no_reason(
    value: str | None, plain: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(plain / "config.json", position_embedding_type=value, feed_forward_type="original")
    assert opened(plain).weights


def test_trust_without_code_is_refused_too(plain: Path, edit_json: Callable[..., None]) -> None:
    edit_json(plain / "config.json", position_embedding_type="alibi")
    with pytest.raises(JexportError, match="its network is another"):
        opened(plain, trust_remote_code=True)


@pytest.mark.usefixtures("own_module_cache")
def test_its_own_code_gives_its_vectors(alibi: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="its network is another"):
        opened(alibi)
    model = opened(alibi, trust_remote_code=True)
    assert model.source.layout == "remote_code"
    assert {one.path for one in model.source.code} == {
        "configuration_alibi.py",
        "modeling_alibi.py",
    }
    spec = LoadSpec(model=str(alibi), trust_remote_code=True)
    with reference_library.opened(model, spec) as library:
        ids = library.tokenize(TEXTS)
        wanted = np.stack([one.vector for one in library.encode(TEXTS, ids)])
    found = as_built(model).encode(TEXTS)
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    assert unit[0] @ unit[3] < 0.9999
