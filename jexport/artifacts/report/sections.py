"""The lines of report.html's tables and figures, as page.html.j2 shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jexport.artifacts.report import findings, markup, plots
from jexport.artifacts.report.findings import Held, Precision
from jexport.artifacts.report.markup import Markup, escape
from jexport.artifacts.report.reading import (
    MISSING,
    Facts,
    cosine,
    count,
    listed,
    mapping,
    number,
    percent,
    rows,
    share,
    short,
    value,
)

FIRST_MATRICES = 20
"""Rows of the matrix table that are open at first."""

QUALITY = ("cosine, mean", "1st percentile", "lowest", "top-10 overlap")

BARS: Mapping[str, str] = {
    "Size in MiB": "Size of the graph and its weights in MiB; less is better.",
    "Texts per second": "Texts per second, in one run on the building machine; more is better.",
}
"""The captions of the bars."""


def _quality(metrics: Facts) -> tuple[str, ...]:
    """The cells below QUALITY."""
    cosines = (cosine(metrics.get(key)) for key in ("cosine_mean", "cosine_p1", "cosine_min"))
    return (*cosines, share(value(metrics, "top10_overlap")))


def headline(quantization: Facts, parity: Facts) -> list[tuple[str, ...]]:
    """Each measure against its gate, on the held-out texts and of the artifact.

    Args:
        quantization: quantization.json.
        parity: parity.json.

    Returns:
        Cells of each line: measure, held-out value, parity value; a missed gate is marked.
    """
    measured = findings.headline(quantization, parity)
    return [(one.words, *map(_judged, sides)) for one, *sides in measured]


def _judged(held: Held) -> str:
    """A value with its gate: '0.99650 (gate 0.996: met)'."""
    if held.gate is None:
        return held.shown
    if held.number is None:
        outcome = "not measured"
    else:
        outcome = "met" if held.missed_by is None else f"missed by {held.missed_by:.2g}"
    cell = f"{held.shown} (gate {held.gate:g}: {outcome})"
    return cell if held.good else Markup(f'<span class="bad">{escape(cell)}</span>')


def work(quantization: Facts) -> list[tuple[str, str, int, float]]:
    """The layers' precisions.

    Args:
        quantization: quantization.json.

    Returns:
        Name, CSS class, number of layers, and share of the multiply-adds (0 to 1) of each.
    """
    names = list(findings.LAYER_PRECISIONS)
    return [
        (name, f"t{names.index(name) if name in names else 9}", layers, part)
        for name, layers, part in findings.layer_precisions(quantization)
    ]


def precisions(known: Sequence[Precision]) -> list[tuple[str, ...]]:
    """Size, speed and quality by precision.

    Args:
        known: as `findings.precisions` gives them.

    Returns:
        Cells of each line.
    """
    return [(p.name, p.size_in_words, p.speed_in_words, cosine(p.cosine_mean)) for p in known]


def bars(known: Sequence[Precision]) -> Iterator[tuple[str, list[tuple[str, float, str]]]]:
    """Sizes and speeds that are known.

    Args:
        known: as `findings.precisions` gives them.

    Yields:
        A key of BARS, and its bars: precision, value, and the value in words.
    """
    mib = findings.MIB
    sizes = [(p.name, p.size / mib, f"{p.size / mib:,.1f}") for p in known if p.size is not None]
    speeds = [(p.name, p.speed, f"{p.speed:,.4g}") for p in known if p.speed is not None]
    yield from ((what, drawn) for what, drawn in zip(BARS, (sizes, speeds), strict=True) if drawn)


def parity_gates(quantization: Facts, parity: Facts) -> Facts:
    """The gates of the parity texts; those of the held-out texts where they name no cosine.

    Args:
        quantization: quantization.json.
        parity: parity.json.

    Returns:
        Bounds by gate key.
    """
    gates = mapping(parity, "gates")
    return gates if {"cosine_mean", "cosine_p1"} & set(gates) else mapping(quantization, "gates")


Group = tuple[str, str, list[tuple[str, Facts]], list[tuple[str, ...]]]


def groups(metrics: Facts) -> Iterator[Group]:
    """By language, kind, length and dimension.

    Args:
        metrics: of parity.json, or the held-out ones of quantization.json.

    Yields:
        In words what it is by, its order in words, name and metrics of each group, and the cells
        of the table's lines.
    """
    for key, words, worst_first in (
        ("by_language", "language", True),
        ("by_kind", "kind of text", True),
        ("by_length", "length in tokens", False),
        ("by_dimension", "Matryoshka dimension", False),
    ):
        members = findings.groups(metrics, key, worst_first=worst_first)
        if len(members) < (2 if key == "by_dimension" else 1):
            continue  # one dimension is the headline again
        lines = [(name, *_quality(group), count(group.get("texts"))) for name, group in members]
        yield words, ", worst first" if worst_first and len(members) > 1 else "", members, lines


def pair(mixes: Sequence[tuple[str, Facts]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """How quantized queries and passages find each other, and float ones.

    Args:
        mixes: as `findings.pairs` gives them.

    Returns:
        Heads, and cells of each line; nDCG@10 only where a mix has it.
    """
    both = any(number(mix.get("ndcg10")) is not None for _, mix in mixes)
    heads = ("searched with, and in", "top-10 overlap", "nDCG@10")
    lines = [
        (words, share(value(mix, "top10_overlap")), share(mix.get("ndcg10")))[: 3 if both else 2]
        for words, mix in mixes
    ]
    return heads[: 3 if both else 2], lines


def points(quantization: Facts) -> list[Facts]:
    """The points of the curve whose share is known.

    Args:
        quantization: quantization.json.

    Returns:
        Rows of `curve`.
    """
    return [one for one in rows(quantization, "curve") if number(one.get("share")) is not None]


def curve(words: str, keys: Sequence[str], quantization: Facts) -> tuple[Markup, bool]:
    """A figure of quality against the share at higher precision.

    Args:
        words: what is measured.
        keys: of the points; a line for each.
        quantization: quantization.json.

    Returns:
        As `plots.curve`.
    """
    drawn = plots.Curve(
        rows=points(quantization),
        keys=keys,
        gates=mapping(quantization, "gates"),
        kept=number(findings.kept(quantization).get("share")),
        marks=rows(quantization, "techniques"),
    )
    return plots.curve(f"{words} against the share at higher precision", drawn)


def techniques(measured: Sequence[Facts]) -> list[tuple[str, ...]]:
    """Where each technique stands, by number.

    Args:
        measured: rows of `techniques` in quantization.json.

    Returns:
        Cells of each line: number and name, share, then QUALITY.
    """
    return [
        (f"{which}. {one.get('what', MISSING)}", percent(one.get("share")), *_quality(one))
        for which, one in enumerate(measured, 1)
    ]


def tried(quantization: Facts) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and lines of every trial of the search, in its order.

    Args:
        quantization: quantization.json.

    Returns:
        The heads, and the cells of each line; layers in float only where a trial has any.
    """
    kept, lines = findings.kept(quantization), []
    floats = any(listed(one, "floats") for one in rows(quantization, "tried"))
    for one in rows(quantization, "tried"):
        mark = Markup(" <b>(kept)</b>") if one == kept else Markup("")
        lines.append(
            (
                Markup(escape(one.get("what", MISSING)) + mark),
                count(len(listed(one, "wide"))),
                *([count(len(listed(one, "floats")))] if floats else []),
                percent(one.get("share")),
                *_quality(one),
                "yes" if one.get("passed") is True else "no",
            )
        )
    more = ("in float",) if floats else ()
    return ("what", "layers at higher precision", *more, "share", *QUALITY, "passed"), lines


