"""Each engine, in an environment of its own, gives the checkpoint's vectors from an artifact.

The script that loads the artifact imports nothing of jexport. What it measured is kept for the
tables of servers (results.py).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jexport.artifacts import manifest
from jexport.tasks import JINA_V3_PROMPTS

JINA, MINILM = "jina-embeddings-v3", "all-MiniLM-L6-v2"
LOWEST_COSINE = 0.99999
TWO = ("retrieval.query", "classification")
"""With a prompt and without: for engines that need a server for each."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """An engine with the artifacts of one target.

    environment: the folder with its requirements.txt. script: the folder with its embed.py. tasks:
    of the small checkpoint. smaller: whether it is asked for Matryoshka dimensions. strips: whether
    it strips white space from a text and its prompt before it looks at them.
    """

    engine: str
    target: str
    environment: str
    script: str
    tasks: tuple[str, ...] = tuple(JINA_V3_PROMPTS)
    smaller: bool = False
    strips: bool = False


def proof(engine: str, target: str, environment: str, script: str = "", **more: Any) -> Any:
    """As a parameter of a test, with a name."""
    made = Proof(
        engine=engine, target=target, environment=environment, script=script or environment, **more
    )
    return pytest.param(made, id=f"{engine}-{target}")


PROOFS = [
    proof("transformers", "hf", "transformers"),
    proof("sentence-transformers", "hf", "sentence_transformers"),
    proof("sentence-transformers", "openvino", "sentence_transformers"),
    proof(
        "sentence-transformers",
        "onnx",
        "sentence_transformers_5",
        "sentence_transformers",
        strips=True,
    ),
    proof("optimum", "onnx", "sentence_transformers_5", "optimum"),
    proof("langchain", "hf", "langchain"),
    proof("llama-index", "hf", "llama_index"),
    proof("fastembed", "onnx", "fastembed"),
    proof("onnxruntime", "onnx", "onnxruntime"),
    proof("openvino-genai", "openvino", "openvino_genai"),
    proof("infinity", "onnx", "infinity", tasks=TWO, strips=True),
    proof("tei", "onnx", "onnxruntime", "tei"),
    proof("vllm", "vllm", "vllm", tasks=TWO, smaller=True),
]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def cosines(vectors: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each row with the same row, neither taken to be of length 1."""
    assert vectors.shape == wanted.shape, (vectors.shape, wanted.shape)
    assert np.isfinite(vectors).all()
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted, axis=1)
    return (vectors.astype(np.float64) * wanted).sum(axis=1) / lengths


@pytest.mark.parametrize("proof", PROOFS)
def test_vectors_are_the_checkpoints(
    proof: Proof, asked: Callable[..., Any], run: Callable[..., str], results: Any, tmp_path: Path
) -> None:
    ones = [asked(JINA, task, proof.target, strip=proof.strips) for task in proof.tasks]
    ones.append(asked(MINILM, "none", proof.target, strip=proof.strips))
    jobs = [
        one.job(proof.engine, tmp_path / f"{number}.npy", free_port())
        for number, one in enumerate(ones)
    ]
    for job in jobs:
        job["smaller"] = job["smaller"] if proof.smaller else {}
    told = tmp_path / "asked.json"
    told.write_text(json.dumps({"jobs": jobs}), encoding="utf-8")
    (tmp_path / "home").mkdir()
    said = run(
        proof.environment,
        f"tests/servers/{proof.script}/embed.py",
        told,
        home=tmp_path / "home",
        path=Path(__file__).parent,
    )
    lowest: dict[str, float] = {}
    for one, job in zip(ones, jobs, strict=True):
        vectors = np.load(job["output"])
        found = cosines(vectors, one.wanted)
        assert found.min() >= LOWEST_COSINE, f"{job['name']}: {found.min()} of {found.argmin()}"
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-4
        for size, output in job["smaller"].items():
            cut = one.wanted[:, : int(size)]
            assert cosines(np.load(output), cut).min() >= LOWEST_COSINE, f"{job['name']} of {size}"
        lowest[job["name"]] = float(found.min())
        manifest.verify(one.artifact.path)  # whoever opened the folder wrote nothing into it
    results.keep(
        engine=proof.engine,
        target=proof.target,
        versions=json.loads(said.splitlines()[-1]),
        tasks=proof.tasks,
        precision="fp32",
        lowest=lowest,
        line=ones[-1].line(proof.engine),
    )


def test_teis_candle_loader_finds_its_keys_and_tensors(
    asked: Callable[..., Any], run: Callable[..., str], tmp_path: Path
) -> None:
    ones = [asked(JINA, task, "vllm") for task in TWO] + [asked(MINILM, "none", "vllm")]
    folders = [str(one.artifact.path) for one in ones]
    said = run(
        "onnxruntime",
        "tests/servers/tei/candle.py",
        *folders,
        home=tmp_path,
        path=Path(__file__).parent,
    )
    assert said.split() == folders
