"""What one kind of checkpoint does in its own way: a Layout, one class in one file for each.

What a class leaves out is as transformers and sentence-transformers have it. Tokenizer, prompts,
modules and lengths are read for all of them alike (see embedding.py). Knows no target.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jexport.checkpoints import (
    eager,
    native_mismatch,
    peft_adapter,
    sentence_files,
    sentence_transformer,
    tokenizer_backend,
    transformer_files,
)
from jexport.checkpoints.embedding import OwnCode
from jexport.errors import UnsupportedCheckpointError
from jexport.recipe import LoadSpec
from jexport.types import LowRank, Runner, WeightReader

if TYPE_CHECKING:
    import torch

Parts = tuple[dict[str, WeightReader], dict[str, LowRank], list[Path]]
"""A reader by weight name, the task's deltas under the same names, and the files of both."""


JINA_LICENCE = "CC-BY-NC-4.0"
"""Licence of the weights that Jina publishes (their model cards); a README's own line wins."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose layout is known, and what [load] says of it.

    Args:
        folder: the checkpoint's own.
        home: that of its tokenizer and the Transformer module's file.
        base: that of config.json and weights: another one only where an adapter's base is.
        stated: config.json as it is.
        config: that of the model that is assembled.
        spec: [load] of the recipe.
        peft: the adapter at its root, if there is one.
        transformer: what the Transformer module's file says.
    """

    folder: Path
    home: Path
    base: Path
    stated: Mapping[str, Any]
    config: Mapping[str, Any]
    spec: LoadSpec
    peft: peft_adapter.PeftAdapter | None
    transformer: sentence_files.TransformerSettings


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the tokenizer has to agree with.

    Args:
        width: of the hidden states.
        rows: of the embedding table.
        positions: that the config states, 0 for none.
        table: rows of a learned table of positions that a text can use, 0 for none.
    """

    width: int
    rows: int
    positions: int = 0
    table: int = 0


class Layout:
    """How checkpoints of one kind are read; to be subclassed.

    Attributes:
        name: in the manifest.
        licence: of the published weights (their model cards); a README's own line wins.
        is_jina_v3: pools, cuts and prompts as the authors' encode() of jina-embeddings-v3.
        contextual: whether a token's vector depends on the tokens beside it.
        own: how the checkpoint's own Transformer class embeds, where it has one.
        merges_adapter: whether an adapter at the checkpoint's root is merged into these weights.
        needs_code: whether nothing but the checkpoint's own code can open it.
        takes_code: whether that code, where it is trusted, becomes the reference.
    """

    name: ClassVar[str]
    licence: ClassVar[str] = ""
    is_jina_v3: ClassVar[bool] = False
    contextual: ClassVar[bool] = True
    own: ClassVar[OwnCode | None] = None
    merges_adapter: ClassVar[bool] = False
    needs_code: ClassVar[bool] = False
    takes_code: ClassVar[bool] = True

    def matches(self, folder: Path, config: Mapping[str, Any], *, trust_code: bool) -> bool:
        """Whether a folder holds this layout.

        Args:
            folder: the checkpoint's own.
            config: its config.json; empty where there is none.
            trust_code: whether the checkpoint's own code may run.

        Returns:
            True also where a later one of LAYOUTS matches, too: the first is taken.

        Raises:
            CheckpointError: a file that decides it cannot be read.
        """
        raise NotImplementedError

    def known_tasks(self, folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The tasks that there are adapters for; none, where a class does not say otherwise.

        Args:
            folder: of config.json and weights.
            config: its config.json.

        Returns:
            In the checkpoint's own order, without `none`.

        Raises:
            CheckpointError: what lists them cannot be read.
        """
        return ()

    def check(self, opened: Opened, task: str) -> None:
        """Refuse what this kind of checkpoint cannot be opened for, before its weights are read.

        Args:
            opened: not changed.
            task: asked for; whether there is such a task is checked later.

        Raises:
            JexportError: by name; a class says which.
        """

    def stated_config(self, base: Path) -> dict[str, Any]:
        """config.json, or what takes its place.

        Args:
            base: of the weights.

        Returns:
            Its content.

        Raises:
            CheckpointError: it is missing or broken.
        """
        return transformer_files.read_json(base / "config.json")

    def model_config(
        self, base: Path, stated: Mapping[str, Any], transformer: sentence_files.TransformerSettings
    ) -> dict[str, Any]:
        """The config of the model that is assembled.

        Args:
            base: of config.json.
            stated: as `stated_config` gives it.
            transformer: its arguments for model and tokenizer.

        Returns:
            That of transformers' own class, with the arguments that take effect.

        Raises:
            UnsupportedCheckpointError: another network, or arguments that nothing would read.
            CheckpointError: the class does not take it.
        """
        native_mismatch.check(stated)
        given = sentence_transformer.given_config(base, stated, transformer.config)
        sentence_transformer.check_native(given)
        return given

    def read(self, folder: Path, config: Mapping[str, Any], task: str) -> Parts:
        """Find what one task needs; of weights only names and shapes are read.

        Args:
            folder: of config.json and weights.
            config: that of the model.
            task: one of `known_tasks`, or 'none' for the base model alone.

        Returns:
            Weights under the names in the file, the task's deltas, and the files that hold them.

        Raises:
            CheckpointError: a file is missing or broken, or a dtype holds no weights.
        """
        return sentence_transformer.read(folder, config, task)

    def sizes(self, opened: Opened) -> Sizes:
        """What the tokenizer has to agree with.

        Args:
            opened: config and weights.

        Returns:
            The sizes.

        Raises:
            CheckpointError, UnsupportedCheckpointError: the config has none that can be used.
        """
        width, rows = transformer_files.width_and_rows(opened.config)
        return Sizes(
            width=width,
            rows=rows,
            positions=sentence_transformer.stated_positions(opened.base, opened.transformer.config),
            table=sentence_transformer.positions(opened.base, opened.config),
        )

    def open_tokenizer(self, opened: Opened) -> Any:
        """AutoTokenizer's; that of a known layout needs no code, also when code is trusted.

        Args:
            opened: its home has the files.

        Returns:
            transformers' tokenizer.

        Raises:
            TokenizerError: it cannot be opened.
        """
        arguments = opened.transformer.tokenizer
        return transformer_files.auto_tokenizer(opened.home, arguments=arguments)

    def tokenizing(self, opened: Opened, rows: int) -> tokenizer_backend.Tokenizing:
        """The tokenizer, checked against the rows of the embedding table.

        Args:
            opened: its home has the files.
            rows: of the table.

        Returns:
            Its files and what they decide.

        Raises:
            TokenizerError: it is missing or broken, or gives ids that the table lacks.
        """
        return tokenizer_backend.take(
            opened.home,
            partial(self.open_tokenizer, opened),
            rows=rows,
            do_lower_case=opened.transformer.do_lower_case,
            as_stored=not opened.transformer.tokenizer,
        )

    def assemble(self, opened: Opened, weights: Mapping[str, WeightReader]) -> torch.nn.Module:
        """A fresh model with exactly these weights.

        Args:
            opened: config and arguments.
            weights: all of them, under the names that `read` gives.

        Returns:
            float32, on the CPU, in eval mode, without gradients.

        Raises:
            StateDictError: weights are missing, too many or of another shape.
            CheckpointError, NotFiniteError: config or a weight cannot be used.
        """
        return sentence_transformer.assemble(opened.base, weights, opened.transformer.config)

    def reference(
        self,
        opened: Opened,
        weights: Mapping[str, WeightReader],
        adapter: Mapping[str, LowRank],
    ) -> AbstractContextManager[Runner]:
        """The forward pass with the adapter beside its matrices, as PEFT runs it, never merged.

        Independent of the merge stage: a wrong merge, or another task's adapter in it, shows
        against this. Attention is sdpa, so 8,192 tokens fit in memory.

        Args:
            opened: config and arguments.
            weights: as `read` gives them.
            adapter: the task's deltas by weight name; empty for none.

        Returns:
            Opens what gives last_hidden_state, float32 [batch, sequence, width].

        Raises:
            JexportError: as `assemble`.
        """
        model = sentence_transformer.with_adapter(self.assemble(opened, weights), adapter)
        return eager.opened(model)


