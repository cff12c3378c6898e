"""`make bench-int8`: what int8 keeps, brings and costs.

quality: all-MiniLM-L6-v2 on English docstrings and on short literary texts, which neither
calibration nor search has seen.
curve: the same model's own held-out texts, from nothing wide to everything, and what each technique
gives. wide: four layers of 1,024, one batch of 8 x 128 tokens, the engines in turn in one run, the
fastest of several rounds. full: memory and time at full size.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import jexport
from benchmarks import table, texts, weights
from benchmarks.process import measured
from jexport import recipe, targets
from jexport.artifacts import manifest
from jexport.building import calibration_texts
from jexport.datasets import calibration
from jexport.evaluation import parity, speed
from jexport.runtime.open import compiled_model
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import export, load, merge, quantize

TEXTS = 1000
PRECISIONS = ("fp32", "int8-weights", "int8")
SYMMETRIC = "int8, symmetric scheme"
METRICS = ("cosine_mean", "cosine_p1", "cosine_min", "top10_overlap")
HEADS = ["cosine mean", "p1", "min", "top-10"]
ENGINE = targets.load("onnx")
assert ENGINE.int8 is not None


def minilm() -> recipe.Recipe:
    """The shipped recipe on the weights that `make setup` installs."""
    return recipe.read("all-MiniLM-L6-v2").replace_load(model=str(weights.minilm()))


def quality() -> None:
    """MiniLM: neighbours and cosine on unseen texts, size, speed."""
    chosen = minilm()
    kinds = {"docstrings": texts.docstrings(TEXTS), "literary": texts.literary(TEXTS)}
    vectors, sizes, folders = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            built = jexport.build(
                chosen, task="none", target="onnx", precision=precision, out=Path(folder)
            )
            folders[precision] = built.path
        folders[SYMMETRIC] = symmetric(chosen, folders["fp32"], Path(folder) / "symmetric")
        for name, path in folders.items():
            sizes[name] = sum(p.stat().st_size for p in path.glob("model.onnx*"))
            with jexport.open_artifact(path, device="cpu", verify=False) as model:
                vectors[name] = {kind: model.encode(some) for kind, some in kinds.items()}
        rates = _rates(folders, kinds["docstrings"])
    rows = []
    for name in folders:
        row = [name, f"{sizes[name] / sizes['fp32']:.3f}", f"{rates[name] / rates['fp32']:.2f}"]
        for kind in kinds:
            outcome = parity.compare(
                parity.Outputs(embeddings=vectors["fp32"][kind]),
                parity.Outputs(embeddings=vectors[name][kind]),
                parity.Labels(languages=("en",) * TEXTS, lengths=(1,) * TEXTS, dimensions=(384,)),
            )["overall"]
            rows.append([*row, kind, *(f"{outcome[metric]:.4f}" for metric in METRICS)])
    table.write(
        "INT8 of all-MiniLM-L6-v2",
        "make bench-int8",
        f"{TEXTS:,} English docstrings and {TEXTS:,} short literary texts (Debian's fortunes: "
        "verse, dialogue, aphorisms) that nothing was tuned on, against fp32. At most 15 % of "
        "the work of the products is not plain int8. The last rows are what TensorRT takes, run "
        "in onnxruntime.",
        ["precision", "size", "speed, 8 x 128 tokens", "texts", *HEADS],
        rows,
    )


def symmetric(chosen: recipe.Recipe, fp32: Path, folder: Path) -> Path:
    """An artifact's folder (its manifest is fp32's) with the graph of the symmetric scheme."""
    import shutil

    loaded = load.run(chosen.load, task="none")
    own = calibration_texts.TokenizedTexts.of(chosen.quantize.calibration, loaded)
    for name in ("export", "quantize"):
        (folder / name).mkdir(parents=True)
    plain = export.run(
        loaded, chosen.export, precision="fp32", samples=[], out_dir=folder / "export"
    )
    made = quantize.run(
        plain,
        calibration_texts.calibration_data(own, chosen.quantize),
        chosen.quantize,
        quantize.QuantizationTarget(
            scheme="symmetric", precision="int8", fallback="int8x2", gates={}
        ),
        runtime=ENGINE,
        out_dir=folder / "quantize",
    )
    place = folder / "artifact"
    shutil.copytree(fp32, place, ignore=shutil.ignore_patterns("model.onnx*"))
    ENGINE.build(made, chosen.compile, place)
    return place


def _rates(folders: dict[str, Path], sentences: list[str]) -> dict[str, float]:
    tokenizer = TextTokenizer.open(folders["fp32"], max_tokens=256)
    with contextlib.ExitStack() as stack:
        runners = {
            name: stack.enter_context(
                ENGINE.runner(compiled_model(path, manifest.read(path).content), "cpu", 0)
            )
            for name, path in folders.items()
        }
        return speed.compare(runners, speed.feeds(tokenizer.token_ids(sentences), 256))


def curve() -> None:
    """MiniLM with --effort full: quality against the share that is wide, and each technique's."""
    with tempfile.TemporaryDirectory() as folder:
        built = jexport.build(
            minilm().replace_quantize(effort="full"),
            task="none",
            target="onnx",
            precision="int8",
            out=Path(folder),
        )
        report = json.loads((built.path / "quantization.json").read_text(encoding="utf-8"))
    points = [{**one, "what": f"all int8: {one['what']}"} for one in report["techniques"]]
    points += report["curve"]
    shipped = report["chosen"]["wide"]
    rows = [
        [
            one["what"] + (" (shipped)" if one.get("wide") == shipped else ""),
            f"{one['share']:.0%}",
            *(f"{one[metric]:.4f}" for metric in METRICS),
        ]
        for one in points
    ]
    table.write(
        "INT8 quality against the share that is wide",
        "make bench-int8",
        f"all-MiniLM-L6-v2 with --effort full, its {report['held_out']['texts']} held-out texts in "
        "30 languages. Wide: activations as two int8 terms (about 16 bits), weights int8.",
        ["", "share wide", *HEADS],
        rows,
    )


