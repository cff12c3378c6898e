"""The nouns that flow between stages: frozen, keyword-only, free of any framework.

From `export` on, large things travel as a path and a digest. No noun has an optional field that a
later stage fills in. This module knows no stage, no target and no file format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Tensors: TypeAlias = "Mapping[str, np.ndarray]"
Runner: TypeAlias = Callable[[Tensors], Tensors]
"""One forward pass. Takes `input_ids` and `attention_mask` (int64 [batch, sequence]).

It may have a method `only(names)` that gives a Runner of these outputs alone: what is not asked for
is not copied from the device. May be called from several threads at once."""


WINDOW_TOKENS = 8_192
"""Tokens of one forward pass where token vectors depend on no other token: a text without a length
limit then takes no more memory the longer it is (at 1,024 columns 32 MiB)."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How an opened engine wants its batches.

    Args:
        tokens: padded tokens of one forward pass when many texts are embedded.
        length_multiple: lengths are rounded up to it, or where they are long to a power of two
            times it, so that shapes repeat.
        in_flight: batches that may run or wait at once; tokenising and copying overlap with
            running.
        pooled: whether the engine's own `sentence_embedding` is asked for, where the graph has one.
        few_shapes: when passes repeat (runtime/batches.py), for an engine that keeps code for every
            shape; rows that are missing are filled and dropped. 'many': in calls of two full
            batches and more; 'always': for one text too, and opening runs its lengths.
    """

    tokens: int = 1024
    length_multiple: int = 1
    in_flight: int = 1
    pooled: bool = False
    few_shapes: Literal["never", "many", "always"] = "never"


WeightReader: TypeAlias = Callable[[], Any]
"""Reads one weight, when called, as a float32 torch tensor."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a graph says of a tensor.

    Args:
        name: of the input or output.
        dtype: numpy's name of the type.
        shape: sizes; a str is a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a graph takes and gives.

    Args:
        inputs: in the graph's order.
        outputs: in the graph's order.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def output(self, name: str) -> TensorSpec | None:
        """One output.

        Args:
            name: of the output.

        Returns:
            Its spec, or None where the graph has none of that name.
        """
        return next((spec for spec in self.outputs if spec.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How a text becomes an embedding: everything but the weights.

    Args:
        task: that the weights are for, 'none' for a model without tasks.
        prompt: put before each text.
        pooling: 'mean', 'cls', 'max', 'mean_sqrt_len', 'weightedmean' or 'last'; several joined by
            '+' where `modules` has them.
        normalize: whether the model's own vectors have length 1.
        dimension: full size of a vector.
        matryoshka: smaller sizes it was trained for (vectors are cut, then normalised again).
        max_tokens: length limit, special tokens included.
        prompts: every prompt by its name.
        default_prompt_name: the name of `prompt`, '' for none.
        similarity: how two vectors are compared: 'cosine', 'dot', 'euclidean' or 'manhattan'.
        truncate_dim: the size that vectors are cut to after normalisation, 0 for the full size.
        include_prompt: False leaves the prompt's tokens out of the pooling.
        use: that `prompt` is of ('query', 'document', ...), '' for the checkpoint's default.
        side: 'query' or 'document' where the weights are those of one side of retrieval only (a
            Router's route), '' where they embed both.
        contextual: False where a token's vector depends on no other token: a table of vectors.
        modules: what makes a text's vector of its token vectors, a line each, where that is more
            than one pooling and its normalisation: the engine does all of it, and gives no token
            vectors.
    """

    task: str
    prompt: str
    pooling: str
    normalize: bool
    dimension: int
    matryoshka: tuple[int, ...]
    max_tokens: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""
    similarity: str = "cosine"
    truncate_dim: int = 0
    include_prompt: bool = True
    use: str = ""
    side: str = ""
    contextual: bool = True
    modules: tuple[str, ...] = ()

    @property
    def forward_tokens(self) -> int:
        """Tokens of the longest text in one forward pass."""
        return self.max_tokens if self.contextual else min(self.max_tokens, WINDOW_TOKENS)


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """A file and what is in it.

    Args:
        path: relative, with forward slashes.
        size_bytes: of its content.
        sha256: of its content, 64 hex digits.
    """

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model came from: what a manifest says of its origin.

    Args:
        name: hub id or folder name.
        layout: name of the checkpoint layout that read it.
        revision: the 40-hex commit on a hub, '' for a folder.
        code_revision: commit of the repository that its code came from, '' for none.
        licence: SPDX id as the checkpoint or the recipe states it, '' for none.
        files: every file that was read.
        code: every .py file that was run (remote code), else empty.
    """

    name: str
    layout: str
    revision: str
    code_revision: str
    licence: str
    files: tuple[FileDigest, ...]
    code: tuple[FileDigest, ...]


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A LoRA delta `up @ down * scaling` of one weight [rows, columns].

    Args:
        up: reads float32 [rows, rank].
        down: reads float32 [rank, columns].
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    up: WeightReader
    down: WeightReader
    scaling: float


@dataclass(frozen=True, kw_only=True)
class HeadModule:
    """One module after the transformer.

    Args:
        kind: the class's name in sentence-transformers: 'Pooling', 'Dense', 'LayerNorm' or
            'Normalize'.
        config: its config.json with every key that takes effect, under the names of
            sentence-transformers 6; `pooling_mode` is a list of Embedding's names of poolings.
        weights: a reader by the name in its file.
    """

    kind: str
    config: Mapping[str, Any]
    weights: Mapping[str, WeightReader]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint opened for one task; weights stay on disk until `assemble` reads them.

    Args:
        folder: where the checkpoint lies.
        config: its config.json.
        weights: a reader by weight name.
        adapter: per weight name, the delta that the task adds; empty when there is none (left).
        assemble: weights -> a fresh float32 torch module in eval mode with exactly those.
        tokenize_reference: texts -> the checkpoint's own token ids, prompt included, a list each.
        reference: opens the checkpoint's own forward pass, the adapter applied but never merged.
        tokenizer_files: copied as they are into the artifact.
        embedding: how its texts become embeddings.
        source: where it came from.
        notes: what the user should know of it, a line each.
        head: the modules after the transformer in their order, the first is the Pooling; () where
            they are one pooling and its normalisation, which `embedding` names.
    """

    folder: Path
    config: Mapping[str, Any]
    weights: Mapping[str, WeightReader]
    adapter: Mapping[str, LowRank]
    assemble: Callable[[Mapping[str, WeightReader]], Any]
    tokenize_reference: Callable[[list[str]], list[list[int]]]
    reference: Callable[[], AbstractContextManager[Runner]]
    tokenizer_files: tuple[Path, ...]
    embedding: Embedding
    source: Source
    notes: tuple[str, ...] = ()
    head: tuple[HeadModule, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A checkpoint with nothing left to merge, for a target that takes weights and no graph.

    Args:
        model: its `adapter` is empty; weights are still read, and merged, one by one when called.
        precision: what they are to be written in.
    """

    model: LoadedModel
    precision: str


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """An ONNX graph on disk: a file and, beside it, one external-data file.

    Args:
        path: of the graph.
        signature: what it takes and gives.
        precision: of its arithmetic.
        opset: of standard ONNX.
        sha256: digest over graph and weights.
        max_tokens: the longest text that it will be given, special tokens included.
        pooling: how its token vectors become a text's, as in Embedding; '' where a target may not
            pool.
        normalize: whether they are brought to length 1 then.
    """

    path: Path
    signature: Signature
    precision: str
    opset: int
    sha256: str
    max_tokens: int
    pooling: str = ""
    normalize: bool = False


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """What a target wrote: a folder with the files that its engine opens.

    Args:
        target: name of the target.
        precision: of the artifact.
        folder: that holds the files.
        files: names inside `folder`; the first is the one that the engine is given.
        signature: what the engine takes and gives.
        facts: what the target wants the manifest to say (operator counts, fusions), JSON-ready.
    """

    target: str
    precision: str
    folder: Path
    files: tuple[str, ...]
    signature: Signature
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text.

    Args:
        text: as it is embedded, without a prompt.
        language: ISO 639-1.
        kind: what sort of text it is, such as 'verse' or 'code'; '' for its task's usual ones.
    """

    text: str
    language: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Texts of one task from a folder in `calibration_data/`.

    Args:
        name: of the set.
        samples: in the order of its files.
        sha256: digest of its files.
    """

    name: str
    samples: tuple[Sample, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ReferenceFiles:
    """What the reference library gives for the validation texts, in a folder.

    Args:
        folder: that holds them.
        texts: how many were embedded.
        library: its name and version.
    """

    folder: Path
    texts: int
    library: str


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far a candidate is from its reference, and which gates it failed.

    Args:
        passed: whether it failed none.
        failures: in words, one per gate and group.
        metrics: overall, by language, by length bucket and by dimension, as `parity.compare`
            returns them.
    """

    passed: bool
    failures: tuple[str, ...]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """A compiled model that passed: its report, and what was measured of it beside float models.

    Args:
        folder: holds parity.json, and the reference's vectors by their own name.
        report: of the comparison.
        sizes: bytes of graph and weights by precision, for int8.
        measured: what another run measures otherwise (speeds), or with another artifact beside
            (ranking).
        notes: all of it in words, a line each.
    """

    folder: Path
    report: ParityReport
    sizes: Mapping[str, int]
    measured: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage of one run.

    Args:
        stage: its name.
        seconds: wall time.
        peak_memory_mib: peak resident memory of the process, in MiB.
        note: what it did, in words.
    """

    stage: str
    seconds: float
    peak_memory_mib: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json, read and checked.

    Args:
        content: follows `manifest.schema.json`.
    """

    content: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A packaged artifact.

    Args:
        path: its folder.
        manifest: of that folder.
    """

    path: Path
    manifest: Manifest