class SentenceTransformers(Layout):
    """A folder of sentence-transformers, or any text encoder that transformers has a class for."""

    name = "sentence_transformer"
    merges_adapter = True

    def matches(self, folder: Path, config: Mapping[str, Any], *, trust_code: bool) -> bool:
        """modules.json is enough, and so is an architecture that transformers has: asked last."""
        is_listed = (folder / sentence_files.MODULES).is_file()
        return is_listed or sentence_transformer.is_native(config)


class OwnFormat(Layout):
    """A layout whose model is assembled here, not by AutoModel; to be subclassed."""

    def model_config(
        self, base: Path, stated: Mapping[str, Any], transformer: sentence_files.TransformerSettings
    ) -> dict[str, Any]:
        """config.json as it is: there is no AutoConfig that arguments could be passed to."""
        if transformer.config or transformer.tokenizer:
            raise UnsupportedCheckpointError(
                "arguments for a model that its own code opens are not passed on",
                evidence=f"{transformer.file}: {[*transformer.config, *transformer.tokenizer]}",
                fix="put them into config.json and tokenizer_config.json",
            )
        return dict(stated)

    def sizes(self, opened: Opened) -> Sizes:
        """Those that config.json states."""
        return stated_sizes(opened.config)


def stated_sizes(config: Mapping[str, Any], *, table: int = 0) -> Sizes:
    """The sizes that a config states under their usual names.

    Args:
        config: of the model.
        table: rows of a learned table of positions that a text can use, 0 for none.

    Returns:
        The sizes; positions are 0 where max_position_embeddings is no number.

    Raises:
        CheckpointError: there is no width, or no size of the embedding table.
    """
    width, rows = transformer_files.width_and_rows(config)
    stated = config.get("max_position_embeddings")
    positions = stated if isinstance(stated, int) and stated > 0 else 0
    return Sizes(width=width, rows=rows, positions=positions, table=table)
