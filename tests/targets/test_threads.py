"""Every target from 16 threads, 500 calls each: the right vector, whoever asks at the same time."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport import targets
from jexport.errors import JexportError
from jexport.recipe import CompileSpec
from jexport.runtime import Embedder, TextTokenizer
from jexport.stages import compile as compile_stage
from jexport.types import Embedding, MergedModel, OnnxModel

THREADS, CALLS = 16, 500
TEXTS = [
    "the ferry leaves at seven",
    "profits rose",
    "the island has two towers",
    "a",
    "one boat",
    "every hour a bus",
    "cold",
    "the winter market opens again on monday at nine",
]


@pytest.mark.parametrize("name", targets.names())
def test_sixteen_threads_get_their_own_vectors(
    name: str,
    standard: OnnxModel,
    merged: MergedModel,
    small: Path,
    tmp_path: Path,
    stand_in_engine: Callable[[str], None],
) -> None:
    target = targets.load(name)
    try:
        target.ready()
    except JexportError:
        stand_in_engine(name)
    model: Any = standard if target.needs_onnx else merged
    compiled = compile_stage.run(model, target, CompileSpec(), out_dir=tmp_path)
    with target.runner(compiled, "auto", 1) as runner:
        embedder = _embedder(target, compiled, runner, merged.model.embedding, small)
        wanted = embedder.encode(TEXTS)
        lengths = np.linalg.norm(wanted, axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-5)
        wrong: list[str] = []

        def work(number: int) -> None:
            for turn in range(CALLS):
                which = (number + turn) % len(TEXTS)
                try:
                    cosine = float(embedder.encode(TEXTS[which]) @ wanted[which])
                except Exception as error:
                    wrong.append(repr(error))
                    return
                if cosine < 1 - 1e-5:
                    wrong.append(f"text {which}: cosine {cosine}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(300)
        assert not any(one.is_alive() for one in threads)
        assert not wrong, f"{len(wrong)}, such as {wrong[:3]}"
    others = wanted @ wanted.T - np.eye(len(TEXTS))
    if name != "trt":  # whose stand-in runs no model
        assert others.max() < 1 - 1e-4, "another text's vector would not be noticed"


@pytest.mark.parametrize("name", [name for name in targets.names() if name != "trt"])
def test_a_runner_itself_takes_many_threads(
    name: str, standard: OnnxModel, merged: MergedModel, tmp_path: Path
) -> None:
    """As an engine of its own would be used: nothing before it takes turns."""
    target = targets.load(name)
    model: Any = standard if target.needs_onnx else merged
    compiled = compile_stage.run(model, target, CompileSpec(), out_dir=tmp_path)
    feeds = []
    for number in range(8):
        ids = np.full((1, 3 + number), 5 + number, dtype=np.int64)
        feeds.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    with target.runner(compiled, "auto", 1) as run:
        wanted = [np.array(run(feed)["last_hidden_state"]) for feed in feeds]
        wrong: list[Any] = []

        def work(number: int) -> None:
            try:
                for _ in range(40):
                    got = np.asarray(run(feeds[number])["last_hidden_state"])
                    if not np.allclose(got, wanted[number], atol=1e-5):
                        wrong.append(number)
            except Exception as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(120)
    assert not wrong


def _embedder(
    target: targets.Target, compiled: Any, runner: Any, embedding: Embedding, small: Path
) -> Embedder:
    return Embedder(
        tokenizer=TextTokenizer.open(small, max_tokens=embedding.max_tokens),
        runner=runner,
        embedding=embedding,
        outputs=[spec.name for spec in compiled.signature.outputs],
        batching=target.runtime.batching(compiled, "cpu"),
    )


def _open_and_run(compiled: Any, feed: Any, queue: Any) -> None:
    with targets.load("hf").runner(compiled, "cpu", 2) as run:
        queue.put(np.asarray(run(feed)["last_hidden_state"]))


def test_torch_in_a_forked_child_does_not_wait_for_its_parents_threads(
    merged: MergedModel, tmp_path: Path
) -> None:
    target = targets.load("hf")
    compiled = compile_stage.run(merged, target, CompileSpec(), out_dir=tmp_path)
    ids = np.full((32, 64), 5, dtype=np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    context = multiprocessing.get_context("fork")
    with target.runner(compiled, "cpu", 2) as run:
        wanted = np.asarray(run(feed)["last_hidden_state"])
        queue = context.Queue()
        child = context.Process(target=_open_and_run, args=(compiled, feed, queue))
        child.start()
        try:
            found = queue.get(timeout=60)
        finally:
            child.kill()
            child.join()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
