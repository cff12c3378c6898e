"""Embedder: texts -> embeddings. Sorts by length, batches by tokens, runs, pools, un-sorts.

Any number of threads may use one, and any process that was forked or spawned from its own. The
engine is a `types.Runner`: this module knows no engine, no artifact folder and no text file.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np

from jexport.errors import (
    DimensionError,
    NotFiniteError,
    TextInputError,
    TextTooLongError,
    UnsupportedGraphError,
)
from jexport.runtime import prompts, windows
from jexport.runtime.batches import PASS_MULTIPLE, Batch, plan, round_up
from jexport.runtime.combine import Ids, OutputRequest
from jexport.runtime.engine import Engine, Opened, only
from jexport.runtime.inference import TextBatch, run_batches
from jexport.runtime.pool import (
    Floats,
    Ints,
    finish,
    mean_by_group,
    mean_of_windows,
    pool,
    without_prompt,
)
from jexport.runtime.tokenise import TextTokenizer, TokenOffsets, check_texts
from jexport.types import WINDOW_TOKENS, Batching, Embedding, Runner

TOKEN_VECTORS = "last_hidden_state"
"""A graph's output before pooling: float32 [batch, sequence, dim]."""

TEXT_VECTORS = "sentence_embedding"
"""A graph's output after pooling and L2-normalisation: float32 [batch, dim]."""

WARM_SECONDS, WARM_RATIO, FIRST_TOKENS, WARM_TOKENS = 0.5, 1.5, 16, 128

_LIVE: weakref.WeakSet[Embedder] = weakref.WeakSet()


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
        finished = finish(
            pooled, dimensions=self.cut, normalize=self.normalize, cut_last=self.cut_last
        )
        return finish(finished, dimensions=None, normalize=True) if self.again else finished


