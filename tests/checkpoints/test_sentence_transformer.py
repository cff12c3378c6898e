"""Any sentence-transformers encoder: equal to sentence-transformers itself, or refused."""

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
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from jexport.checkpoints import module_kinds
from jexport.errors import (
    CheckpointError,
    NotFiniteError,
    PrecisionError,
    StateDictError,
    UnknownTaskError,
    UnsupportedCheckpointError,
)
from jexport.types import LoadedModel

SMALL = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
Open = Callable[..., LoadedModel]
Edit = Callable[..., None]
Vectors = Callable[[LoadedModel, list[str]], np.ndarray]

SIZES = {
    "vocab_size": 331,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {"type_vocab_size": 1},
    "XLMRoberta": {"type_vocab_size": 1},
    "MPNet": {},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "Electra": {"embedding_size": 16},
    "ModernBert": {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2},
    "Albert": {"embedding_size": 16},
    "Camembert": {"type_vocab_size": 1},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}


def write_encoder(folder: Path, name: str) -> Any:
    """A seeded model of one architecture, its weights far from their start, and a tokenizer."""
    config = SIZES | ARCHITECTURES[name]
    if name == "DistilBert":
        config = {k: v for k, v in config.items() if k not in SIZES or "_size" not in k} | {
            "vocab_size": 331
        }
    torch.manual_seed(3)
    kind = getattr(transformers, f"{name}Model")
    model = kind(getattr(transformers, f"{name}Config")(**config)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("weight") and weight.dim() > 1:
                weight.mul_(6)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / file, folder)
    return model


