"""Modules after the transformer, text to vector against SentenceTransformer: seeded checkpoints.

The vectors are those of the graph that export writes, by onnxruntime, and of the folder that the
target hf writes. Both judges are the users' own library.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling

from jexport.checkpoints import module_writer
from jexport.errors import (
    CheckpointError,
    DimensionError,
    StateDictError,
    UnsupportedCheckpointError,
    UnsupportedGraphError,
)
from jexport.recipe import CompileSpec, ExportSpec
from jexport.runtime import Embedder, TextTokenizer
from jexport.stages import export
from jexport.targets import hf, onnx, vllm
from jexport.types import CompiledModel, LoadedModel, MergedModel

Open = Callable[..., LoadedModel]
Edit = Callable[..., None]
SMALL = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
TEXTS = ["the harbour at night", "SHIPS and Boats, 1923!", "", "a", "x <mask> y", "boats " * 80]
WIDTH = 32
BERT = {
    "vocab_size": 331,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
}
T5 = {
    "vocab_size": 331,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 1,
}


def scaled(model: torch.nn.Module, factor: float) -> Any:
    """A model whose weights are far from their start: a module that is left out is then seen."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("weight") and weight.dim() > 1:
                weight.mul_(factor)
            elif weight.dim() == 1:
                weight.add_(torch.randn(weight.shape) * 0.3)
    return model.eval()


def write(folder: Path, *modules: Any, kind: str = "Bert") -> Path:
    """A checkpoint as sentence-transformers saves it."""
    torch.manual_seed(3)
    sizes = T5 if kind.endswith("T5") else BERT
    config = getattr(transformers, f"{kind}Config")(**sizes)
    named = f"{kind}EncoderModel" if kind.endswith("T5") else f"{kind}Model"
    model = scaled(getattr(transformers, named)(config), 1.5 if kind.endswith("T5") else 6)
    model.save_pretrained(folder / "encoder")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / file, folder / "encoder")
    transformer = Transformer(str(folder / "encoder"), max_seq_length=60)
    for module in modules:
        if not isinstance(module, Pooling):
            scaled(module, 2)
    whole = SentenceTransformer(modules=[transformer, *modules], device="cpu")
    whole.save(str(folder / "saved"))
    return folder / "saved"


def embedder(model: LoadedModel, compiled: CompiledModel, runner: Any) -> Embedder:
    """A compiled model behind the runtime that users open."""
    return Embedder(
        tokenizer=TextTokenizer.open(
            model.tokenizer_files[0].parent, max_tokens=model.embedding.max_tokens
        ),
        runner=runner,
        embedding=model.embedding,
        outputs=[spec.name for spec in compiled.signature.outputs],
    )


@contextmanager
def built(model: LoadedModel, folder: Path, spec: ExportSpec | None = None) -> Iterator[Embedder]:
    """The checkpoint as an artifact of the target onnx."""
    spec = spec or ExportSpec()
    (folder / "graph").mkdir()
    (folder / "onnx").mkdir()
    graph = export.run(model, spec, precision="fp32", samples=(), out_dir=folder / "graph")
    compiled = onnx.build(graph, CompileSpec(), folder / "onnx")
    with onnx.runner(compiled, "cpu", 1) as runner:
        yield embedder(export.as_shipped(model, spec), compiled, runner)


def library(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})


def same(ours: Any, theirs: Any, **options: Any) -> None:
    """Vectors of all texts, at once and alone."""
    wanted = theirs.encode(TEXTS, **options)
    found = ours.encode(TEXTS)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2e-5 * max(1, np.abs(wanted).max())
    assert np.abs(ours.encode(TEXTS[1]) - wanted[1]).max() <= 2e-5 * max(1, np.abs(wanted).max())


GELU, IDENTITY = torch.nn.GELU(), torch.nn.Identity()
ELEMENTWISE = ("SiLU", "Mish", "Softplus", "LeakyReLU", "ELU", "CELU", "SELU", "Hardswish")
ELEMENTWISE += ("Hardsigmoid", "Softsign", "LogSigmoid", "Softshrink", "Tanhshrink", "ReLU6")
ELEMENTWISE += ("Hardtanh", "Hardshrink", "Sigmoid", "ReLU")
"""Activations of torch that need no argument; sentence-transformers keeps their names alone."""

