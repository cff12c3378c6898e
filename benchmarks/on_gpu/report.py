"""A run's JSON -> its goals, its section of BENCHMARKS.md, and a few lines of summary.

Knows only what the file holds, so that a section can be made again anywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import table
from benchmarks.on_gpu import trial
from benchmarks.on_gpu.measure import percentile
from benchmarks.on_gpu.models import FULL
from benchmarks.on_gpu.run import FP16, GRAPHS, TORCH

TITLE = "On a GPU"
Record = Mapping[str, Any]

ENCODE_SHARE, TORCH_TIMES, PEAK_SHARE, ONE_TEXT_MS = 0.9, 1.0, 0.45, 2.0
"""The goals: of the bare graph; of torch fp16 with SDPA; of the large product; milliseconds."""

PEAK_TOKENS, ONE_TOKENS = 512, 16


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A goal and what was measured of it; met is None where nothing was."""

    name: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """In words."""
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]


# --- numbers of one record ------------------------------------------------------------------------


def rate(record: Record) -> float:
    """Texts a second of the median round."""
    return float(record["texts"] / statistics.median(record["seconds"]))


def tokens_rate(record: Record) -> float:
    """Tokens a second, padding not counted."""
    return float(record["real_tokens"] / statistics.median(record["seconds"]))


def tflops(record: Record) -> float:
    """TFLOP/s of the matrix products, padding not counted."""
    return float(record["flop"] / statistics.median(record["seconds"]) / 1e12)


def _select(content: Record, **wanted: Any) -> list[Record]:
    return [
        one
        for one in content["measured"]
        if all(one.get(key) == value for key, value in wanted.items())
    ]


def _beside(content: Record, one: Record, side: str, kind: str = "") -> Record | None:
    """The record of another side that ran in turn with this one, on the same texts."""
    same = {key: one[key] for key in ("model", "group", "tokens", "texts")}
    found = _select(content, side=side, kind=kind or one["kind"], **same)
    return found[0] if found else None


def _first(records: Sequence[Record]) -> list[Record]:
    """Each side's first record of its kind and length: some run again beside another."""
    found: dict[tuple[Any, ...], Record] = {}
    for one in records:
        found.setdefault((one["model"], one["kind"], one["side"], one["tokens"]), one)
    return list(found.values())


def _ratio(slow: Record, fast: Record) -> float:
    """How many times as fast the second is: the median over rounds that both ran, in turn."""
    pairs = zip(slow["seconds"], fast["seconds"], strict=False)
    texts = fast["texts"] / slow["texts"]
    return texts * statistics.median(a / b for a, b in pairs)


def _onnx_fp16(content: Record, kind: str) -> list[str]:
    """Sides of onnx that compute in half precision, the portable one first."""
    names = dict.fromkeys(one["side"] for one in _select(content, model=FULL, kind=kind))
    return [name for name in names if name.startswith(FP16)]


# --- goals ----------------------------------------------------------------------------------------


def goals(content: Record) -> list[Goal]:
    """The goals of the full-size model, each with the best artifact for it."""
    return [
        _encode_goal(content),
        _torch_goal(content),
        _peak_goal(content),
        _one_text_goal(content),
    ]


def _encode_goal(content: Record) -> Goal:
    name = f"encode >= {ENCODE_SHARE} of its bare graph on mixed texts"
    values = {}
    for side in _onnx_fp16(content, "encode"):
        for whole in _select(content, model=FULL, kind="encode", side=side, tokens="mix"):
            bare = _beside(content, whole, side, "graph")
            if bare is not None:
                values[side] = (_ratio(bare, whole), whole["texts"])
    if not values:
        return Goal(name=name, measured="", met=None)
    best = max(values, key=lambda side: values[side][0])
    share, texts = values[best]
    return Goal(
        name=name, measured=f"{share:.2f} ({best}, {texts:,} texts)", met=share >= ENCODE_SHARE
    )


