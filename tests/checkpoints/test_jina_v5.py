"""jina-embeddings-v5-text: each task from text to vector against PEFT, and what is refused.

The judge is transformers' own class with PEFT's adapter beside it (evaluation/
reference_library_jina_v5.py), which shares nothing with what reads and merges here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jexport import checkpoints
from jexport.errors import (
    AdapterError,
    CheckpointError,
    JexportError,
    RecipeError,
    RemoteCodeError,
    StateDictError,
    UnknownTaskError,
    UnsupportedCheckpointError,
)
from jexport.evaluation import reference_library
from jexport.recipe import LoadSpec
from jexport.runtime import Embedder, TextTokenizer
from jexport.stages import load, merge
from jexport.tasks import JINA_V5
from jexport.toy import checkpoint
from jexport.types import LoadedModel

KINDS = ("jina-v5-small", "jina-v5-nano")
LONG = "the harbour at night and " * 150
TEXTS = [
    "the harbour at night",
    "SHIPS and Boats, 1923!\n",
    "",
    " ",
    "港の灯台は夜になると光ります。",
]
ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("v5")
    return {kind: checkpoint.write(folder / kind, layout=kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def toy(request: pytest.FixtureRequest, toys: dict[str, Path]) -> Path:
    return toys[request.param]


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    """A toy that a test may break."""
    return Path(shutil.copytree(toy, tmp_path / "v5"))


def embedder(model: LoadedModel) -> Embedder:
    """The merged checkpoint as an artifact runs it: tokenizer.json, token vectors, pooling."""
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


def judged(model: LoadedModel, texts: list[str], **spec: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The library's method, and the vectors that it gives."""
    with reference_library.opened(model, LoadSpec(model=str(model.folder), **spec)) as library:
        assert library.uses == reference_library.USES
        for use in library.uses:
            ids = library.tokenize(texts, use)
            yield use, np.stack([one.vector for one in library.encode(texts, ids, use)])


def opened(folder: Path, task: str, **spec: Any) -> LoadedModel:
    return load.run(LoadSpec(model=str(folder), **spec), task=task)


@pytest.mark.parametrize("task", [*JINA_V5, "none"])
def test_each_task_gives_the_vectors_of_peft(toy: Path, task: str) -> None:
    model = opened(toy, task)
    ours = embedder(model)
    assert model.embedding.default_prompt_name == "document"
    assert model.embedding.prompts == {"query": "Query: ", "document": "Document: "}
    vectors = {}
    for use, wanted in judged(model, TEXTS):
        vectors[use] = getattr(ours, use)(TEXTS)
        assert np.abs(vectors[use] - wanted).max() < 2e-6, use
        assert np.abs(np.linalg.norm(wanted, axis=1) - 1).max() < 1e-5
    assert (vectors["encode"] == vectors["encode_document"]).all()
    assert np.abs(vectors["encode_query"] - vectors["encode_document"]).max() > 0.01
    by_name = ours.encode(TEXTS, prompt_name="query")
    assert (by_name == vectors["encode_query"]).all()


def test_the_adapters_differ_and_so_does_the_base(toy: Path) -> None:
    vectors = [embedder(opened(toy, task)).encode(TEXTS[:1])[0] for task in (*JINA_V5, "none")]
    for place, one in enumerate(vectors):
        for other in vectors[:place]:
            assert one @ other < 0.99


def test_a_text_beyond_1024_tokens(toy: Path) -> None:
    model = opened(toy, "retrieval")
    texts = [LONG, TEXTS[0]]
    with reference_library.opened(model, LoadSpec(model=str(toy))) as library:
        ids = library.tokenize(texts)
        assert len(ids[0]) > 1024
        assert ids == model.tokenize_reference(texts)
        wanted = np.stack([one.vector for one in library.encode(texts, ids)])
    assert np.abs(embedder(model).encode(texts) - wanted).max() < 2e-6


def test_smaller_sizes_are_cut_and_normalised_again(toy: Path) -> None:
    model = opened(toy, "text-matching")
    assert model.embedding.matryoshka == (32, 64, 128)
    ours = embedder(model)
    whole = next(iter(judged(model, TEXTS)))[1]
    for size in model.embedding.matryoshka:
        cut = whole[:, :size] / np.linalg.norm(whole[:, :size], axis=1, keepdims=True)
        assert np.abs(ours.encode(TEXTS, dimensions=size) - cut).max() < 2e-6


