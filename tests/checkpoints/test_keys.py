"""The table of keys: current with the installed libraries, and what its documentation says."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import sentence_transformers
import transformers
from sentence_transformers.base import model as base_model
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer, transformer
from sentence_transformers.cross_encoder import model as cross_encoder
from sentence_transformers.multi_vector_encoder import model as multi_vector
from sentence_transformers.sentence_transformer import model as sentence_model
from sentence_transformers.sentence_transformer.modules import (
    Dropout,
    LayerNorm,
    Pooling,
    StaticEmbedding,
    pooling,
)
from sentence_transformers.sparse_encoder import model as sparse_encoder
from transformers import tokenization_utils_base, tokenization_utils_tokenizers
from transformers.models.auto import tokenization_auto

from jexport.checkpoints import (
    keys,
    keys_page,
    module_stack,
    routes,
    sentence_files,
    static_embedding,
)
from jexport.errors import UnsupportedCheckpointError
from jexport.runtime import prompts

PAGE = Path(__file__).parents[2] / "docs" / "checkpoint-keys.md"
PLUMBING = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
    "commit_message",
    "repo_id",
    "save_jinja_files",
    "_from_pipeline",
    "_from_auto",
    "tokenizer",
    "_json_truncation",
    "_json_padding",
    "_spm_precompiled_charsmap",
    "use_source_tokenizer",
    "sanitize_control_tokens",
    "max_target_length",
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "add_special_tokens",
    "max_pad_length",
}
"""Arguments of calls, of fetching and saving: no file of a checkpoint gives them."""


def tree(module: ModuleType | type | Any) -> ast.AST:
    source = inspect.getsource(module)
    return ast.parse(textwrap.dedent(source))


def read_from(code: ast.AST, names: set[str]) -> Iterator[str]:
    """Keys that code reads out of dicts of these names."""
    for node in ast.walk(code):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in names:
            key = node.slice
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("get", "pop", "setdefault")
            and ast.unparse(node.func.value) in names
            and node.args
        ):
            key = node.args[0]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) in names:
            key = node.left
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def lacking(read: Iterable[str], file: keys.File, *, allowed: set[str] = frozenset()) -> set[str]:  # type: ignore[assignment]
    return set(read) - set(file.keys) - allowed


def parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def test_modules_json() -> None:
    read = set(read_from(tree(base_model), {"module_config"}))
    assert {"type", "path", "name", "kwargs"} <= read
    assert not lacking(read, keys.MODULES)


def test_config_sentence_transformers_json() -> None:
    read = set(read_from(tree(base_model.BaseModel._get_model_type), {"config"}))
    for module in (base_model, sentence_model, sparse_encoder, cross_encoder, multi_vector):
        read |= set(read_from(tree(module), {"model_config"}))
    assert {"prompts", "truncate_dim", "requirements", "model_type"} <= read
    assert not lacking(read, keys.SENTENCE_TRANSFORMER)


def test_sentence_bert_config_json() -> None:
    read = parameters(Transformer) - {"model_name_or_path"} | set(Transformer.config_keys)
    old = {"model_args", "tokenizer_args", "config_args"}
    assert not lacking(read | old, keys.TRANSFORMER)
    assert not lacking(Transformer._VALID_PROCESSING_KWARGS_KEYS, keys.PROCESSING)
    named = {
        node.value
        for node in ast.walk(tree(Transformer.load_config))
        if isinstance(node, ast.Constant) and str(node.value).endswith("_config.json")
    }
    assert named == set(sentence_files.TRANSFORMER)
    assert {new for new, _, _ in sentence_files.ARGUMENTS} | old <= set(keys.TRANSFORMER.keys)
    assert "modality_config" in transformer.Transformer.config_keys


def test_modules_of_their_own() -> None:
    read = parameters(Pooling) | set(pooling._LEGACY_POOLING_MODE_KWARGS)
    assert not lacking(read | set(Pooling.config_key_renames), keys.POOLING)
    assert not lacking(parameters(Normalize) | set(Normalize.config_keys), keys.NORMALIZE)
    assert not lacking(parameters(Dropout), keys.DROPOUT)
    assert not lacking(parameters(Dense) | set(Dense.config_keys), keys.DENSE)
    assert not lacking(parameters(LayerNorm), keys.LAYER_NORM)
    modes = {module_stack.NEW_POOLING_NAMES.get(mode, mode) for mode in Pooling.POOLING_MODES}
    assert modes == set(module_stack.POOLINGS)
    assert list(module_stack.POOLING_MODES) == list(pooling._LEGACY_POOLING_MODE_KWARGS)


def test_a_router_and_a_static_embedding() -> None:
    read = set(read_from(tree(Router.load), {"config"}))
    assert {"types", "structure", "parameters"} <= read
    assert not lacking(read, keys.ROUTER)
    stated = set(Router.config_keys) | (parameters(Router) - {"sub_modules"})
    assert "default_route" in stated
    assert not lacking(stated, keys.ROUTER_PARAMETERS)
    assert (routes.CONFIG, set(routes.SIDES)) == (Router.config_file_name, set(prompts.ALWAYS))
    names = {static_embedding.TABLE, static_embedding.DISTILLED}
    names |= {static_embedding.MAPPING, static_embedding.TOKEN_WEIGHTS}
    assert set(read_from(tree(StaticEmbedding.load), {"weights"})) == names


def test_rules_of_prompts_and_similarity() -> None:
    kind = sentence_transformers.SentenceTransformer
    assert set(kind._default_prompts) == set(prompts.ALWAYS)
    lists = [
        ast.literal_eval(node)
        for node in ast.walk(tree(kind.encode_document))
        if isinstance(node, ast.List) and node.elts
    ]
    assert list(prompts.DOCUMENT_NAMES) in lists
    assert set(kind.SUPPORTED_SIMILARITY_FN_NAMES) == set(sentence_files.SIMILARITIES)


def test_tokenizer_config_json() -> None:
    dicts = {"kwargs", "init_kwargs", "local_kwargs", "tokenizer_config"}
    base, fast = tokenization_utils_base.PreTrainedTokenizerBase, transformers.TokenizersBackend
    code = [base.__init__, base._from_pretrained, fast.__init__, fast.convert_to_native_format]
    read = {key for one in code for key in read_from(tree(one), dicts)}
    read |= set(
        read_from(tree(tokenization_auto.AutoTokenizer.from_pretrained), {"tokenizer_config"})
    )
    assert {"model_max_length", "split_special_tokens", "post_processor", "auto_map"} <= read
    assert not lacking(read, keys.TOKENIZER, allowed=PLUMBING)
    assert tokenization_utils_tokenizers.TokenizersBackend is fast


def test_adapter_config_json() -> None:
    read = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert {"use_rslora", "rank_pattern", "use_dora"} <= read
    assert not lacking(read, keys.ADAPTER)


def test_the_guard_sees_a_key_that_the_table_lacks() -> None:
    code = ast.parse('a = model_config["x"]\nb = model_config.get("y", 1)\nc = "z" in model_config')
    assert set(read_from(code, {"model_config"})) == {"x", "y", "z"}
    assert lacking({"prompts", "x"}, keys.SENTENCE_TRANSFORMER) == {"x"}


def test_the_page_is_current() -> None:
    """`python -m jexport.checkpoints.keys_page > docs/checkpoint-keys.md` writes it again."""
    assert PAGE.read_text(encoding="utf-8") == keys_page.text()
    assert all(f"\n## {file.title}\n" in keys_page.text() for file in keys.FILES)


@pytest.mark.parametrize("value", [False, None, [], {}, ""])
def test_what_asks_for_nothing_passes(value: Any) -> None:
    keys.check(keys.ADAPTER, {"use_dora": value}, where="adapter_config.json")


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="'promts' is a key that") as caught:
        keys.check(keys.SENTENCE_TRANSFORMER, {"promts": {}}, where="config_x.json")
    assert "'prompts'" in caught.value.fix
    keys.check(keys.NORMALIZE, {"anything": 3}, where="2_Normalize/config.json")
    with pytest.raises(UnsupportedCheckpointError, match=r"config_x\.json: 'model_type'"):
        keys.check(
            keys.SENTENCE_TRANSFORMER, {"model_type": "SparseEncoder"}, where="config_x.json"
        )
