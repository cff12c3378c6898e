"""What is measured, in which order, and how each number is taken; the results go into a JSON file.

What matters most comes first, and the file is written after every measurement: a run that is cut
off leaves what it has. Sides of one measurement run in turn in one process.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.on_gpu import measure, models, sides
from benchmarks.on_gpu.models import Model
from benchmarks.on_gpu.sides import Feed, Graph, Opened
from jexport.runtime.tokenise import TextTokenizer

FORMAT = 1
TORCH, COMPILED, EXACT = "torch fp16", "torch fp16, compiled", "torch fp32"
FP16, FP32, TF32 = "onnx fp16", "onnx fp32", "onnx tf32"
GRAPHS, CAPTURED = "CUDA graphs", ("fp16", "fp16 for CUDA, all")
"""Artifacts that are opened with CUDA graphs as well; one that cannot be captured says so."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    shapes: (batch, tokens) of the bare graphs. texts, mean_tokens: of the mix; fp32_share: how much
    of it the fp32 sides embed. rounds, seconds: most of one measurement, after one to warm up.
    one_text: most runs of one text. matmul: rows of the large product. compiled: how many of the
    models run under torch.compile.
    """

    shapes: tuple[tuple[int, int], ...] = ((64, 16), (64, 128), (32, 512), (8, 2048), (2, 8192))
    texts: int = 4096
    mean_tokens: float = 318.0
    fp32_share: float = 0.125
    torch_share: float = 0.25
    rounds: int = 10
    seconds: float = 5.0
    mix_rounds: int = 2
    one_text: int = 200
    one_text_s: float = 1.0
    matmul: int = 16384
    compiled: int = 2


SMALL = Settings(
    shapes=((4, 16), (2, 64)),
    texts=12,
    mean_tokens=24.0,
    rounds=2,
    seconds=1.0,
    mix_rounds=1,
    one_text=3,
    one_text_s=0.5,
    matmul=128,
    compiled=1,
)


class Book:
    """The results, written to the disk whenever one is added."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self.group = ""
        """The step that measures: sides of one group ran in turn."""
        self.content: dict[str, Any] = {
            "format": FORMAT,
            **about,
            "models": [],
            "measured": [],
            "left_out": [],
        }
        self._save()

    def add(self, **record: Any) -> None:
        """One measurement."""
        self.content["measured"].append({"group": self.group, **record})
        self._save()

    def leave_out(self, what: str, why: str) -> None:
        """Something that has no number, and the reason."""
        self.content["left_out"].append({"what": what, "why": why})
        self._save()

    def put(self, **values: Any) -> None:
        """Something about the run as a whole."""
        self.content.update(values)
        self._save()

    def _save(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)