def wide() -> None:
    """Four layers of 1,024: int8 against torch fp32 (sdpa) and fp32 ONNX."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        chosen = wide_recipe(Path(folder) / "toy")
        built = {
            precision: jexport.build(
                chosen, task="none", target="onnx", precision=precision, out=Path(folder)
            ).path
            for precision in ("fp32", "int8")
        }
        loaded = load.run(chosen.load, task="none")
        module = loaded.assemble(loaded.weights)
        ids = np.random.default_rng(0).integers(10, 1000, (64, 128)).tolist()

        def in_torch(feed: Any) -> dict[str, np.ndarray]:
            with torch.no_grad():
                out = module(**{name: torch.from_numpy(value) for name, value in feed.items()})
            return {"last_hidden_state": out.last_hidden_state.numpy()}

        opened = [
            ENGINE.runner(compiled_model(p, manifest.read(p).content), "cpu", 0)
            for p in built.values()
        ]
        with opened[0] as first, opened[1] as second:
            rates = speed.compare(
                {"torch fp32": in_torch, "onnx fp32": first, "onnx int8": second},
                speed.feeds(ids, 128),
            )
    rows = [[name, f"{rate / rates['torch fp32']:.2f}"] for name, rate in rates.items()]
    table.write(
        "INT8 of four layers of 1,024",
        "make bench-int8",
        "Seeded XLM-R shape, batch of 8 x 128 tokens, speed against torch fp32.",
        ["", "times torch fp32"],
        rows,
    )


def wide_recipe(toy: Path) -> recipe.Recipe:
    """A seeded checkpoint of that shape, written to `toy`, and goals that it can reach."""
    _write_wide(toy)
    return recipe.for_model(str(toy)).replace_quantize(samples=64, max_tokens=128)


def _write_wide(folder: Path) -> None:
    """A seeded XLM-R encoder with the MiniLM tokenizer, as sentence-transformers saves it."""
    import shutil

    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(0)
    shutil.copytree(
        weights.minilm(),
        folder,
        ignore=shutil.ignore_patterns("*.safetensors", "*.onnx*", "*.bin"),
    )
    made = XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=30522,
            hidden_size=1024,
            num_hidden_layers=4,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            pad_token_id=0,
            type_vocab_size=1,
        ),
        add_pooling_layer=False,
    )
    made.save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    content = json.loads(pooling.read_text(encoding="utf-8"))
    content["word_embedding_dimension"] = 1024
    pooling.write_text(json.dumps(content), encoding="utf-8")


FULL_SAMPLES = (64, 8, 256)


def full() -> None:
    """Full size: quantize alone, each number of samples in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        toy, tokenizer = str(Path(folder) / "toy"), str(weights.xlm_r_tokenizer())
        measured("-m", "jexport", "toy", toy, "--full-size", "--tokenizer", tokenizer)
        measured("-m", "benchmarks.int8", "export-full", toy, folder)
        for samples in FULL_SAMPLES:
            _, peak_gb, output = measured(
                "-m", "benchmarks.int8", "quantize-full", toy, folder, str(samples)
            )
            seconds, size = json.loads(output.splitlines()[-1])
            rows.append([f"{samples}", f"{seconds:.0f}", f"{peak_gb:.2f}", f"{size:.3f}"])
    least, most = (min(float(row[2]) for row in rows), max(float(row[2]) for row in rows))
    table.write(
        "INT8 at full size",
        "make bench-int8",
        "Full-size seeded checkpoint (559 M parameters), the stage quantize for "
        f"{weights.TASK}: calibration texts of at most 128 tokens, 90 held-out texts, goals that "
        f"the first trial meets. Most over least memory: **{most / least:.2f}**.",
        ["calibration texts", "seconds", "peak memory, GB", "size against fp32"],
        rows,
    )


