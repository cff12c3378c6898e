"""examples/triton_client.py against a server that speaks Triton's gRPC and checks every request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

import jexport
from jexport.artifacts import manifest
from jexport.serving import layouts
from jexport.types import Artifact

EXAMPLE = Path(__file__).parents[3] / "examples" / "triton_client.py"
TEXTS = ["one", "", "drei Wörter hier", "四", "a rather longer text than the others " * 9] * 5


@pytest.fixture(scope="module")
def served(
    builds: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, triton: Any
) -> Iterator[SimpleNamespace]:
    """Two tasks, one in fp16, on a server."""
    paths = [builds("retrieval.query").path, builds("retrieval.passage", "fp16").path]
    out = tmp_path_factory.mktemp("served") / "models"
    found = [Artifact(path=path, manifest=manifest.read(path)) for path in paths]
    written = layouts.load("triton").write(found, out, layouts.Wishes())
    with triton.serving(out) as (url, models):
        assert all(len(model.batches) == 2 for model in models.values())  # the warm-ups ran
        yield SimpleNamespace(url=url, models=models, pairs=list(zip(paths, written, strict=True)))


def test_vectors_are_the_artifacts(served: SimpleNamespace, client: Any) -> None:
    for path, one in served.pairs:
        with jexport.open_artifact(path) as local, client.embedder(one.path, served.url) as remote:
            wanted, found = local.encode(TEXTS), remote.encode(TEXTS)
            short = remote.encode(TEXTS[:2], dimensions=32, prompt=False)
            np.testing.assert_allclose(
                short, local.encode(TEXTS[:2], dimensions=32, prompt=False), atol=2e-6
            )
        assert found.dtype == np.float32
        assert (found * wanted).sum(axis=1).min() > 0.999999
        np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_requests_are_padded_to_a_multiple_and_split_at_the_largest_batch(
    served: SimpleNamespace, client: Any
) -> None:
    _, one = served.pairs[0]
    model = served.models[one.name]
    model.batches.clear()
    with client.embedder(one.path, served.url) as remote:
        remote.encode(TEXTS, max_batch_tokens=100_000)
    assert sum(rows for rows, _ in model.batches) == len(TEXTS)
    assert max(rows for rows, _ in model.batches) == model.config.max_batch_size
    assert all(tokens % 32 == 0 for _, tokens in model.batches)


def test_another_model_under_that_name_is_noticed(
    served: SimpleNamespace,
    client: Any,
    artifact_copy: Path,
    changed: Callable[..., Path],
    tmp_path: Path,
) -> None:
    other = changed(artifact_copy, lambda c: c["embedding"].update(space="0" * 64))
    folder = tmp_path / "small_retrieval.query" / "1"
    folder.parent.mkdir()
    other.rename(folder)
    with (
        pytest.raises(ValueError, match="serves another model"),
        client.embedder(folder, served.url),
    ):
        pass


@pytest.mark.parametrize("change", ["dtype", "rank", "rows", "name"])
def test_the_server_refuses_what_the_config_does_not_say(
    change: str, served: SimpleNamespace
) -> None:
    """Guards the tests above: a wrong config or client would not pass unseen."""
    import tritonclient.grpc as grpc_client

    rows = 99 if change == "rows" else 1
    shape = (rows, 4, 1) if change == "rank" else (rows, 4)
    value = np.ones(shape, dtype=np.int32 if change == "dtype" else np.int64)
    inputs = []
    for name in ("input_ids", "mask" if change == "name" else "attention_mask"):
        kind = "INT32" if change == "dtype" else "INT64"
        one = grpc_client.InferInput(name, value.shape, kind)
        one.set_data_from_numpy(value)
        inputs.append(one)
    with (
        grpc_client.InferenceServerClient(served.url) as asking,
        pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"),
    ):
        asking.infer("small_retrieval.query", inputs)


def test_lengths_fit_the_engines_profiles(
    trt: Callable[..., Path], tmp_path: Path, triton: Any, client: Any
) -> None:
    path = trt(
        [
            {"batch": [1, 4, 8], "tokens": [1, 16, 40]},
            {"batch": [1, 4, 8], "tokens": [100, 128, 200]},
        ]
    )
    artifact = Artifact(path=path, manifest=manifest.read(path))
    [one] = layouts.load("triton").write([artifact], tmp_path / "models", layouts.Wishes())
    config = triton.parsed(one.path.parent / "config.pbtxt")
    asked: list[tuple[int, ...]] = []

    def infer(model: str, inputs: Any, **_: Any) -> Any:
        asked.append(tuple(inputs[0].shape()))
        return SimpleNamespace(as_numpy=lambda name: np.ones((*asked[-1], 64), np.float32))

    stub = SimpleNamespace(get_model_config=lambda *_: SimpleNamespace(config=config), infer=infer)
    runner = client.TritonRunner(stub, one.name, "1", pad_id=1)
    sent = {}
    for length in (1, 32, 33, 40, 41, 130, 193, 200):
        feed = np.ones((1, length), np.int64)
        answer = runner({"input_ids": feed, "attention_mask": feed})
        assert answer["last_hidden_state"].shape == (1, length, 64)
        sent[length] = asked[-1][1]
    assert sent == {1: 32, 32: 32, 33: 100, 40: 100, 41: 100, 130: 160, 193: 200, 200: 200}
    with pytest.raises(ValueError, match="profiles end at 200"):
        runner({"input_ids": np.ones((1, 201), np.int64), "attention_mask": feed})


def test_the_example_as_a_program(served: SimpleNamespace) -> None:
    _, one = served.pairs[0]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(one.path), "a boat", "a ship", "--url", served.url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("2 vectors of 64")
    assert " 1.000" in done.stdout
