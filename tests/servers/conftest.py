"""Environments of their own for what does not fit requirements.lock: installed once, then reused.

Each folder here has a requirements.txt with every version pinned. `make test-servers` runs the
check_*.py files; `make test` does not, since an environment takes minutes and hundreds of MB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from uv import find_uv_bin

from jexport import recipe
from jexport.building import pipeline
from jexport.datasets import calibration
from jexport.runtime.embedder import TOKEN_VECTORS, Embedder
from jexport.runtime.open import embedding_of
from jexport.runtime.tokenise import TextTokenizer
from jexport.serving import servers
from jexport.serving.servers.lines import Served
from jexport.stages import load
from jexport.toy import checkpoint
from jexport.types import Artifact

PROJECT = Path(__file__).parents[2]
KEPT = PROJECT / ".servers"
JINA, MINILM = "jina-embeddings-v3", "all-MiniLM-L6-v2"
LONG_CHARACTERS = 4500
"""More than MiniLM takes, so that it shows who cuts where; jina-embeddings-v3 takes it whole."""

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Nobody is told that these tests ran, and nothing is looked for elsewhere."""


def _install(home: Path, pins: Path) -> None:
    """Make a virtual environment; most of its files are links into uv's cache, torch's too."""
    python = home / "bin" / "python"
    for words in (
        ["venv", "--clear", "--python", sys.executable, home],
        ["pip", "install", "--no-deps", "--python", python, "-r", pins],
    ):
        subprocess.run([find_uv_bin(), "--quiet", *words], check=True, env=_uv_environment())


def _uv_environment() -> dict[str, str]:
    """Wheels that pip is told to take from a folder (a CPU build of torch) are uv's as well."""
    links = os.environ.get("PIP_FIND_LINKS")
    return {**os.environ, **({"UV_FIND_LINKS": links} if links else {})}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's checks share one server and stay together; each engine's vectors are a check alone.

    pytest-xdist's own groups (--dist loadgroup) have no effect: 3.8 with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if file.endswith("/check_vectors.py") else file

    return ByServer(config, log)


@pytest.fixture(scope="session")
def environment() -> Callable[[str], Path]:
    """`environment("mem0")`: the folder of that environment, made when its pins are new."""

    def folder(name: str) -> Path:
        pins = PROJECT / "tests" / "servers" / name / "requirements.txt"
        lines = [line for line in pins.read_text().splitlines() if not line.startswith("#")]
        digest = hashlib.sha256("\n".join([*lines, sys.version]).encode()).hexdigest()[:12]
        home = KEPT / f"{name}-{digest}"
        KEPT.mkdir(exist_ok=True)
        with FileLock(f"{home}.lock"):
            if not (home / "ready").is_file():
                _install(home, pins)
                (home / "ready").touch()
        return home

    return folder


