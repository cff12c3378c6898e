"""report.html of an INT8 artifact: what quantization cost, where, and what was tried.

Every number comes from quantization.json, parity.json and manifest.json; what one of them lacks is
left out, or shown as a dash. Knows no framework and no network: the page holds its own style and
draws its own SVG. It is well-formed XML too, so a test can read it.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

FORMAT = 1
"""The quantization.json that this module reads."""

MISSING = "–"
MIB = 1 << 20
PLAIN = ("int8", "int8-weights")
TREATMENTS = {
    "int8": "activation and weight in 8 bits",
    "int8x2": "activation as two 8-bit terms, the value and what rounding left of it",
    "float": "not quantized",
    "int8-weights": "only the weight in 8 bits",
}
FIRST_MATRICES = 20
"""Rows of the matrix table that are open at first."""

Facts = Mapping[str, Any]


class _Markup(str):
    """HTML as it stands; `_escape` escapes every other text."""


class _Measure(NamedTuple):
    """A line of the headline table: its words and its key in a try and in parity.json."""

    words: str
    tried: str
    parity: str
    at_least: bool = True


MEASURES = (
    _Measure("cosine, mean", "cosine_mean", "cosine_mean"),
    _Measure("cosine, 1st percentile", "cosine_p1", "cosine_p1"),
    _Measure("cosine, lowest", "cosine_min", "cosine_min"),
    _Measure("shared top-10 neighbours", "top10_overlap", "top10_overlap"),
    _Measure("Spearman of pairwise similarities", "spearman", "spearman"),
    _Measure(
        "largest difference of a component", "largest_difference", "largest_difference", False
    ),
)


def text(quantization: Facts, parity: Facts, manifest: Facts) -> str:
    """The report in at most 40 lines for a terminal; arguments as for `page`."""
    lines = [_title(manifest), _verdict(quantization), ""]
    lines.append(f"{'':<35}{'held-out texts':<40}artifact")
    lines += [f"{words:<35}{ours:<40}{theirs}" for words, ours, theirs in _headline(
        quantization, parity)]  # fmt: skip
    lines.append("")
    treated = "; ".join(
        f"{_line(name)} {count} ({_percent(share)})"
        for name, count, share in treatments(quantization)
    )
    found = [("matrices", treated and f"{treated} of the work")]
    for name, size, speed, _ in _precisions(quantization, parity, manifest):
        found.append((_line(name), ", ".join(word for word in (size, speed) if word != MISSING)))
    metrics = _mapping(parity, "metrics")
    for key, words in (("by_language", "worst languages"), ("by_length", "worst lengths")):
        worst = _groups(metrics, key, worst_first=True)[:5]
        found.append(
            (words, ", ".join(f"{_line(n)} {_cosine(g.get('cosine_p1'))}" for n, g in worst))
        )
    sizes = _groups(metrics, "by_dimension")
    if len(sizes) > 1:
        told = ", ".join(f"{_line(n)} {_cosine(g.get('cosine_mean'))}" for n, g in sizes)
        found.append(("dimensions", told))
    for key, words in (("calibration", "calibrated with"), ("held_out", "chosen by")):
        found.append((words, _texts_used(_mapping(quantization, key))))
    found.append(("tried", _tried_in_brief(quantization)))
    lines += [f"{name:<17}{value}" for name, value in found if value]
    matrices = _worst_matrices(quantization)
    if matrices:
        lines += ["", "largest errors left (before -> after):"]
    for matrix in matrices[:5]:
        error = f"{_short(matrix.get('error_naive'))} -> {_short(matrix.get('error'))}"
        told = f"{_line(matrix.get('treatment', MISSING)):<14}{_line(matrix.get('name', MISSING))}"
        lines.append(f"  {error:<22}{told}")
    if quantization.get("command"):
        lines += ["", _line(quantization["command"])]
    return "\n".join(lines) + "\n"


def page(quantization: Facts, parity: Facts, manifest: Facts) -> str:
    """One self-contained HTML page.

    quantization: quantization.json. parity: parity.json. manifest: manifest.json or what of it is
    known so far; `speed`, a list of {"precision", "texts_per_second"}, is shown where there is one.
    """
    reached = quantization.get("reached") is True
    title = _escape(_title(manifest))
    sections = [
        ("Against the gates", _headline_section(quantization, parity)),
        ("How the work is done", _work(quantization)),
        ("Quality, size and speed", _trade(quantization, parity, manifest)),
        ("Quality by group", _group_figures(quantization, parity)),
        ("Quality against the share of wider work", _curve_section(quantization)),
        ("What was tried", _tried_table(quantization)),
        ("Matrix by matrix", _matrix_tables(quantization)),
        ("Texts used", _texts_table(quantization, parity)),
        ("Build it again", _command(quantization)),
    ]
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections if content
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\"/>\n"
        f"<title>Quantization of {title}</title>\n<style>{STYLE}</style></head>\n"
        f'<body><header><h1>{title}</h1>\n<p class="{"good" if reached else "bad"}">'
        f"{_escape(_verdict(quantization))}</p></header>\n<main>\n{body}</main></body></html>\n"
    )


def treatments(quantization: Facts) -> list[tuple[str, int, float]]:
    """Name, number of matrices and share of the work (0 to 1); unknown names last."""
    found: dict[str, tuple[int, float]] = dict.fromkeys(TREATMENTS, (0, 0.0))
    for matrix in _rows(quantization, "matrices"):
        name = str(matrix.get("treatment", MISSING))
        count, share = found.get(name, (0, 0.0))
        found[name] = count + 1, share + (_number(matrix.get("share")) or 0)
    return [(name, count, share) for name, (count, share) in found.items() if count]


# What the files say, in words


def _title(manifest: Facts) -> str:
    engine = " ".join(str(manifest[key]) for key in ("target", "precision") if manifest.get(key))
    parts = [str(manifest.get("name") or ""), str(manifest.get("task") or ""), engine]
    return _line(" · ".join(part for part in [*parts, str(manifest.get("version") or "")] if part))


def _verdict(quantization: Facts) -> str:
    told = "The gates were reached" if quantization.get("reached") is True else (
        "The gates were NOT reached; this is the best that was found")  # fmt: skip
    how = [f"{key} {quantization[key]}" for key in ("precision", "scheme", "effort")
           if quantization.get(key)]  # fmt: skip
    return _line(f"{told} ({', '.join(how)})" if how else told)


def _headline(quantization: Facts, parity: Facts) -> list[tuple[str, str, str]]:
    """Per measure its words, its value in the kept try and its value in the artifact."""
    tried, overall = _kept(quantization), _mapping(_mapping(parity, "metrics"), "overall")
    first, second = _mapping(quantization, "gates"), _mapping(parity, "gates")
    rows = []
    for words, ours, theirs, at_least in MEASURES:
        shown = _cosine if at_least else _short
        cells = (
            _held(_value(tried, ours), _value(first, ours), at_least, shown),
            _held(overall.get(theirs), second.get(theirs), at_least, shown),
        )
        if cells != (MISSING, MISSING):
            rows.append((words, *cells))
    return rows


def _held(value: object, bound: object, at_least: bool, shown: Callable[[object], str]) -> str:
    """A value with its gate: '0.99650 (gate 0.996: met)'."""
    number, gate = _number(value), _number(bound)
    if gate is None:
        return shown(value)
    if number is None:
        return f"{MISSING} (gate {gate:g}: not measured)"
    above = number - gate if at_least else gate - number
    return f"{shown(value)} (gate {gate:g}: {'met' if above >= 0 else f'missed by {-above:.2g}'})"


def _kept(quantization: Facts) -> Facts:
    """The try that the artifact is: `chosen`, else the one whose wide matrices its own are.

    Without either the last that passed.
    """
    chosen = _mapping(quantization, "chosen")
    if chosen:
        return chosen
    tried, matrices = _rows(quantization, "tried"), _rows(quantization, "matrices")
    wide = {str(m.get("name")) for m in matrices if m.get("treatment") not in PLAIN}
    same = [t for t in tried if matrices and {str(name) for name in _list(t, "wide")} == wide]
    passed = [t for t in tried if t.get("passed") is True]
    both = [t for t in same if t in passed]
    return next((found[-1] for found in (both, same, passed, tried) if found), {})


def _precisions(
    quantization: Facts, parity: Facts, manifest: Facts
) -> list[tuple[str, str, str, str]]:
    """Precision, size, texts per second and mean cosine (of this artifact's own), in words."""
    sizes = _mapping(quantization, "bytes")
    overall = _mapping(_mapping(parity, "metrics"), "overall")
    speeds = {str(row.get("precision")): row.get("texts_per_second") for row in _rows(
        manifest, "speed")}  # fmt: skip
    own = str(quantization.get("precision", "int8"))
    if own not in sizes and own != "int8" and "int8" in sizes:
        sizes = {own if name == "int8" else name: size for name, size in sizes.items()}
    whole, slowest = _number(sizes.get("fp32")), _number(speeds.get("fp32"))
    rows = []
    for name in dict.fromkeys([*sizes, *speeds]):
        size, speed = _number(sizes.get(name)), _number(speeds.get(name))
        told = MISSING if size is None else f"{size / MIB:,.1f} MiB"
        if size is not None and whole and name != "fp32":
            told += f" ({_percent(size / whole)} of fp32)"
        pace = MISSING if speed is None else f"{speed:,.4g} texts/s"
        if speed is not None and slowest and name != "fp32":
            pace += f" ({speed / slowest:.2f} times fp32)"
        quality = _cosine(overall.get("cosine_mean")) if name == own else MISSING
        rows.append((name, told, pace, quality))
    return rows


def _groups(metrics: Facts, key: str, *, worst_first: bool = False) -> list[tuple[str, Facts]]:
    groups = _mapping(metrics, key)
    rows = [(str(name), group) for name, group in groups.items() if isinstance(group, Mapping)]
    if worst_first:
        rows.sort(key=lambda row: _or_infinite(row[1].get("cosine_p1")))
    return rows


def _worst_matrices(quantization: Facts) -> list[Facts]:
    rows = _rows(quantization, "matrices")
    return sorted(rows, key=lambda matrix: -(_number(matrix.get("error")) or 0))


def _texts_used(texts: Facts) -> str:
    if not texts:
        return ""
    digest = str(texts.get("sha256") or "")[:16]
    counts = f"{_count(texts.get('texts'))} texts, {_count(texts.get('tokens'))} tokens"
    return _line(f"{texts.get('name', MISSING)}: {counts}{f', {digest}' if digest else ''}")


def _tried_in_brief(quantization: Facts) -> str:
    tried, kept = _rows(quantization, "tried"), _kept(quantization)
    if not tried:
        return ""
    ways = "way" if len(tried) == 1 else "ways"
    seconds = sum(_number(row.get("seconds")) or 0 for row in tried)
    return _line(f"{len(tried)} {ways} in {seconds:,.0f} s; kept: {kept.get('what', MISSING)}")


# Sections of the page


def _headline_section(quantization: Facts, parity: Facts) -> str:
    rows = [(words, *map(_judged, cells)) for words, *cells in _headline(quantization, parity)]
    listed = "".join(f'<li class="bad">{_escape(line)}</li>' for line in _list(parity, "failures"))
    metrics = _mapping(parity, "metrics")
    for key, words in (("tokens", "token vectors, lowest cosine"),
                       ("batch", "alone against in a padded batch, lowest cosine")):  # fmt: skip
        value = _mapping(metrics, key).get("cosine_min")
        if value is not None:
            bound = _mapping(parity, "gates").get(f"{key.removesuffix('s')}_cosine_min")
            rows.append((words, MISSING, _judged(_held(value, bound, True, _cosine))))
    if not rows:
        return ""
    heads = ("measure", "held-out texts, while quantizing", "artifact, on the parity texts")
    note = "Both against the checkpoint in fp32; 1 is the same vector, or the same neighbours."
    return _table(note, heads, rows) + (f"<ul>{listed}</ul>" if listed else "")


def _judged(cell: str) -> _Markup:
    bad = "missed by" in cell or "not measured" in cell
    return _Markup(f'<span class="bad">{_escape(cell)}</span>') if bad else _Markup(_escape(cell))


def _work(quantization: Facts) -> str:
    found = treatments(quantization)
    if not found:
        return ""
    total = sum(share for _, _, share in found) or 1
    left, parts, items = 0.0, [], []
    for name, count, share in found:
        width, kind = (
            share / total * WIDTH,
            list(TREATMENTS).index(name) if name in TREATMENTS else 9,
        )
        parts.append(
            f'<rect class="t{kind}" x="{left:.2f}" y="0" width="{width:.2f}" height="20"/>'
        )
        left += width
        meant = f": {TREATMENTS[name]}" if name in TREATMENTS else ""
        items.append(
            f'<li><svg class="key" viewBox="0 0 12 12" aria-hidden="true"><rect class="t{kind}" '
            f'width="12" height="12"/></svg> <b>{_escape(name)}</b>{meant}. {count} '
            f"{'matrix' if count == 1 else 'matrices'}, {_percent(share)} of the MatMul work</li>"
        )
    told = ", ".join(f"{name} {_percent(share)}" for name, _, share in found)
    drawn = _svg(20, "Share of the MatMul work by treatment", told, parts)
    return f"<figure>{drawn}</figure><ul>{''.join(items)}</ul>"


def _trade(quantization: Facts, parity: Facts, manifest: Facts) -> str:
    rows = _precisions(quantization, parity, manifest)
    if not rows:
        return ""
    sizes = _mapping(quantization, "bytes")
    bars = [
        (n, v / MIB, f"{v / MIB:,.1f}") for n, s in sizes.items() if (v := _number(s)) is not None
    ]
    figures = _figure("Size in MiB", _bars("Size in MiB by precision", bars)) if bars else ""
    pace = [
        (str(row.get("precision")), value, f"{value:,.4g}")
        for row in _rows(manifest, "speed")
        if (value := _number(row.get("texts_per_second"))) is not None
    ]
    if pace:
        figures += _figure("Texts per second", _bars("Texts per second by precision", pace))
    heads = ("precision", "size", "speed", "cosine, mean")
    return _table("", heads, rows) + f'<div class="figures">{figures}</div>'


def _group_figures(quantization: Facts, parity: Facts) -> str:
    metrics = _mapping(parity, "metrics")
    gates = _mapping(parity, "gates")
    if not {"cosine_mean", "cosine_p1"} & set(gates):
        gates = _mapping(quantization, "gates")
    figures = ""
    for key, words, worst_first in (
        ("by_language", "language", True),
        ("by_length", "length in tokens", False),
        ("by_dimension", "Matryoshka dimension", False),
    ):
        groups = _groups(metrics, key, worst_first=worst_first)
        if len(groups) < (2 if key == "by_dimension" else 1):
            continue  # one dimension is the headline again
        rows = [
            (name, *(_cosine(g.get(k)) for k in ("cosine_mean", "cosine_p1", "cosine_min")),
             _cosine(g.get("top10_overlap")), _count(g.get("texts")))
            for name, g in groups
        ]  # fmt: skip
        heads = (words, "mean", "1st percentile", "lowest", "top-10 overlap", "texts")
        table = f"<details><summary>as a table</summary>{_table('', heads, rows)}</details>"
        order = ", worst first" if worst_first else ""
        drawn = _dots(f"Cosine by {words}", groups, gates)
        figures += _figure(f"By {words}{order}. {KEY}", drawn + table)
    return f'<div class="figures">{figures}</div>' if figures else ""


def _curve_section(quantization: Facts) -> str:
    curve = [r for r in _rows(quantization, "curve") if _number(r.get("share")) is not None]
    if not curve:
        return "<p>Not measured in this build.</p>" if _rows(quantization, "tried") else ""
    gates, kept = _mapping(quantization, "gates"), _number(_kept(quantization).get("share"))
    figures = ""
    for words, keys, legend in (
        ("Cosine", ("cosine_mean", "cosine_p1"), KEY),
        ("Shared top-10 neighbours", ("top10_overlap",), "Dashed: its gate."),
    ):
        drawn = _curve(f"{words} against the share of wider work", curve, keys, gates, kept)
        if drawn:
            figures += _figure(f"{words}. {legend}", drawn)
    note = (
        "Across: the share of the MatMul work that is not plain int8. Down the line: what is kept."
    )
    return f'<p>{note}</p><div class="figures">{figures}</div>'


def _tried_table(quantization: Facts) -> str:
    kept, rows = _kept(quantization), []
    for tried in _rows(quantization, "tried"):
        mark = _Markup(" <b>(kept)</b>") if tried == kept else _Markup("")
        rows.append(
            (
                _Markup(_escape(tried.get("what", MISSING)) + mark),
                _count(len(_list(tried, "wide"))),
                _percent(tried.get("share")),
                *(_cosine(tried.get(k)) for k in ("cosine_mean", "cosine_p1", "cosine_min")),
                _cosine(_value(tried, "top10_overlap")),
                "yes" if tried.get("passed") is True else "no",
                f"{_number(tried.get('seconds')) or 0:,.1f}",
            )
        )
    heads = ("what", "wide matrices", "share", "mean", "1st percentile", "lowest", "overlap",
             "passed", "seconds")  # fmt: skip
    return _table("On the held-out texts, in the order tried.", heads, rows) if rows else ""


def _matrix_tables(quantization: Facts) -> str:
    matrices = _worst_matrices(quantization)
    if not matrices:
        return ""
    errors = [
        e for m in matrices for k in ("error", "error_naive") if (e := _number(m.get(k))) and e > 0
    ]
    scale = (min(errors), max(errors)) if errors else (1.0, 1.0)
    rows = [
        (
            _Markup(_escape(m.get("name", MISSING)).replace("/", "/<wbr/>")),
            str(m.get("treatment", MISSING)),
            _short(m.get("error_naive")),
            _short(m.get("error")),
            _before_after(m.get("error_naive"), m.get("error"), scale),
            _percent(m.get("share")),
            " × ".join(map(str, _list(m, "shape"))) or MISSING,
            _short(m.get("smoothing")),
            _short(m.get("clip")),
        )
        for m in matrices
    ]
    heads = ("matrix", "treatment", "error before", "after", "before ○ after ●, log scale",
             "share", "shape", "smoothing", "clip")  # fmt: skip
    note = "Error of the matrix's output; before: plain 8 bits without smoothing. Worst first."
    shown = _table(note, heads, rows[:FIRST_MATRICES])
    rest = rows[FIRST_MATRICES:]
    if rest:
        more = _table("", heads, rest)
        shown += f"<details><summary>the other {len(rest)}</summary>{more}</details>"
    return shown


def _texts_table(quantization: Facts, parity: Facts) -> str:
    rows = []
    for key, used in (("calibration", "calibration"), ("held_out", "held out, to choose by")):
        texts = _mapping(quantization, key)
        if texts:
            digest = _Markup(f"<code>{_escape(texts.get('sha256') or MISSING)}</code>")
            counts = _count(texts.get("texts")), _count(texts.get("tokens"))
            rows.append((used, str(texts.get("name", MISSING)), *counts, digest))
    compared = _mapping(parity, "texts")
    if compared:
        digest = _Markup(f"<code>{_escape(compared.get('sha256') or MISSING)}</code>")
        count = _count(_mapping(parity, "metrics").get("texts"))
        rows.append(("parity", str(compared.get("set", MISSING)), count, MISSING, digest))
    heads = ("used for", "name", "texts", "tokens", "SHA-256")
    return _table("", heads, rows) if rows else ""


def _command(quantization: Facts) -> str:
    command = quantization.get("command")
    return f'<pre tabindex="0">{_escape(command)}</pre>' if command else ""


# HTML and SVG


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column heads its rows; it scrolls sideways when it is too wide."""
    top = "".join(f'<th scope="col">{_escape(head)}</th>' for head in heads)
    lines = []
    for first, *cells in rows:
        others = "".join(
            f'<td class="n">{_escape(cell)}</td>' if re.fullmatch(r"[\d+-][\d.,e+ %-]*", cell)
            else f"<td>{_escape(cell)}</td>"
            for cell in cells
        )  # fmt: skip
        lines.append(f'<tr><th scope="row">{_escape(first)}</th>{others}</tr>\n')
    note = f"<caption>{_escape(caption)}</caption>" if caption else ""
    label = _escape(caption or heads[0])
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>{note}'
        f"<thead><tr>{top}</tr></thead>\n<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _figure(caption: str, content: str) -> str:
    return f"<figure><figcaption>{_escape(caption)}</figcaption>{content}</figure>\n"


def _svg(height: float, title: str, desc: str, parts: Iterable[str], *, width: int = 0) -> str:
    told = f"<title>{_escape(title)}</title><desc>{_escape(desc)}</desc>"
    box = f"0 0 {width or WIDTH} {height:g}"
    return f'<svg viewBox="{box}" role="img">{told}{"".join(parts)}</svg>'


def _label(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escape(words)}</text>'


def _stroke(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(key: str, x: float, y: float, told: str = "") -> str:
    tip = f"<title>{_escape(told)}</title>" if told else ""
    return f'<circle class="{key}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>'


def _dots(title: str, groups: Sequence[tuple[str, Facts]], gates: Facts) -> str:
    """Per group a line with the mean and the 1st percentile, and both as numbers at its end."""
    keys = ("cosine_mean", "cosine_p1")
    names = [_fitting(name, 12) for name, _ in groups]
    left = max(max(map(_columns, names)) * LETTER + 8, 24)  # half of the first tick's words
    right, top, row = WIDTH - 16 * LETTER, 20, 17
    bottom = top + row * len(groups)
    bounds = {key: gate for key in keys if (gate := _number(_value(gates, key))) is not None}
    values = [
        v for _, group in groups for key in keys if (v := _number(group.get(key))) is not None
    ]
    ticks, place = _axis([*values, *bounds.values()], left + 4, right - 8)
    parts = [
        _label(WIDTH - 9 * LETTER, 12, "mean", anchor="end"),
        _label(WIDTH, 12, "p1", anchor="end"),
    ]
    for value, words in ticks:
        parts.append(_stroke("grid", place(value), top, place(value), bottom))
        parts.append(_label(place(value), bottom + 14, words, anchor="middle"))
    parts += [_stroke(f"gate {key}", place(v), top, place(v), bottom) for key, v in bounds.items()]
    for number, (name, (whole, group)) in enumerate(zip(names, groups, strict=True)):
        y = top + row * (number + 0.5)
        found = {k: v for k in keys if (v := _number(group.get(k))) is not None}
        parts.append(_label(left - 4, y + 4, name, anchor="end"))
        if len(found) == 2:
            parts.append(_stroke("link", *(f for k in keys for f in (place(found[k]), y))))
        parts += [
            _dot(key, place(value), y, f"{whole}: {_cosine(value)}")
            for key, value in reversed(found.items())
        ]
        parts.append(_label(WIDTH - 9 * LETTER, y + 4, _cosine(group.get(keys[0])), anchor="end"))
        parts.append(_label(WIDTH, y + 4, _cosine(group.get(keys[1])), anchor="end"))
    worst = min(groups, key=lambda g: _or_infinite(g[1].get("cosine_p1")))
    told = f"{len(groups)} groups; lowest 1st percentile {_cosine(worst[1].get('cosine_p1'))}"
    return _svg(bottom + 20, title, f"{told} ({worst[0]})", parts)


def _curve(
    title: str, rows: Sequence[Facts], keys: Sequence[str], gates: Facts, kept: float | None
) -> str:
    """Lines over the share from 0 to 1, one per key; '' when no row has such a value."""
    points = {
        key: sorted(
            (float(r["share"]), v) for r in rows if (v := _number(_value(r, key))) is not None
        )
        for key in keys
    }
    values = [value for line in points.values() for _, value in line]
    if not values:
        return ""
    bounds = {key: gate for key in keys if (gate := _number(_value(gates, key))) is not None}
    left, right, top, bottom = 8 * LETTER, WIDTH - 14, 18, 200
    ticks, place = _axis([*values, *bounds.values()], bottom, top)

    def across(share: float) -> float:
        return left + (right - left) * min(max(share, 0.0), 1.0)

    parts = []
    for value, words in ticks:
        parts.append(_stroke("grid", left, place(value), right, place(value)))
        parts.append(_label(left - 6, place(value) + 4, words, anchor="end"))
    for percent in (0, 25, 50, 75, 100):
        words = f"{percent} %" if percent in (0, 50, 100) else str(percent)
        anchor = "end" if percent == 100 else "middle"
        x = WIDTH if percent == 100 else across(percent / 100)
        parts.append(_label(x, bottom + 16, words, anchor=anchor))
    parts += [_stroke(f"gate {key}", left, place(v), right, place(v)) for key, v in bounds.items()]
    if kept is not None:
        parts.append(_stroke("kept", across(kept), top, across(kept), bottom))
        parts.append(_label(across(kept), 12, "kept", anchor="start" if kept < 0.5 else "end"))
    for key, line in points.items():
        path = " ".join(f"{across(share):.1f},{place(value):.1f}" for share, value in line)
        parts.append(f'<polyline class="{key}" points="{path}"/>')
        parts += [
            _dot(key, across(share), place(value), f"{_percent(share)}: {_cosine(value)}")
            for share, value in line
        ]
    told = f"{len(rows)} points, from {_cosine(min(values))} to {_cosine(max(values))}"
    return _svg(bottom + 22, title, told, parts)


def _bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """One bar per row, from 0; its value in words behind it."""
    names = [_fitting(name, 14) for name, _, _ in rows]
    left = max(map(_columns, names)) * LETTER + 8
    room = WIDTH - left - (max(_columns(words) for *_, words in rows) + 1) * LETTER
    most = max(value for _, value, _ in rows) or 1
    parts = []
    for number, (name, (_, value, words)) in enumerate(zip(names, rows, strict=True)):
        y, length = 24 * number, room * max(value, 0) / most
        parts.append(_label(left - 6, y + 15, name, anchor="end"))
        parts.append(
            f'<rect class="t0" x="{left:.1f}" y="{y + 3}" width="{length:.1f}" height="16"/>'
        )
        parts.append(_label(left + length + 5, y + 15, words))
    told = ", ".join(f"{name} {words}" for name, _, words in rows)
    return _svg(24 * len(rows), title, told, parts)


def _before_after(before: object, after: object, scale: tuple[float, float]) -> _Markup:
    """A small line from the error before to the error after, on a log scale; 0 lies at its left."""
    low, high = (math.log(bound) for bound in scale)

    def place(value: float) -> float:
        return 6 + 88 * ((math.log(value) - low) / (high - low) if value > 0 and high > low else 0)

    named = (("before", _number(before)), ("after", _number(after)))
    found = {name: place(value) for name, value in named if value is not None}
    parts = [_dot(name, x, 8) for name, x in found.items()]
    if len(found) == 2:
        parts.insert(0, _stroke("link", found["before"], 8, found["after"], 8))
    told = f"{_short(before)} before, {_short(after)} after"
    return _Markup(f'<div class="small">{_svg(16, "Error", told, parts, width=100)}</div>')


def _axis(
    values: Sequence[float], start: float, end: float
) -> tuple[list[tuple[float, str]], Callable[[float], float]]:
    """Round ticks with their words, and where a value lies between start and end.

    Across (start < end) there is room for 9 letters from tick to tick, else for two lines.
    Together no finer than 1e-4: the words stay short and noise does not look like a fall.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = max((high - low) * 1.1, 1e-4)
    low = (low + high - span) / 2
    most = max(abs(end - start) / (9 * LETTER if start < end else 24), 1)
    power = 10.0 ** math.floor(math.log10(span / most))
    factors = (factor for factor in (1, 2, 2.5, 5, 10) if power * factor * most >= span * 0.9999)
    step = power * next(factors)
    decimals = next(d for d in range(9) if abs(round(step, d) - step) < step / 100)
    first, last = math.ceil(low / step - 1e-9), math.floor((low + span) / step + 1e-9)
    ticks = [(n * step, f"{n * step:.{decimals}f}") for n in range(first, last + 1)]

    def place(value: float) -> float:
        return start + (end - start) * (value - low) / span

    return ticks, place


def _fitting(words: str, columns: int) -> str:
    """The words in that many columns; an ellipsis says that some are left out."""
    words = _line(words)
    if _columns(words) <= columns:
        return words
    while words and _columns(words) >= columns:
        words = words[:-1]
    return words + "…"


def _columns(words: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in words)


def _escape(value: object) -> str:
    return value if isinstance(value, _Markup) else html.escape(_printable(str(value)))


def _line(value: object) -> str:
    return _printable(" ".join(str(value).split()))


def _printable(words: str) -> str:
    """Without what a terminal would obey and what UTF-8 and XML do not have."""
    return re.sub(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", words)


# Reading what may not be there


def _mapping(parent: Facts, key: str) -> Facts:
    found = parent.get(key)
    return found if isinstance(found, Mapping) else {}


def _rows(parent: Facts, key: str) -> list[Facts]:
    return [row for row in _list(parent, key) if isinstance(row, Mapping)]


def _list(parent: Facts, key: str) -> Sequence[Any]:
    found = parent.get(key)
    return found if isinstance(found, list | tuple) else ()


def _value(parent: Facts, key: str) -> object:
    """The value of a key; the shared neighbours go by `overlap` too."""
    return parent.get(key, parent.get("overlap") if key == "top10_overlap" else None)


def _number(value: object) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def _or_infinite(value: object) -> float:
    number = _number(value)
    return math.inf if number is None else number


def _cosine(value: object) -> str:
    number = _number(value)
    return MISSING if number is None else f"{number:.5f}"


def _short(value: object) -> str:
    number = _number(value)
    return MISSING if number is None else f"{number:.3g}"


def _percent(value: object) -> str:
    number = _number(value)
    return MISSING if number is None else f"{number:.1%}".replace("%", " %")


def _count(value: object) -> str:
    number = _number(value)
    return MISSING if number is None else f"{number:,.0f}"


WIDTH = 320
"""Units across a figure: about the pixels of a phone; nothing is drawn wider than 30 rem."""

LETTER = 6.1
"""Width of a letter at the figures' 10 units of monospace (0.6 em; 0.602 in DejaVu)."""

KEY = "Filled: mean; hollow: 1st percentile (p1); dashed: its gate."

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --line: #d0d7de; --ground: #fff;
  --soft: #f4f6f8; --good: #1a7f37; --bad: #b3261e; --one: #0b62c4; --two: #b04a00;
  --three: #7a3fb0; --four: #0d7d74 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaef; --dim: #a3adb8; --line: #3a424c;
  --ground: #12161b; --soft: #1b2128; --good: #56c271; --bad: #ff8a80; --one: #6cb2ff;
  --two: #f5a45d; --three: #c9a0f5; --four: #4fc9bd } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 }
.wide { overflow-x: auto; max-width: 100% } pre { overflow-x: auto; background: var(--soft);
  padding: .8rem } .wide:focus-visible, pre:focus-visible { outline: 2px solid var(--one) }
table { border-collapse: collapse; font-size: .9rem } caption { text-align: left;
  color: var(--dim); padding: .3rem 0 } th, td { text-align: left; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top } thead th { color: var(--dim);
  font-weight: 500 } tbody th { font-weight: 500; min-width: 9rem } td code { font-size: .8rem }
.n { font-variant-numeric: tabular-nums; white-space: nowrap }
.figures { display: grid; gap: 1rem 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 1rem 0; min-width: 0; max-width: 30rem } figcaption { color: var(--dim);
  font-size: .9rem; margin-bottom: .4rem } summary { cursor: pointer; padding: .3rem 0 }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--ink);
  font: 10px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
.small { width: 6.5rem } svg.key { display: inline-block; width: .8em; height: .8em }
ul { padding-left: 1.2rem } .grid { stroke: var(--line) } .link { stroke: var(--dim) }
.gate { stroke-dasharray: 4 3; stroke-width: 1.5 } .kept { stroke: var(--dim) }
line.cosine_mean, line.top10_overlap { stroke: var(--one) } line.cosine_p1 { stroke: var(--two) }
polyline { fill: none; stroke-width: 1.5; stroke: var(--one) }
polyline.cosine_p1 { stroke: var(--two) } circle { fill: var(--one); stroke: var(--one) }
circle.cosine_p1, circle.before { fill: var(--ground); stroke: var(--two); stroke-width: 1.5 }
.t0 { fill: var(--one) } .t1 { fill: var(--two) } .t2 { fill: var(--three) }
.t3 { fill: var(--four) } .t9 { fill: var(--dim) }
@media print { .wide { overflow: visible } }
"""