def write_sentence(folder: Path, *modules: Any, name: str = "Bert", **options: Any) -> Any:
    """That encoder as sentence-transformers 6.2 saves it, and the model itself."""
    write_encoder(folder / "encoder", name)
    transformer = Transformer(str(folder / "encoder"), max_seq_length=60)
    model = SentenceTransformer(modules=[transformer, *modules], device="cpu", **options)
    model.save(str(folder / "saved"))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny BERT, mean pooling, normalised, as version 6.2 saves it."""
    write_sentence(tmp_path, Pooling(32, "mean"), Normalize())
    return tmp_path / "saved"


LONG = "the harbour at night and " * 90


def test_minilm_is_what_sentence_transformers_makes_of_it(
    minilm: Path,
    opened: Open,
    texts: list[str],
    reference_vectors: Vectors,
    merged_vectors: Vectors,
) -> None:
    """Real trained weights; the long text is cut at 256 tokens, the short one is two tokens."""
    wanted = SentenceTransformer(str(minilm), device="cpu").encode([*texts, LONG, ""])
    model = opened(minilm)
    how = model.embedding
    assert (how.pooling, how.normalize, how.dimension, how.max_tokens) == ("mean", True, 384, 256)
    assert (how.prompt, how.task, how.matryoshka) == ("", "none", ())
    assert model.source.layout == "sentence_transformer"
    for vectors in (reference_vectors, merged_vectors):
        assert np.abs(vectors(model, [*texts, LONG, ""]) - wanted).max() <= 1e-6
    with pytest.raises(UnknownTaskError):
        opened(minilm, "retrieval.query")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_what_sentence_transformers_makes_of_them(
    name: str,
    tmp_path: Path,
    opened: Open,
    texts: list[str],
    reference_vectors: Vectors,
    merged_vectors: Vectors,
) -> None:
    wanted = write_sentence(tmp_path, Pooling(32, "mean"), name=name).encode([*texts, LONG])
    model = opened(tmp_path / "saved")
    assert (model.embedding.dimension, model.embedding.max_tokens) == (32, 60)
    assert not model.embedding.normalize
    for vectors in (reference_vectors, merged_vectors):
        found = vectors(model, [*texts, LONG])
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert np.abs(wanted - wanted[:1]).max() > 1e-2


POOLINGS = {
    "mean": "mean",
    "cls": "cls",
    "max": "max",
    "lasttoken": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
}
OLD_KEYS = {
    mode: f"pooling_mode_{mode}_token" + "s" * (mode in ("mean", "max")) for mode in POOLINGS
}
OLD_KEYS |= {mode: f"pooling_mode_{mode}" for mode in ("lasttoken", "mean_sqrt_len_tokens")}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", POOLINGS)
def test_poolings_are_sentence_transformers(
    mode: str,
    normalize: bool,
    tmp_path: Path,
    opened: Open,
    texts: list[str],
    reference_vectors: Vectors,
) -> None:
    ends = [Normalize()] if normalize else []
    wanted = write_sentence(tmp_path, Pooling(32, mode), *ends).encode([*texts[:8], LONG])
    written = json.loads((tmp_path / "saved/1_Pooling/config.json").read_text())
    assert written == {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}
    model = opened(tmp_path / "saved")
    assert (model.embedding.pooling, model.embedding.normalize) == (POOLINGS[mode], normalize)
    found = reference_vectors(model, [*texts[:8], LONG])
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


def pooling_of(folder: Path, opened: Open, content: Any) -> str:
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    return opened(folder).embedding.pooling


def test_poolings_of_older_versions_are_read(saved: Path, opened: Open) -> None:
    for mode, key in OLD_KEYS.items():
        content = {
            "word_embedding_dimension": 32,
            **dict.fromkeys(OLD_KEYS.values(), False),
            key: True,
        }
        assert pooling_of(saved, opened, content) == POOLINGS[mode]
        assert SentenceTransformer(str(saved), device="cpu")[1].pooling_mode == mode
    assert pooling_of(saved, opened, {"embedding_dimension": 32, "pooling_mode": ["cls"]}) == "cls"
    # Both of these are the mean to sentence-transformers.
    assert pooling_of(saved, opened, {"word_embedding_dimension": 32}) == "mean"
    none = {"word_embedding_dimension": 32, **dict.fromkeys(OLD_KEYS.values(), False)}
    assert pooling_of(saved, opened, none) == "mean"


@pytest.mark.parametrize(
    "content",
    [
        {"pooling_mode": "attention"},
        {"pooling_mode": ["cls", "attention"]},
        {"pooling_mode": []},
    ],
)
def test_another_pooling_is_refused(content: Any, saved: Path, opened: Open) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="pools in a way"):
        pooling_of(saved, opened, {"embedding_dimension": 32, **content})


def test_a_pooling_of_another_model_is_refused(saved: Path, opened: Open) -> None:
    with pytest.raises(CheckpointError, match="Pooling module is of another model"):
        pooling_of(saved, opened, {"embedding_dimension": 64, "pooling_mode": "mean"})
    (saved / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"Pooling module has no config\.json"):
        opened(saved)


@pytest.mark.parametrize("kind", [*module_kinds.UNSUPPORTED, "Transformer", "Unheard"])
def test_other_modules_are_refused_by_name(kind: str, saved: Path, opened: Open) -> None:
    modules = json.loads((saved / "modules.json").read_text())
    modules.append({"name": "x", "path": "x", "type": f"sentence_transformers.models.{kind}"})
    (saved / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedCheckpointError, match="modules that jexport does not") as caught:
        opened(saved)
    assert kind in caught.value.evidence
    assert module_kinds.UNSUPPORTED.get(kind, "") in caught.value.evidence


OLD, NEW = "sentence_transformers.models.", "sentence_transformers.base.modules."


@pytest.mark.parametrize(
    ("types", "good"),
    [
        ([f"{OLD}Transformer", f"{OLD}Pooling", f"{OLD}Normalize"], True),
        ([f"{NEW}transformer.Transformer", f"{OLD}Pooling", f"{NEW}normalize.Normalize"], True),
        ([f"{OLD}Transformer", f"{OLD}Pooling"], True),
        ([f"{OLD}Transformer"], False),
        ([f"{OLD}Pooling", f"{OLD}Transformer"], False),
        ([f"{OLD}Transformer", f"{OLD}Normalize", f"{OLD}Pooling"], False),
        ([f"{OLD}Transformer", f"{OLD}Pooling", f"{OLD}LayerNorm"], False),
        ([f"{OLD}StaticEmbedding", f"{OLD}Pooling"], False),
        (["custom_st.Transformer", f"{OLD}Pooling", f"{OLD}Normalize"], False),
        ([f"{OLD}Transformer", "my_code.Pooling", f"{OLD}Normalize"], False),
        ([], False),
    ],
)
def test_which_modules_are_taken(types: list[str], good: bool, saved: Path, opened: Open) -> None:
    homes = {"Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": n, "name": str(n), "type": kind, "path": homes.get(kind.rsplit(".", 1)[-1], "")}
        for n, kind in enumerate(types)
    ]
    (saved / "modules.json").write_text(json.dumps(modules))
    if good:
        assert opened(saved).embedding.normalize == (len(types) == 3)
    else:
        with pytest.raises(UnsupportedCheckpointError):
            opened(saved)


@pytest.mark.parametrize("text", ["", "[", "{}", "3", "[3]", '[{"type": "x"}]', "null"])
def test_modules_that_cannot_be_read_are_refused(text: str, saved: Path, opened: Open) -> None:
    (saved / "modules.json").write_text(text)
    with pytest.raises((CheckpointError, UnsupportedCheckpointError), match=r"modules"):
        opened(saved)


@pytest.mark.parametrize("home", ["../1_Pooling", "/etc", "a/../../b"])
def test_a_module_outside_the_checkpoint_is_refused(home: str, saved: Path, opened: Open) -> None:
    modules = json.loads((saved / "modules.json").read_text())
    modules[1]["path"] = home
    (saved / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        opened(saved)


def test_prompts_are_sentence_transformers(
    tmp_path: Path, opened: Open, texts: list[str], reference_vectors: Vectors, edit_json: Edit
) -> None:
    prompts = {"query": "search for: ", "document": "text: "}
    model = write_sentence(
        tmp_path, Pooling(32, "mean"), Normalize(), prompts=prompts, default_prompt_name="query"
    )
    saved = tmp_path / "saved"
    found = opened(saved)
    assert found.embedding.prompt == "search for: "
    assert np.abs(reference_vectors(found, texts) - model.encode(texts)).max() <= 1e-6
    chosen = opened(saved, prompts={"none": "text: "})
    wanted = model.encode(texts, prompt_name="document")
    assert np.abs(reference_vectors(chosen, texts) - wanted).max() <= 1e-6
    beside = opened(saved, prompts={"document": "title: ", "clustering": "group: "})
    assert beside.embedding.prompt == "search for: "
    assert dict(beside.embedding.prompts) == {
        "query": "search for: ",
        "document": "title: ",
        "clustering": "group: ",
    }
    settings = saved / "config_sentence_transformers.json"
    edit_json(settings, default_prompt_name=None)
    assert opened(saved).embedding.prompt == ""
    edit_json(settings, prompts={}, default_prompt_name="document")
    assert opened(saved).embedding.prompt == ""
    edit_json(settings, default_prompt_name="passage")
    with pytest.raises(CheckpointError, match="default prompt 'passage'"):
        opened(saved)
    edit_json(settings, prompts=["a"], default_prompt_name="query")
    with pytest.raises(CheckpointError, match="is no table"):
        opened(saved)


@pytest.mark.parametrize(
    ("written", "model_max", "limit"),
    [
        (40, 60, 40),
        (100, 60, 100),
        (None, 60, 60),
        (None, 1e30, 130),
        (None, None, 130),
        (500, 60, 130),
    ],
)
def test_the_length_limit_is_sentence_transformers_within_the_table(
    written: int | None,
    model_max: float | None,
    limit: int,
    saved: Path,
    opened: Open,
    edit_json: Edit,
) -> None:
    edit_json(
        saved / "sentence_bert_config.json", max_seq_length=... if written is None else written
    )
    edit_json(
        saved / "tokenizer_config.json", model_max_length=... if model_max is None else model_max
    )
    model = opened(saved)
    assert model.embedding.max_tokens == limit
    assert len(model.tokenize_reference([LONG * 4])[0]) == limit
    (theirs,) = [SentenceTransformer(str(saved), device="cpu").max_seq_length]
    assert theirs == limit or (written == 500 and theirs == 500)


def test_the_length_limit_can_be_lowered(saved: Path, opened: Open) -> None:
    assert len(opened(saved, max_tokens=7).tokenize_reference([LONG])[0]) == 7
    with pytest.raises(UnsupportedCheckpointError, match="more than the checkpoint takes"):
        opened(saved, max_tokens=61)


@pytest.mark.parametrize(
    "name", ["Roberta", "XLMRoberta", "MPNet", "Camembert", "Bert", "ModernBert"]
)
def test_a_text_as_long_as_the_limit_runs(
    name: str, tmp_path: Path, opened: Open, edit_json: Edit, reference_vectors: Vectors
) -> None:
    """The RoBERTa family uses up two of its 130 positions, whatever max_seq_length says."""
    write_sentence(tmp_path, Pooling(32, "mean"), name=name)
    edit_json(tmp_path / "saved" / "sentence_bert_config.json", max_seq_length=130)
    model = opened(tmp_path / "saved")
    assert model.embedding.max_tokens == (130 if name in ("Bert", "ModernBert") else 128)
    assert len(model.tokenize_reference([LONG * 4])[0]) == model.embedding.max_tokens
    assert np.isfinite(reference_vectors(model, [LONG * 4])).all()


def test_old_names_of_the_transformers_file_are_read(saved: Path, opened: Open) -> None:
    old = saved / "sentence_roberta_config.json"
    (saved / "sentence_bert_config.json").rename(old)
    old.write_text(json.dumps({"max_seq_length": 33, "do_lower_case": False}))
    model = opened(saved)
    assert model.embedding.max_tokens == 33
    assert old.name in [file.path for file in model.source.files]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformer_task": "fill-mask"}, "transformer_task"),
        ({"module_output_name": "sentence_embedding"}, "module_output_name"),
        ({"modality_config": {"text": {"method": "get_text_features"}}}, "method"),
        ({"modality_config": {"text": {"method_output_name": "pooler_output"}}}, "pooler_output"),
        ({"processing_kwargs": {"text": {"padding_side": "left"}}}, "processing_kwargs"),
        ({"query_expansion": {"length": 32}}, "query_expansion"),
    ],
)
def test_what_would_change_a_vector_is_refused(
    change: dict[str, Any], said: str, saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "sentence_bert_config.json", **change)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        opened(saved)
    assert said in str(caught.value)
    edit_json(saved / "sentence_bert_config.json", **dict.fromkeys(change, ...))
    edit_json(saved / "sentence_bert_config.json", modality_config="text")
    with pytest.raises(CheckpointError, match="is no table"):
        opened(saved)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Lowercase"},
        {
            "type": "BertNormalizer",
            "lowercase": True,
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
        },
        {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
    ],
)
def test_lower_case_that_the_tokenizer_makes_anyway_is_taken(
    normalizer: dict[str, Any], saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "sentence_bert_config.json", do_lower_case=True)
    edit_json(saved / "tokenizer.json", normalizer=normalizer)
    assert opened(saved).embedding.max_tokens == 60


def test_a_normalize_of_something_else_is_refused(
    saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "2_Normalize" / "config.json", module_input_name="token_embeddings")
    with pytest.raises(UnsupportedCheckpointError, match="module_input_name"):
        opened(saved)
    edit_json(saved / "2_Normalize" / "config.json", module_input_name="sentence_embedding")
    assert "2_Normalize/config.json" in [file.path for file in opened(saved).source.files]
    (saved / "2_Normalize" / "config.json").unlink()
    assert opened(saved).embedding.normalize


def assembled(model: LoadedModel) -> Any:
    return model.assemble(model.weights)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_names_with_and_without_the_architectures_prefix(
    prefix: str,
    saved: Path,
    opened: Open,
    edit_weights: Edit,
    texts: list[str],
    reference_vectors: Vectors,
) -> None:
    wanted = reference_vectors(opened(saved), texts)
    edit_weights(saved, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    assert np.array_equal(reference_vectors(opened(saved), texts), wanted)


def test_what_an_encoder_does_not_need_may_be_there_or_not(
    saved: Path, opened: Open, edit_weights: Edit, texts: list[str], reference_vectors: Vectors
) -> None:
    wanted = reference_vectors(opened(saved), texts)
    edit_weights(saved, lambda ts: {n: t for n, t in ts.items() if not n.startswith("pooler.")})
    assert np.array_equal(reference_vectors(opened(saved), texts), wanted)
    more = {
        "embeddings.position_ids": torch.arange(130)[None],
        "cls.predictions.bias": torch.zeros(331),
        "lm_head.bias": torch.zeros(331),
    }
    edit_weights(saved, lambda tensors: tensors | more)
    assert np.array_equal(reference_vectors(opened(saved), texts), wanted)


@pytest.fixture(scope="module")
def bert_keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bert")
    write_encoder(folder, "Bert")
    return sorted(load_file(folder / "model.safetensors"))


def test_every_missing_or_reshaped_tensor_is_named(
    bert_keys: list[str], saved: Path, opened: Open
) -> None:
    from safetensors.torch import save_file

    whole = load_file(saved / "model.safetensors")
    assert sorted(whole) == bert_keys
    for key in bert_keys:
        save_file({n: t for n, t in whole.items() if n != key}, saved / "model.safetensors")
        with pytest.raises(StateDictError) as caught:
            assembled(opened(saved))
        assert f"missing: {key}" in caught.value.evidence
        other = whole | {key: torch.cat([whole[key], whole[key][-1:]])}
        save_file(other, saved / "model.safetensors")
        with pytest.raises(StateDictError) as caught:
            assembled(opened(saved))
        assert f"mismatched: {key}" in caught.value.evidence


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.2.output.dense.bias",
        "classifier.bias",
        "x.pooler.dense.bias",
        "embeddings.LayerNorm.scale",
        "qa_outputs.weight",
        "pooler.more",
    ],
)
def test_a_tensor_too_many_is_named(
    name: str, saved: Path, opened: Open, edit_weights: Edit
) -> None:
    edit_weights(saved, lambda tensors: tensors | {name: torch.zeros(32)})
    with pytest.raises(StateDictError) as caught:
        assembled(opened(saved))
    assert f"unexpected: {name}" in caught.value.evidence


def test_a_nan_is_named(saved: Path, opened: Open, edit_weights: Edit) -> None:
    key = "encoder.layer.1.output.dense.bias"
    edit_weights(saved, lambda tensors: tensors[key][3:4].fill_(float("nan")))
    with pytest.raises(NotFiniteError, match=key):
        assembled(opened(saved))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden_size": ...}, CheckpointError),
        ({"vocab_size": ...}, CheckpointError),
        ({"hidden_size": "32"}, CheckpointError),
        ({"vocab_size": None}, CheckpointError),
        ({"model_type": "no_such_model"}, UnsupportedCheckpointError),
        ({"model_type": ...}, UnsupportedCheckpointError),
        ({"num_hidden_layers": "two"}, CheckpointError),
        ({"intermediate_size": 64}, StateDictError),
        ({"num_hidden_layers": 1}, StateDictError),
        ({"num_hidden_layers": 3}, StateDictError),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], saved: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(saved / "config.json", **change)
    with pytest.raises(error):
        assembled(opened(saved))


def test_a_distilbert_without_its_width_is_refused(
    tmp_path: Path, opened: Open, edit_json: Edit
) -> None:
    write_sentence(tmp_path, Pooling(32, "mean"), name="DistilBert")
    config = tmp_path / "saved" / "config.json"
    assert "hidden_size" not in json.loads(config.read_text())
    edit_json(config, dim=...)
    with pytest.raises(CheckpointError, match="no usable 'dim'"):
        opened(tmp_path / "saved")


def test_an_encoder_decoder_is_refused(saved: Path, opened: Open) -> None:
    sizes = {
        "vocab_size": 331,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }
    transformers.BartModel(transformers.BartConfig(**sizes)).save_pretrained(saved)
    with pytest.raises(UnsupportedCheckpointError, match="encoder-decoder"):
        assembled(opened(saved))


def test_without_modules_it_is_the_mean_and_nothing_else(
    saved: Path, opened: Open, edit_json: Edit, texts: list[str], reference_vectors: Vectors
) -> None:
    (saved / "modules.json").unlink()
    wanted = SentenceTransformer(str(saved), device="cpu").encode([*texts, LONG])
    model = opened(saved)
    assert (model.embedding.normalize, model.embedding.prompts) == (False, {})
    found = reference_vectors(model, [*texts, LONG])
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    edit_json(saved / "config.json", model_type="no_such_model")
    with pytest.raises(UnsupportedCheckpointError, match="layout is not known"):
        opened(saved)


def test_weights_in_shards_are_read(
    saved: Path, opened: Open, texts: list[str], reference_vectors: Vectors
) -> None:
    wanted = reference_vectors(opened(saved), texts)
    model = transformers.BertModel.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    model.save_pretrained(saved, max_shard_size="40KB")
    assert len(list(saved.glob("model-*"))) > 1
    assert np.array_equal(reference_vectors(opened(saved), texts), wanted)


def test_a_checkpoint_that_is_quantized_already_is_refused(saved: Path, opened: Open) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(PrecisionError, match="quantized already") as caught:
        opened(saved)
    assert "method 'gptq'" in str(caught.value)
