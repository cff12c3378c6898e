"""Each setting that takes effect, against SentenceTransformer(folder) itself: tiny checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, Pooling

from jexport.errors import (
    AdapterError,
    CheckpointError,
    DependencyError,
    JexportError,
    TokenizerError,
    UnsupportedCheckpointError,
)
from jexport.runtime import Embedder, TextTokenizer
from jexport.stages import merge
from jexport.types import LoadedModel

Open = Callable[..., LoadedModel]
Edit = Callable[..., None]
SETTINGS = "config_sentence_transformers.json"
SMALL = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
LONG = "the harbour at night and " * 90
TEXTS = ["the harbour at night", "SHIPS and Boats, 1923!", "", " ", "x <mask> y </s>", LONG]


SIZES = {
    "vocab_size": 331,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
}


def write_encoder(folder: Path, name: str, **config: Any) -> None:
    """A seeded model of one architecture, its weights far from their start, and a tokenizer."""
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**(config or SIZES))
    ).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("weight") and weight.dim() > 1:
                weight.mul_(6)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / file, folder)


def write_sentence(folder: Path, *modules: Any, name: str = "Bert") -> None:
    """That encoder as sentence-transformers 6.2 saves it."""
    write_encoder(folder / "encoder", name)
    transformer = Transformer(str(folder / "encoder"), max_seq_length=60)
    model = SentenceTransformer(modules=[transformer, *modules], device="cpu")
    model.save(str(folder / "saved"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny BERT, mean pooling, not normalised, as version 6.2 saves it."""
    write_sentence(tmp_path, Pooling(32, "mean"))
    return tmp_path / "saved"


def embedder(model: LoadedModel) -> Embedder:
    """The checkpoint as an artifact runs it: tokenizer.json as written, token vectors, pooling."""
    whole = merge.run(model) if model.adapter else model
    module = whole.assemble(whole.weights)

    def run(feed: Any) -> Any:
        with torch.inference_mode():
            out = module(**{name: torch.from_numpy(array) for name, array in feed.items()})
        return {"last_hidden_state": out.last_hidden_state.numpy()}

    folder = model.tokenizer_files[0].parent
    return Embedder(
        tokenizer=TextTokenizer.open(folder, max_tokens=model.embedding.max_tokens),
        runner=run,
        embedding=model.embedding,
        outputs=["last_hidden_state"],
    )


def compared(folder: Path, model: LoadedModel, texts: list[str] = TEXTS) -> Embedder:
    """encode, encode_query and encode_document of both sides give the same vectors."""
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    ours = embedder(model)
    for name in ("encode", "encode_query", "encode_document"):
        wanted = getattr(theirs, name)(texts)
        found = getattr(ours, name)(texts)
        assert found.shape == wanted.shape, name
        assert np.abs(found - wanted).max() <= 2e-6 * max(1, np.abs(wanted).max()), name
    return ours


PROMPTS = {"query": "search: ", "passage": "text: ", "other": "a: "}


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": PROMPTS, "default_prompt_name": None},
        {"prompts": PROMPTS, "default_prompt_name": "other"},
        {"prompts": PROMPTS | {"document": None}, "default_prompt_name": "query"},
        {"prompts": PROMPTS | {"document": "d: ", "query": ""}, "default_prompt_name": "passage"},
        {"similarity_fn_name": "dot", "truncate_dim": 16},
        {"similarity_fn_name": "maxsim", "truncate_dim": 64},
    ],
)
def test_settings_are_sentence_transformers(
    settings: dict[str, Any], saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / SETTINGS, **settings)
    model = opened(saved)
    ours = compared(saved, model, TEXTS[:3])
    theirs = SentenceTransformer(str(saved), device="cpu")
    assert model.embedding.similarity == theirs.similarity_fn_name
    for name in theirs.prompts:
        wanted = theirs.encode(TEXTS[:2], prompt_name=name)
        assert np.abs(ours.encode(TEXTS[:2], prompt_name=name) - wanted).max() <= 1e-5
    for size in (8, 16, 24) if model.embedding.truncate_dim else ():
        for unit in (False, True):
            wanted = theirs.encode(TEXTS[:2], truncate_dim=size, normalize_embeddings=unit)
            found = ours.encode(TEXTS[:2], dimensions=size, normalize=unit or None)
            assert np.abs(found - wanted).max() <= 1e-5


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "mode", ["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"]
)
def test_a_prompt_outside_of_the_pooling(
    mode: str, normalize: bool, saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "1_Pooling/config.json", include_prompt=False, pooling_mode=mode)
    edit_json(saved / SETTINGS, prompts=PROMPTS, default_prompt_name="other")
    if normalize:
        modules = json.loads((saved / "modules.json").read_text())
        modules.append(
            {"name": "2", "path": "2_N", "type": "sentence_transformers.models.Normalize"}
        )
        (saved / "modules.json").write_text(json.dumps(modules))
    ours = compared(saved, opened(saved), [text for text in TEXTS if text.strip()])
    assert np.abs(ours.encode("boats") - ours.encode("boats", prompt="other: ")).max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"do_lower_case": True},
        {"max_seq_length": 20},
        {"max_seq_length": 20, "processor_kwargs": {"model_max_length": 30}},
        {"max_seq_length": 20, "tokenizer_args": {"model_max_length": 30}},
        {"processing_kwargs": {"text": {"max_length": 12}}},
        {"processor_kwargs": {"truncation_side": "left"}, "max_seq_length": 20},
        {"model_kwargs": {"attn_implementation": "eager", "trust_remote_code": True}},
        {"config_kwargs": {"hidden_act": "relu"}},
        {"config_args": {"layer_norm_eps": 0.1, "no_such_key": 3}},
        {"unpad_inputs": None, "backend": "onnx"},
    ],
)
def test_the_transformers_own_file(
    change: dict[str, Any], saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "sentence_bert_config.json", max_seq_length=..., **{})
    old = opened(saved)
    before = embedder(old).encode(TEXTS)
    edit_json(saved / "sentence_bert_config.json", **change)
    changed = embedder(opened(saved)).encode(TEXTS)
    harmless = {"model_kwargs", "backend"} & set(change)
    assert (np.abs(changed - before).max() < 1e-6) == bool(harmless)
    compared(saved, opened(saved))