def test_padding_on_either_side_is_never_pooled(copy: Path, edit_json: Callable[..., None]) -> None:
    right = embedder(opened(copy, "clustering")).encode(TEXTS)
    edit_json(copy / "tokenizer_config.json", padding_side="left")
    model = opened(copy, "clustering")
    found = embedder(model).encode(TEXTS)
    wanted = next(iter(judged(model, TEXTS)))[1]
    assert np.abs(found - wanted).max() < 2e-6
    assert np.abs(found - right).max() < 2e-6


def test_alpha_over_r_of_each_adapter(copy: Path, edit_json: Callable[..., None]) -> None:
    before = embedder(opened(copy, "retrieval")).encode(TEXTS)
    edit_json(copy / "adapters" / "retrieval" / SETTINGS, lora_alpha=48)
    model = opened(copy, "retrieval")
    after = embedder(model).encode(TEXTS)
    assert np.abs(after - next(iter(judged(model, TEXTS)))[1]).max() < 2e-6
    assert np.abs(after - before).max() > 0.001


def test_prompts_of_the_checkpoint_and_of_the_recipe(
    copy: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(copy / "config_sentence_transformers.json", prompts={"query": "Q: "})
    model = opened(copy, "retrieval")
    assert model.embedding.prompts == {"query": "Q: ", "document": "Document: "}
    own = opened(copy, "retrieval", prompts={"retrieval": "Passage: "})
    assert own.embedding.prompt == "Passage: "
    _, wanted = next(iter(judged(own, TEXTS, prompts={"retrieval": "Passage: "})))
    assert np.abs(embedder(own).encode(TEXTS) - wanted).max() < 2e-6


def test_a_prompt_of_the_recipe_by_its_name(copy: Path) -> None:
    model = opened(copy, "retrieval", prompts={"query": "Find: "})
    assert model.embedding.prompts == {"query": "Find: ", "document": "Document: "}
    assert model.embedding.prompt == "Document: "
    ours = embedder(model)
    for use, wanted in judged(model, TEXTS, prompts={"query": "Find: "}):
        assert np.abs(getattr(ours, use)(TEXTS) - wanted).max() < 2e-6, use
    with pytest.raises(RecipeError, match="other"):
        opened(copy, "retrieval", prompts={"other": "Find: "})


def test_names_and_config_are_those_of_the_native_model(toys: dict[str, Path]) -> None:
    small, nano = (opened(toys[kind], "none") for kind in KINDS)
    assert (small.config["model_type"], nano.config["model_type"]) == ("qwen3", "eurobert")
    for model, name in ((small, "Qwen3Model"), (nano, "EuroBertModel")):
        module = model.assemble(model.weights)
        assert type(module).__name__ == name
        assert set(model.weights) == set(module.state_dict())
        assert "auto_map" not in model.config
    assert small.embedding.max_tokens == 32_768
    assert nano.embedding.max_tokens == 8192
    assert small.source.licence == "CC-BY-NC-4.0"


def test_other_adapters_are_not_opened(copy: Path) -> None:
    (copy / "adapters" / "classification" / ADAPTER).write_bytes(b"broken")
    read = {one.path for one in opened(copy, "retrieval").source.files}
    assert "adapters/retrieval/adapter_model.safetensors" in read
    assert not [path for path in read if "classification" in path]


# --- merged repositories ------------------------------------------------------------------------


def test_without_adapters_the_only_task_is_none_with_the_prompts(copy: Path) -> None:
    shutil.rmtree(copy / "adapters")
    assert checkpoints.known_tasks(copy) == ("none",)
    model = opened(copy, "none")
    assert model.embedding.prompt == "Document: "
    assert np.abs(embedder(model).encode(TEXTS) - next(iter(judged(model, TEXTS)))[1]).max() < 2e-6
    with pytest.raises(AdapterError, match="no adapter for the task 'retrieval'") as caught:
        opened(copy, "retrieval")
    assert str(copy / "adapters" / "retrieval") in caught.value.evidence


def test_a_plain_repository_of_one_task(
    copy: Path, edit_json: Callable[..., None], tmp_path: Path
) -> None:
    """As ..-text-small-retrieval: the native model_type, sentence-transformers' own modules."""
    shutil.rmtree(copy / "adapters")
    kind = "qwen3" if "Qwen2" in (copy / "tokenizer_config.json").read_text() else "eurobert"
    names = {"qwen3": "Qwen3Model", "eurobert": "EuroBertModel"}
    edit_json(
        copy / "config.json",
        model_type=kind,
        architectures=[names[kind]],
        auto_map=...,
        task_names=...,
    )
    library = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"{library}.{one}"}
        for n, (path, one) in enumerate(modules)
    ]
    (copy / "modules.json").write_text(json.dumps(listed))
    (copy / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    model = opened(copy, "none")
    assert model.source.layout == "sentence_transformer"
    assert model.embedding.prompts == {"query": "Query: ", "document": "Document: "}
    ours = embedder(model)
    for use, wanted in judged(model, TEXTS):
        assert np.abs(getattr(ours, use)(TEXTS) - wanted).max() < 2e-6


def list_modules(folder: Path, *after: tuple[str, dict[str, Any]]) -> None:
    """What a fine-tune saved with modules of its own has; its first module is the authors'."""
    path = folder / "modules.json"
    entries = json.loads(path.read_text(encoding="utf-8"))[:1]
    for number, (kind, config) in enumerate(after, 1):
        home = f"{number}_{kind}"
        entries.append(
            {
                "idx": number,
                "name": str(number),
                "path": home,
                "type": f"sentence_transformers.models.{kind}",
            }
        )
        (folder / home).mkdir()
        (folder / home / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path.write_text(json.dumps(entries), encoding="utf-8")


@pytest.mark.parametrize(
    ("mode", "known", "normalize"),
    [("mean", "mean", True), ("cls", "cls", False), ("lasttoken", "last", True)],
)
def test_the_pooling_of_a_fine_tune_is_taken(
    mode: str, known: str, normalize: bool, copy: Path
) -> None:
    before = embedder(opened(copy, "retrieval")).encode(TEXTS)
    pooling = ("Pooling", {"embedding_dimension": 128, "pooling_mode": mode})
    list_modules(copy, pooling, *([("Normalize", {})] if normalize else []))
    model = opened(copy, "retrieval")
    assert (model.embedding.pooling, model.embedding.normalize) == (known, normalize)
    ours = embedder(model)
    for use, wanted in judged(model, TEXTS):
        assert np.abs(getattr(ours, use)(TEXTS) - wanted).max() < 2e-5, use
        length = np.linalg.norm(wanted, axis=1)
        assert bool(np.abs(length - 1).max() < 1e-5) == normalize
        if use == "encode":
            changed = np.abs(wanted / length[:, None] - before).max() > 0.01
            assert bool(changed) == (mode != "lasttoken")


def test_modules_without_a_pooling_are_refused(copy: Path) -> None:
    list_modules(copy, ("Normalize", {}))
    with pytest.raises(UnsupportedCheckpointError, match="does not pool once") as caught:
        opened(copy, "retrieval")
    assert "modules.json lists: Transformer, Normalize" in caught.value.evidence


# --- what is refused ----------------------------------------------------------------------------


def test_a_missing_adapter_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "adapters" / "clustering")
    assert checkpoints.known_tasks(copy) == (*JINA_V5, "none")
    with pytest.raises(AdapterError, match="clustering") as caught:
        opened(copy, "clustering")
    assert str(copy / "adapters" / "clustering") in caught.value.evidence
    assert opened(copy, "retrieval").adapter
    with pytest.raises(UnknownTaskError, match="retrieval"):
        opened(copy, "retrieval.query")


def test_the_adapter_of_the_other_model(toys: dict[str, Path], tmp_path: Path) -> None:
    small, nano = (toys[kind] for kind in KINDS)
    for base, other in ((small, nano), (nano, small)):
        folder = Path(shutil.copytree(base, tmp_path / base.name))
        shutil.rmtree(folder / "adapters" / "retrieval")
        shutil.copytree(other / "adapters" / "retrieval", folder / "adapters" / "retrieval")
        with pytest.raises(AdapterError, match=r"adapters/retrieval: .*does not fit") as caught:
            opened(folder, "retrieval")
        assert str(folder / "adapters" / "retrieval") in caught.value.evidence


def drop_a_module(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        del tensors[f"base_model.model.layers.1.mlp.up_proj.lora_{side}.weight"]


def drop_one_side(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def add_a_stranger(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        tensors[f"base_model.model.layers.7.mlp.up_proj.lora_{side}.weight"] = torch.zeros(32, 32)


def halve_the_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        tensors[name] = (value[:16] if "lora_A" in name else value[:, :16]).contiguous()


@pytest.mark.parametrize("change", [drop_a_module, drop_one_side, add_a_stranger, halve_the_rank])
def test_an_adapter_that_is_not_whole(
    change: Callable[..., None], copy: Path, edit_weights: Callable[..., None]
) -> None:
    home = copy / "adapters" / "retrieval"
    edit_weights(home / ADAPTER, change)
    with pytest.raises(AdapterError, match="adapters/retrieval: ") as caught:
        opened(copy, "retrieval")
    assert str(home) in caught.value.evidence


@pytest.mark.parametrize(
    ("file", "error"),
    [(ADAPTER, CheckpointError), (SETTINGS, CheckpointError)],
)
def test_an_adapter_without_one_of_its_files(
    file: str, error: type[JexportError], copy: Path
) -> None:
    (copy / "adapters" / "retrieval" / file).unlink()
    with pytest.raises(error, match="adapters/retrieval: "):
        opened(copy, "retrieval")


def test_more_than_plain_lora(copy: Path, edit_json: Callable[..., None]) -> None:
    edit_json(copy / "adapters" / "retrieval" / SETTINGS, use_dora=True)
    with pytest.raises(UnsupportedCheckpointError, match=r"adapters/retrieval: .*use_dora"):
        opened(copy, "retrieval")


def test_a_base_with_a_weight_missing(copy: Path, edit_weights: Callable[..., None]) -> None:
    name = "layers.0.mlp.up_proj.weight"
    edit_weights(copy, lambda tensors: {key: tensors[key] for key in tensors if key != name})
    model = opened(copy, "none")
    with pytest.raises(StateDictError, match="not those of its config"):
        model.assemble(model.weights)


def test_is_decoder_that_the_weights_deny(
    toys: dict[str, Path], tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    for kind, stated in zip(KINDS, (False, True), strict=True):
        folder = Path(shutil.copytree(toys[kind], tmp_path / kind))
        edit_json(folder / "config.json", is_decoder=stated)
        with pytest.raises(UnsupportedCheckpointError, match="two different models"):
            opened(folder, "none")


@pytest.mark.parametrize("names", ["retrieval", [], ["a", "a"], ["../retrieval"], [1]])
def test_tasks_that_are_no_list_of_names(
    names: Any, copy: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(copy / "config.json", task_names=names)
    with pytest.raises(CheckpointError, match="does not list the tasks"):
        opened(copy, "retrieval")


def test_its_code_is_not_run(copy: Path) -> None:
    with pytest.raises(RemoteCodeError, match="needs no code"):
        opened(copy, "retrieval", trust_remote_code=True)


def test_the_names_and_shapes_are_the_hubs(toys: dict[str, Path]) -> None:
    """Names as vLLM 0.32 reads them (models/jina.py), dtypes as on the hub."""
    adapter = load_file(toys["jina-v5-small"] / "adapters" / "retrieval" / ADAPTER)
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter
    assert len(adapter) == 2 * 7 * 2
    base = load_file(toys["jina-v5-small"] / "model.safetensors")
    assert {str(one.dtype) for one in (*adapter.values(), *base.values())} == {"torch.bfloat16"}
    assert {"embed_tokens.weight", "norm.weight", "layers.1.self_attn.k_norm.weight"} <= set(base)
    assert not [name for name in base if name.startswith(("model.", "lm_head"))]
