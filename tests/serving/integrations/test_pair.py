"""Pair: which artifacts belong together, who embeds what, threads, copies, closing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from jexport.artifacts import manifest
from jexport.errors import (
    ArtifactError,
    DimensionError,
    PairError,
    TextInputError,
    TextTooLongError,
)
from jexport.serving.integrations import pair as pair_module
from jexport.serving.integrations.pair import Options, Pair, check_belong

PLAIN = Options()
TEXTS = ["A cat sleeps.", "", "Ein Boot fährt zur Insel und zurück.", "猫が寝ている。"]


def vectors(folder: Path, texts: list[str], **options: Any) -> np.ndarray:
    with jexport.open_artifact(folder) as model:
        return model.encode(texts, **options)


class Watched:
    """What a Pair opened, and how many calls were in each engine at once."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.most: list[int] = []
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def open(self, *words: Any, **options: Any) -> Any:
        model = jexport.open_artifact(*words, **options)
        engine = model._engine
        number, inside, run = len(self.models), [0], engine._opened.runner
        guard = threading.Lock()

        def counted(feeds: Any) -> Any:
            with guard:
                inside[0] += 1
                self.most[number] = max(self.most[number], inside[0])
            self.entered.set()
            assert self.go_on.wait(30)
            time.sleep(0.002)  # long enough for another thread to come in, if it may
            given = run(feeds)
            with guard:
                inside[0] -= 1
            return given

        engine._opened = dataclasses.replace(engine._opened, runner=counted)
        self.models.append(model)
        self.most.append(0)
        return model


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    one = Watched()
    monkeypatch.setattr(pair_module, "open_artifact", one.open)
    yield one
    one.go_on.set()


def test_queries_and_documents_go_through_their_own_artifact(pair: tuple[Path, Path]) -> None:
    with Pair(*pair, options=PLAIN) as both:
        queries, documents = both.embed_queries(TEXTS), both.embed_documents(TEXTS)
        assert both.dimension == len(queries[0])
    np.testing.assert_allclose(queries, vectors(pair[0], TEXTS), atol=1e-6)
    np.testing.assert_allclose(documents, vectors(pair[1], TEXTS), atol=1e-6)
    assert not np.allclose(queries, documents, atol=1e-3)
    assert type(queries[0][0]) is float


def test_one_artifact_serves_both_where_its_task_does(symmetric: Path, watched: Watched) -> None:
    with Pair(symmetric, options=PLAIN) as both:
        assert both.embed_queries(TEXTS) == both.embed_documents(TEXTS)
        assert both.embed_documents([]) == []
    with Pair(symmetric, symmetric, options=PLAIN):
        pass
    assert len(watched.models) == 2  # one each, not one for each side


def test_options_reach_the_artifacts(pair: tuple[Path, Path]) -> None:
    with Pair(*pair, options=Options(dimensions=16, normalize=False)) as both:
        assert both.dimension == 16
        found = both.embed_queries(TEXTS)
    wanted = vectors(pair[0], TEXTS, dimensions=16, normalize=False)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.linalg.norm(found[0]) != pytest.approx(1)
    long = "word " * 20_000
    with Pair(*pair, options=Options(truncate=False)) as both, pytest.raises(TextTooLongError):
        both.embed_documents([long])
    with Pair(*pair, options=PLAIN) as both, pytest.raises(TextInputError, match="text 1 "):
        both.embed_documents(["a", None])  # type: ignore[list-item]


def test_precisions_may_be_mixed(pair: tuple[Path, Path], builds: Callable[..., Any]) -> None:
    half = builds("retrieval.passage", "fp16").path
    with Pair(pair[0], half, options=PLAIN) as both:
        assert "onnx-fp32" in both.name
        assert "onnx-fp16" in both.name
        found = np.array(both.embed_documents(TEXTS))
    assert (found * vectors(pair[1], TEXTS)).sum(axis=1).min() > 0.999


def test_swapped_artifacts_are_named_as_such(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PairError, match="swapped") as caught:
        Pair(pair[1], pair[0], options=PLAIN)
    assert f"queries: {pair[1]} (retrieval.passage)" in caught.value.evidence
    assert f"documents: {pair[0]} (retrieval.query)" in caught.value.evidence
    assert caught.value.fix == "exchange the two"


def test_half_a_pair_says_what_it_needs(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PairError, match=r"an artifact of retrieval\.query cannot") as caught:
        Pair(pair[0], options=PLAIN)
    assert "documents need an artifact of retrieval.passage" in caught.value.fix
    with pytest.raises(PairError, match=r"an artifact of retrieval\.passage cannot") as caught:
        Pair(pair[1], options=PLAIN)
    assert "queries need an artifact of retrieval.query" in caught.value.fix


def test_tasks_that_do_not_meet(pair: tuple[Path, Path], symmetric: Path) -> None:
    for words in ((pair[0], symmetric), (symmetric, pair[1])):
        with pytest.raises(PairError, match="cannot be compared"):
            Pair(*words, options=PLAIN)


