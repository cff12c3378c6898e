"""jexport.runtime.engine: memory that ends, closing while others run, streams opened once."""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport.errors import DeviceMemoryError
from jexport.runtime import Embedder, TextTokenizer
from jexport.runtime.engine import MANY, DeviceMemoryWarning
from jexport.types import Batching, Embedding, Tensors
from tests.runtime.test_embedder import DIM, EMBEDDING, REFERENCE, SmallModel

TEXTS = ["word " * (number % 9) + f"and {number}" for number in range(40)]
ALIKE = [f"word and {number}" for number in range(10, 70)]


class Small(SmallModel):
    """A device that takes so many padded tokens a pass."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def __call__(self, feeds: Tensors) -> Tensors:
        if feeds["input_ids"].size > self.tokens:
            raise DeviceMemoryError("full", evidence="allocating 7 GiB", fix="none")
        return super().__call__(feeds)


def make(model: Any, batching: Batching | None = None, **more: Any) -> Embedder:
    embedding: Embedding = EMBEDDING
    return Embedder(
        tokenizer=TextTokenizer.open(REFERENCE, max_tokens=64),
        runner=model,
        embedding=embedding,
        outputs=("last_hidden_state",),
        batching=batching,
        **more,
    )


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_full_memory_halves_the_batches_once_and_says_so(in_flight: int) -> None:
    wanted = make(SmallModel()).encode(ALIKE)
    model = Small(300)
    embedder = make(model, Batching(tokens=512, in_flight=in_flight))
    with pytest.warns(DeviceMemoryWarning, match="max_batch_tokens=2") as seen:
        found = embedder.encode(ALIKE)
    assert len(seen) == 1
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(embedder.encode(ALIKE), found)


def test_memory_that_holds_no_half_either_is_an_error() -> None:
    embedder = make(Small(100), Batching(tokens=512))
    with (
        pytest.warns(DeviceMemoryWarning),
        pytest.raises(DeviceMemoryError, match="is full at ") as caught,
    ):
        embedder.encode(ALIKE)
    assert caught.value.evidence == "allocating 7 GiB"
    assert "max_batch_tokens" in caught.value.fix
    with pytest.raises(DeviceMemoryError, match="full at 1 x "):
        make(Small(3)).encode("one text")
    assert embedder.encode("one text").shape == (DIM,)


class Sleepy(SmallModel):
    """Takes 20 ms, and knows whether it was freed under way."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.freed, self.freed_under_way = 0, 0, False

    def __call__(self, feeds: Tensors) -> Tensors:
        assert not self.freed
        self.running += 1
        time.sleep(0.02)
        answer = super().__call__(feeds)
        self.running -= 1
        return answer

    def free(self) -> None:
        self.freed += 1
        self.freed_under_way |= self.running > 0


def test_closing_while_others_embed_waits_and_is_a_clear_error() -> None:
    model = Sleepy()
    embedder = make(model, release=model.free)
    ends: list[str] = []

    def work() -> None:
        try:
            while True:
                assert embedder.encode("a text").shape == (DIM,)
        except RuntimeError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for one in threads:
        one.start()
    time.sleep(0.1)
    embedder.close()
    for one in threads:
        one.join(30)
    embedder.close()
    assert ends == ["this Embedder is closed"] * 8
    assert (model.freed, model.freed_under_way) == (1, False)


def test_streams_are_opened_once_by_any_number_of_threads() -> None:
    opened: list[int] = []

    def streams() -> list[SmallModel]:
        opened.append(1)
        time.sleep(0.02)
        return [SmallModel(), SmallModel()]

    embedder = make(SmallModel(), streams=streams)
    texts = TEXTS * (1 + MANY // len(TEXTS))
    wanted = make(SmallModel()).encode(texts, max_batch_tokens=1)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(embedder.encode(texts, max_batch_tokens=1)))
        for _ in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert opened == [1]
    assert len(found) == 4
    for one_found in found:
        np.testing.assert_array_equal(one_found, wanted)


def test_truncated_is_counted_right_by_threads() -> None:
    embedder = make(SmallModel())
    long = "word " * 100

    def work() -> None:
        for _ in range(50):
            embedder.encode([long, "short"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert embedder.truncated == 8 * 50


def test_tokenising_overlaps_with_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two in flight the first batch runs before the last text is a token."""
    before = set(threading.enumerate())
    order: list[str] = []
    tokenizer = TextTokenizer.open(REFERENCE, max_tokens=64)
    token_ids = tokenizer.token_ids

    def remember(texts: Any, **more: Any) -> Any:
        order.append("tokenise")
        return token_ids(texts, **more)

    monkeypatch.setattr(tokenizer, "token_ids", remember)

    class Model(SmallModel):
        def __call__(self, feeds: Tensors) -> Tensors:
            order.append("run")
            return super().__call__(feeds)

    texts = [f"text {number} " + "word " * (number % 5) for number in range(3000)]
    embedder = Embedder(
        tokenizer=tokenizer,
        runner=Model(),
        embedding=EMBEDDING,
        outputs=("last_hidden_state",),
        batching=Batching(tokens=512, in_flight=2),
    )
    found = embedder.encode(texts)
    np.testing.assert_allclose(found, make(SmallModel()).encode(texts), atol=2e-6)
    last = len(order) - 1 - order[::-1].index("tokenise")
    assert order.index("run") < last
    embedder.close()
    for one in set(threading.enumerate()) - before:
        one.join(10)
        assert not one.is_alive()


def test_a_fork_leaves_a_plain_runner_usable(tmp_path: Path) -> None:
    """Locks that a thread of the parent held are not the child's."""
    import multiprocessing

    embedder = make(SmallModel())
    wanted = embedder.encode("a text")
    with embedder._lock:
        process = multiprocessing.get_context("fork").Process(
            target=lambda: np.save(tmp_path / "found.npy", embedder.encode("a text"))
        )
        process.start()
        process.join(30)
    assert process.exitcode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), wanted)
