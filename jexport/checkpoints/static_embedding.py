"""sentence-transformers' StaticEmbedding: a table with one vector a token, a text is their mean.

model2vec's models (potion) are of this kind, too: `embeddings`, with a `mapping` from token ids to
rows and `weights` of the tokens where there are any. There is no network, so no token's vector
depends on another token, and a text may be as long as it likes. Special tokens are not added.

Source: `StaticEmbedding` of sentence-transformers 6.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jexport.checkpoints import sentence_files, shards, tokenizer_backend
from jexport.checkpoints.layout import Opened, OwnFormat, Parts
from jexport.checkpoints.tokenizer_backend import FILE, Tokenizing
from jexport.checkpoints.transformer_files import check_rows, optional_json
from jexport.errors import CheckpointError, DeviceError, TokenizerError
from jexport.types import Runner, Tensors, WeightReader

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

MODEL_TYPE = "static_embedding"
"""What config.json of an artifact says: transformers has no such architecture."""

LIMITLESS = 2**31 - 1
"""Length limit in tokens of a model that has none."""

TABLE = "embedding.weight"
DISTILLED, MAPPING, TOKEN_WEIGHTS = "embeddings", "mapping", "weights"
"""model2vec's names: row mapping[id] of the table, times weights[id], is a token's vector."""

PADS = ("[PAD]", "<pad>", "<|endoftext|>")
"""Tokens to stand in a padded place; the mask leaves it out, so that any would do."""


class StaticEmbedding(OwnFormat):
    """A table of token vectors, without a network."""

    name = "static_embedding"
    contextual = False
    takes_code = False

    def matches(self, folder: Path, config: Mapping[str, Any], *, trust_code: bool) -> bool:
        """Whether modules.json begins with the library's own StaticEmbedding."""
        listed = sentence_files.modules(folder) or ()
        return any(sentence_files.is_static(one) for one in listed[:1])

    def stated_config(self, base: Path) -> dict[str, Any]:
        """The sizes of the table; sentence-transformers reads nothing of a config.json.

        matryoshka_dimensions are taken where there is one that states them.
        """
        entries = shards.tensors(base)
        table = entries[_table_name(entries, base)]
        rows = entries[MAPPING].shape[0] if _is_mapped(entries) else table.shape[0]
        stated = optional_json(base / "config.json").get("matryoshka_dimensions")
        return {
            "model_type": MODEL_TYPE,
            "hidden_size": table.shape[1],
            "vocab_size": rows,
            "pad_token_id": 0,
            **({"matryoshka_dimensions": stated} if stated else {}),
        }

    def read(self, folder: Path, config: Mapping[str, Any], task: str) -> Parts:
        """The weight TABLE, with one row a token id, and no adapter."""
        entries = shards.tensors(folder)
        name = _table_name(entries, folder)
        table = shards.reader(name, entries[name])
        is_plain = name == TABLE or not {MAPPING, TOKEN_WEIGHTS} & entries.keys()
        weight = table if is_plain else partial(_folded, table, entries)
        return {TABLE: weight}, {}, shards.files(folder, entries)

    def tokenizing(self, opened: Opened, rows: int) -> Tokenizing:
        """tokenizer.json without its post-processor, which adds special tokens.

        Its limit is LIMITLESS unless the file cuts texts itself, as the library then does, too.
        """
        import json

        path = opened.home / FILE
        backend = _backend(path)
        content = json.loads(backend.to_str())
        check_rows(content, rows)
        cut = content.get("truncation") or {}
        stored = content.get("padding") or {}
        known = [backend.token_to_id(token) for token in PADS]
        pad = next((one for one in known if one is not None), int(stored.get("pad_id", 0)))
        pad = pad if 0 <= pad < rows else 0
        # No post-processor: what it does is put special tokens around a text, and offsets, which no
        # vector depends on. The padding only tells the runtime an id.
        backend.post_processor = None
        backend.enable_padding(pad_id=pad, pad_token=backend.id_to_token(pad) or "")
        files = tokenizer_backend.kept(
            json.loads(backend.to_str()), {"tokenizer_class": "PreTrainedTokenizerFast"}
        )
        return Tokenizing(
            files=files,
            read=(path,),
            open=partial(_of_transformers, files[0]),
            max_length=int(cut.get("max_length") or LIMITLESS),
            chat_template=False,
            pads_left=False,
        )

    def assemble(self, opened: Opened, weights: Mapping[str, WeightReader]) -> torch.nn.Module:
        """A module that looks a vector up for each token: last_hidden_state for input_ids."""
        import torch

        class TokenTable(torch.nn.Module):
            """One vector a token, whatever stands beside it."""

            def __init__(self) -> None:
                super().__init__()
                self.config = SimpleNamespace(**opened.config)
                table = weights[TABLE]()
                rows, width = table.shape
                self.embedding = torch.nn.Embedding(rows, width, _weight=table, _freeze=True)

            def forward(
                self, input_ids: torch.Tensor, attention_mask: torch.Tensor
            ) -> SimpleNamespace:
                """Look up [batch, sequence] ids."""
                return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

        return TokenTable().eval()


