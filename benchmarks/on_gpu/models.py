"""What is measured: seeded checkpoints, their artifacts, and texts of given numbers of tokens.

All of it lies in one work folder, so that tests and benchmark share one build. No real weights are
needed: speed does not depend on them, and cosines are against the same weights in torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.measure import one_line
from jexport import recipe

INDEX = "models.json"
FULL, MINILM = "jina-embeddings-v3, full size", "MiniLM's shape"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One checkpoint. width, layers, inner: hidden size, blocks, size of the inner MLP layer."""

    name: str
    folder: str
    task: str
    layers: int
    width: int
    inner: int
    max_tokens: int

    def flop(self, tokens: int) -> float:
        """Floating-point operations of one text: the matrix products of all blocks.

        Twice the weights a token (QKV, output, both MLP matrices), and 4 x tokens x width a token
        for attention's two products. Embedding, norms and pooling are not counted.
        """
        weights = self.layers * (4 * self.width**2 + 2 * self.width * self.inner)
        return tokens * (2.0 * weights + 4.0 * tokens * self.width * self.layers)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One artifact of a model. compile: keys of [compile] that differ from the default.

    reuses: it takes another variant's exported graph from the cache, and is built after it.
    folders: of the models that have it.
    """

    target: str
    precision: str
    compile: Mapping[str, Any] = field(default_factory=dict)
    providers: tuple[str, ...] = ("cuda", "cpu")
    reuses: bool = False
    folders: tuple[str, ...] = ("jina", "minilm")


VARIANTS: dict[str, Variant] = {
    "hf": Variant(target="hf", precision="fp32"),
    "fp16": Variant(target="onnx", precision="fp16"),
    "fp32": Variant(target="onnx", precision="fp32"),
    "tf32": Variant(target="onnx", precision="tf32", providers=("cuda",), reuses=True),
}
"""By name. 'hf' is what the torch sides open."""

CUDA_STEPS = (("all",), ("all", "packed_attention"), *((name,) for name in recipe.CUDA_STEPS))
"""Values of `compile.cuda`: all that CUDA graphs take, all and no padding, and each step alone."""

VARIANTS |= {
    f"fp16 for CUDA, {' + '.join(steps)}": Variant(
        target="onnx",
        precision="fp16",
        compile={"cuda": steps},
        providers=("cuda",),
        reuses=True,
        folders=("jina", "minilm") if "all" in steps else ("jina",),
    )
    for steps in CUDA_STEPS
}

AT_ONCE = 6
"""Builds at full size side by side: each takes up to 6 GB."""


def models(*, small: bool) -> list[Model]:
    """The two checkpoints, or two tiny ones of the same kinds."""
    task = "retrieval.passage"
    if small:
        return [
            Model(
                name=FULL, folder="jina", task=task, layers=2, width=128, inner=320, max_tokens=8192
            ),
            Model(
                name=MINILM,
                folder="minilm",
                task="none",
                layers=2,
                width=64,
                inner=128,
                max_tokens=512,
            ),
        ]
    return [
        Model(
            name=FULL, folder="jina", task=task, layers=24, width=1024, inner=4096, max_tokens=8192
        ),
        Model(
            name=MINILM,
            folder="minilm",
            task="none",
            layers=6,
            width=384,
            inner=1536,
            max_tokens=512,
        ),
    ]


def prepare(work: Path, *, small: bool, provider: str) -> dict[str, Any]:
    """Write the checkpoints and build every variant, unless that was done; returns the index.

    The index: {model folder: {variant: artifact folder}, "failed": {"model variant": error}}.
    """
    index = work / INDEX
    if index.is_file():
        found: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        return found
    work.mkdir(parents=True, exist_ok=True)
    chosen = models(small=small)
    for model in chosen:
        _write_checkpoint(model, work / model.folder, full_size=not small)
    made: dict[str, Any] = {model.folder: {} for model in chosen} | {"failed": {}}
    for later in (False, True):
        jobs = [
            (model, name)
            for model in chosen
            for name, variant in VARIANTS.items()
            if provider in variant.providers
            and variant.reuses == later
            and model.folder in variant.folders
        ]
        for (model, name), result in zip(jobs, _built(jobs, work, small=small), strict=True):
            if isinstance(result, Path):
                made[model.folder][name] = str(result)
            else:
                made["failed"][f"{model.folder} {name}"] = result
    index.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return made


def build(work: Path, model: Model, name: str) -> Path:
    """Build one variant; few texts are compared: tests/gpu and the benchmark compare again."""
    import jexport

    variant = VARIANTS[name]
    chosen = recipe.for_model(str(work / model.folder)).replace_compile(**variant.compile)
    quick = dataclasses.replace(chosen.validate, budget_tokens=2048, max_tokens=256)
    made = jexport.build(
        dataclasses.replace(chosen, validate=quick),
        task=model.task,
        target=variant.target,
        precision=variant.precision,
        out=work / "artifacts",
    )
    return made.path


def _built(jobs: Sequence[tuple[Model, str]], work: Path, *, small: bool) -> list[Path | str]:
    """An artifact's folder for each job, or why there is none; large ones side by side."""
    results: list[Path | str] = []
    if small:
        for model, name in jobs:
            try:
                results.append(build(work, model, name))
            except Exception as error:
                results.append(one_line(error))
        return results
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 4))}

    def one(job: tuple[Model, str]) -> Path | str:
        model, name = job
        command = [sys.executable, "-m", "benchmarks.gpu", "build", str(work), model.folder, name]
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(f"--- {model.folder} {name}\n{done.stdout}", flush=True)
        lines = done.stdout.strip().splitlines() or ["it said nothing"]
        # The last line of a traceback is a fix, or a note: the first of the error says more.
        errors = [line for line in lines if "Error" in line]
        return (errors or lines)[-1] if done.returncode else Path(lines[-1])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, jobs))