class Embedder:
    """Embeds texts with one artifact. A context manager; `close()` frees the engine.

    embedding: how a text becomes an embedding. truncated: how many texts were cut to the length
    limit since the Embedder was made (never reset: a stream is many `encode` calls).

    Any number of threads may call it; texts that they send at the same time run together. In a
    forked child it opens the artifact again at its first use; pickled (multiprocessing's spawn), it
    is opened again where it arrives.
    """

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        runner: Runner,
        embedding: Embedding,
        outputs: Sequence[str],
        release: Callable[[], None] | None = None,
        streams: Callable[[], Sequence[Runner]] | None = None,
        batching: Batching | None = None,
        reopen: Callable[[], Embedder] | None = None,
    ) -> None:
        """Join a tokenizer and an engine.

        outputs: names of the graph's outputs. `last_hidden_state` is used where there is one, else
        `sentence_embedding`, or the other way round where batching.pooled; with neither,
        UnsupportedGraphError. release: called once by `close`.
        streams: opens runners that take a batch each at the same time, or none; called at most
        once, by the first `encode` of many batches. A batch gives the same vectors in each of them.
        batching: how the engine wants its batches, where `encode` is given no other number of
        tokens; None for the defaults. reopen: opens the same artifact again, for another process;
        it can be pickled.
        """
        self.embedding = embedding
        self.truncated = 0
        self._tokenizer = tokenizer
        self._batching = batching or Batching()
        self._reopen = reopen
        self._lock = threading.Lock()
        self._engine = Engine(
            Opened(runner=runner, streams=streams, release=release),
            self._pooled,
            self._batching,
            max_tokens=tokenizer.max_tokens,
        )
        _LIVE.add(self)
        self._outputs = [name for name in (TOKEN_VECTORS, TEXT_VECTORS) if name in outputs]
        if not self._outputs:
            raise UnsupportedGraphError(
                "embedder: the graph gives no embedding",
                evidence=f"outputs: {', '.join(outputs) or 'none'}",
                fix=f"export it with the output {TOKEN_VECTORS} or {TEXT_VECTORS}",
            )

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine, once the passes that run have ended.

        Closing twice is harmless; embedding afterwards is a RuntimeError, also in other threads.
        """
        self._engine.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how it was opened: whoever unpickles it opens the artifact again."""
        if self._reopen is None:
            raise TypeError("only an Embedder that open_artifact made can be pickled")
        self._engine.check_open()
        return _opened_again, (self._reopen,)

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
        """Embed texts.

        Args:
            texts: a list, or a single str.
            dimensions: keep the first d of the vector, 1 to the full size; only the full size when
                the model was not trained for smaller ones. None: the size that the checkpoint
                states, else the full one.
            normalize: None does what the checkpoint does, True brings every vector to length 1
                after the cut, False leaves the pooled vector at its own length. Where the
                checkpoint normalises, a cut vector is normalised again, unless the checkpoint has a
                truncate_dim: sentence-transformers cuts after normalising, and so is it done here
                then.
            prompt: True puts the artifact's default prompt before each text, False nothing, a str
                that instead.
            prompt_name: takes that prompt of the artifact (`embedding.prompts`).
            truncate: cut texts over the length limit (and count them in `truncated`), else refuse
                them.
            max_batch_tokens: padded tokens of one forward pass (a longer text is run alone), None
                for what suits the engine.
            on_batch: called after each forward pass with how many texts it held.
            first_index: the number of the first text in error messages, for a part of something
                longer.

        Returns:
            float32 [n, d] in the order given, or [d] for a single str.

        Raises:
            TextInputError: a text is none; names it.
            TextTooLongError: a text is over the limit and truncate is False; names it.
            DimensionError: the model has no such size.
            PromptError: the artifact has no prompt of that name, or both were given.
            UnsupportedGraphError: normalize=False on a graph that normalises.
            NotFiniteError: the engine gave NaN or an infinity.
            RuntimeError: it is closed.
        """
        shape = self._shape(dimensions, normalize)
        output = self._output(normalize=shape.normalize)
        many = [texts] if isinstance(texts, str) else list(texts)
        check_texts(many, first_index=first_index)
        prefix = prompts.text(self.embedding, prompt, prompt_name)
        request = OutputRequest(output, self._tokens_to_skip(prefix))

        def tokenise(start: int, stop: int) -> Ids:
            part = [prefix + text for text in many[start:stop]]
            return self._limited(part, truncate=truncate, first_index=first_index + start)

        vectors = np.empty((len(many), shape.columns), dtype=np.float32)
        most = self._batching.tokens if max_batch_tokens is None else max_batch_tokens
        # Closed at once whatever is raised here: a traceback would keep it, and its streams, going.
        with contextlib.closing(self._batches(len(many), tokenise, request, most)) as batches:
            for rows, pooled in batches:
                _check_finite(pooled, "text", [first_index + row for row in rows])
                vectors[rows] = shape.of(pooled)
                if on_batch is not None:
                    on_batch(len(rows))
        return vectors[0] if isinstance(texts, str) else vectors

    def _batches(
        self,
        texts: int,
        tokenise: Callable[[int, int], Ids],
        request: OutputRequest,
        max_batch_tokens: int,
    ) -> Generator[tuple[list[int], Floats], None, None]:
        """Numbers of texts that ran together, and their pooled vectors, float32 [rows, dim].

        Args:
            texts: how many there are.
            tokenise: token ids of the texts from a first number to before a last.
            request: of each forward pass.
            max_batch_tokens: padded tokens of one.
        """
        engine = self._live_engine()

        def planner(lengths: Sequence[int]) -> list[Batch]:
            return plan(lengths, self._batching, max_batch_tokens, self._tokenizer.max_tokens)

        def forward(stream: Runner | None, batch: TextBatch[Ints]) -> Floats:
            return engine.run(stream, batch.ids, batch.shape, request, max_batch_tokens)

        ahead = self._batching.in_flight > 1
        with contextlib.ExitStack() as stack:
            read = windows.tokenised(texts, tokenise, ahead=ahead)
            stack.enter_context(contextlib.closing(read))
            count, batches = windows.planned(read, planner)
            done = run_batches(batches, engine.streams(count), forward)
            for batch, pooled in stack.enter_context(contextlib.closing(done)):
                yield batch.rows, pooled

    def encode_query(self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]) -> Floats:
        """Embed queries: `encode` with the checkpoint's prompt for them.

        As sentence-transformers' encode_query: without `prompt` or `prompt_name`, the prompt named
        'query', and none where there is no such prompt, whatever the default prompt is.

        Args:
            texts: a list, or a single str.
            options: as in `encode`.

        Returns:
            float32 [n, d] in the order given, or [d] for a single str.

        Raises:
            UnknownTaskError: the artifact is of a task that embeds documents only.
            JexportError: what `encode` raises.
        """
        return self.encode(texts, **self._sided(options, prompts.QUERY_NAMES))

    def encode_document(
        self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]
    ) -> Floats:
        """Embed documents: `encode` with the checkpoint's prompt for them.

        As sentence-transformers' encode_document: without `prompt` or `prompt_name`, the prompt
        named 'document', and none where there is no such prompt, whatever the default prompt is.

        Args:
            texts: a list, or a single str.
            options: as in `encode`.

        Returns:
            float32 [n, d] in the order given, or [d] for a single str.

        Raises:
            UnknownTaskError: the artifact is of a task that embeds queries only.
            JexportError: what `encode` raises.
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
        """Embed the chunks of one long text, each in the context of all.

        The chunks are joined as they are, the prompt is put before, and one forward pass gives the
        token vectors; a chunk's embedding is the mean over the tokens that begin in it (white space
        before a word aside). A token across a border belongs to the chunk where it begins.

        Source: Late Chunking, arXiv 2409.04701. One difference: its section 4.1 adds the prompt and
        the first special token to the first chunk and the last one to the last. Here they belong to
        no chunk, so that a chunk's vector does not depend on being first or last, and a short first
        chunk is not mostly prompt.

        Args:
            chunks: of one text, in order.
            dimensions: as in `encode`.
            normalize: as in `encode`.
            prompt: as in `encode`.
            prompt_name: as in `encode`.

        Returns:
            float32 [len(chunks), d].

        Raises:
            TextInputError: a chunk without a token, or not a str.
            TextTooLongError: the joined text is over the limit.
            DimensionError: the model has no such size.
            UnsupportedGraphError: no token vectors, or another pooling than the mean.
            NotFiniteError: the engine gave NaN or an infinity.
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
        with self._live_engine().in_use() as runner:
            hidden = self._run(runner, self._tokenizer.pad([tokens.ids]), TOKEN_VECTORS)
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

    def warm_up(self) -> None:
        """Run what a first call would else pay for: a new length is then as fast as the next.

        Every engine allocates its buffers with the first texts: one of FIRST_TOKENS is run, and
        one of WARM_TOKENS where that takes less than WARM_SECONDS. One that compiles each shape
        when it first comes (few_shapes) runs a text of each length that such texts are padded
        to, upwards until compiling no longer costs half of running, or for WARM_SECONDS.
        """
        limit = self._tokenizer.max_tokens
        self._tokenizer.token_ids(["a"])
        with self._engine.in_use() as runner:
            if self._batching.few_shapes == "always":
                self._compile_lengths(runner, limit)
                return
            seconds = self._one_text(runner, min(FIRST_TOKENS, limit))
            if seconds * WARM_TOKENS / FIRST_TOKENS < WARM_SECONDS:
                self._one_text(runner, min(WARM_TOKENS, limit))

    def _compile_lengths(self, runner: Runner, limit: int) -> None:
        begin, tokens = time.perf_counter(), min(PASS_MULTIPLE, limit)
        while tokens <= limit and time.perf_counter() - begin < WARM_SECONDS:
            first, second = self._one_text(runner, tokens), self._one_text(runner, tokens)
            if tokens > PASS_MULTIPLE and first <= WARM_RATIO * second:
                break  # but the very first run does more than its shape needs
            tokens = round_up(tokens + 1, PASS_MULTIPLE, limit) if tokens < limit else limit + 1

    def _one_text(self, runner: Runner, tokens: int) -> float:
        """Run one text of so many tokens; the seconds that it took."""
        ids: list[Ints] = [np.full(tokens, self._tokenizer.pad_id, dtype=np.int32)]
        begin = time.perf_counter()
        self._pooled(runner, ids, (1, tokens), OutputRequest(self._outputs[0]))
        return time.perf_counter() - begin

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
            raise self._needs_token_vectors(
                "normalize=False", f"{TEXT_VECTORS} is already normalised"
            )
        whole = whole and self.embedding.contextual  # others may need windows of token vectors
        pooled = self._batching.pooled and whole and TEXT_VECTORS in self._outputs
        return TEXT_VECTORS if pooled else self._outputs[0]

    def _limited(self, texts: Sequence[str], *, truncate: bool, first_index: int) -> Ids:
        """Token ids of each text within the length limit; over-long ones are counted or refused."""
        kept: list[Ints] = []
        limit, cut = self._tokenizer.max_tokens, 0
        for start in range(0, len(texts), windows.FIRST_WINDOW):
            part = texts[start : start + windows.FIRST_WINDOW]
            first = first_index + start
            for row, one in enumerate(self._tokenizer.token_ids(part, first_index=first)):
                if len(one) > limit and not truncate:
                    raise _too_long(f"text {first + row}", len(one), limit)
                cut += len(one) > limit
                # A list of Python's numbers takes nine times the memory.
                kept.append(np.array(self._tokenizer.truncate(one), dtype=np.int32))
        if cut:
            with self._lock:
                self.truncated += cut
        return kept

    def _live_engine(self) -> Engine:
        """The engine; opened again where this process was forked since it was opened."""
        with self._lock:
            if self._engine.stale and self._reopen is not None:
                self._engine.check_open()
                fresh = self._reopen()
                _LIVE.discard(fresh)
                self._tokenizer, self._engine = fresh._tokenizer, fresh._engine
        self._engine.check_open()
        return self._engine

    def _forked(self) -> None:
        """In a child that was forked: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
        self._engine.forked(again=self._reopen is not None)

    def _pooled(
        self, runner: Runner, ids: Ids, shape: tuple[int, int], request: OutputRequest
    ) -> Floats:
        """One vector per row of a batch, not yet cut or normalised here: float32 [batch, dim]."""
        feeds = self._tokenizer.pad(ids, shape=shape)
        mask = feeds["attention_mask"]
        if (
            not self.embedding.contextual
            and request.output == TOKEN_VECTORS
            and mask.shape[1] > WINDOW_TOKENS
        ):

            def token_vectors(columns: slice) -> Floats:
                part = {name: array[:, columns] for name, array in feeds.items()}
                return self._run(runner, part, TOKEN_VECTORS)

            return mean_of_windows(token_vectors, mask, WINDOW_TOKENS)[: len(ids)]
        vectors = self._run(runner, feeds, request.output)
        if request.output == TOKEN_VECTORS:
            rows = slice(len(ids))  # those after it only fill the shape
            mask = without_prompt(feeds["attention_mask"][rows], request.skip)
            vectors = pool(vectors[rows], mask, self.embedding.pooling, skipped=request.skip)
        return vectors[: len(ids)]

    def _run(self, runner: Runner, feeds: Mapping[str, Ints], output: str) -> Floats:
        """One of the graph's outputs for a padded batch, its shape checked."""
        shape = feeds["attention_mask"].shape
        values = np.asarray(only(runner, output)(feeds)[output], dtype=np.float32)
        lead = shape if output == TOKEN_VECTORS else shape[:1]
        expected = (*lead, self.embedding.dimension)
        if values.shape != expected:
            raise UnsupportedGraphError(
                "embedder: the graph's output has another shape than the manifest says",
                evidence=f"{output} is {list(values.shape)}, expected {list(expected)}",
                fix="build the artifact again",
            )
        return values

    def _check_late_chunking(self, chunks: Sequence[str]) -> None:
        """Refuse what has no token vectors to average, and chunks that are not a list of str."""
        if TOKEN_VECTORS not in self._outputs:
            raise self._needs_token_vectors("late chunking", f"the graph gives only {TEXT_VECTORS}")
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

    def _needs_token_vectors(self, what: str, evidence: str) -> UnsupportedGraphError:
        if self.embedding.modules:
            return UnsupportedGraphError(
                f"{what} needs token vectors, and this artifact's engine gives none",
                evidence="it gives the vectors of texts, by: " + "; ".join(self.embedding.modules),
                fix="leave it out: no artifact of this checkpoint can do that",
            )
        return UnsupportedGraphError(
            f"{what} needs the graph's {TOKEN_VECTORS}",
            evidence=evidence,
            fix=f"build an artifact whose recipe exports the output {TOKEN_VECTORS}",
        )


def _opened_again(reopen: Callable[[], Embedder]) -> Embedder:
    return reopen()


def _after_fork() -> None:
    for embedder in list(_LIVE):
        embedder._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