def _table_name(entries: Mapping[str, shards.Entry], home: Path) -> str:
    """The tensor that holds the vectors. Raises CheckpointError."""
    name = TABLE if TABLE in entries else DISTILLED
    entry = entries.get(name)
    if entry is None or len(entry.shape) != 2 or not all(entry.shape):
        raise CheckpointError(
            "the StaticEmbedding module has no table of vectors",
            evidence=f"{home}: {name} has shape {entry.shape}"
            if entry
            else f"{home} has: {shards.describe(entries) or 'nothing'}",
            fix=f"give weights with {TABLE}, or model2vec's {DISTILLED}, of shape [tokens, width]",
        )
    return name


def _is_mapped(entries: Mapping[str, shards.Entry]) -> bool:
    return TABLE not in entries and MAPPING in entries


def _folded(table: WeightReader, entries: Mapping[str, shards.Entry]) -> torch.Tensor:
    """float32 [token ids, width]: the row of each token id, times its weight."""
    vectors: torch.Tensor = table()
    if MAPPING in entries:
        rows = shards.stored(MAPPING, entries[MAPPING]).long()
        if rows.ndim != 1 or rows.numel() == 0 or not 0 <= rows.min() <= rows.max() < len(vectors):
            raise CheckpointError(
                f"'{MAPPING}' names rows that the table does not have",
                evidence=f"shape {tuple(rows.shape)}; the table has {len(vectors)} rows",
                fix="download the checkpoint again",
            )
        vectors = vectors[rows]
    if TOKEN_WEIGHTS in entries:
        weights = shards.reader(TOKEN_WEIGHTS, entries[TOKEN_WEIGHTS])()
        if tuple(weights.shape) != (len(vectors),):
            raise CheckpointError(
                f"'{TOKEN_WEIGHTS}' is of another vocabulary than the table",
                evidence=f"shape {tuple(weights.shape)} for {len(vectors)} tokens",
                fix="download the checkpoint again",
            )
        vectors = vectors * weights[:, None]
    return vectors.contiguous()


def _backend(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception, whatever is wrong
        raise TokenizerError(
            "the checkpoint's tokenizer.json cannot be read",
            evidence=f"{path.parent}: {error!r}",
            fix="save the tokenizer with the StaticEmbedding module, and add it",
        ) from error


def _of_transformers(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def runner(folder: Path, device: str) -> Iterator[Runner]:
    """Open a written folder: rows of a table in numpy, on the CPU.

    Args:
        folder: of model.safetensors with TABLE.
        device: 'auto' or 'cpu'.

    Yields:
        Gives last_hidden_state, float32 [batch, sequence, width].

    Raises:
        DeviceError: another device.
        CheckpointError: the table cannot be read.
    """
    if device not in ("auto", "cpu"):
        raise DeviceError(
            f"a table of token vectors is not looked up on '{device}'",
            evidence="the artifact has no network: copying the texts there would take longer",
            fix="use device='cpu', or build --target onnx",
        )
    table = shards.reader(TABLE, shards.tensors(folder)[TABLE])().numpy()

    def run(feed: Tensors) -> Tensors:
        return {"last_hidden_state": table[feed["input_ids"]]}

    yield run
