"""`jexport report` and `jexport compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from jexport.errors import ArtifactError

MIB = 1 << 20
QUANTIZATION, PARITY, PAGE = "quantization.json", "parity.json", "report.html"

Fact = tuple[Any, str]
"""A value for JSON and as it is shown."""


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--open", "open_page", is_flag=True, help="Open report.html in a browser.")
@click.option("--json", "as_json", is_flag=True, help="quantization.json and parity.json as JSON.")
def report(artifact: Path, open_page: bool, as_json: bool) -> None:
    """Show what quantization cost an int8 artifact, and where its report.html is."""
    from jexport import manifest, quantization_report

    content = manifest.read(artifact).content
    quantization = _quantization(artifact)
    if not quantization:
        raise ArtifactError(
            f"{artifact} was not quantized",
            evidence=f"there is no {QUANTIZATION} in it; its precision is {content['precision']}",
            fix="give an int8 artifact (see `jexport list`), or `jexport inspect` this one",
        )
    parity, page = _json(artifact, PARITY), artifact / PAGE
    if as_json:
        found = str(page) if page.is_file() else None
        told = {"page": found, "quantization": quantization, "parity": parity}
        click.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        click.echo(quantization_report.text(quantization, parity, content))
        if page.is_file():
            click.echo(page)
    if open_page:
        _open(page)


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Show two artifacts side by side; * marks what differs (files are not checked; see verify)."""
    ours, theirs = _facts(a), _facts(b)
    absent: Fact = (None, "-")
    rows = [(name, ours.get(name, absent), theirs.get(name, absent)) for name in {**ours, **theirs}]
    same_space = ours["embedding space"] == theirs["embedding space"]
    same_texts = ours["parity texts"] == theirs["parity texts"]
    if as_json:
        listed = [
            {"name": name, "a": first[0], "b": second[0], "differs": first[0] != second[0]}
            for name, first, second in rows
        ]
        told = {"a": str(a), "b": str(b), "same_space": same_space,
                "same_parity_texts": same_texts, "rows": listed}  # fmt: skip
        click.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    click.echo(f"A  {a}\nB  {b}\n")
    width = max(len(first[1]) for _, first, _ in rows) + 2
    click.echo(f"  {'':<24}{'A':<{width}}B")
    for name, first, second in rows:
        mark = " " if first[1] == second[1] else "*"
        click.echo(f"{mark} {name:<24}{first[1]:<{width}}{second[1]}".rstrip())
    click.echo()
    if same_space:
        click.echo("one embedding space: one may search the other's index, as near as their gates")
    else:
        click.echo("the embedding spaces differ: never mix their vectors in one index")
    if not same_texts:
        click.echo("parity was measured on different texts: its numbers do not compare")


def _facts(artifact: Path) -> dict[str, Fact]:
    """What `compare` shows of one artifact, by name."""
    from jexport import manifest, quantization_report

    content = manifest.read(artifact).content
    quantization, compared = _quantization(artifact), _json(artifact, PARITY).get("texts") or {}
    embedding, parity, checkpoint = content["embedding"], content["parity"], content["checkpoint"]
    size = sum(entry["size_bytes"] for entry in content["files"])
    digest = compared.get("sha256")
    facts: dict[str, Fact] = {
        name: (content[name], content[name]) for name in ("name", "task", "target", "precision")
    }
    facts |= {
        "version": (content["version"], content["version"]),
        "checkpoint": (
            [checkpoint["name"], checkpoint["revision"]],
            f"{checkpoint['name']} {checkpoint['revision']}".strip(),
        ),
        "size": (size, f"{size / MIB:,.1f} MiB"),
        "dimension": (embedding["dimension"], str(embedding["dimension"])),
        "Matryoshka sizes": (
            embedding["matryoshka"],
            ", ".join(map(str, embedding["matryoshka"])) or "full size only",
        ),
        "length limit": (embedding["max_tokens"], f"{embedding['max_tokens']} tokens"),
        "prompt": (embedding["prompt"], repr(embedding["prompt"])),
        "pooling": (embedding["pooling"], embedding["pooling"]),
        "normalised": (embedding["normalize"], "yes" if embedding["normalize"] else "no"),
        "embedding space": (embedding["space"], embedding["space"][:16]),
        "parity texts": (
            [parity["texts"], digest],
            f"{parity['texts']} texts, {(digest or '-')[:16]}",
        ),
        "cosine, mean": (parity["cosine_mean"], f"{parity['cosine_mean']:.5f}"),
        "cosine, 1st percentile": (parity["cosine_p1"], f"{parity['cosine_p1']:.5f}"),
        "cosine, lowest": (parity["cosine_min"], f"{parity['cosine_min']:.5f}"),
        "top-10 overlap": (parity["top10_overlap"], f"{parity['top10_overlap']:.4f}"),
        "Spearman": (parity["spearman"], f"{parity['spearman']:.5f}"),
    }
    for row in content.get("speed", ()):
        if row["precision"] == content["precision"]:
            speed = row["texts_per_second"]
            facts["speed"] = speed, f"{speed:,.4g} texts/s"
    treated = quantization_report.treatments(quantization)
    if treated:
        counts = {name: count for name, count, _ in treated}
        shown = ", ".join(f"{count} {name}" for name, count in counts.items())
        facts["scheme"] = quantization.get("scheme"), str(quantization.get("scheme", "-"))
        facts["matrices"] = counts, shown
    return facts


def _quantization(artifact: Path) -> Mapping[str, Any]:
    """quantization.json, {} when there is none; ArtifactError for another format."""
    from jexport import quantization_report

    content = _json(artifact, QUANTIZATION)
    if content and content.get("format") != quantization_report.FORMAT:
        raise ArtifactError(
            f"{artifact / QUANTIZATION} has format {content.get('format')!r:.40}",
            evidence=f"this jexport reads format {quantization_report.FORMAT}",
            fix="use the jexport that wrote it, or build it again",
        )
    return content


def _json(artifact: Path, name: str) -> Mapping[str, Any]:
    """A JSON object of an artifact, {} when there is no such file."""
    path = artifact / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = "" if isinstance(content, dict) else "it is not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise ArtifactError(
            f"{path} cannot be read",
            evidence=problem,
            fix=f"see `jexport verify {artifact}`; fetch it again, or build it again",
        )
    found: Mapping[str, Any] = content
    return found


def _open(page: Path) -> None:
    """Show the page in a browser; one line on stderr where there is none."""
    import webbrowser

    if not page.is_file():
        raise ArtifactError(
            "there is no report to open",
            evidence=f"{page} is missing",
            fix="leave out --open, or build the artifact again",
        )
    if not webbrowser.open(page.resolve().as_uri()):
        click.echo(f"no browser here; open {page} yourself", err=True)


COMMANDS = {"report": report, "compare": compare}
