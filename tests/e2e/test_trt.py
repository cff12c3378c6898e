"""A build for TensorRT from the checkpoint to vectors, on stand-ins for TensorRT and the GPU.

Everything but those two is real: the pipeline, Polygraphy, the artifact, the runtime. What the
stand-in engine computes is onnxruntime's; whether TensorRT computes it too, tests/gpu shows.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import jexport
from jexport.artifacts import manifest
from jexport.errors import ArtifactError, DeviceError

static_models: Any = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "checkpoints" / "static_models.py"))
)
TASK = "retrieval.query"
RECIPE = """name = "small"
[compile]
profiles = [
  {batch = [1, 4, 16], tokens = [1, 32, 64]},
  {batch = [1, 2, 8], tokens = [65, 128, 1024]},
]
[validate]
budget_tokens = 1
max_tokens = 64
"""


@pytest.fixture
def words(tmp_path: Path, small: Path) -> list[Any]:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    return [
        "build",
        "--recipe",
        recipe,
        "--model",
        small,
        "--task",
        TASK,
        "--target",
        "trt",
        "--out",
        tmp_path / "out",
    ]


def test_from_the_checkpoint_to_vectors(
    bench: Any, words: list[Any], cli: Callable[..., Any], artifact: Path, texts: list[str]
) -> None:
    answer = cli(*words)
    assert answer.code == 0, answer.err
    content = manifest.verify(answer.path).content
    assert content["target"] == "trt"
    assert content["parity"]["passed"]
    assert content["engine"]["runs_on"]["device"].startswith("Stand-In 3090")
    assert content["engine"]["facts"]["profiles"] == [
        {"batch": [1, 4, 16], "tokens": [1, 32, 64]},
        {"batch": [1, 2, 8], "tokens": [65, 128, 1024]},
    ]
    assert (answer.path / "model.plan").is_file()
    many = [*texts, "word " * 50, ""] * 3
    with jexport.open_artifact(answer.path) as embedder, jexport.open_artifact(artifact) as onnx:
        np.testing.assert_allclose(embedder.encode(many), onnx.encode(many), atol=2e-5)
    assert bench.gpu.leaks() == {"device": 0, "host": 0, "handles": 0}

    # On another GPU, and with a changed plan: refused before TensorRT sees it.
    seen = len(bench.record.named("deserialize_cuda_engine"))
    bench.gpu.major = 9
    with pytest.raises(DeviceError, match="another GPU architecture"):
        jexport.open_artifact(answer.path)
    bench.gpu.major = 8
    with (answer.path / "model.plan").open("ab") as file:
        file.write(b".")
    for verify in (True, False):
        with pytest.raises(ArtifactError):
            jexport.open_artifact(answer.path, verify=verify)
    assert len(bench.record.named("deserialize_cuda_engine")) == seen


def test_a_plan_says_what_it_is_attested_by(
    bench: Any,
    words: list[Any],
    cli: Callable[..., Any],
    vouching: Callable[[Path, Path], dict[str, str]],
    artifact: Path,
    tmp_path: Path,
) -> None:
    answer = cli(*words)
    assert answer.code == 0, answer.err
    content = manifest.verify(answer.path).content
    [graph] = (tmp_path / "out" / ".cache").glob("export-*/content")
    facts = content["engine"]["facts"]
    assert facts["reproducible"] is False
    assert facts["attested_by"] == vouching(answer.path, graph)
    # What a second build gives again, bit for bit, needs nobody to vouch for it.
    assert "attested_by" not in manifest.read(artifact).content["engine"]["facts"]
    for key, digest in facts["attested_by"].items():
        path = answer.path / manifest.NAME
        whole = path.read_text(encoding="utf-8")
        false = {**facts["attested_by"], key: digest[::-1]}
        told = {
            **content,
            "engine": {**content["engine"], "facts": {**facts, "attested_by": false}},
        }
        path.write_text(json.dumps(told), encoding="utf-8")
        with pytest.raises(ArtifactError):
            manifest.verify(answer.path)
        path.write_text(whole, encoding="utf-8")
    manifest.verify(answer.path)


@pytest.mark.parametrize("lack", ["gpu", "driver"])
def test_without_a_gpu_nothing_is_begun(
    lack: str, bench: Any, words: list[Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    if lack == "gpu":
        bench.gpu.count = 0
    else:
        bench.gpu.driver = 0
    answer = cli(*words, "--json")
    assert answer.code == DeviceError.exit_code
    assert "jexport build --target trt --until compile" in answer.err
    assert "jexport compile ARTIFACT" in answer.err
    stages = [json.loads(line) for line in answer.err.splitlines() if line.startswith("{")]
    assert not [one for one in stages if one.get("stage") == "load"]
    assert not (tmp_path / "out").exists()


def test_profiles_that_overlap_leave_nothing(
    bench: Any, words: list[Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("[65, 128, 1024]", "[64, 128, 1024]"))
    answer = cli(*words)
    assert answer.code == 27, answer.err
    assert "profiles 0 and 1 overlap" in answer.err
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())


def stack(folder: Path) -> Path:
    """Two poolings joined, Dense, LayerNorm, Dense without a bias: all of it in the graph."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    width = static_models.WIDTH
    encoder = static_models.encoder(folder.with_name("encoder"))
    modules = [
        encoder,
        Pooling(width, pooling_mode=["lasttoken", "weightedmean"]),
        Dense(2 * width, width),
        LayerNorm(width),
        Dense(width, 24, bias=False, activation_function=torch.nn.GELU()),
        Normalize(),
    ]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


@pytest.mark.rare
@pytest.mark.parametrize("kind", ["stack", "static"])
def test_modules_and_a_table_as_a_plan(
    kind: str, bench: Any, cli: Callable[..., Any], texts: list[str], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    saved = tmp_path / "saved"
    checkpoint = stack(saved) if kind == "stack" else static_models.save_static(saved)
    words = (
        "--task",
        "none",
        "--target",
        "trt",
        "--validate-tokens",
        64,
        "--out",
        tmp_path / "out",
    )
    answer = cli("build", "--model", checkpoint, *words)
    assert answer.code == 0, answer.err
    library = SentenceTransformer(str(checkpoint), device="cpu", local_files_only=True)
    many = [*texts, "the harbour at night " * 400, ""]
    with jexport.open_artifact(answer.path) as embedder:
        np.testing.assert_allclose(embedder.encode(many), library.encode(many), atol=2e-5)
    assert bench.gpu.leaks() == {"device": 0, "host": 0, "handles": 0}
