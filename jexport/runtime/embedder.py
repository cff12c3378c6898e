"""Embedder: texts -> embeddings. Sorts by length, batches by tokens, runs, pools, un-sorts.

The engine is a `flow.Runner`: this module knows no engine, no artifact folder and no text file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypedDict, Unpack, cast

import numpy as np

from jexport.errors import (
    DimensionError,
    NotFiniteError,
    TextInputError,
    TextTooLongError,
    UnsupportedGraphError,
)
from jexport.flow import Batching, Embedding, Runner
from jexport.runtime import prompts
from jexport.runtime.lanes import in_order
from jexport.runtime.pool import Floats, Ints, finish, mean_by_group, pool, without_prompt
from jexport.runtime.tokenise import TextTokenizer, TokenOffsets, check_texts

TOKEN_VECTORS = "last_hidden_state"
"""A graph's output before pooling: float32 [batch, sequence, dim]."""

TEXT_VECTORS = "sentence_embedding"
"""A graph's output after pooling and L2-normalisation: float32 [batch, dim]."""

MANY = 32
"""Batches in one call from which opening lanes pays: OpenVINO took 13 batches' time to open MiniLM
again, and saved about a quarter of each batch from then on."""


class EncodeOptions(TypedDict, total=False):
    """The options of `Embedder.encode` that others pass on; its defaults hold."""

    dimensions: int | None
    normalize: bool | None
    prompt: bool | str
    prompt_name: str | None
    truncate: bool
    max_batch_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What becomes of a pooled vector.

    normalize: to length 1. cut: columns to keep, None for all; cut_last: after normalising.
    again: normalise once more after that. columns: of the result.
    """

    normalize: bool
    cut: int | None
    cut_last: bool
    again: bool
    columns: int

    def of(self, pooled: Floats) -> Floats:
        """Vectors [n, dim] as they are returned: float32 [n, columns]."""
        made = finish(pooled, dimensions=self.cut, normalize=self.normalize, cut_last=self.cut_last)
        return finish(made, dimensions=None, normalize=True) if self.again else made


class Embedder:
    """Embeds texts with one artifact. A context manager; `close()` frees the engine.

    embedding: how a text becomes an embedding. truncated: how many texts were cut to the length
    limit since the Embedder was made (never reset: a stream is many `encode` calls).
    """

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        runner: Runner,
        embedding: Embedding,
        outputs: Sequence[str],
        release: Callable[[], None] | None = None,
        lanes: Callable[[], Sequence[Runner]] | None = None,
        batching: Batching | None = None,
    ) -> None:
        """Join a tokenizer and an engine.

        outputs: names of the graph's outputs. `last_hidden_state` is used where there is one, else
        `sentence_embedding`, or the other way round where batching.pooled; with neither,
        UnsupportedGraphError. release: called once by `close`.
        lanes: opens runners that take a batch each at the same time, or none; called at most once,
        by the first `encode` of many batches. A batch gives the same vectors in each of them.
        batching: how the engine wants its batches, where `encode` is given no other number of
        tokens; None for the defaults.
        """
        self.embedding = embedding
        self.truncated = 0
        self._tokenizer = tokenizer
        self._runner: Runner | None = runner
        self._release = release
        self._open_lanes = lanes
        self._batching = batching or Batching()
        self._lanes: Sequence[Runner] = ()
        self._outputs = [name for name in (TOKEN_VECTORS, TEXT_VECTORS) if name in outputs]
        if not self._outputs:
            raise UnsupportedGraphError(
                "embedder: the graph gives no embedding",
                evidence=f"outputs: {', '.join(outputs) or 'none'}",
                fix=f"export it with the output {TOKEN_VECTORS} or {TEXT_VECTORS}",
            )

    def __enter__(self) -> Embedder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine. Closing twice is harmless; embedding afterwards is a RuntimeError."""
        release, self._release, self._runner = self._release, None, None
        self._open_lanes, self._lanes = None, ()
        if release is not None:
            release()

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt: bool | str = True,
        prompt_name: str | None = None,
        truncate: bool = True,
        max_batch_tokens: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        first_index: int = 0,
    ) -> Floats:
        """Embed texts: float32 [n, d] in the order given, or [d] for a single str.

        dimensions: keep the first d of the vector, 1 to the full size; only the full size when the
        model was not trained for smaller ones. None: the size that the checkpoint states, else the
        full one. normalize: None does what the checkpoint does, True brings every vector to length
        1 after the cut, False leaves the pooled vector at its own length. Where the checkpoint
        normalises, a cut vector is normalised again, unless the checkpoint has a truncate_dim:
        sentence-transformers cuts after normalising, and so is it done here then. prompt: True
        puts the artifact's default prompt before each text, False nothing, a str that instead.
        prompt_name: takes that prompt of the artifact (`embedding.prompts`). truncate: cut
        texts over the length limit (and count them in `truncated`), else refuse them.
        max_batch_tokens: padded tokens of one forward pass (a longer text is run alone), None for
        what suits the engine. on_batch: called after each forward pass with how many texts it held.
        first_index: the number of the first text in error messages, for a part of something longer.

        Raises TextInputError, TextTooLongError (both name the text), DimensionError, PromptError,
        UnsupportedGraphError (normalize=False on a graph that normalises), NotFiniteError.
        """
        shape = self._shape(dimensions, normalize)
        output = self._output(normalize=shape.normalize)
        many = [texts] if isinstance(texts, str) else list(texts)
        check_texts(many, first_index=first_index)
        prefix = prompts.text(self.embedding, prompt, prompt_name)
        skip = self._tokens_to_skip(prefix)
        prompted = [prefix + text for text in many] if prefix else many
        ids = self._limited(prompted, truncate=truncate, first_index=first_index)
        vectors = np.empty((len(ids), shape.columns), dtype=np.float32)
        most = self._batching.tokens if max_batch_tokens is None else max_batch_tokens
        batches = plan_batches([len(one) for one in ids], most)

        def forward(lane: Runner, rows: list[int]) -> Floats:
            return self._forward(lane, [ids[row] for row in rows], output, skip)

        # Closed at once whatever is raised here: a traceback would keep it, and its lanes, going.
        with contextlib.closing(in_order(batches, self._runners(len(batches)), forward)) as done:
            for rows, pooled in zip(batches, done, strict=True):
                _check_finite(pooled, "text", [first_index + row for row in rows])
                vectors[rows] = shape.of(pooled)
                if on_batch is not None:
                    on_batch(len(rows))
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_query(self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]) -> Floats:
        """Embed queries: `encode` with the checkpoint's prompt for them.

        As sentence-transformers' encode_query: without `prompt` or `prompt_name`, the prompt named
        'query', and none where there is no such prompt, whatever the default prompt is.

        Raises:
            UnknownTaskError: the artifact is of a task that embeds documents only.
        """
        return self.encode(texts, **self._sided(options, prompts.QUERY_NAMES))

    def encode_document(
        self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]
    ) -> Floats:
        """Embed documents: `encode` with the checkpoint's prompt for them.

        As sentence-transformers' encode_document: without `prompt` or `prompt_name`, the prompt
        named 'document', and none where there is no such prompt, whatever the default prompt is.

        Raises:
            UnknownTaskError: the artifact is of a task that embeds queries only.
        """
        return self.encode(texts, **self._sided(options, prompts.DOCUMENT_NAMES))

    def _sided(self, options: EncodeOptions, names: tuple[str, ...]) -> EncodeOptions:
        """The options with the prompt of one side of retrieval, unless they choose one."""
        name = prompts.name_for(self.embedding, names)
        if options.get("prompt", True) is not True or options.get("prompt_name") is not None:
            return options
        return {**options, "prompt_name": name}

    def late_chunking(
        self,
        chunks: Sequence[str],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt: bool | str = True,
        prompt_name: str | None = None,
    ) -> Floats:
        """Embed the chunks of one long text, each in the context of all: float32 [len(chunks), d].

        The chunks are joined as they are, the prompt is put before, and one forward pass gives the
        token vectors; a chunk's embedding is the mean over the tokens that begin in it (white space
        before a word aside). A token across a border belongs to the chunk where it begins. Options
        as in `encode`.
        Source: Late Chunking, arXiv 2409.04701. One difference: its section 4.1 adds the prompt and
        the first special token to the first chunk and the last one to the last. Here they belong to
        no chunk, so that a chunk's vector does not depend on being first or last, and a short first
        chunk is not mostly prompt.

        Raises TextInputError (a chunk without a token, or not a str), TextTooLongError,
        DimensionError, UnsupportedGraphError (no token vectors, or another pooling than the mean),
        NotFiniteError.
        """
        shape = self._shape(dimensions, normalize)
        self._check_late_chunking(chunks)
        if not chunks:
            return np.empty((0, shape.columns), dtype=np.float32)
        prefix = prompts.text(self.embedding, prompt, prompt_name)
        tokens = self._tokenizer.offsets(prefix + "".join(chunks))
        if len(tokens.ids) > self._tokenizer.max_tokens:
            raise _too_long("the joined text", len(tokens.ids), self._tokenizer.max_tokens)
        owner = _chunk_of_each_token(tokens, len(prefix), [len(chunk) for chunk in chunks])
        empty = np.flatnonzero(np.bincount(owner[owner >= 0], minlength=len(chunks)) == 0)
        if len(empty):
            raise TextInputError(
                f"late chunking: chunk {empty[0]} has no token",
                evidence=f"chunk {empty[0]} is {chunks[empty[0]]!r:.80}; no token begins in it",
                fix="join it with a neighbour, or leave it out",
            )
        hidden = self._run(self._runners(1)[0], [tokens.ids], TOKEN_VECTORS)[1]
        vectors = mean_by_group(hidden[0], owner, len(chunks))
        _check_finite(vectors, "chunk", range(len(chunks)))
        return shape.of(vectors)

    def _shape(self, dimensions: int | None, normalize: bool | None) -> _Shape:
        """What becomes of pooled vectors. Raises DimensionError."""
        stated = self.embedding.truncate_dim
        columns = self._size(dimensions)
        return _Shape(
            normalize=self.embedding.normalize if normalize is None else normalize,
            cut=None if columns == self.embedding.dimension else columns,
            cut_last=stated > 0,
            again=stated > 0 and normalize is True,
            columns=columns,
        )

    def _tokens_to_skip(self, prefix: str) -> int:
        """Tokens of the prompt that the pooling leaves out."""
        if self.embedding.include_prompt or not prefix:
            return 0
        return self._tokenizer.prompt_tokens(prefix)

    def _size(self, dimensions: int | None) -> int:
        """Columns of the vectors to return; DimensionError when the model does not offer them."""
        full, stated = self.embedding.dimension, self.embedding.truncate_dim
        trained = self.embedding.matryoshka or ((stated,) if stated else ())
        size = (stated or full) if dimensions is None else dimensions
        if size == full or (trained and type(size) is int and 1 <= size <= full):
            return size
        offered = f"trained for {', '.join(map(str, trained))}" if trained else "no smaller size"
        raise DimensionError(
            f"encode: this artifact does not offer {dimensions!r} dimensions",
            evidence=f"its vectors have {full} dimensions, {offered}",
            fix=f"ask for 1 to {full}" if trained else f"ask for {full}, or leave dimensions out",
        )

    def _output(self, *, normalize: bool) -> str:
        """The output to ask the engine for. Raises UnsupportedGraphError."""
        # What the graph pools is what the checkpoint does, and nothing less.
        as_stated = normalize or not self.embedding.normalize
        whole = as_stated and self.embedding.include_prompt
        if not whole and TOKEN_VECTORS not in self._outputs:
            raise _needs_token_vectors("normalize=False", f"{TEXT_VECTORS} is already normalised")
        pooled = self._batching.pooled and whole and TEXT_VECTORS in self._outputs
        return TEXT_VECTORS if pooled else self._outputs[0]

    def _limited(
        self, texts: Sequence[str], *, truncate: bool, first_index: int
    ) -> list[list[int]]:
        """Token ids of each text within the length limit; over-long ones are counted or refused."""
        ids = self._tokenizer.token_ids(texts, first_index=first_index)
        for row, one in enumerate(ids):
            if len(one) <= self._tokenizer.max_tokens:
                continue
            if not truncate:
                name = f"text {first_index + row}"
                raise _too_long(name, len(one), self._tokenizer.max_tokens)
            ids[row] = self._tokenizer.truncate(one)
            self.truncated += 1
        return ids

    def _runners(self, batches: int) -> Sequence[Runner]:
        """The engine, in lanes when there are that many batches; at least one runner."""
        if self._runner is None:
            raise RuntimeError("this Embedder is closed")
        if batches >= MANY and self._open_lanes is not None:
            open_lanes, self._open_lanes = self._open_lanes, None
            self._lanes = open_lanes()
        # One batch goes through the runner that gives it every core.
        return self._lanes if batches > 1 and self._lanes else (self._runner,)

    def _forward(
        self, runner: Runner, batch: Sequence[Sequence[int]], output: str, skip: int = 0
    ) -> Floats:
        """One vector per row of a batch, not yet cut or normalised here: float32 [batch, dim].

        skip: tokens at the start of each row that the pooling leaves out.
        """
        mask, vectors = self._run(runner, batch, output)
        if output == TEXT_VECTORS:
            return vectors
        return pool(vectors, without_prompt(mask, skip), self.embedding.pooling)

    def _run(
        self, runner: Runner, batch: Sequence[Sequence[int]], output: str
    ) -> tuple[Ints, Floats]:
        """The mask of a padded batch and one of the graph's outputs for it, its shape checked."""
        if self._runner is None:
            raise RuntimeError("this Embedder is closed")
        feeds = self._tokenizer.pad(batch)
        mask = feeds["attention_mask"]
        values = np.asarray(only(runner, output)(feeds)[output], dtype=np.float32)
        lead = mask.shape if output == TOKEN_VECTORS else mask.shape[:1]
        expected = (*lead, self.embedding.dimension)
        if values.shape != expected:
            raise UnsupportedGraphError(
                "embedder: the graph's output has another shape than the manifest says",
                evidence=f"{output} is {list(values.shape)}, expected {list(expected)}",
                fix="build the artifact again",
            )
        return mask, values

    def _check_late_chunking(self, chunks: Sequence[str]) -> None:
        """Refuse what has no token vectors to average, and chunks that are not a list of str."""
        if TOKEN_VECTORS not in self._outputs:
            raise _needs_token_vectors("late chunking", f"the graph gives only {TEXT_VECTORS}")
        if self.embedding.pooling != "mean":
            raise UnsupportedGraphError(
                "late chunking: the model does not pool with the mean",
                evidence=f"its pooling is '{self.embedding.pooling}'",
                fix="embed each chunk by itself with encode",
            )
        if isinstance(chunks, str):
            raise TextInputError(
                "late chunking: one str instead of a list of chunks",
                evidence=f"chunks is {chunks!r:.80}",
                fix="split the text first, or use encode",
            )
        check_texts(chunks)


