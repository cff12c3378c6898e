"""`make bench-openvino`: jexport's OpenVINO artifacts against torch and sentence-transformers.

embedding: all-MiniLM-L6-v2 on texts of mixed length, end to end (tokenising, batching, forward
pass, pooling). wide: four layers of 1,024, one batch of 8 x 128 tokens. All of one table run in
turn in each round; a ratio is that of one round.

sentence-transformers' own OpenVINO backend needs an older transformers than jexport, so it runs in
another environment: OPENVINO_ENV names its interpreter, where
`pip install "sentence-transformers[openvino]"` was run. Without it that row is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jexport
from benchmarks import int8, table, texts, weights
from jexport import targets
from jexport.artifacts import manifest
from jexport.runtime.open import compiled_model
from jexport.stages import load

TEXTS, ROUNDS = 1500, 5
LIMIT = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
"""oneDNN's own name of the instructions that it may use: AVX512_CORE_BF16 leaves AMX out."""

COMMAND = (f"ONEDNN_MAX_CPU_ISA={LIMIT} " if LIMIT else "") + "make bench-openvino"
PRECISIONS = ("fp32", "bf16", "int8")
ENGINE = targets.load("openvino")
# -P: beside that script lies this file, and its name is the engine's.
THEIRS = ("-P", str(Path(__file__).with_name("sentence_transformers_side.py")))
Side = Callable[[], float]
"""One pass over everything; returns its seconds."""


def embedding() -> None:
    """MiniLM on docstrings."""
    model = str(weights.minilm())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        room = Path(folder)
        asked = room / "texts.json"
        asked.write_text(json.dumps(texts.docstrings(TEXTS)), encoding="utf-8")
        theirs = {"sentence-transformers, torch fp32": [sys.executable, *THEIRS, "torch", model]}
        if os.environ.get("OPENVINO_ENV"):
            theirs["sentence-transformers, its openvino backend"] = [
                *shlex.split(os.environ["OPENVINO_ENV"]),
                *THEIRS,
                "openvino",
                model,
            ]
        commands = dict(theirs)
        for precision in PRECISIONS:
            # What is slower is a number to read here, no reason to stop.
            chosen = int8.minilm().replace_quantize(allow_slower=True)
            built = jexport.build(
                chosen, task="none", target="openvino", precision=precision, out=room
            )
            command = [sys.executable, "-m", "benchmarks.openvino", "side", str(built.path)]
            commands[f"jexport, openvino {precision}"] = command
        made = {name: room / f"{number}.npy" for number, name in enumerate(commands)}
        sides = {
            name: stack.enter_context(_side([*command, str(asked), str(made[name])]))
            for name, command in commands.items()
        }
        seconds = in_turn(sides)
        vectors = {name: np.load(path) for name, path in made.items()}
    base = next(iter(theirs))
    rows = []
    for name, own in seconds.items():
        worst = float((vectors[name] * vectors[base]).sum(axis=1).min())
        rate = f"{TEXTS / statistics.median(own):,.0f}/s"
        others = [spread(seconds[other], own) for other in theirs]
        rows.append([name, rate, *others, f"{worst:.5f}"])
    table.write(
        f"OpenVINO: embedding with all-MiniLM-L6-v2{LIMIT and ', ' + LIMIT}",
        COMMAND,
        f"{TEXTS:,} docstrings, mean 50 tokens; {ROUNDS} rounds, all in turn, each in a process "
        "of its own. Texts a second are those of the median round; a ratio is one round's: lowest "
        "/ **median** / highest. "
        "sentence-transformers' backend runs in the precision that it chooses by itself.",
        ["", "", *(f"times {name}" for name in theirs), "lowest cosine to torch"],
        rows,
    )


@contextlib.contextmanager
def _side(command: Sequence[str]) -> Iterator[Side]:
    """A process that embeds everything once for each line that it is given, and prints seconds."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def run() -> float:
        requests.write("again\n")
        requests.flush()
        for line in answers:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"it stopped: {shlex.join(command)}")

    try:
        yield run
    finally:
        requests.close()
        process.wait()


def side(path: str, asked: str, vectors: str) -> None:
    """What a process of jexport's own does: answer until stdin ends."""
    sentences = json.loads(Path(asked).read_text(encoding="utf-8"))
    with jexport.open_artifact(Path(path), device="cpu") as opened:
        for _ in sys.stdin:
            begin = time.perf_counter()
            made = opened.encode(sentences)
            print(f"seconds {time.perf_counter() - begin}", flush=True)
            np.save(vectors, made)


def in_turn(sides: Mapping[str, Side]) -> dict[str, list[float]]:
    """Seconds of each in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, run in sides.items():
            took = run()
            if number:
                seconds[name].append(took)
    return seconds


def spread(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Ratios of the rounds: lowest / median / highest."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{min(ratios):.2f} / **{statistics.median(ratios):.2f}** / {max(ratios):.2f}"


def wide() -> None:
    """Four layers of 1,024 against torch fp32 (sdpa)."""
    import torch

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        toy = Path(folder) / "toy"
        chosen = int8.wide_recipe(toy).replace_quantize(allow_slower=True)
        module_of = load.run(chosen.load, task="none")
        module = module_of.assemble(module_of.weights)
        ids = np.random.default_rng(0).integers(10, 1000, (8, 128))
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

        def in_torch(given: Mapping[str, Any]) -> None:
            with torch.no_grad():
                module(**{name: torch.from_numpy(value) for name, value in given.items()})

        runners: dict[str, Callable[..., Any]] = {"torch fp32": in_torch}
        for precision in PRECISIONS:
            built = jexport.build(
                chosen, task="none", target="openvino", precision=precision, out=Path(folder)
            )
            compiled = compiled_model(built.path, manifest.read(built.path).content)
            runners[f"openvino {precision}"] = stack.enter_context(
                ENGINE.runner(compiled, "cpu", 0)
            )
        seconds = in_turn({name: _passes(run, feed) for name, run in runners.items()})
    rows = [[name, spread(seconds["torch fp32"], own)] for name, own in seconds.items()]
    table.write(
        f"OpenVINO: four layers of 1,024{LIMIT and ', ' + LIMIT}",
        COMMAND,
        f"Seeded XLM-R shape, batch of 8 x 128 tokens, {ROUNDS} rounds of four passes, in turn. "
        "Speed against torch fp32 of the same round: lowest / **median** / highest.",
        ["", "times torch fp32"],
        rows,
    )


def _passes(run: Callable[..., Any], feed: Mapping[str, Any]) -> Side:
    def timed() -> float:
        begin = time.perf_counter()
        for _ in range(4):
            run(feed)
        return time.perf_counter() - begin

    return timed


PARTS: dict[str, Callable[[], None]] = {"embedding": embedding, "wide": wide}

if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        side(*sys.argv[2:])
    else:
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
