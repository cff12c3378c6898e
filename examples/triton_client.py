"""Embed texts with a Triton server that serves a repository of `jexport package --layout triton`.

    python examples/triton_client.py REPOSITORY/small_retrieval.query/1 "a text" "another"

The folder is the version that the server serves: tokenizer, prompt, pooling and length limit come
from its files, and its weights may be missing. Tokenising, padding, pooling and normalising happen
here, by jexport's own runtime; the server runs the graph. Needs jexport, tokenizers and
tritonclient[grpc].
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from jexport.artifacts import manifest
from jexport.runtime.embedder import TOKEN_VECTORS, Embedder
from jexport.runtime.open import embedding_of
from jexport.runtime.tokenise import TextTokenizer
from jexport.types import Tensors

MULTIPLE = 32
"""Triton joins requests of different clients only when their lengths are equal."""


class TritonRunner:
    """A forward pass on the server: what jexport's Embedder asks for instead of an engine."""

    def __init__(self, client: Any, model: str, version: str, *, pad_id: int) -> None:
        """Read the model's config from the server: inputs, largest batch, profiles."""
        config = client.get_model_config(model, version).config
        self.space = config.parameters["jexport.embedding_space"].string_value
        self._client, self._model, self._version = client, model, version
        self._types = {one.name: _kserve_type(one.data_type) for one in config.input}
        self._fill = {"input_ids": pad_id, "attention_mask": 0}
        self._output = config.output[0].name
        self._max_batch = config.max_batch_size
        said = config.parameters["jexport.profiles"].string_value
        self._tokens = [one["tokens"] for one in json.loads(said or "[]")]
        limit = int(config.parameters["jexport.max_tokens"].string_value)
        self._limit = max((tokens[2] for tokens in self._tokens), default=limit)

    def __call__(self, feeds: Tensors) -> Tensors:
        """Run a padded batch, in parts that the server takes, and cut our padding off again."""
        count, length = feeds["input_ids"].shape
        padded = {name: self._padded(name, value) for name, value in feeds.items()}
        parts = [
            self._infer({name: value[rows] for name, value in padded.items()})
            for rows in (slice(n, n + self._max_batch) for n in range(0, count, self._max_batch))
        ]
        joined = np.concatenate(parts)
        return {self._output: joined[:, :length] if self._output == TOKEN_VECTORS else joined}

    def _padded(self, name: str, value: np.ndarray) -> np.ndarray:
        width = self._width(value.shape[1]) - value.shape[1]
        return np.pad(value, ((0, 0), (0, width)), constant_values=self._fill[name])

    def _width(self, length: int) -> int:
        """The length to send: a multiple of MULTIPLE, and one that a profile takes."""
        width = min(-(-length // MULTIPLE) * MULTIPLE, max(self._limit, length))
        if not self._tokens:
            return width
        if length > self._limit:
            raise ValueError(f"{length} tokens; the engine's profiles end at {self._limit}")
        taken = [max(width, low) for low, _, high in self._tokens if width <= high]
        return min(taken)

    def _infer(self, feeds: Tensors) -> np.ndarray:
        inputs = []
        for name, kind in self._types.items():
            value = np.ascontiguousarray(feeds[name], dtype=triton_to_numpy(kind))
            one = triton.InferInput(name, value.shape, kind)
            one.set_data_from_numpy(value)
            inputs.append(one)
        asked = [triton.InferRequestedOutput(self._output)]
        answer = self._client.infer(self._model, inputs, model_version=self._version, outputs=asked)
        return np.asarray(answer.as_numpy(self._output))


def _kserve_type(config_type: int) -> str:
    """INT64 for TYPE_INT64."""
    from tritonclient.grpc import model_config_pb2

    return str(model_config_pb2.DataType.Name(config_type)).removeprefix("TYPE_")


def triton_to_numpy(kind: str) -> Any:
    """The numpy type of a KServe type."""
    from tritonclient.utils import triton_to_np_dtype

    return triton_to_np_dtype(kind)


@contextlib.contextmanager
def embedder(folder: Path, url: str) -> Iterator[Embedder]:
    """An Embedder whose forward pass runs on a server. folder: <repository>/<model>/<version>."""
    content = manifest.read(folder).content
    embedding = embedding_of(content)
    tokenizer = TextTokenizer.open(folder, max_tokens=embedding.max_tokens)
    with triton.InferenceServerClient(url) as client:
        runner = TritonRunner(client, folder.parent.name, folder.name, pad_id=tokenizer.pad_id)
        if runner.space != content["embedding"]["space"]:
            raise ValueError(f"{url} serves another model than {folder} describes")
        yield Embedder(
            tokenizer=tokenizer,
            runner=runner,
            embedding=embedding,
            outputs=[spec["name"] for spec in content["engine"]["outputs"]],
        )


def main() -> None:
    """Embed the texts given and print the cosine of each pair."""
    parser = argparse.ArgumentParser(description="Embed texts with a Triton server.")
    parser.add_argument("folder", type=Path, help="REPOSITORY/MODEL/VERSION")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--url", default="localhost:8001", help="the server's gRPC port")
    parser.add_argument("--prompt-name", help="another prompt of the artifact than its default")
    words = parser.parse_args()
    with embedder(words.folder.resolve(), words.url) as model:
        vectors = model.encode(words.texts, prompt_name=words.prompt_name)
    print(f"{len(vectors)} vectors of {vectors.shape[1]}; their cosines:")
    for row in vectors @ vectors.T:
        print("  " + " ".join(f"{value:6.3f}" for value in row))


if __name__ == "__main__":
    main()