def _torch_goal(content: Record) -> Goal:
    name = f"bare graph >= {TORCH_TIMES:.1f} times torch fp16 SDPA at every length"
    found: dict[str, dict[int, float]] = {}
    for side in _onnx_fp16(content, "graph"):
        found[side] = {}
        for own in _first(_select(content, model=FULL, kind="graph", side=side)):
            base = _beside(content, own, TORCH)
            if base is not None and own["tokens"] != "mix":
                found[side][own["tokens"]] = _ratio(base, own)
    found = {side: values for side, values in found.items() if values}
    if not found:
        return Goal(name=name, measured="", met=None)
    best = max(found, key=lambda side: min(found[side].values()))
    words = ", ".join(f"{tokens:,}: {value:.2f}" for tokens, value in sorted(found[best].items()))
    return Goal(
        name=name, measured=f"{words} ({best})", met=min(found[best].values()) >= TORCH_TIMES
    )


def _peak_goal(content: Record) -> Goal:
    name = f"bare graph >= {PEAK_SHARE:.0%} of the matmul peak at {PEAK_TOKENS} tokens"
    peak = content.get("peak", {}).get("tflops", 0.0)
    values = {
        one["side"]: tflops(one) / peak
        for side in _onnx_fp16(content, "graph")
        for one in _select(content, model=FULL, kind="graph", side=side, tokens=PEAK_TOKENS)
        if peak
    }
    if not values:
        return Goal(name=name, measured="", met=None)
    best = max(values, key=lambda side: values[side])
    return Goal(name=name, measured=f"{values[best]:.0%} ({best})", met=values[best] >= PEAK_SHARE)


def _one_text_goal(content: Record) -> Goal:
    name = f"one text of {ONE_TOKENS} tokens <= {ONE_TEXT_MS:.0f} ms with {GRAPHS}"
    values = {
        (one["kind"], one["side"]): percentile(one["seconds"], 0.5) * 1e3
        for kind in ("one encode", "one graph")
        for one in _select(content, model=FULL, kind=kind, tokens=ONE_TOKENS)
        if GRAPHS in one["side"]
    }
    if not values:
        return Goal(name=name, measured="", met=None)
    words = ", ".join(f"{ms:.2f} ms ({kind}, {side})" for (kind, side), ms in values.items())
    # End to end where that was measured: a user's text is not tokenised yet.
    judged = [ms for (kind, _), ms in values.items() if kind == "one encode"] or values.values()
    return Goal(name=name, measured=words, met=min(judged) <= ONE_TEXT_MS)


# --- the section ----------------------------------------------------------------------------------


def machine(content: Record) -> str:
    """Card, driver and versions of the run."""
    card = content["card"]
    parts = [content["machine"]]
    if card:
        parts = [
            f"{card['name']} (compute capability {card['capability']}, {card['memory_gib']} GiB, "
            f"driver {card['driver']}, CUDA {card['cuda']})",
            *parts,
        ]
    return ", ".join([*parts, *(f"{n} {v}" for n, v in content["versions"].items())])


def section(content: Record) -> str:
    """The section of BENCHMARKS.md."""
    peak = content.get("peak")
    product = (
        f"A {peak['size']:,}-row square fp16 matrix product reached {peak['tflops']:.4g} TFLOP/s "
        "in the same run; 'of peak' is the share of that, padding and everything but matrix "
        "products not counted as work. "
        if peak
        else ""
    )
    small = " **Tiny models on a CPU: every line was run, no number means anything.**"
    text = [
        f"## {TITLE}",
        "",
        f"`make bench-gpu`, {content['date']}, {machine(content)}",
        "",
        "Seeded weights; all sides of a table in turn, in one process; rates are of the median "
        f"round. {product}Cosines are the lowest to torch fp32 without TF32 on the same device. "
        "Memory is the side's own peak on the device, weights included. No prompts."
        + (small if content["small"] else ""),
        "",
        *table.lines(
            ["goal (full size)", "measured", ""],
            [[one.name, one.measured, one.verdict] for one in goals(content)],
        ),
        "",
    ]
    for model in dict.fromkeys(one["model"] for one in content["measured"]):
        for kind, title in (("graph", "bare graph"), ("encode", "encode, end to end")):
            rows = [_row(content, one) for one in _first(_select(content, model=model, kind=kind))]
            if rows:
                text += [f"{model}: {title}", "", *table.lines(_HEAD, rows), ""]
        rows = [
            _one_row(one)
            for kind in ("one graph", "one encode")
            for one in _select(content, model=model, kind=kind)
        ]
        if rows:
            text += [f"{model}: one text", "", *table.lines(_ONE_HEAD, rows), ""]
    text += _trial()
    if content["left_out"]:
        text += ["Not measured:", ""]
        text += [f"- {one['what']}: {one['why']}" for one in content["left_out"]] + [""]
    return "\n".join(text)