@pytest.fixture(scope="session")
def run(environment: Callable[[str], Path]) -> Callable[..., str]:
    """`run("mem0", "examples/x.py", "word")`: that script there, offline; what it printed."""

    def run(name: str, script: str, *words: object, home: Path, path: Path = PROJECT) -> str:
        there = environment(name) / "bin"
        done = subprocess.run(
            [
                there / "python",
                PROJECT / "tests" / "offline.py",
                PROJECT / script,
                *map(str, words),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={
                "PATH": f"{there}:{os.environ['PATH']}",
                "HOME": str(home),
                "PYTHONPATH": str(path),
                **QUIET,
            },
        )
        assert done.returncode == 0, done.stderr[-8000:] + done.stdout[-2000:]
        return done.stdout

    return run


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One artifact, the texts that it is asked for, and the checkpoint's own vectors of them."""

    model: str
    artifact: Artifact
    texts: list[str]
    wanted: np.ndarray

    def line(self, engine: str) -> str:
        """How it is started, with FOLDER for its path."""
        content = self.artifact.manifest.content
        return servers.way(engine, content).line(Served(folder=Path("FOLDER"), content=content))

    def job(self, engine: str, output: Path, port: int) -> dict[str, Any]:
        """What its embed.py is told."""
        content, folder = self.artifact.manifest.content, self.artifact.path
        embedding = content["embedding"]
        served = Served(folder=folder, content=content, port=port)
        return {
            "folder": str(folder),
            "name": f"{self.model}-{embedding['task']}",
            "target": content["target"],
            "files": content["engine"]["files"],
            "properties": content["engine"]["facts"].get("properties", {}),
            "texts": self.texts,
            "output": str(output),
            "port": port,
            "task": embedding["task"],
            "prompt": embedding["prompt"],
            "dimension": embedding["dimension"],
            "max_tokens": embedding["max_tokens"],
            "smaller": {
                str(size): str(output.with_suffix(f".{size}.npy"))
                for size in embedding["matryoshka"][:-1]
            },
            "line": servers.way(engine, content).line(served),
        }


@pytest.fixture(scope="session")
def results() -> SimpleNamespace:
    """results.py: tests are no package."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("results.py"))))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """One text in each of 30 languages, the empty text and a long one."""
    samples = calibration.read("parity", "none").samples
    one_each = {sample.language: sample.text for sample in samples}
    assert len(one_each) >= 30
    return [*one_each.values(), "", " ".join(sample.text for sample in samples)[:LONG_CHARACTERS]]


def _quick(whole: recipe.Recipe) -> recipe.Recipe:
    """The same recipe, with fewer texts compared: the engines' vectors are what is looked at."""
    few = dataclasses.replace(whole.validate, budget_tokens=1000, max_tokens=64)
    return dataclasses.replace(whole, validate=few)


@pytest.fixture(scope="session")
def asked(
    minilm: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Asked]:
    """`asked(JINA, "separation", "onnx")`: that artifact, and what it must give.

    It is built once in a run: what one worker of pytest-xdist has built, the other finds done.
    """
    of_the_run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        of_the_run = of_the_run.parent
    shared = of_the_run / "served"
    shared.mkdir(exist_ok=True)
    with FileLock(shared / "toy.lock"):
        small = shared / "toy"
        if not small.is_dir():
            checkpoint.write(small)
    recipes = {
        JINA: _quick(recipe.read(JINA).replace_load(model=str(small))),
        MINILM: _quick(recipe.read(MINILM).replace_load(model=str(minilm))),
    }
    wanted: dict[tuple[str, str, bool], np.ndarray] = {}
    made: dict[tuple[str, str, str], Artifact] = {}

    def truth(model: str, task: str, folder: Artifact, strip: bool) -> np.ndarray:
        """The checkpoint's own forward pass; strip: of texts stripped with their prompts."""
        embedding = embedding_of(folder.manifest.content)
        prompted = [embedding.prompt + text for text in texts]
        loaded = load.run(recipes[model].load, task=task)
        with loaded.reference() as forward:
            tokenizer = TextTokenizer.open(folder.path, max_tokens=embedding.max_tokens)
            reference = Embedder(
                tokenizer=tokenizer, runner=forward, embedding=embedding, outputs=[TOKEN_VECTORS]
            )
            return reference.encode(
                [text.strip() for text in prompted] if strip else prompted, prompt=False
            )

    def ask(model: str, task: str, target: str, *, strip: bool = False) -> Asked:
        key = (model, task, target)
        if key not in made:
            out = shared / "artifacts"
            with FileLock(shared / f"{model}-{task}-{target}.lock"):
                made[key] = pipeline.build(
                    recipes[model], task=task, target=target, precision="fp32", out=out
                )
        of = (model, task, strip)
        if of not in wanted:
            wanted[of] = truth(model, task, made[key], strip)
        return Asked(model=model, artifact=made[key], texts=texts, wanted=wanted[of])

    return ask