@pytest.mark.parametrize(
    "change",
    [
        {"transformer_task": "fill-mask"},
        {"query_length": 32},
        {"document_length": 64},
        {"query_expansion": {"strategy": "fixed", "length": 32}},
        {"tokenizer_name_or_path": "elsewhere"},
        {"no_such_key": None},
        {"model_kwargs": {"load_in_8bit": True}},
        {"processor_kwargs": {"gguf_file": "x.gguf"}},
        {"processing_kwargs": {"text": {"truncation": False}}},
        {"processing_kwargs": {"common": {"padding": "max_length"}}},
        {"processing_kwargs": {"txt": {}}},
        {
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "last_hidden_state"},
                "message": {"method": "forward", "method_output_name": "x"},
            }
        },
        {"modality_config": {"image": {"method": "forward", "method_output_name": "x"}}},
        {
            "modality_config": {
                "text": {"method": "forward", "method_output_name": ["hidden_states", -2]}
            }
        },
    ],
)
def test_what_is_refused_of_it(
    change: dict[str, Any], saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "sentence_bert_config.json", **change)
    with pytest.raises((UnsupportedCheckpointError, CheckpointError)) as caught:
        opened(saved)
    assert "sentence_bert_config.json" in str(caught.value)


def test_padding_that_changes_positions_is_refused(
    saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "tokenizer_config.json", padding_side="left")
    model = SentenceTransformer(str(saved), device="cpu")
    alone, batched = model.encode(TEXTS[0]), model.encode(TEXTS)[0]
    assert np.abs(alone - batched).max() > 1e-2
    with pytest.raises(UnsupportedCheckpointError, match="pads on the left"):
        opened(saved)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompts": {"query": 3}}, CheckpointError),
        ({"default_prompt_name": "nobody"}, CheckpointError),
        ({"truncate_dim": 0}, CheckpointError),
        ({"truncate_dim": "16"}, CheckpointError),
        ({"model_type": "SparseEncoder"}, UnsupportedCheckpointError),
        ({"rescale": True}, UnsupportedCheckpointError),
        ({"requirements": {"torch": ">=99"}}, DependencyError),
        ({"requirements": {"no-such-package-at-all": {"specifier": ">=1"}}}, DependencyError),
    ],
)
def test_what_is_refused_of_the_settings(
    change: dict[str, Any], error: type[JexportError], saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / SETTINGS, **change)
    with pytest.raises(error):
        opened(saved)


