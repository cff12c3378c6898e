"""Every architecture of the table of vLLM's layouts, in a real vLLM beside sentence-transformers.

Weekly (`make test-rare`): vLLM looks at each of its classes in a process of its own, most of a
minute each on a busy machine. test_layout_rows.py holds that no row of the table is left out.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jexport import recipe
from jexport.artifacts import manifest
from jexport.building import pipeline
from jexport.evaluation import reference_library_jina_v5
from jexport.toy import checkpoint, like

SWEEP = Path(__file__).parents[2] / "sweep"
tiny: Any = runpy.run_path(str(SWEEP / "tiny.py"))
one: Any = runpy.run_path(str(SWEEP / "one.py"))
rows: Any = runpy.run_path(str(Path(__file__).with_name("layout_rows.py")))

LOWEST_COSINE = 0.99999
ROWS = [*rows["LIKE"], *("/".join(names[::2]) for names in rows["JINA_V5"]), *rows["TINY"]]
LONG = "the harbour at night and the ferry to the island " * 60
"""Beyond every window, and what jina's toys call long."""

pytestmark = pytest.mark.rare


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row: vLLM's vectors beside the library's, or what vLLM said instead."""

    given: np.ndarray | None
    wanted: np.ndarray
    error: str


def build(chosen: recipe.Recipe, folder: Path, task: str = "none") -> Path:
    few = dataclasses.replace(chosen.validate, budget_tokens=400, max_tokens=64)
    quick = dataclasses.replace(chosen.replace_load(model=str(folder / "model")), validate=few)
    return pipeline.build(
        quick, task=task, target="vllm", precision="fp32", out=folder / "out"
    ).path


def judged(folder: Path, texts: list[str], max_tokens: int) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
    )
    library.max_seq_length = max_tokens
    vectors: np.ndarray = library.float().encode(texts, batch_size=1, prompt="")
    return vectors


def max_tokens(artifact: Path) -> int:
    return int(manifest.verify(artifact).content["embedding"]["max_tokens"])


def of_recipe(name: str, folder: Path) -> tuple[Path, list[str], np.ndarray]:
    like.write(folder / "model", name)
    artifact = build(recipe.read(name), folder)
    texts = [*one["TEXTS"], LONG]
    return artifact, texts, judged(folder / "model", texts, max_tokens(artifact))


def of_jina_v5(names: tuple[str, str, str], folder: Path) -> tuple[Path, list[str], np.ndarray]:
    name, layout, task = names
    checkpoint.write(folder / "model", layout=layout)
    artifact = build(recipe.read(name), folder, task)
    texts = [f"Query: {text}" for text in (*one["TEXTS"], LONG)]
    judge = reference_library_jina_v5.assemble(folder / "model", task)
    return artifact, texts, judge.encode(texts, batch_size=1, prompt="")


def of_tiny(name: str, folder: Path) -> tuple[Path, list[str], np.ndarray]:
    kind, pooling, config = rows["TINY"][name]
    tiny["make"](kind, folder / "model", **config)
    path = folder / "model" / "1_Pooling" / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stored | pooling), encoding="utf-8")
    table = {"name": name, "load": {"model": str(folder / "model")}}
    artifact = build(recipe.from_table(table, origin="a test"), folder)
    texts = [*one["TEXTS"], LONG]
    return artifact, texts, judged(folder / "model", texts, max_tokens(artifact))


@pytest.fixture(scope="module")
def results(run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Every row in one vLLM process."""
    home = tmp_path_factory.mktemp("layouts")
    torch.set_num_threads(1)
    made = {name: of_recipe(name, home / name) for name in rows["LIKE"]}
    for names in rows["JINA_V5"]:
        name = "/".join(names[::2])
        made[name] = of_jina_v5(names, home / name.replace("/", "-"))
    made |= {name: of_tiny(name, home / name) for name in rows["TINY"]}
    jobs, outputs = [], {}
    for number, (name, (artifact, texts, _)) in enumerate(made.items()):
        outputs[name] = home / f"{number}.npy"
        jobs.append({"folder": str(artifact), "texts": texts, "output": str(outputs[name])})
    (home / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    run("vllm", "tests/servers/vllm/rows.py", home / "jobs.json", home=home)
    done = {}
    for name, (_, _, wanted) in made.items():
        error = outputs[name].with_suffix(".txt")
        done[name] = Result(
            given=np.load(outputs[name]) if outputs[name].is_file() else None,
            wanted=wanted,
            error=error.read_text() if error.is_file() else "",
        )
    return done


@pytest.mark.parametrize("name", ROWS)
def test_vllm_gives_the_librarys_vectors(name: str, results: dict[str, Result]) -> None:
    row = results[name]
    assert row.given is not None, row.error
    assert row.given.shape == row.wanted.shape
    lengths = np.linalg.norm(row.given, axis=1) * np.linalg.norm(row.wanted, axis=1)
    cosine = (row.given.astype(np.float64) * row.wanted).sum(axis=1) / lengths
    assert cosine.min() >= LOWEST_COSINE, cosine
    apart = np.linalg.norm(row.wanted[:, None] - row.wanted[None], axis=2)
    far = apart[np.triu_indices(len(apart), 1)].mean() / np.linalg.norm(row.wanted, axis=1).mean()
    assert far > 0.05, "texts this alike prove nothing"
