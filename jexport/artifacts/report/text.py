"""The report for a terminal, in at most 50 lines as wide as it is. Knows no colour."""

from __future__ import annotations

import textwrap

from jexport.artifacts.report import findings
from jexport.artifacts.report.findings import Held
from jexport.artifacts.report.reading import (
    MISSING,
    Facts,
    columns,
    cosine,
    fitting,
    line,
    mapping,
    or_infinite,
    rows,
    share,
    short,
    value,
)

LINES = 50
NARROWEST, WIDEST = 60, 100
INDENT = 17
"""Where the values stand."""


def render(quantization: Facts, parity: Facts, manifest: Facts, *, width: int = WIDEST) -> str:
    """The report in at most LINES lines.

    Args:
        quantization: quantization.json.
        parity: parity.json.
        manifest: manifest.json or what of it is known so far, with `speed` where there is one.
        width: columns of the terminal, held between NARROWEST and WIDEST; no line is longer, but
            for names that have no space to break at and the command.

    Returns:
        The lines, each with its end.
    """
    columns_ = min(max(width, NARROWEST), WIDEST)
    ways = textwrap.wrap(findings.summary(quantization), columns_)
    report = [
        fitting(findings.title(manifest), columns_),
        *ways,
        "",
        *_headline(quantization, parity),
    ]
    report += ["", *_facts(quantization, parity, manifest, columns_), ""]
    # In one line, however long: it is there to be copied.
    command = [line(quantization["command"])] if quantization.get("command") else []
    matrices = _matrices(quantization, columns_)
    left = LINES - len(report) - len(command)
    return (
        "\n".join([*report, *(matrices if len(matrices) <= left else []), *command][:LINES]) + "\n"
    )


def _headline(quantization: Facts, parity: Facts) -> list[str]:
    measures = findings.headline(quantization, parity)
    if not measures:
        return []
    lines = [f"{'':<{INDENT}}{'held-out texts':<22}parity texts"]
    for one, ours, its in measures:
        lines.append(f"{one.brief:<{INDENT}}{_held(ours):<22}{_held(its)}".rstrip())
    return lines


def _held(held: Held) -> str:
    """'0.99650 >= 0.996', '0.99412 MISSED 0.996'."""
    if held.gate is None:
        return held.shown
    if not held.good:
        return f"{held.shown} MISSED {held.gate:g}"
    return f"{held.shown} {'>=' if held.measure.at_least else '<='} {held.gate:g}"


def _facts(quantization: Facts, parity: Facts, manifest: Facts, width: int) -> list[str]:
    """A name and what is known of it per line, in order of what users ask first."""
    facts = [(p.name, _of(p)) for p in findings.precisions(quantization, parity, manifest)]
    facts.append(("layers", "; ".join(findings.layers_in_brief(quantization))))
    other, pairs = findings.pairs(quantization)
    mixes = "; ".join(f"{words} {share(value(mix, 'top10_overlap'))}" for words, mix in pairs)
    facts.append(("rankings", f"top-10 with {other}: {mixes}" if mixes else ""))
    held_out = mapping(quantization, "held_out_quality")
    metrics = held_out if held_out else mapping(parity, "metrics")
    for key, words in (
        ("by_language", "worst languages"),
        ("by_kind", "worst kinds of text"),
        ("by_length", "worst lengths"),
    ):
        worst = findings.groups(metrics, key, worst_first=True)[:5]
        text = ", ".join(f"{name} {cosine(group.get('cosine_p1'))}" for name, group in worst)
        facts.append((words, f"{text} (p1)" if text else ""))
    sizes = findings.groups(metrics, "by_dimension")
    text = ", ".join(f"{name} {cosine(group.get('cosine_mean'))}" for name, group in sizes)
    facts.append(("dimensions", f"{text} (mean)" if len(sizes) > 1 else ""))
    facts.append(("techniques", _techniques(quantization)))
    for key, words in (("calibration", "calibrated with"), ("held_out", "chosen by")):
        facts.append((words, findings.texts_used(mapping(quantization, key))))
    facts.append(("search", findings.tried_in_brief(quantization)))
    return [text for name, words in facts for text in _indented(name, words, width)]


def _of(precision: findings.Precision) -> str:
    known = (precision.size_in_words, precision.speed_in_words)
    return ", ".join(word for word in known if word != MISSING)


def _techniques(quantization: Facts) -> str:
    """The best of them by shared neighbours; the page has all."""
    techniques = rows(quantization, "techniques")
    if not techniques:
        return ""
    best = min(techniques, key=lambda one: or_infinite(_negative(value(one, "top10_overlap"))))
    summary = f"{best.get('what', MISSING)}: top-10 {share(value(best, 'top10_overlap'))}"
    return f"{len(techniques)} measured, the best {summary}"


def _negative(value: object) -> object:
    return -value if isinstance(value, int | float) else value


def _indented(name: str, words: str, width: int) -> list[str]:
    """A name and words behind it, broken at spaces into at most three lines; [] without words."""
    if not words:
        return []
    name = fitting(name, INDENT - 2)
    wrapped = textwrap.wrap(
        line(words), width - INDENT, break_long_words=False, break_on_hyphens=False
    )
    if len(wrapped) > 3:
        wrapped[2:] = [fitting(" ".join(wrapped[2:]), width - INDENT)]
    first, *rest = (fitting(part, width - INDENT) for part in wrapped)
    pad = " " * (INDENT - columns(name))
    return [f"{name}{pad}{first}", *(f"{'':<{INDENT}}{more}" for more in rest)]


def _matrices(quantization: Facts, width: int) -> list[str]:
    """The five with the largest error left."""
    worst = findings.worst_matrices(quantization)[:5]
    if not worst:
        return []
    lines = ["largest errors left (before -> after):"]
    for matrix in worst:
        error = f"{short(matrix.get('error_naive'))} -> {short(matrix.get('error'))}"
        precision = line(findings.label(str(matrix.get("treatment", MISSING))))
        name = _end(line(matrix.get("name", MISSING)), width - 37)
        lines.append(f"  {error:<20}{fitting(precision, 13):<14} {name}")
    return [*lines, ""]


def _end(name: str, width: int) -> str:
    """A name's end where it is too long: that is where names of one graph differ."""
    return name if columns(name) <= width else "…" + fitting(name[::-1], width)[:-1][::-1]