def contents(pair: tuple[Path, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    one, other = (copy.deepcopy(dict(manifest.read(folder).content)) for folder in pair)
    return one, other


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    with pytest.raises(PairError, match="not of one model") as caught:
        check_belong(one, other, folders=("a", "b"))
    return caught.value.evidence.splitlines()[-1]


def entry(content: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [one for one in content["checkpoint"]["files"] if one["path"] == name]
    return found


def test_of_two_models(pair: tuple[Path, Path]) -> None:
    one, other = contents(pair)
    check_belong(one, other, folders=("a", "b"))
    entry(other, "model.safetensors")["sha256"] = "0" * 64
    assert difference(one, other) == "not the same: the checkpoint's model.safetensors"
    one, other = contents(pair)
    one["checkpoint"]["revision"], other["checkpoint"]["revision"] = "a" * 40, "b" * 40
    assert "revision (aaaaaaaaaaaa and bbbbbbbbbbbb)" in difference(one, other)
    one, other = contents(pair)
    other["embedding"]["dimension"] //= 2
    assert "dimension (64 and 32)" in difference(one, other)
    one, other = contents(pair)
    other["embedding"]["pooling"] = "cls"
    assert "pooling (mean and cls)" in difference(one, other)
    one, other = contents(pair)
    entry(other, "model.safetensors")["path"] = "other.safetensors"
    assert "share no weights" in difference(one, other)


def test_what_may_differ_within_one_model(pair: tuple[Path, Path]) -> None:
    """Each task's adapter folder, a README, and a build from a folder beside one from a hub."""
    one, other = contents(pair)
    for content, task in ((one, "query"), (other, "passage")):
        content["checkpoint"]["files"] += [
            {"path": f"retrieval_{task}/adapter_model.safetensors", "sha256": task},
            {"path": "README.md", "sha256": task},
        ]
    one["checkpoint"]["revision"] = "a" * 40
    check_belong(one, other, folders=("a", "b"))


def test_one_task_of_two_spaces(symmetric: Path) -> None:
    one, other = contents((symmetric, symmetric))
    check_belong(one, other, folders=("a", "b"))
    other["embedding"]["space"] = "0" * 64
    assert difference(one, other) == "not the same: their embedding spaces"


def test_what_cannot_be_opened_leaves_nothing_open(
    pair: tuple[Path, Path], symmetric: Path, watched: Watched, tmp_path: Path
) -> None:
    with pytest.raises(DimensionError, match="does not offer 65"):
        Pair(*pair, options=Options(dimensions=65))
    with pytest.raises(ArtifactError, match="is not a jexport artifact"):
        Pair(symmetric, tmp_path, options=PLAIN)
    with pytest.raises(ValueError, match="device is 'tpu'"):
        Pair(*pair, options=Options(device="tpu"))
    assert watched.models
    assert all(model._engine._opened is None for model in watched.models)


def test_closing(pair: tuple[Path, Path], symmetric: Path, watched: Watched) -> None:
    for words in (pair, (symmetric,)):
        both = Pair(*words, options=PLAIN)
        both.embed_queries(["x"])
        both.close()
        both.close()
        for embed in (both.embed_queries, both.embed_documents):
            with pytest.raises(RuntimeError, match="closed"):
                embed(["x"])
    assert len(watched.models) == 3
    assert all(model._engine._opened is None for model in watched.models)


def test_threads_wait_for_each_other(pair: tuple[Path, Path], watched: Watched) -> None:
    with Pair(*pair, options=PLAIN) as both:
        wanted = [both.embed_queries(TEXTS), both.embed_documents(TEXTS)]

        def embed(number: int) -> bool:
            of = (both.embed_queries, both.embed_documents)[number % 2]
            return of(TEXTS) == wanted[number % 2]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(embed, range(32)))
    assert watched.most == [1, 1]


def test_closing_waits_for_a_call_under_way(pair: tuple[Path, Path], watched: Watched) -> None:
    both = Pair(*pair, options=PLAIN)
    watched.go_on.clear()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(both.embed_queries, ["x"])
        assert watched.entered.wait(30)
        closing = pool.submit(both.close)
        time.sleep(0.05)
        assert not closing.done()
        watched.go_on.set()
        assert len(running.result(30)) == 1
        closing.result(30)
    assert all(model._engine._opened is None for model in watched.models)


def test_copies_open_their_own_engines(pair: tuple[Path, Path], watched: Watched) -> None:
    with Pair(*pair, options=Options(dimensions=16)) as both:
        wanted = both.embed_queries(TEXTS)
        stored = pickle.dumps(both)
        twin = copy.deepcopy(both)
    assert len(stored) < 2_000  # paths, not weights
    assert len(watched.models) == 2
    for one in (pickle.loads(stored), pickle.loads(pickle.dumps(pickle.loads(stored))), twin):
        assert (one.name, one.dimension) == (both.name, 16)
        with one:
            assert one.embed_queries(TEXTS) == wanted
    assert len(watched.models) == 8


def test_a_copy_does_not_follow_latest_into_another_space(
    symmetric: Path, builds: Callable[..., Any], tmp_path: Path
) -> None:
    link = tmp_path / "latest"
    link.symlink_to(symmetric)
    with Pair(link, options=PLAIN) as both:
        stored = pickle.dumps(both)
    link.unlink()
    link.symlink_to(builds("separation").path)
    with pickle.loads(stored) as moved, pytest.raises(PairError, match="copied from"):
        moved.embed_queries(["x"])