def _at_full_size(checkpoint: str) -> recipe.Recipe:
    low = {"cosine_mean": 0.5, "cosine_p1": 0.5, "top10_overlap": 0.1, "max_tokens": 128}
    return recipe.for_model(checkpoint).replace_quantize(**low)


def export_full(checkpoint: str, folder: str) -> None:
    """The merged fp32 graph, written once."""
    chosen = _at_full_size(checkpoint)
    merged = merge.run(load.run(chosen.load, task=weights.TASK))
    place = Path(folder) / "plain"
    place.mkdir()
    export.run(merged, chosen.export, precision="fp32", samples=[], out_dir=place)


def quantize_full(checkpoint: str, folder: str, samples: str) -> None:
    """One run of the stage; prints its seconds and the size of what it wrote over fp32's."""
    chosen = _at_full_size(checkpoint).replace_quantize(samples=int(samples))
    loaded = load.run(chosen.load, task=weights.TASK)
    own = calibration_texts.TokenizedTexts(
        parts=calibration.parts(chosen.quantize.calibration, weights.TASK),
        model=loaded,
        tokenizer=TextTokenizer.open(
            loaded.tokenizer_files[0].parent, max_tokens=loaded.embedding.max_tokens
        ),
    )
    place = Path(folder) / f"int8-{samples}"
    place.mkdir()
    begin = time.perf_counter()
    quantize.run(
        weights.exported(Path(folder) / "plain", loaded, chosen),
        calibration_texts.calibration_data(own, chosen.quantize),
        chosen.quantize,
        quantize.QuantizationTarget(
            scheme=ENGINE.int8.scheme, precision="int8", fallback=ENGINE.int8.fallback, gates={}
        ),
        runtime=ENGINE,
        out_dir=place,
    )
    seconds = time.perf_counter() - begin
    sizes = json.loads((place / "quantization.json").read_text(encoding="utf-8"))["bytes"]
    print(json.dumps([seconds, sizes["int8"] / sizes["fp32"]]))


PARTS: dict[str, Callable[..., None]] = {
    "quality": quality,
    "curve": curve,
    "wide": wide,
    "full": full,
}
INSIDE: dict[str, Callable[..., None]] = {
    "export-full": export_full,
    "quantize-full": quantize_full,
}

if __name__ == "__main__":
    if sys.argv[1:]:
        {**PARTS, **INSIDE}[sys.argv[1]](*sys.argv[2:])
    else:
        for part in PARTS:
            subprocess.run([sys.executable, "-m", "benchmarks.int8", part], check=True)