def matrices(quantization: Facts) -> list[tuple[str, ...]]:
    """Each layer, its precision, and its error before and after; the largest left first.

    Args:
        quantization: quantization.json.

    Returns:
        Cells of each line.
    """
    worst = findings.worst_matrices(quantization)
    errors = [
        e for m in worst for k in ("error", "error_naive") if (e := number(m.get(k))) and e > 0
    ]
    scale = (min(errors), max(errors)) if errors else (1.0, 1.0)
    return [_matrix(matrix, scale) for matrix in worst]


def split_channels(quantization: Facts) -> str:
    """What to say of split outlier channels.

    Args:
        quantization: quantization.json.

    Returns:
        A sentence that goes on from another; '' where no channel is split.
    """
    places = rows(quantization, "copied")
    extra = sum(
        int(number(many) or 1) - 1 for one in places for many in mapping(one, "channels").values()
    )
    if not extra:
        return ""
    where = "one activation" if len(places) == 1 else f"{len(places)} activations"
    return (
        f" In {where}, outlier channels are split into copies, each with a part of its row of the "
        f"next weight: {extra} copies in all."
    )


def _matrix(matrix: Facts, scale: tuple[float, float]) -> tuple[str, ...]:
    return (
        markup.name(matrix.get("name", MISSING)),
        findings.label(str(matrix.get("treatment", MISSING))),
        short(matrix.get("error_naive")),
        short(matrix.get("error")),
        plots.before_after(matrix.get("error_naive"), matrix.get("error"), scale),
        percent(matrix.get("share")),
        "\u00a0×\u00a0".join(map(str, listed(matrix, "shape"))) or MISSING,
        short(matrix.get("smoothing")),
        short(matrix.get("clip")),
    )


def texts(quantization: Facts, parity: Facts) -> list[tuple[str, ...]]:
    """Which texts were used for what, with their digests.

    Args:
        quantization: quantization.json.
        parity: parity.json.

    Returns:
        Cells of each line: use, set, texts, tokens, digest.
    """
    lines: list[tuple[str, ...]] = []
    for key, used in (("calibration", "calibration"), ("held_out", "held out, to choose by")):
        used_texts = mapping(quantization, key)
        if used_texts:
            counts = count(used_texts.get("texts")), count(used_texts.get("tokens"))
            lines.append((used, str(used_texts.get("name", MISSING)), *counts, _digest(used_texts)))
    compared = mapping(parity, "texts")
    if compared:
        texts_compared = count(mapping(parity, "metrics").get("texts"))
        name = str(compared.get("set", MISSING))
        lines.append(("parity", name, texts_compared, MISSING, _digest(compared)))
    return lines


def _digest(texts_: Facts) -> Markup:
    digest: Any = texts_.get("sha256") or MISSING
    return Markup(f"<code>{escape(digest)}</code>")