STACKS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "LaBSE": ("Bert", (Pooling(WIDTH, "cls"), Dense(WIDTH, WIDTH), Normalize())),
    "distiluse": ("Bert", (Pooling(WIDTH, "mean"), Dense(WIDTH, 16))),
    "sentence-t5": (
        "T5",
        (Pooling(WIDTH, "mean"), Dense(WIDTH, 24, False, IDENTITY), Normalize()),
    ),
    "EmbeddingGemma": (
        "Bert",
        (
            Pooling(WIDTH, "mean"),
            Dense(WIDTH, 96, False, IDENTITY),
            Dense(96, WIDTH, False, IDENTITY),
            Normalize(),
        ),
    ),
    "everything": (
        "XLMRoberta",
        (
            Pooling(WIDTH, ("weightedmean", "cls", "max", "mean_sqrt_len_tokens", "lasttoken")),
            Normalize(),
            LayerNorm(5 * WIDTH),
            Dropout(0.5),
            Dense(5 * WIDTH, 20, activation_function=GELU, use_residual=True),
            Dense(20, 20, activation_function=torch.nn.PReLU(), use_residual=True),
            Normalize(),
            LayerNorm(20),
        ),
    ),
    "activations": (
        "Bert",
        (
            Pooling(WIDTH, "mean"),
            *(
                Dense(WIDTH, WIDTH, activation_function=getattr(torch.nn, name)())
                for name in ELEMENTWISE
            ),
            Normalize(),
        ),
    ),
}


RARE = ("EmbeddingGemma", "everything", "activations")
"""Stacks that `make test` opens in torch alone; their graphs are exported once a week."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.rare if name in RARE else ()) for name in STACKS],
)
def test_a_graph_gives_the_librarys_vectors(name: str, tmp_path: Path, opened: Open) -> None:
    kind, modules = STACKS[name]
    saved = write(tmp_path, *modules, kind=kind)
    model, theirs = opened(saved), library(saved)
    with built(model, tmp_path) as ours:
        assert ours._outputs == ["sentence_embedding"]
        same(ours, theirs)
        assert model.embedding.dimension == theirs.get_embedding_dimension()
        with pytest.raises(UnsupportedGraphError, match=r"late chunking .* engine gives none"):
            ours.late_chunking(["a", "b"])
        unit = np.linalg.norm(ours.encode(TEXTS, normalize=True), axis=1)
        assert np.abs(unit - 1).max() < 1e-5
        if model.embedding.normalize:
            with pytest.raises(UnsupportedGraphError, match=r"normalize=False .* gives none"):
                ours.encode("a", normalize=False)
        else:
            same(ours, theirs)
        with pytest.raises(DimensionError):
            ours.encode("a", dimensions=8)


@pytest.mark.parametrize("name", STACKS)
def test_a_folder_that_the_library_opens(name: str, tmp_path: Path, opened: Open) -> None:
    kind, modules = STACKS[name]
    saved = write(tmp_path, *modules, kind=kind)
    model, theirs = opened(saved), library(saved)
    folder = tmp_path / "hf"
    folder.mkdir()
    compiled = hf.build(MergedModel(model=model, precision="fp32"), CompileSpec(), folder)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(
        compiled.files
    )
    with hf.runner(compiled, "cpu", 1) as runner:
        same(embedder(model, compiled, runner), theirs)
    for path in model.tokenizer_files:
        shutil.copy(path, folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 60}')
    again = library(folder)
    assert np.array_equal(again.encode(TEXTS), theirs.encode(TEXTS))
    types = {one["type"] for one in json.loads((folder / "modules.json").read_text())}
    assert all(one.startswith("sentence_transformers.models.") for one in types)


def test_a_folder_as_of_old(tmp_path: Path, opened: Open, edit_json: Edit) -> None:
    """LaBSE's files: old types, old flags in their own order, a pickle, no activation: Tanh."""
    saved = write(tmp_path, Pooling(WIDTH, ("cls", "mean")), Dense(2 * WIDTH, 16))
    for number, kind in ((1, "Pooling"), (2, "Dense")):
        (saved / f"{number}_{kind}").rename(saved / f"{number}_old")
        modules = json.loads((saved / "modules.json").read_text())
        modules[number] |= {
            "type": f"sentence_transformers.models.{kind}",
            "path": f"{number}_old",
        }
        (saved / "modules.json").write_text(json.dumps(modules))
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    (saved / "1_old/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    edit_json(saved / "2_old/config.json", activation_function=..., module_input_name=...)
    torch.save(load_file(saved / "2_old/model.safetensors"), saved / "2_old/pytorch_model.bin")
    (saved / "2_old/model.safetensors").unlink()
    model, theirs = opened(saved), library(saved)
    assert model.embedding.modules == ("Pooling cls+mean", "Dense 64 > 16, Tanh")
    assert "2_old/pytorch_model.bin" in {file.path for file in model.source.files}
    with built(model, tmp_path) as ours:
        same(ours, theirs)
    edit_json(saved / "2_old/config.json", activation_function="my_code.Swish")
    assert opened(saved).embedding.modules == model.embedding.modules  # Tanh, as in the library


def test_sizes_that_are_cut_and_sizes_of_their_own(
    tmp_path: Path, opened: Open, edit_json: Edit
) -> None:
    saved = write(tmp_path, Pooling(WIDTH, "mean"), Dense(WIDTH, 24), Normalize())
    edit_json(saved / "config.json", matryoshka_dimensions=[8, 16, 24, 32])
    model = opened(saved)
    assert model.embedding.matryoshka == (8, 16, 24)
    with built(model, tmp_path, ExportSpec(dimension=16)) as ours:
        wanted = library(saved).encode(TEXTS)[:, :16]
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        assert np.abs(ours.encode(TEXTS) - wanted).max() < 1e-5
    edit_json(saved / "config_sentence_transformers.json", truncate_dim=12)
    for name in ("graph", "onnx"):
        shutil.rmtree(tmp_path / name)
    with built(opened(saved), tmp_path) as ours:
        same(ours, library(saved))
    shutil.copytree(saved / "2_Dense", saved / "2_Dense_256")  # as stella's other sizes
    assert opened(saved).embedding.matryoshka == ()


def test_a_prompt_outside_of_a_stack_is_refused(
    tmp_path: Path, opened: Open, edit_json: Edit
) -> None:
    saved = write(tmp_path, Pooling(WIDTH, "mean", include_prompt=False), Dense(WIDTH, 16))
    with pytest.raises(UnsupportedCheckpointError, match="leaves its prompt out"):
        opened(saved)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"module_input_name": "token_embeddings"}, UnsupportedCheckpointError),
        ({"module_output_name": "other"}, UnsupportedCheckpointError),
        ({"activation_function": "torch.nn.functional.gelu"}, UnsupportedCheckpointError),
        ({"activation_function": "torch.nn.Linear"}, UnsupportedCheckpointError),
        ({"activation_function": "torch.no.Such"}, UnsupportedCheckpointError),
        ({"in_features": 16}, CheckpointError),
        ({"out_features": ...}, CheckpointError),
        ({"out_features": 8}, StateDictError),
        ({"bias": False}, StateDictError),
        ({"use_residual": True}, StateDictError),
    ],
)
def test_what_is_refused_of_a_dense_module(
    change: dict[str, Any],
    error: type[Exception],
    tmp_path: Path,
    opened: Open,
    edit_json: Edit,
) -> None:
    saved = write(tmp_path, Pooling(WIDTH, "mean"), Dense(WIDTH, 16))
    edit_json(saved / "2_Dense/config.json", **change)
    with pytest.raises(error) as caught:
        opened(saved)
    assert "2_Dense" in str(caught.value)


