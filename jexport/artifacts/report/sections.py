"""The parts of report.html, one function each; '' where there is nothing to say. Knows no style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jexport.artifacts.report import findings, markup, plots
from jexport.artifacts.report.findings import Held
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

KEY = "Filled: mean; hollow: 1st percentile (p1); dashed: its gate."

QUALITY = ("cosine, mean", "1st percentile", "lowest", "top-10 overlap")


def _quality(metrics: Facts) -> tuple[str, str, str, str]:
    """The cells below QUALITY."""
    return (
        *(cosine(metrics.get(key)) for key in ("cosine_mean", "cosine_p1", "cosine_min")),
        share(value(metrics, "top10_overlap")),
    )  # type: ignore[return-value]


def headline(quantization: Facts, parity: Facts) -> str:
    """Each measure against its gate, on the held-out texts and of the artifact."""
    lines = [
        (one.words, *map(_judged, sides)) for one, *sides in findings.headline(quantization, parity)
    ]
    if not lines:
        return ""
    failures = "".join(
        f'<li class="bad">{escape(failure)}</li>' for failure in listed(parity, "failures")
    )
    heads = ("measure", "held-out texts, while quantizing", "artifact, on the parity texts")
    note = (
        "Held-out texts: against the same graph in fp32. Parity texts: against the checkpoint. "
        "A cosine of 1 is the same vector, an overlap of 1 the same ten neighbours."
    )
    return markup.table(note, heads, lines) + (f"<ul>{failures}</ul>" if failures else "")


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


def work(quantization: Facts) -> str:
    """The share of the multiply-adds by the layers' precision."""
    by_precision = findings.layer_precisions(quantization)
    if not by_precision:
        return ""
    names = list(findings.LAYER_PRECISIONS)
    kinds = {name: f"t{names.index(name) if name in names else 9}" for name, *_ in by_precision}
    items = []
    for name, layers, part in by_precision:
        meant = f": {findings.LAYER_PRECISIONS[name]}" if name in names else ""
        items.append(
            f"<li>{plots.key(kinds[name])} <b>{escape(findings.label(name))}</b>{meant}. {layers} "
            f"{'layer' if layers == 1 else 'layers'}, {percent(part)} of the multiply-adds</li>"
        )
    drawn = plots.shares(
        "Share of the multiply-adds by precision", {findings.label(n): (kinds[n], part) for n, _, part in by_precision}
    )
    return f'<figure>{drawn}</figure><ul class="legend">{"".join(items)}</ul>'


def trade(quantization: Facts, parity: Facts, manifest: Facts) -> str:
    """Size, speed and quality by precision."""
    precisions = findings.precisions(quantization, parity, manifest)
    if not precisions:
        return ""
    mib = findings.MIB
    sizes = [(p.name, p.size / mib, f"{p.size / mib:,.1f}") for p in precisions if p.size is not None]
    speeds = [(p.name, p.speed, f"{p.speed:,.4g}") for p in precisions if p.speed is not None]
    drawn = ""
    if sizes:
        caption = "Size of the graph and its weights in MiB; less is better."
        drawn += markup.figure(caption, plots.bars("Size in MiB by precision", sizes))
    if speeds:
        caption = "Texts per second, side by side on the machine that built it; more is better."
        drawn += markup.figure(caption, plots.bars("Texts per second by precision", speeds))
    heads = ("precision", "size", "speed", "cosine, mean")
    lines = [(p.name, p.size_in_words, p.speed_in_words, cosine(p.cosine_mean)) for p in precisions]
    return markup.table("", heads, lines) + markup.figures(drawn)


def held_out_groups(quantization: Facts) -> str:
    """Quality by language, length and dimension on the held-out texts."""
    return _groups(mapping(quantization, "held_out_quality"), mapping(quantization, "gates"))


def parity_groups(quantization: Facts, parity: Facts) -> str:
    """The same of the artifact, on the parity texts."""
    gates = mapping(parity, "gates")
    if not {"cosine_mean", "cosine_p1"} & set(gates):
        gates = mapping(quantization, "gates")
    return _groups(mapping(parity, "metrics"), gates)


def _groups(metrics: Facts, gates: Facts) -> str:
    figures = ""
    for key, words, worst_first in (
        ("by_language", "language", True),
        ("by_length", "length in tokens", False),
        ("by_dimension", "Matryoshka dimension", False),
    ):
        groups = findings.groups(metrics, key, worst_first=worst_first)
        if len(groups) < (2 if key == "by_dimension" else 1):
            continue  # one dimension is the headline again
        lines = [(name, *_quality(group), count(group.get("texts"))) for name, group in groups]
        table = markup.table("", (words, *QUALITY, "texts"), lines)
        order = ", worst first" if worst_first and len(groups) > 1 else ""
        drawn = plots.dots(f"Cosine by {words}", groups, gates)
        content = drawn + markup.folded("as a table", table)
        figures += markup.figure(f"Cosine by {words}{order}. {KEY}", content)
    return markup.figures(figures)


