"""What quantization.json, parity.json and a manifest say, before anybody shows it.

Every number comes from them. Knows no HTML and no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jexport.artifacts.report.reading import (
    MISSING,
    Facts,
    cosine,
    count,
    fine,
    line,
    listed,
    mapping,
    number,
    or_infinite,
    percent,
    rows,
    share,
    short,
    value,
)
from jexport.gates import CONFIDENCE, GROUP_TEXTS

FORMAT = 1
"""The quantization.json that is read here."""

MIB = 1 << 20
FLOATS = ("fp32", "fp16", "bf16")
PLAIN = ("int8", "int8-weights")
LAYER_PRECISIONS = {
    "int8": "activations and weight in 8 bits",
    "int8x2": "a second 8-bit term for what rounding left of the activations",
    "float": "not quantized",
    "int8-weights": "only the weight in 8 bits",
}
"""By their names in quantization.json."""

LABELS = {"int8x2": "int8_residual"}
"""What people read, where it is not the name in quantization.json."""

PAIRS = {
    "queries_int8_passages_int8": "int8 queries, int8 passages",
    "queries_int8_passages_fp32": "int8 queries, fp32 passages",
    "queries_fp32_passages_int8": "fp32 queries, int8 passages",
}


class Measure(NamedTuple):
    """A line of the headline.

    Args:
        words: its name on the page.
        brief: its name in the terminal.
        key: its name in a trial, in parity's metrics and among the gates.
        shown: from a value to words.
        at_least: whether more is better.
    """

    words: str
    brief: str
    key: str
    shown: Callable[[object], str] = cosine
    at_least: bool = True


MEASURES = (
    Measure("cosine, mean", "cosine, mean", "cosine_mean"),
    Measure("cosine, 1st percentile", "cosine, p1", "cosine_p1"),
    Measure("cosine, lowest", "cosine, lowest", "cosine_min"),
    Measure("shared top-10 neighbours", "shared top-10", "top10_overlap", share),
    Measure("Spearman of pairwise similarities", "Spearman", "spearman"),
    Measure(
        "largest difference of a component", "max difference", "largest_difference", short, False
    ),
    Measure(
        f"loss of the worst language or length, at {CONFIDENCE:.0%} confidence",
        "worst group",
        "group_loss",
        short,
        False,
    ),
    Measure(
        "loss of the worst language over the mean loss",
        "worst language",
        "language_loss",
        short,
        False,
    ),
)
TOKENS = Measure("token vectors, lowest cosine", "token vectors", "token_cosine_min")
BATCH = Measure(
    "alone against in a padded batch, lowest cosine", "in any batch", "batch_cosine_min", fine
)


class Held(NamedTuple):
    """A value beside its gate.

    Args:
        number: the value, None where it was not measured.
        gate: its bound, None where it has none.
        measure: what it is of.
    """

    number: float | None
    gate: float | None
    measure: Measure

    @property
    def shown(self) -> str:
        """The value alone."""
        return self.measure.shown(self.number)

    @property
    def missed_by(self) -> float | None:
        """How far below (or above) its gate; None when it holds, or has no gate or value."""
        if self.gate is None or self.number is None:
            return None
        above = self.number - self.gate if self.measure.at_least else self.gate - self.number
        return -above if above < 0 else None

    @property
    def good(self) -> bool:
        """Whether nothing speaks against it: no gate, or one that holds."""
        return self.gate is None or (self.number is not None and self.missed_by is None)


def title(manifest: Facts) -> str:
    """Model, task, engine and version, as far as they are known.

    Args:
        manifest: manifest.json, or what is known of it so far.

    Returns:
        One line; '' where nothing is known.
    """
    engine = " ".join(str(manifest[key]) for key in ("target", "precision") if manifest.get(key))
    parts = [str(manifest.get("name") or ""), str(manifest.get("task") or ""), engine]
    return line(" · ".join(part for part in [*parts, str(manifest.get("version") or "")] if part))


def summary(quantization: Facts) -> str:
    """Whether the gates were reached, and under which settings.

    Args:
        quantization: quantization.json.

    Returns:
        One line.
    """
    outcome = (
        "The gates were reached"
        if quantization.get("reached") is True
        else ("The gates were NOT reached; this is the best that was found")
    )
    how = [
        f"{key} {quantization[key]}"
        for key in ("precision", "scheme", "effort")
        if quantization.get(key)
    ]
    return line(f"{outcome} ({', '.join(how)})" if how else outcome)


def headline(quantization: Facts, parity: Facts) -> list[tuple[Measure, Held, Held]]:
    """Per measure its value on the held-out texts and on the parity texts.

    The last ones are about the artifact alone: its token vectors, and the same text in a batch.

    Args:
        quantization: quantization.json.
        parity: parity.json.

    Returns:
        Measure, held-out value and parity value; measures without a value or a gate are left out.
    """
    metrics = mapping(parity, "metrics")
    held_out = mapping(quantization, "held_out_quality")
    ours = {**mapping(held_out, "overall"), **kept(quantization)}
    theirs = dict(mapping(metrics, "overall"))
    for side, metrics_ in ((ours, held_out), (theirs, metrics)):
        side["group_loss"] = worst_loss(metrics_)
        if side["group_loss"] is None or "language_loss" in mapping(parity, "gates"):
            side["language_loss"] = mapping(metrics_, "languages").get("largest_loss")
    theirs[TOKENS.key] = mapping(metrics, "tokens").get("cosine_min")
    theirs[BATCH.key] = mapping(metrics, "batch").get("cosine_min")
    lines = []
    for one in (*MEASURES, TOKENS, BATCH):
        first, second = (
            Held(number(value(side, one.key)), number(value(gates, one.key)), one)
            for side, gates in (
                (ours, mapping(quantization, "gates")),
                (theirs, mapping(parity, "gates")),
            )
        )
        if (first.number, first.gate, second.number, second.gate) != (None,) * 4:
            lines.append((one, first, second))
    return lines


def worst_loss(metrics: Facts) -> float | None:
    """The largest loss of a language, length or kind that its texts prove.

    Args:
        metrics: of parity.json, or the held-out ones of quantization.json.

    Returns:
        The loss; None where no group of enough texts says it, as in older reports.
    """
    keys = ("by_language", "by_length", "by_kind")
    groups_ = [group for key in keys for group in mapping(metrics, key).values()]
    losses = [
        number(group.get("loss_low"))
        for group in groups_
        if isinstance(group, Mapping) and (number(group.get("texts")) or 0) >= GROUP_TEXTS
    ]
    return max((loss for loss in losses if loss is not None), default=None)


def kept(quantization: Facts) -> Facts:
    """The trial that the artifact is: `chosen`, else one with the same layers at higher precision.

    Without either the last that passed.

    Args:
        quantization: quantization.json.

    Returns:
        The trial's numbers; {} where no trial is listed.
    """
    chosen = mapping(quantization, "chosen")
    if chosen:
        return chosen
    tried, matrices = rows(quantization, "tried"), rows(quantization, "matrices")
    special = {str(m.get("name")) for m in matrices if m.get("treatment") not in PLAIN}
    same = [
        t
        for t in tried
        if matrices and {str(n) for n in (*listed(t, "wide"), *listed(t, "floats"))} == special
    ]
    passed = [t for t in tried if t.get("passed") is True]
    both = [t for t in same if t in passed]
    return next((candidates[-1] for candidates in (both, same, passed, tried) if candidates), {})


def layer_precisions(quantization: Facts) -> list[tuple[str, int, float]]:
    """The precisions of the linear layers.

    Args:
        quantization: quantization.json.

    Returns:
        Name in quantization.json, number of layers, and share of the multiply-adds (0 to 1) of
        each; unknown names last.
    """
    totals: dict[str, tuple[int, float]] = dict.fromkeys(LAYER_PRECISIONS, (0, 0.0))
    for matrix in rows(quantization, "matrices"):
        name = str(matrix.get("treatment", MISSING))
        matrices, work = totals.get(name, (0, 0.0))
        totals[name] = matrices + 1, work + (number(matrix.get("share")) or 0)
    return [(name, many, work) for name, (many, work) in totals.items() if many]


class Precision(NamedTuple):
    """What one precision of the same model weighs and does; None where it was not measured.

    Args:
        name: 'fp32', 'int8', ...
        size: bytes of graph and weights.
        of_fp32: its size over that of fp32; None for fp32 itself.
        speed: texts a second.
        times_fp32: its speed over that of fp32; None for fp32 itself.
        cosine_mean: over the parity texts; None but for the artifact's own precision.
    """

    name: str
    size: float | None
    of_fp32: float | None
    speed: float | None
    times_fp32: float | None
    cosine_mean: float | None

    @property
    def size_in_words(self) -> str:
        """'22.9 MiB (26.4 % of fp32)'."""
        if self.size is None:
            return MISSING
        part = "" if self.of_fp32 is None else f" ({percent(self.of_fp32)} of fp32)"
        return f"{self.size / MIB:,.1f} MiB{part}"

    @property
    def speed_in_words(self) -> str:
        """'241.8 texts/s (2.34 times fp32)'."""
        if self.speed is None:
            return MISSING
        times = "" if self.times_fp32 is None else f" ({self.times_fp32:.2f} times fp32)"
        return f"{self.speed:,.4g} texts/s{times}"


def precisions(quantization: Facts, parity: Facts, manifest: Facts) -> list[Precision]:
    """Every precision of which size or speed is known; the cosine is this artifact's own.

    Args:
        quantization: quantization.json, {} where there is none.
        parity: parity.json; {} leaves the cosine out.
        manifest: manifest.json or what is known of it; `speed` of either file counts.

    Returns:
        One for each, float ones first.
    """
    sizes = mapping(quantization, "bytes")
    overall = mapping(mapping(parity, "metrics"), "overall")
    measured = [*rows(quantization, "speed"), *rows(manifest, "speed")]
    speeds = {str(row.get("precision")): row.get("texts_per_second") for row in measured}
    own = str(quantization.get("precision", "int8"))
    if own not in sizes and own != "int8" and "int8" in sizes:
        sizes = {own if name == "int8" else name: size for name, size in sizes.items()}
    whole, slowest = number(sizes.get("fp32")), number(speeds.get("fp32"))
    result = []
    for name in dict.fromkeys([*FLOATS, *sizes, *speeds]):
        if name not in sizes and name not in speeds:
            continue
        size, speed = number(sizes.get(name)), number(speeds.get(name))
        result.append(
            Precision(
                name=name,
                size=size,
                of_fp32=size / whole if size is not None and whole and name != "fp32" else None,
                speed=speed,
                times_fp32=speed / slowest if speed and slowest and name != "fp32" else None,
                cosine_mean=number(overall.get("cosine_mean")) if name == own else None,
            )
        )
    return result


def groups(metrics: Facts, key: str, *, worst_first: bool = False) -> list[tuple[str, Facts]]:
    """The groups of parity's metrics by name.

    Args:
        metrics: of parity.json, or the held-out ones of quantization.json.
        key: 'by_language', 'by_kind', 'by_length' or 'by_dimension'.
        worst_first: by the lowest 1st percentile, else in the file's order.

    Returns:
        Name and metrics of each; empty where there are none.
    """
    by_name = mapping(metrics, key)
    named = [(str(name), group) for name, group in by_name.items() if isinstance(group, Mapping)]
    if worst_first:
        named.sort(key=lambda row: or_infinite(row[1].get("cosine_p1")))
    return named


def label(precision: str) -> str:
    """A layer's precision as people read it.

    Args:
        precision: its name in quantization.json.

    Returns:
        The name in LABELS, else the same.
    """
    return LABELS.get(precision, precision)


def layers_in_brief(quantization: Facts) -> list[str]:
    """How many linear layers have which precision.

    Args:
        quantization: quantization.json.

    Returns:
        '22 of 24 layers int8', '2 of 24 layers kept at higher precision (int8_residual), ...'.
    """
    precisions_ = layer_precisions(quantization)
    total = sum(many for _, many, _ in precisions_)
    return [
        f"{many} of {total} layers {label(name)}"
        if name in PLAIN
        else f"{many} of {total} layers kept at higher precision ({label(name)}), "
        f"{percent(part)} of the multiply-adds"
        for name, many, part in precisions_
    ]


def pairs(quantization: Facts) -> tuple[str, list[tuple[str, Facts]]]:
    """How the artifact ranks together with the other half of its retrieval pair.

    Args:
        quantization: quantization.json.

    Returns:
        The task on the other side, and per mix of precisions its words and numbers.
    """
    pair = mapping(quantization, "pair")
    mixes = [(PAIRS[key], mapping(pair, key)) for key in PAIRS if mapping(pair, key)]
    return str(pair.get("with", MISSING)), mixes


def worst_matrices(quantization: Facts) -> list[Facts]:
    """The matrices, largest error left first.

    Args:
        quantization: quantization.json.

    Returns:
        All of `matrices`; one without an error counts as 0.
    """
    return sorted(
        rows(quantization, "matrices"), key=lambda matrix: -(number(matrix.get("error")) or 0)
    )


def texts_used(texts: Facts) -> str:
    """A set of texts in one line.

    Args:
        texts: `calibration` or `held_out` of quantization.json.

    Returns:
        'everyday: 300 texts, 20,310 tokens, a1b2c3d4...'; '' when nothing is known.
    """
    if not texts:
        return ""
    digest = str(texts.get("sha256") or "")[:16]
    counts = f"{count(texts.get('texts'))} texts, {count(texts.get('tokens'))} tokens"
    return line(f"{texts.get('name', MISSING)}: {counts}{f', {digest}' if digest else ''}")


def tried_in_brief(quantization: Facts) -> str:
    """How many trials, and which was kept.

    Args:
        quantization: quantization.json.

    Returns:
        One line; '' where no trial is listed.
    """
    tried = rows(quantization, "tried")
    if not tried:
        return ""
    trials = "trial" if len(tried) == 1 else "trials"
    return line(f"{len(tried)} {trials}; kept: {kept(quantization).get('what', MISSING)}")