def _write_checkpoint(model: Model, folder: Path, *, full_size: bool) -> None:
    from jexport.toy import checkpoint

    if folder.is_dir():
        return
    if model.name == FULL:
        checkpoint.write(folder, full_size=full_size)
    else:
        _write_bert(model, folder)


def _write_bert(model: Model, folder: Path) -> None:
    """A seeded BERT encoder as sentence-transformers saves it: mean pooling, then length 1."""
    import torch
    from transformers import BertConfig, BertModel

    from jexport.toy import tokenizer as toy_tokenizer

    tokenizer = toy_tokenizer.train()
    torch.manual_seed(0)
    heads = max(2, model.width // 32)
    made = BertModel(
        BertConfig(
            vocab_size=30522,
            hidden_size=model.width,
            num_hidden_layers=model.layers,
            num_attention_heads=heads,
            intermediate_size=model.inner,
            pad_token_id=1,
            max_position_embeddings=model.max_tokens,
            # At 0.02 every token of a text ends as nearly the same vector.
            initializer_range=model.width**-0.5,
        ),
        add_pooling_layer=False,
    )
    made.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    special |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.max_tokens}
    package = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{package}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{package}.Normalize"},
    ]
    pooling = {"word_embedding_dimension": model.width, "pooling_mode_mean_tokens": True}
    for name, content in {
        "tokenizer_config.json": special | kind,
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": model.max_tokens, "do_lower_case": False},
        "1_Pooling/config.json": pooling,
    }.items():
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(content), encoding="utf-8")


class TextSource:
    """Texts of given numbers of tokens, cut out of the calibration texts, in 30 languages.

    tokenize: token ids of texts, special tokens included.
    """

    def __init__(self, tokenize: Callable[[list[str]], list[list[int]]]) -> None:
        from jexport.datasets import calibration

        files = sorted((calibration.data_folder() / "everyday").glob("*.jsonl"))
        lines = [line for path in files for line in path.read_text("utf-8").splitlines()]
        found = [json.loads(line)["text"] for line in lines]
        random.Random(0).shuffle(found)
        self._tokenize = tokenize
        self._stream = " ".join(found)
        sample = self._stream[:20_000]
        self._characters = len(sample) / len(tokenize([sample])[0])
        """Of one token, on average."""

    def texts(self, lengths: Sequence[int], *, seed: int = 0) -> list[str]:
        """A text of about each length, special tokens included, never of more tokens."""
        generator = random.Random(seed)
        made = [self._cut(generator, self._characters * n * 1.1) for n in lengths]
        for _ in range(8):  # a cut changes the count a little: until none is too long
            counts = list(map(len, self._tokenize(made)))
            over = [i for i, n in enumerate(lengths) if counts[i] > n]
            if not over:
                break
            for i in over:
                made[i] = made[i][: max(1, int(len(made[i]) * lengths[i] / counts[i]) - 1)]
        return made

    def _cut(self, generator: random.Random, characters: float) -> str:
        size = max(1, int(characters))
        start = generator.randrange(max(1, len(self._stream) - size))
        return self._stream[start : start + size]


def mixed_lengths(count: int, *, mean: float, longest: int, seed: int = 0) -> list[int]:
    """Lengths as those of documents are: log-normal (sigma 0.8) with that mean, 4 to `longest`."""
    import math

    generator = random.Random(seed)
    middle = math.log(mean) - 0.8**2 / 2
    return [
        max(4, min(longest, round(generator.lognormvariate(middle, 0.8)))) for _ in range(count)
    ]