def pair(quantization: Facts) -> str:
    """Whether quantized queries and passages find each other, and float ones."""
    other, mixes = findings.pairs(quantization)
    if not mixes:
        return ""
    both = any(number(mix.get("ndcg10")) is not None for _, mix in mixes)
    lines = [
        (words, share(value(mix, "top10_overlap")), *([share(mix.get("ndcg10"))] if both else []))
        for words, mix in mixes
    ]
    heads = ("searched with, and in", "top-10 overlap", *(["nDCG@10"] if both else []))
    note = f"With {other}. Against fp32 queries in fp32 passages; 1 is the same ranking."
    return markup.table(note, heads, lines)


def curve(quantization: Facts) -> str:
    """Quality against the share at higher precision, the techniques beside it, and both as tables."""
    points = [r for r in rows(quantization, "curve") if number(r.get("share")) is not None]
    techniques = rows(quantization, "techniques")
    if not points and not techniques:
        return "<p>Not measured in this build.</p>" if rows(quantization, "tried") else ""
    gates, kept = mapping(quantization, "gates"), number(findings.kept(quantization).get("share"))
    figures = ""
    for words, keys, legend in (
        ("Cosine", ("cosine_mean", "cosine_p1"), KEY),
        ("Shared top-10 neighbours", ("top10_overlap",), "Dashed: its gate."),
    ):
        title = f"{words} against the share at higher precision"
        drawn, stretched = plots.curve(title, plots.Curve(points, keys, gates, kept, techniques))
        if drawn:
            mean = " (mean)" if len(keys) > 1 else ""
            diamonds = f" Diamonds{mean}: the techniques below, by number." if techniques else ""
            scale = " The scale stretches towards 1." if stretched else ""
            figures += markup.figure(f"{words}. {legend}{diamonds}{scale}", drawn)
    note = (
        "Across: the share of the multiply-adds at higher precision than int8, from none to all. "
        "The line down marks what is kept."
    )
    return f"<p>{note}</p>{markup.figures(figures)}{_techniques(techniques)}"


def _techniques(techniques: Sequence[Facts]) -> str:
    lines = [
        (f"{which}. {one.get('what', MISSING)}", percent(one.get("share")), *_quality(one))
        for which, one in enumerate(techniques, 1)
    ]
    heads = ("technique", "share", *QUALITY)
    note = "Where each technique stands, on the held-out texts."
    return markup.table(note, heads, lines) if lines else ""


def tried(quantization: Facts) -> str:
    """Every trial of the search, in its order."""
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
    heads = ("what", "layers at higher precision", *(["in float"] if floats else []), "share", *QUALITY, "passed")
    note = "On the held-out texts, in the order tried; share: of the multiply-adds."
    return markup.table(note, heads, lines) if lines else ""


def matrices(quantization: Facts) -> str:
    """Each layer: its precision, and its error before and after."""
    worst = findings.worst_matrices(quantization)
    if not worst:
        return ""
    errors = [
        e for m in worst for k in ("error", "error_naive") if (e := number(m.get(k))) and e > 0
    ]
    scale = (min(errors), max(errors)) if errors else (1.0, 1.0)
    lines = [_matrix(matrix, scale) for matrix in worst]
    heads = ("layer", "precision", "error before", "after", "before ○ after ●, log scale",
             "share", "shape", "smoothing", "clip")
    note = (
        "Share of the layer's output energy that rounding loses; before: round to nearest without "
        "smoothing. Where one outlier holds most of the energy, smoothing may raise it and still "
        "help. Largest error left first."
    )
    note += _split_channels(quantization)
    shown = markup.table(note, heads, lines[:FIRST_MATRICES])
    rest = lines[FIRST_MATRICES:]
    if rest:
        shown += markup.folded(f"the other {len(rest)}", markup.table("", heads, rest))
    return shown


def _split_channels(quantization: Facts) -> str:
    """What to say of split outlier channels; '' where none is."""
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


def texts(quantization: Facts, parity: Facts) -> str:
    """Which texts were used for what, with their digests."""
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
    heads = ("used for", "name", "texts", "tokens", "SHA-256")
    return markup.table("", heads, lines) if lines else ""


def _digest(texts_: Facts) -> Markup:
    digest: Any = texts_.get("sha256") or MISSING
    return Markup(f"<code>{escape(digest)}</code>")


def command(quantization: Facts) -> str:
    """How to build it again."""
    shell = quantization.get("command")
    return f'<pre tabindex="0">{escape(shell)}</pre>' if shell else ""