def test_a_transformer_in_a_folder_of_its_own(saved: Path, opened: Open) -> None:
    home = saved / "0_Transformer"
    home.mkdir()
    for path in saved.iterdir():
        if path.is_file() and path.name not in ("modules.json", SETTINGS, "README.md"):
            path.rename(home / path.name)
    modules = json.loads((saved / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (saved / "modules.json").write_text(json.dumps(modules))
    model = opened(saved)
    compared(saved, model)
    files = [file.path for file in model.source.files]
    assert {"0_Transformer/config.json", "1_Pooling/config.json", "modules.json"} <= set(files)


def test_dropout_changes_nothing(tmp_path: Path, opened: Open) -> None:
    write_sentence(tmp_path, Pooling(32, "mean"), Dropout(0.5))
    compared(tmp_path / "saved", opened(tmp_path / "saved"))


def test_pickled_weights(saved: Path, opened: Open) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    compared(saved, opened(saved))
    torch.save({"model": tensors}, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        opened(saved)


def test_pieces_without_their_index_are_named(saved: Path, opened: Open) -> None:
    (saved / "model.safetensors").rename(saved / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json is missing"):
        opened(saved)


def test_auto_map_of_an_architecture_that_transformers_has(
    saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "config.json", auto_map={"AutoConfig": "a/b--c.C", "AutoModel": "a/b--d.D"})
    model = opened(saved)
    assert model.source.layout == "sentence_transformer"
    compared(saved, model)


def test_without_modules_a_chat_template_is_refused(
    saved: Path, opened: Open, edit_json: Edit
) -> None:
    (saved / "modules.json").unlink()
    edit_json(saved / SETTINGS, prompts=PROMPTS, default_prompt_name="query")
    compared(saved, opened(saved))  # the prompts are not read there, either
    (saved / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UnsupportedCheckpointError, match="chat template"):
        opened(saved)


def test_a_rebuilt_backend_is_what_is_saved(tmp_path: Path, opened: Open, edit_json: Edit) -> None:
    """XLM-R's class drops what tokenizer.json has for a normaliser, and puts its own there."""
    write_sentence(tmp_path, Pooling(32, "mean"), name="XLMRoberta")
    saved = tmp_path / "saved"
    edit_json(saved / "tokenizer.json", normalizer={"type": "Lowercase"})
    edit_json(saved / "tokenizer_config.json", tokenizer_class="XLMRobertaTokenizer")
    model = opened(saved)
    texts = [*TEXTS, "Ends in a space ", "Ａ half ﾊﾝｶｸ", "tab\tnew\nline", "\u200b", "e\u0301"]
    ours = compared(saved, model, texts)
    ids = SentenceTransformer(str(saved), device="cpu").tokenizer(texts, truncation=True)
    assert ours._tokenizer.model_ids(texts) == ids["input_ids"]
    assert model.tokenizer_files[0].parent != saved
    again = tmp_path / "again"  # what a server of the artifact opens is that backend again
    shutil.copytree(saved, again)
    for path in model.tokenizer_files:
        shutil.copy(path, again)
    both = SentenceTransformer(str(again), device="cpu").tokenizer(texts, truncation=True)
    assert both["input_ids"] == ids["input_ids"]


def test_vocab_txt_alone(saved: Path, opened: Open, edit_json: Edit) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "harbour", "night", "##s", "a"]
    (saved / "tokenizer.json").unlink()
    (saved / "vocab.txt").write_text("\n".join(pieces))
    (saved / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    model = opened(saved)
    compared(saved, model)
    names = {file.path for file in model.source.files}
    assert "vocab.txt" in names
    assert "tokenizer.json" not in names
    assert [path.name for path in model.tokenizer_files] == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    edit_json(saved / "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(UnsupportedCheckpointError, match="split_special_tokens"):
        opened(saved)
    edit_json(saved / "tokenizer_config.json", split_special_tokens=...)
    (saved / "vocab.txt").unlink()
    with pytest.raises(TokenizerError):
        opened(saved)


def with_adapter(saved: Path, **config: Any) -> None:
    """A LoRA adapter beside the weights of a tiny BERT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    given = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "dense"]} | config
    model = get_peft_model(AutoModel.from_pretrained(saved), LoraConfig(**given))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name:
                one.copy_(torch.randn(one.shape) * 0.3)
    model.save_pretrained(saved)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 9}}],
)
def test_an_adapter_beside_its_base(config: dict[str, Any], saved: Path, opened: Open) -> None:
    plain = embedder(opened(saved)).encode(TEXTS[:2])
    with_adapter(saved, **config)
    model = opened(saved)
    ours = compared(saved, model)
    assert np.abs(ours.encode(TEXTS[:2]) - plain).max() > 1e-2
    assert "adapter_model.safetensors" in [file.path for file in model.source.files]


def test_an_adapter_whose_base_is_elsewhere(
    saved: Path, tmp_path: Path, opened: Open, edit_json: Edit
) -> None:
    with_adapter(saved)
    base = write_base(saved, tmp_path / "base")
    edit_json(saved / "adapter_config.json", base_model_name_or_path=str(base))
    model = opened(saved)
    compared(saved, model)
    assert "base/model.safetensors" in [file.path for file in model.source.files]
    edit_json(saved / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="base model is not here"):
        opened(saved)


def write_base(saved: Path, base: Path) -> Path:
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (saved / name).rename(base / name)
    return base


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["pooler"]},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa"},
        {"no_such_key": 1},
    ],
)
def test_more_than_plain_lora_is_refused(
    change: dict[str, Any], saved: Path, opened: Open, edit_json: Edit
) -> None:
    with_adapter(saved)
    edit_json(saved / "adapter_config.json", **change)
    with pytest.raises(UnsupportedCheckpointError, match=next(iter(change))):
        opened(saved)
    removed = dict.fromkeys(change, ...)
    edit_json(saved / "adapter_config.json", **removed)
    edit_json(saved / "adapter_config.json", peft_type="LORA", r=3)
    with pytest.raises(AdapterError, match="another rank"):
        opened(saved)


def test_positions_named_by_the_architecture(tmp_path: Path, opened: Open) -> None:
    """DistilBERT's width is `dim`; without a stated limit its table of 130 is the limit."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    sizes |= {"vocab_size": 331, "max_position_embeddings": 130, "pad_token_id": 1}
    write_encoder(tmp_path, "DistilBert", **sizes)
    assert opened(tmp_path).embedding.max_tokens == 130
    compared(tmp_path, opened(tmp_path))
