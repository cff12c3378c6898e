"""Figures of the report as SVG: dots by group, curves, bars, small before-and-after lines.

Colours and fonts are the page's. Knows no file and no section; each figure says in words what it
shows, for who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jexport.artifacts.report import axes, findings
from jexport.artifacts.report.axes import LETTER
from jexport.artifacts.report.markup import Markup, escape
from jexport.artifacts.report.reading import (
    Facts,
    columns,
    cosine,
    fitting,
    number,
    or_infinite,
    percent,
    short,
    value,
)

WIDTH = 320
"""Units across a figure: about the pixels of a phone; nothing is drawn wider than 30 rem."""

MARK = 4.0
"""From the middle of a technique's mark to its corners."""


def svg(
    height: float, title: str, desc: str, parts: Iterable[str], *, width: int = WIDTH
) -> Markup:
    """A figure, with its name and what it shows in words.

    Args:
        height: in units.
        title: its name.
        desc: what it shows, for who cannot see it.
        parts: SVG elements, escaped already.
        width: in units.

    Returns:
        An svg element.
    """
    heading = f"<title>{escape(title)}</title><desc>{escape(desc)}</desc>"
    size = f"0 0 {width} {height:g}"
    return Markup(f'<svg viewBox="{size}" role="img">{heading}{"".join(parts)}</svg>')