def only(runner: Runner, output: str) -> Runner:
    """The runner asked for one output alone, where it can be."""
    ask = getattr(runner, "only", None)
    return runner if ask is None else cast(Runner, ask((output,)))


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group rows of similar length so that rows x longest <= max_batch_tokens; longest first.

    lengths: tokens of each row. Returns the row numbers of each batch; every row is in exactly one,
    and a row over the limit is alone. Of all cuts of the rows sorted by length, it takes the one
    with the fewest tokens, padding included, where each batch costs 1/64 of the limit on top: a
    forward pass of MiniLM cost as much as 7 tokens, and padding [500, 10] doubles the work. On
    1,500 mixed texts it padded 0.3 % (filling each batch to the limit: 1.0 %) and took 5 ms.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cost = np.zeros(len(order) + 1)  # of the first n rows in that order, cut as well as possible
    begin = [0] * (len(order) + 1)  # where the last batch of that cut begins
    for stop, row in enumerate(order, 1):
        longest = max(1, lengths[row])
        low = max(0, stop - max(1, max_batch_tokens // longest))
        candidates = cost[low:stop] + np.arange(stop - low, 0, -1) * longest
        best = int(candidates.argmin())
        begin[stop] = low + best
        cost[stop] = candidates[best] + max_batch_tokens / 64
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[begin[stop] : stop])
        stop = begin[stop]
    return batches


def _chunk_of_each_token(tokens: TokenOffsets, start: int, sizes: Sequence[int]) -> Ints:
    """The chunk in which each token begins, -1 for the prompt and special tokens: int64 [tokens].

    start: the character where the first chunk begins. sizes: characters of each chunk.
    """
    borders = start + np.cumsum([0, *sizes])
    owner = np.searchsorted(borders, tokens.starts, side="right") - 1
    # A token that stands for no character, at the very end, begins after the last border.
    owner = np.minimum(owner, len(sizes) - 1)
    owner[tokens.special] = -1
    return owner.astype(np.int64)


def _check_finite(vectors: Floats, noun: str, numbers: Sequence[int]) -> None:
    """Refuse a NaN or an infinity: written into an index it would be found much later, if ever."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise NotFiniteError(
            f"the vector of {noun} {numbers[int(finite.argmin())]} is not finite",
            evidence=f"NaN or infinity in {(~finite).sum()} of {len(vectors)} vectors of its batch",
            fix="use an artifact of higher precision (fp32), and run jexport verify on this one",
        )


def _too_long(name: str, tokens: int, limit: int) -> TextTooLongError:
    return TextTooLongError(
        f"{name} is too long",
        evidence=f"{tokens} tokens with prompt and special tokens; the limit is {limit}",
        fix="split it, or let encode truncate it (truncate=True; no --no-truncate)",
    )


def _needs_token_vectors(what: str, evidence: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        f"{what} needs the graph's {TOKEN_VECTORS}",
        evidence=evidence,
        fix=f"build an artifact whose recipe exports the output {TOKEN_VECTORS}",
    )