@pytest.mark.parametrize("kind", [pytest.param("MT5", marks=pytest.mark.rare), "UMT5"])
def test_a_whole_encoder_decoder_gives_its_encoder(kind: str, tmp_path: Path, opened: Open) -> None:
    saved = write(tmp_path, Pooling(WIDTH, "mean"), Normalize(), kind=kind)
    torch.manual_seed(5)
    whole = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**T5))
    whole.save_pretrained(saved)
    model = opened(saved)
    assert not any(name.startswith("decoder") for name in model.weights)
    with built(model, tmp_path) as ours:
        same(ours, library(saved))
    folder = tmp_path / "hf"
    folder.mkdir()
    compiled = hf.build(MergedModel(model=model, precision="fp32"), CompileSpec(), folder)
    with hf.runner(compiled, "cpu", 1) as runner:
        same(embedder(model, compiled, runner), library(saved))


def test_what_vllm_and_tei_read(tmp_path: Path, opened: Open, edit_json: Edit) -> None:
    saved = write(tmp_path, *STACKS["LaBSE"][1])
    model = opened(saved)
    merged = MergedModel(model=model, precision="fp32")
    vllm.check(merged)
    (tmp_path / "vllm").mkdir()
    compiled = vllm.build(merged, CompileSpec(), tmp_path / "vllm")
    with vllm.runner(compiled, "cpu", 1) as runner:
        same(embedder(model, compiled, runner), library(saved))
    listed = json.loads((tmp_path / "vllm/modules.json").read_text())
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    assert [one["type"] for one in listed] == [f"{module_writer.TYPES}.{kind}" for kind in kinds]
    dense = json.loads((tmp_path / "vllm/2_Dense/config.json").read_text())
    assert dense == {
        "in_features": WIDTH,
        "out_features": WIDTH,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    edit_json(saved / "2_Dense/config.json", activation_function="torch.nn.GELU")
    with pytest.raises(UnsupportedCheckpointError, match="vLLM or TEI") as caught:
        vllm.check(MergedModel(model=opened(saved), precision="fp32"))
    assert "GELU" in caught.value.evidence