def _label(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _stroke(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(key: str, x: float, y: float, label: str = "", *, radius: float = 3.5) -> str:
    tip = f"<title>{escape(label)}</title>" if label else ""
    return f'<circle class="{key}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{tip}</circle>'


def dots(title: str, groups: Sequence[tuple[str, Facts]], gates: Facts) -> Markup:
    """Per group a line with the mean and the 1st percentile, and both as numbers at its end.

    Args:
        title: of the figure.
        groups: name and metrics of each; at least one.
        gates: bounds of the mean and the 1st percentile, where there are any.

    Returns:
        An svg element.
    """
    keys = ("cosine_mean", "cosine_p1")
    names = [fitting(name, 12) for name, _ in groups]
    left = max(max(map(columns, names)) * LETTER + 8, 24)  # half of the first tick's words
    right, top, row = WIDTH - 16 * LETTER, 20, 17
    bottom = top + row * len(groups)
    bounds = {key: gate for key in keys if (gate := number(value(gates, key))) is not None}
    values = [v for _, group in groups for key in keys if (v := number(group.get(key))) is not None]
    axis = axes.even([*values, *bounds.values()], left + 4, right - 8)
    place = axis.place
    parts = [
        _label(WIDTH - 9 * LETTER, 12, "mean", anchor="end", kind="dim"),
        _label(WIDTH, 12, "p1", anchor="end", kind="dim"),
    ]
    for tick, words in axis.ticks:
        parts.append(_stroke("grid", place(tick), top, place(tick), bottom))
        parts.append(_label(place(tick), bottom + 14, words, anchor="middle", kind="dim"))
    parts += [_stroke(f"gate {key}", place(v), top, place(v), bottom) for key, v in bounds.items()]
    for position, (name, (whole, group)) in enumerate(zip(names, groups, strict=True)):
        y = top + row * (position + 0.5)
        cosines = {k: v for k in keys if (v := number(group.get(k))) is not None}
        parts.append(_label(left - 4, y + 4, name, anchor="end"))
        if len(cosines) == 2:
            parts.append(_stroke("link", *(f for k in keys for f in (place(cosines[k]), y))))
        parts += [
            _dot(key, place(v), y, f"{whole}: {cosine(v)}") for key, v in reversed(cosines.items())
        ]
        parts.append(_label(WIDTH - 9 * LETTER, y + 4, cosine(group.get(keys[0])), anchor="end"))
        parts.append(_label(WIDTH, y + 4, cosine(group.get(keys[1])), anchor="end"))
    worst = min(groups, key=lambda g: or_infinite(g[1].get("cosine_p1")))
    description = f"{len(groups)} groups; lowest 1st percentile {cosine(worst[1].get('cosine_p1'))}"
    return svg(bottom + 20, title, f"{description} ({worst[0]})", parts)


class Curve(NamedTuple):
    """What one figure of quality over share draws.

    Args:
        rows: points with `share` and the keys.
        keys: a line for each.
        gates: bounds by key, where there are any.
        kept: the share of the artifact, None where it is unknown.
        marks: points of techniques, numbered from 1, by the first key alone.
    """

    rows: Sequence[Facts]
    keys: Sequence[str]
    gates: Facts
    kept: float | None
    marks: Sequence[Facts] = ()


def curve(title: str, drawn: Curve) -> tuple[Markup, bool]:
    """Lines over the share from 0 to 1, one per key.

    Args:
        title: of the figure.
        drawn: what is drawn.

    Returns:
        An svg element, '' when no row has such a value; whether the axis stretches towards 1.
    """
    points = {
        key: sorted(
            (s, v)
            for r in drawn.rows
            if (s := number(r.get("share"))) is not None
            and (v := number(value(r, key))) is not None
        )
        for key in drawn.keys
    }
    marks = [
        (n, mark, s, v)
        for n, mark in enumerate(drawn.marks, 1)
        if (s := number(mark.get("share"))) is not None
        and (v := number(value(mark, drawn.keys[0]))) is not None
    ]
    values = [v for series in points.values() for _, v in series] + [v for *_, v in marks]
    if not values:
        return Markup(), False
    bounds = {key: g for key in drawn.keys if (g := number(value(drawn.gates, key))) is not None}
    left, right, top, bottom = 8 * LETTER, WIDTH - 14, 18, 220
    axis = axes.towards_one([*values, *bounds.values()], bottom, top)
    place = axis.place

    def across(share: float) -> float:
        return left + (right - left) * min(max(share, 0.0), 1.0)

    parts = _frame(axis, left, right, bottom)
    parts += [_stroke(f"gate {key}", left, place(v), right, place(v)) for key, v in bounds.items()]
    if drawn.kept is not None:
        x = across(drawn.kept)
        parts.append(_stroke("kept", x, top, x, bottom))
        parts.append(_label(x, 12, "kept", anchor="start" if drawn.kept < 0.5 else "end"))
    for key, series in points.items():
        path = " ".join(f"{across(s):.1f},{place(v):.1f}" for s, v in series)
        parts.append(f'<polyline class="{key}" points="{path}"/>')
        parts += [
            _dot(key, across(s), place(v), f"{percent(s)}: {cosine(v)}", radius=2.5)
            for s, v in series
        ]
    spots = [(n, m, across(s), place(v)) for n, m, s, v in marks]
    taken = [(across(s), place(v)) for series in points.values() for s, v in series]
    parts += _marks(spots, taken, (left, top, right, bottom))
    description = f"{len(drawn.rows)} points, from {cosine(min(values))} to {cosine(max(values))}"
    return svg(bottom + 22, title, description, parts), axis.stretched


def _frame(axis: axes.Axis, left: float, right: float, bottom: float) -> list[str]:
    """Grid, ticks of the value, and the share along the bottom."""
    parts = []
    for tick, words in axis.ticks:
        y = axis.place(tick)
        parts.append(_stroke("grid", left, y, right, y))
        parts.append(_label(left - 6, y + 4, words, anchor="end", kind="dim"))
    for of_hundred in (0, 25, 50, 75, 100):
        last = of_hundred == 100
        x = WIDTH if last else left + (right - left) * of_hundred / 100
        anchor = "end" if last else "middle"
        parts.append(_label(x, bottom + 16, f"{of_hundred} %", anchor=anchor, kind="dim"))
    return parts


def _marks(
    spots: Sequence[tuple[int, Facts, float, float]],
    taken: Sequence[tuple[float, float]],
    area: tuple[float, float, float, float],
) -> Iterator[str]:
    """A diamond per technique, its number near it, and a line between the two where they part."""
    points = [*taken, *((x, y) for *_, x, y in spots)]
    boxes: list[tuple[float, float]] = []
    diamonds = []
    for which, mark, x, y in sorted(spots, key=lambda spot: (spot[3], spot[2])):
        words = str(which)
        half = len(words) * LETTER / 2 + 1
        at = _free(x, y, half, points, boxes, area)
        if at is not None:
            boxes.append(at)
            if math.hypot(at[0] - x, at[1] - y) > 14:
                yield _stroke("link", x, y, *at)
            yield (
                f'<rect class="ground" x="{at[0] - half:.1f}" y="{at[1] - 5:.1f}" '
                f'width="{2 * half:.1f}" height="10"/>'
            )
            yield _label(at[0], at[1] + 4, words, anchor="middle", kind="mark")
        tip = escape(f"{words}: {mark.get('what', '')}")
        corners = ((0, -MARK), (MARK, 0), (0, MARK), (-MARK, 0))
        path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
        diamonds.append(f'<polygon class="mark" points="{path}"><title>{tip}</title></polygon>')
    yield from diamonds


def _free(
    x: float,
    y: float,
    half: float,
    points: Sequence[tuple[float, float]],
    boxes: Sequence[tuple[float, float]],
    area: tuple[float, float, float, float],
) -> tuple[float, float] | None:
    """The nearest middle for a number where it hits no point, no other number and no edge."""
    left, top, right, bottom = area
    for far in (11, 16, 22, 30, 40, 52, 66, 82, 100, 130, 170):
        for turn in range(16):  # to the right first
            angle = (turn + 1) // 2 * math.pi / 8 * (-1) ** turn
            at = x + far * math.cos(angle), y + far * math.sin(angle)
            inside = left + half <= at[0] <= right - half and top + 5 <= at[1] <= bottom - 5
            if (
                inside
                and all(
                    abs(at[0] - a) >= half + MARK or abs(at[1] - b) >= 5 + MARK for a, b in points
                )
                and all(abs(at[0] - a) >= 4 * LETTER or abs(at[1] - b) >= 11 for a, b in boxes)
            ):
                return at
    return None


def bars(title: str, bars_: Sequence[tuple[str, float, str]]) -> Markup:
    """One bar per row, from 0; its value in words behind it.

    Args:
        title: of the figure.
        bars_: name, value and the value in words of each; at least one.

    Returns:
        An svg element.
    """
    names = [fitting(name, 14) for name, _, _ in bars_]
    left = max(map(columns, names)) * LETTER + 8
    space = WIDTH - left - (max(columns(words) for *_, words in bars_) + 1) * LETTER
    most = max(size for _, size, _ in bars_) or 1
    parts = []
    for position, (name, (_, size, words)) in enumerate(zip(names, bars_, strict=True)):
        y, length = 24 * position, space * max(size, 0) / most
        parts.append(_label(left - 6, y + 15, name, anchor="end"))
        parts.append(
            f'<rect class="t0" x="{left:.1f}" y="{y + 3}" width="{length:.1f}" height="16"/>'
        )
        parts.append(_label(left + length + 5, y + 15, words))
    description = ", ".join(f"{name} {words}" for name, _, words in bars_)
    return svg(24 * len(bars_), title, description, parts)


def shares(title: str, parts_: Sequence[tuple[str, str, int, float]]) -> Markup:
    """One bar cut into shares.

    Args:
        title: of the figure.
        parts_: as `sections.work` gives them.

    Returns:
        An svg element.
    """
    total = sum(share for *_, share in parts_) or 1
    left, parts = 0.0, []
    for _, kind, _, share in parts_:
        width = share / total * WIDTH
        parts.append(f'<rect class="{kind}" x="{left:.2f}" y="0" width="{width:.2f}" height="20"/>')
        left += width
    description = ", ".join(f"{findings.label(name)} {percent(part)}" for name, *_, part in parts_)
    return svg(20, title, description, parts)


def key(kind: str) -> Markup:
    """A small square of a class's colour, for a legend.

    Args:
        kind: the CSS class.

    Returns:
        An svg element.
    """
    square = f'<rect class="{kind}" width="12" height="12"/>'
    return Markup(f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true">{square}</svg>')


def before_after(before: object, after: object, scale: tuple[float, float]) -> Markup:
    """A small line from the error before to the error after, on a log scale; 0 lies at its left.

    Args:
        before: the error of plain rounding; without it its dot is left out.
        after: the error that is left; without it its dot is left out.
        scale: the least and the largest error of all such lines, both above 0.

    Returns:
        A div with an svg element.
    """
    low, high = (math.log(bound) for bound in scale)

    def place(error: float) -> float:
        return 6 + 88 * ((math.log(error) - low) / (high - low) if error > 0 and high > low else 0)

    named = (("before", number(before)), ("after", number(after)))
    places = {name: place(error) for name, error in named if error is not None}
    parts = [_dot(name, x, 8) for name, x in places.items()]
    if len(places) == 2:
        parts.insert(0, _stroke("link", places["before"], 8, places["after"], 8))
    description = f"{short(before)} before, {short(after)} after"
    return Markup(f'<div class="small">{svg(16, "Error", description, parts, width=100)}</div>')
