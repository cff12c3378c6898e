"""What two artifacts say of themselves, name by name. Checks no file; knows no terminal."""

from __future__ import annotations

from typing import Any, NamedTuple

from jexport.artifacts.report import findings
from jexport.artifacts.report.findings import MIB
from jexport.artifacts.report.reading import Facts, cosine, mapping, number, percent, share, value


class Fact(NamedTuple):
    """A value for JSON and as it is shown.

    Args:
        value: JSON-ready, None where the artifact does not say it.
        shown: the value in words.
    """

    value: Any
    shown: str


class Row(NamedTuple):
    """One name and what either artifact says of it.

    Args:
        name: what is compared, in words.
        a: of the first artifact.
        b: of the second artifact.
    """

    name: str
    a: Fact
    b: Fact

    @property
    def differs(self) -> bool:
        """Whether the values do, as they are shown."""
        return self.a.shown != self.b.shown


ABSENT = Fact(None, "-")


class Sides(NamedTuple):
    """What is read of one artifact.

    Args:
        manifest: manifest.json.
        quantization: quantization.json, {} where there is none.
        parity: parity.json.
    """

    manifest: Facts
    quantization: Facts
    parity: Facts


def rows(a: Sides, b: Sides) -> list[Row]:
    """Every name that either has, in one order whichever comes first.

    Args:
        a: the first artifact.
        b: the second artifact.

    Returns:
        A row per name, in the order of the artifact that says more.
    """
    ours, theirs = _facts(a), _facts(b)
    more, fewer = (ours, theirs) if len(ours) >= len(theirs) else (theirs, ours)
    names = [*more, *(name for name in fewer if name not in more)]
    return [Row(name, ours.get(name, ABSENT), theirs.get(name, ABSENT)) for name in names]


def verdicts(a: Sides, b: Sides) -> list[str]:
    """What follows from the rows, in words.

    Args:
        a: the first artifact, 'A' in the words.
        b: the second artifact, 'B' in the words.

    Returns:
        A sentence each: sizes, speeds, embedding spaces, and other parity texts if they differ.
    """
    verdicts = []
    sizes = [sum(entry["size_bytes"] for entry in one.manifest["files"]) for one in (a, b)]
    if sizes[0] and sizes[0] != sizes[1]:
        verdicts.append(f"B takes {percent(sizes[1] / sizes[0])} of the bytes of A")
    rates = _rates(a, b)
    if rates:
        verdicts.append(f"B does {rates[1] / rates[0]:.2f} times the texts per second of A")
    if same_space(a, b):
        verdicts.append(
            "one embedding space: one may search the other's index, as near as their gates"
        )
    else:
        verdicts.append("the embedding spaces differ: never mix their vectors in one index")
    if not same_texts(a, b):
        verdicts.append("parity was measured on different texts: its numbers do not compare")
    return verdicts


def same_space(a: Sides, b: Sides) -> bool:
    """Whether vectors of both may share an index.

    Args:
        a: the first artifact.
        b: the second artifact.

    Returns:
        True where their embedding spaces are equal.
    """
    return bool(a.manifest["embedding"]["space"] == b.manifest["embedding"]["space"])


def same_texts(a: Sides, b: Sides) -> bool:
    """Whether parity was measured on the same texts.

    Args:
        a: the first artifact.
        b: the second artifact.

    Returns:
        True where number and digest of the texts are equal.
    """
    ours, theirs = _facts(a)["parity texts"], _facts(b)["parity texts"]
    return bool(ours.value == theirs.value)


def _rates(a: Sides, b: Sides) -> tuple[float, float] | None:
    """Texts a second of both, from a run that measured them side by side: one of the same model."""
    first, second = a.manifest, b.manifest
    same = all(first[key] == second[key] for key in ("name", "task", "target"))
    if not same or not same_space(a, b) or first["precision"] == second["precision"]:
        return None
    for one in (second, first):
        rates = {row["precision"]: number(row["texts_per_second"]) for row in one.get("speed", ())}
        slow, fast = rates.get(first["precision"]), rates.get(second["precision"])
        if slow and fast:
            return slow, fast
    return None


def _facts(one: Sides) -> dict[str, Fact]:
    """What is shown of one artifact, by name."""
    content, compared = one.manifest, mapping(one.parity, "texts")
    embedding, parity, checkpoint = content["embedding"], content["parity"], content["checkpoint"]
    size = sum(entry["size_bytes"] for entry in content["files"])
    digest = compared.get("sha256")
    facts: dict[str, Fact] = {
        name: Fact(content[name], content[name])
        for name in ("name", "task", "target", "precision", "version")
    }
    named = [checkpoint["name"], checkpoint["revision"]]
    prompt = embedding["prompt"]
    facts |= {
        "checkpoint": Fact(named, " ".join(named).strip()),
        "size": Fact(size, f"{size / MIB:,.1f} MiB"),
        "speed": _speed(content),
        "dimension": Fact(embedding["dimension"], str(embedding["dimension"])),
        "Matryoshka sizes": Fact(
            embedding["matryoshka"],
            ", ".join(map(str, embedding["matryoshka"])) or "full size only",
        ),
        "length limit": Fact(embedding["max_tokens"], f"{embedding['max_tokens']} tokens"),
        "prompt": Fact(prompt, repr(prompt) if prompt else "none"),
        "pooling": Fact(embedding["pooling"], embedding["pooling"]),
        "normalised": Fact(embedding["normalize"], "yes" if embedding["normalize"] else "no"),
        "embedding space": Fact(embedding["space"], embedding["space"][:16]),
        "parity texts": Fact(
            [parity["texts"], digest], f"{parity['texts']} texts, {(digest or '-')[:16]}"
        ),
    }
    for measure in findings.MEASURES:
        if measure.key in parity:
            measured = parity[measure.key]
            facts[measure.brief] = Fact(measured, measure.shown(measured))
    return facts | _quantized(one.quantization)


def _speed(content: Facts) -> Fact:
    """Texts a second of its own precision."""
    for row in content.get("speed", ()):
        if row["precision"] == content["precision"]:
            return Fact(row["texts_per_second"], f"{row['texts_per_second']:,.4g} texts/s")
    return ABSENT


def _quantized(quantization: Facts) -> dict[str, Fact]:
    """What only an int8 artifact has."""
    precisions = findings.layer_precisions(quantization)
    if not precisions:
        return {}
    counts = {name: many for name, many, _ in precisions}
    chosen, texts = findings.kept(quantization), mapping(quantization, "calibration")
    scheme, mean = quantization.get("scheme"), chosen.get("cosine_mean")
    top, digest = value(chosen, "top10_overlap"), texts.get("sha256")
    named = f"{texts.get('name', '-')}, {str(digest or '-')[:16]}"
    return {
        "scheme": Fact(scheme, str(scheme or "-")),
        "matrices": Fact(
            counts, ", ".join(f"{many} {findings.label(name)}" for name, many in counts.items())
        ),
        "held-out cosine": Fact(mean, cosine(mean)),
        "held-out top-10": Fact(top, share(top)),
        "calibrated with": Fact([texts.get("name"), digest], named),
    }