class Bench:
    """One model's sides, opened when first needed, and what is measured of them."""

    def __init__(self, model: Model, index: dict[str, Any], book: Book, how: Settings) -> None:
        self.model, self.how = model, how
        self._book, self._index = book, index.get(model.folder, {})
        self._provider: str = book.content["provider"]
        self._stack = contextlib.ExitStack()
        self._open: dict[tuple[str, str], Opened] = {}
        self._failed: set[tuple[str, str]] = set()
        self._truth: Graph | None = None
        self._memory = measure.MemoryOf(measure.Memory(self._provider))
        self._tokenizer: TextTokenizer | None = None
        self._source: models.TextSource | None = None
        self._texts: dict[tuple[int, ...], list[str]] = {}

    def close(self) -> None:
        """Free every side."""
        self._open.clear()
        self._truth = None
        self._stack.close()

    # --- what can be opened -------------------------------------------------------------------

    def _path(self, variant: str) -> Path:
        if variant not in self._index:
            raise FileNotFoundError(f"{self.model.name}: there is no artifact '{variant}'")
        return Path(self._index[variant])

    def sides(self, kind: str) -> dict[str, Callable[[], AbstractContextManager[Opened]]]:
        """What opens each side by its name. kind: 'graph' or 'encode'."""
        onnx = sides.onnx_graph if kind == "graph" else sides.onnx_encode
        torch = sides.torch_graph if kind == "graph" else sides.torch_encode
        made: dict[str, Callable[[], AbstractContextManager[Opened]]] = {}
        for name in self._index:
            if name != "hf":
                made[f"onnx {name}"] = partial(onnx, self._path(name), self._provider)
            if self._provider == "cuda" and name in CAPTURED:
                made[f"onnx {name}, {GRAPHS}"] = partial(
                    onnx, self._path(name), self._provider, cuda_graphs=True
                )
        if "hf" in self._index:
            folder = self._path("hf")
            made[TORCH] = partial(torch, folder, self._provider, "float16")
            made[COMPILED] = partial(torch, folder, self._provider, "float16", compiled=True)
            made[EXACT] = partial(torch, folder, self._provider, "float32")
        return made

    def names(self, kind: str, *, graphs: bool = False) -> list[str]:
        """Sides in half precision, not compiled. graphs: those with CUDA graphs, too."""
        return [
            name
            for name in self.sides(kind)
            if name not in (FP32, TF32, EXACT, COMPILED) and (graphs or GRAPHS not in name)
        ]

    def _side(self, kind: str, name: str) -> Opened | None:
        """An opened side, or None (once said why) where it cannot be opened."""
        key = (kind, name)
        if key not in self._open and key not in self._failed:
            known = self.sides(kind)
            try:
                if name not in known:
                    raise KeyError(f"no such side: {name}")
                with self._memory.acting(f"{kind} {name}", sampled=GRAPHS not in name):
                    self._open[key] = self._stack.enter_context(known[name]())
            except Exception as error:
                self._fail(kind, name, "opening", measure.one_line(error))
        return self._open.get(key)

    def _fail(self, kind: str, name: str, what: str, why: str) -> None:
        self._failed.add((kind, name))
        self._open.pop((kind, name), None)
        self._book.leave_out(f"{self.model.name}: {name}, {kind}: {what}", why)

    # --- texts and truth ----------------------------------------------------------------------

    @property
    def tokenizer(self) -> TextTokenizer:
        """That of the checkpoint's artifacts."""
        if self._tokenizer is None:
            folder = next(Path(path) for name, path in self._index.items() if name != "hf")
            self._tokenizer = TextTokenizer.open(folder, max_tokens=self.model.max_tokens)
        return self._tokenizer

    def texts_of(self, lengths: Sequence[int]) -> list[str]:
        """Texts of about so many tokens."""
        if self._source is None:
            self._source = models.TextSource(self.tokenizer.token_ids)
        key = tuple(lengths)
        if key not in self._texts:
            self._texts[key] = self._source.texts(lengths)
        return self._texts[key]

    def _ids(self, batch: int, tokens: int) -> Feed:
        """Seeded ids without padding."""
        ids = np.random.default_rng(tokens).integers(5, 500, (batch, tokens))
        ids[:, 0], ids[:, -1] = 0, 2
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def _true_vectors(self, feed: Feed) -> np.ndarray:
        """The same weights in torch, float32 without TF32, on the same device."""
        if self._truth is None:
            opened = sides.torch_graph(self._path("hf"), self._provider, "float32")
            graph = self._stack.enter_context(opened).graph
            assert graph is not None
            self._truth = graph
        with sides.exact_products():
            if feed["attention_mask"].all():
                return self._truth(feed)
            # A text at a time: padding them all to the longest could fill the memory.
            rows = []
            for ids, mask in zip(feed["input_ids"], feed["attention_mask"], strict=True):
                real = mask.astype(bool)[None]
                rows.append(
                    self._truth(
                        {
                            "input_ids": ids[None][real][None],
                            "attention_mask": mask[None][real][None],
                        }
                    )
                )
            return np.concatenate(rows)

    # --- measurements -------------------------------------------------------------------------

    def lengths(self, names: Sequence[str]) -> None:
        """The bare graphs of one batch at each length."""
        for batch, tokens in self.how.shapes:
            if tokens > self.model.max_tokens:
                continue
            feed = self._ids(batch, tokens)
            running = self._first("graph", names, lambda graph, f=feed: graph(f), feed)
            with sides.exact_products():
                taken = measure.in_turn(
                    {name: one.run for name, one in running.items()},
                    rounds=self.how.rounds,
                    seconds=self.how.seconds,
                    warm=False,
                )
            flop = batch * self.model.flop(tokens)
            self._record(
                "graph",
                taken,
                running,
                tokens=tokens,
                texts=batch,
                real_tokens=batch * tokens,
                flop=flop,
            )

    def encode_lengths(self, names: Sequence[str]) -> None:
        """End to end, four batches of texts of each length."""
        for batch, tokens in self.how.shapes:
            if tokens > self.model.max_tokens:
                continue
            self._encoded(names, self.texts_of([tokens] * (4 * batch)), tokens, 5)

    def mix(self, names: Sequence[str], graph_of: str = "", share: float = 1.0) -> None:
        """End to end on texts of mixed length.

        graph_of: that artifact's bare graph runs in turn, too, on the batches that `encode` makes.
        """
        count = max(4, round(self.how.texts * share))
        lengths = models.mixed_lengths(
            count, mean=self.how.mean_tokens, longest=self.model.max_tokens
        )
        sentences = self.texts_of(lengths)
        self._encoded(names, sentences, "mix", self.how.mix_rounds, graph_of)

    def one(self, kind: str, names: Sequence[str]) -> None:
        """One text at each length: every run's seconds."""
        for _, tokens in self.how.shapes:
            if tokens > self.model.max_tokens:
                continue
            feed, sentence = self._ids(1, tokens), self.texts_of([tokens])
            if kind == "encode":
                feed = self._feed_of(sentence)
            running = self._first(
                kind, names, lambda run, s=sentence, f=feed: run(f if kind == "graph" else s), feed
            )
            for name, one in running.items():
                longer = 1.0 if tokens == self.how.shapes[0][1] else 0.4
                taken = measure.in_turn(
                    {name: one.run},
                    rounds=self.how.one_text,
                    seconds=self.how.one_text_s * longer,
                )
                self._record(
                    f"one {kind}",
                    taken,
                    {name: one},
                    tokens=tokens,
                    texts=1,
                    real_tokens=int(feed["attention_mask"].sum()),
                    flop=self.model.flop(tokens),
                )

    def _encoded(
        self,
        names: Sequence[str],
        sentences: list[str],
        tokens: int | str,
        rounds: int,
        graph_of: str = "",
    ) -> None:
        ids = self.tokenizer.model_ids(sentences)
        sample = list(range(0, len(sentences), max(1, len(sentences) // 64)))
        feed = self._feed_of([sentences[n] for n in sample])
        running = self._first(
            "encode", names, lambda encode: encode(sentences), feed, sample=sample
        )
        if graph_of in running:
            graph = self._side("graph", graph_of)
            variant = graph_of.removeprefix("onnx ")
            if graph is not None and graph.graph is not None:
                forward = graph.graph
                batches = sides.batches_of(self._path(variant), self._provider, sentences)
                measure.in_turn(
                    {"graph": lambda: [forward(one) for one in batches]},
                    rounds=1,
                    seconds=0,
                    warm=False,
                )
                running["graph"] = _Running(
                    run=lambda: [forward(one) for one in batches],
                    cosine=None,
                    batches=len(batches),
                )
        taken = measure.in_turn(
            {name: one.run for name, one in running.items()},
            rounds=rounds,
            seconds=2 * self.how.seconds,
            warm=False,
        )
        flop = sum(self.model.flop(len(one)) for one in ids)
        about = {
            "tokens": tokens,
            "texts": len(sentences),
            "flop": flop,
            "real_tokens": sum(map(len, ids)),
        }
        if "graph" in running:
            bare = running.pop("graph")
            self._book.add(
                model=self.model.name,
                kind="graph",
                side=graph_of,
                seconds=taken.seconds.pop("graph"),
                batches=bare.batches,
                memory_bytes=0,
                cosine_min=None,
                **about,
            )
        self._record("encode", taken, running, **about)

    def _feed_of(self, sentences: Sequence[str]) -> Feed:
        return self.tokenizer.pad(self.tokenizer.model_ids(sentences))

    def _first(
        self,
        kind: str,
        names: Sequence[str],
        call: Callable[[Any], Any],
        feed: Feed,
        sample: Sequence[int] = (),
    ) -> dict[str, _Running]:
        """Open the sides and run each once: its memory, and its lowest cosine to torch fp32."""
        wanted = self._true_vectors(feed)
        running: dict[str, _Running] = {}
        for name in names:
            opened = self._side(kind, name)
            if opened is None:
                continue
            function = opened.graph if kind == "graph" else opened.encode
            try:
                acting = self._memory.acting(f"{kind} {name}", sampled=GRAPHS not in name)
                with acting, sides.exact_products():
                    vectors = np.asarray(call(function))
            except Exception as error:
                self._fail(kind, name, "running", measure.one_line(error))
                continue
            chosen = vectors[list(sample)] if sample else vectors
            running[name] = _Running(
                run=partial(call, function), cosine=_lowest_cosine(chosen, wanted)
            )
        return running

    def _record(
        self, kind: str, taken: measure.Rounds, running: dict[str, _Running], **about: Any
    ) -> None:
        for name, why in taken.failed.items():
            self._fail(kind.removeprefix("one "), name, "running again", why)
        for name, seconds in taken.seconds.items():
            if not seconds:
                continue
            self._book.add(
                model=self.model.name,
                kind=kind,
                side=name,
                seconds=seconds,
                memory_bytes=self._memory.peak.get(f"{kind.removeprefix('one ')} {name}", 0),
                cosine_min=running[name].cosine,
                **about,
            )


@dataclass(frozen=True, kw_only=True)
class _Running:
    """A side that ran once."""

    run: Callable[[], object]
    cosine: float | None
    batches: int = 0


def _lowest_cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    first, second = found.astype(np.float64), wanted.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(1) / lengths).min())


def steps(benches: Sequence[Bench]) -> list[tuple[str, Callable[[], None]]]:
    """Everything, the most telling first: each step with its name."""
    made: list[tuple[str, Callable[[], None]]] = []
    for part in (_goals, _exact, _end_to_end):
        for bench in benches:
            made += [(f"{bench.model.name}: {name}", step) for name, step in part(bench)]
    for bench in benches[: benches[0].how.compiled]:
        made += [(f"{bench.model.name}: {name}", step) for name, step in _compiled(bench)]
    return made


Steps = Iterator[tuple[str, Callable[[], None]]]


def _goals(bench: Bench) -> Steps:
    """What the goals are about."""
    yield "bare graphs", partial(bench.lengths, bench.names("graph"))
    yield "mixed texts", partial(bench.mix, [FP16], FP16)
    whole, captured = _whole(bench.names("graph", graphs=True)), bench.names("encode", graphs=True)
    yield "one text", partial(bench.one, "graph", whole)
    without = [name for name in _whole(captured) if name != TORCH]
    yield "one text, end to end", partial(bench.one, "encode", without)
    for side in _whole(bench.names("encode")):
        if side not in (FP16, TORCH):
            yield f"mixed texts, {side}", partial(bench.mix, [side], side)


def _exact(bench: Bench) -> Steps:
    """Float32, and what is nearly that."""
    known = bench.sides("graph")
    names = [name for name in (FP32, TF32, EXACT) if name in known]
    yield "bare graphs in fp32", partial(bench.lengths, names)
    yield "mixed texts in fp32", partial(bench.mix, [FP32], FP32, bench.how.fp32_share)


def _end_to_end(bench: Bench) -> Steps:
    """Against sentence-transformers."""
    whole = _whole(bench.names("encode"))
    yield "mixed texts, against torch", partial(bench.mix, whole, "", bench.how.torch_share)
    yield "end to end by length", partial(bench.encode_lengths, whole)


def _compiled(bench: Bench) -> Steps:
    """torch.compile: last, since nothing stops it but the end of the process."""
    yield "compiled graph", partial(bench.lengths, [COMPILED, TORCH])
    share = bench.how.torch_share
    yield "compiled, mixed texts", partial(bench.mix, [COMPILED, TORCH], "", share)


def _whole(names: Sequence[str]) -> list[str]:
    """Without those that differ in one graph step: their bare graphs say enough."""
    return [name for name in names if "for CUDA" not in name or "all" in name]