_HEAD = (
    "tokens",
    "texts",
    "",
    "texts/s",
    "tokens/s",
    "TFLOP/s",
    "of peak",
    "times torch fp16",
    "peak memory, GiB",
    "lowest cosine",
)
_ONE_HEAD = ("tokens", "", "", "p50, ms", "p99, ms", "runs")


def _row(content: Record, one: Record) -> list[str]:
    peak = content.get("peak", {}).get("tflops", 0.0)
    base = _beside(content, one, TORCH)
    cosine, memory = one["cosine_min"], one["memory_bytes"]
    return [
        _tokens(one["tokens"]),
        f"{one['texts']:,}",
        one["side"],
        f"{rate(one):,.1f}",
        f"{tokens_rate(one):,.0f}",
        f"{tflops(one):.4g}",
        f"{tflops(one) / peak:.0%}" if peak else "",
        f"{_ratio(base, one):.2f}" if base else "",
        f"{memory / 2**30:.2f}" if memory else "",
        f"{cosine:.7f}" if cosine is not None else "",
    ]


def _one_row(one: Record) -> list[str]:
    half, worst = (percentile(one["seconds"], share) * 1e3 for share in (0.5, 0.99))
    kind = "end to end" if one["kind"] == "one encode" else "graph"
    return [
        _tokens(one["tokens"]),
        kind,
        one["side"],
        f"{half:.2f}",
        f"{worst:.2f}",
        str(len(one["seconds"])),
    ]


def _tokens(tokens: int | str) -> str:
    return tokens if isinstance(tokens, str) else f"{tokens:,}"


def _trial() -> list[str]:
    """The figures of another run, with what they are."""
    rows = [
        [f"{point.tokens:,}", str(point.batch), f"{point.onnx:,.0f}", f"{point.torch:,.0f}"]
        for point in trial.POINTS
    ]
    encodes = ", ".join(f"{rate:,.0f} ({how})" for how, rate in trial.ENCODE.items())
    once = ", ".join(f"{ms} ms ({side})" for side, ms in trial.ONE_TEXT_MS.items())
    return [
        f"For comparison, {trial.SOURCE}; a large fp16 product reached about "
        f"{trial.PEAK_TFLOPS:.0f} TFLOP/s, `encode` of 4,096 texts {encodes} texts/s, one text of "
        f"16 tokens took {once}.",
        "",
        *table.lines(["tokens", "texts", "onnx, texts/s", "torch fp16 SDPA, texts/s"], rows),
        "",
    ]


# --- the summary ----------------------------------------------------------------------------------


def summary(content: Record) -> list[str]:
    """At most 24 lines: machine, goals, the best rates, what is missing."""
    peak = content.get("peak", {}).get("tflops")
    lines = [
        machine(content)[:200],
        f"peak: {peak:.4g} TFLOP/s (fp16 product)" if peak else "peak: -",
    ]
    lines += [f"{one.verdict}: {one.name}: {one.measured}" for one in goals(content)]
    for tokens, batch in _shapes(content):
        sides = _first(_select(content, model=FULL, kind="graph", tokens=tokens))
        words = ", ".join(
            f"{one['side']} {rate(one):,.0f}" for one in sides if one["texts"] == batch
        )
        lines.append(f"{_tokens(tokens)} tokens x {batch}, texts/s: {words}"[:200])
    for one in _first(_select(content, kind="encode", tokens="mix")):
        lines.append(
            f"encode, mix, {one['model']}, {one['side']}: {rate(one):,.1f} texts/s, "
            f"lowest cosine {one['cosine_min']:.6f}"
        )
    left = content["left_out"]
    lines = lines[:21]
    lines.append(f"not measured: {len(left)}" if left else "nothing was left out")
    lines += [f"  {one['what']}: {one['why']}"[:200] for one in left[:2]]
    return lines


def _shapes(content: Record) -> Sequence[tuple[Any, int]]:
    found = dict.fromkeys(
        (one["tokens"], one["texts"])
        for one in _select(content, model=FULL, kind="graph")
        if one["tokens"] != "mix"
    )
    return list(found)
