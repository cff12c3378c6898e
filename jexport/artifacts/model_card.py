"""README.md of an artifact: what it is, its numbers, its licence, how to load it.

Every number comes from the manifest's content and, of an int8 artifact, from its
quantization.json. Knows no stage.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from jexport.artifacts.report import findings, reading

NON_COMMERCIAL = "CC-BY-NC"
YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")


NAMED = 8
"""Matrices that are named before the rest is only counted."""


def text(content: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> str:
    """The model card as Markdown with YAML front matter.

    content: a manifest without its files. quantization: quantization.json, where there is one.
    """
    embedding, parity = content["embedding"], content["parity"]
    title = f"{content['name']} · {content['task']} · {content['target']} {content['precision']}"
    sizes = ", ".join(str(size) for size in embedding["matryoshka"]) or "full size only"
    prompt = _code(embedding["prompt"]) if embedding["prompt"] else "none"
    others = {
        name: text
        for name, text in embedding.get("prompts", {}).items()
        if text and name != embedding.get("default_prompt_name")
    }
    rows = [
        ("task", _plain(content["task"])),
        ("prompt put before each text", prompt),
        *((f"prompt {_code(name)}", _code(text)) for name, text in others.items()),
        ("pooling", embedding["pooling"] + (", L2-normalised" if embedding["normalize"] else "")),
        ("dimension", embedding["dimension"]),
        ("Matryoshka sizes", sizes),
        ("length limit", f"{embedding['max_tokens']} tokens, special tokens included"),
        ("precision", content["precision"]),
        *_device(content),
        ("checkpoint", _plain(_checkpoint(content["checkpoint"]))),
        ("version", content["version"]),
        ("embedding space", f"`{embedding['space'][:16]}`"),
        ("licence", _plain(content["licence"]) or "not stated by the checkpoint"),
    ]
    measured = [
        ("texts compared", parity["texts"]),
        ("cosine, mean", f"{parity['cosine_mean']:.7f}"),
        ("cosine, 1st percentile", f"{parity['cosine_p1']:.7f}"),
        ("cosine, lowest", f"{parity['cosine_min']:.7f}"),
        ("largest difference of a component", f"{parity['largest_difference']:.2e}"),
        ("Spearman of pairwise similarities", f"{parity['spearman']:.6f}"),
        ("shared top-10 neighbours", f"{parity['top10_overlap']:.4f}"),
        ("alone against in a padded batch, lowest cosine", f"{parity['batch_cosine_min']:.7f}"),
    ]
    return "\n".join(
        [
            *_front_matter(content),
            f"# {_plain(title)}",
            "",
            _table(("", ""), rows),
            "",
            "## How far it is from the checkpoint",
            "",
            "Measured when it was built, against the checkpoint's own forward pass; by language,",
            "length and dimension in `parity.json`.",
            "",
            _table(("measure", "value"), measured),
            "",
            *(_quantization(content, quantization) if quantization else []),
            *_usage(content),
            *_licence(content),
        ]
    )


def _device(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it is made for, where that is not any machine."""
    cuda = content["engine"]["facts"].get("cuda")
    if not cuda:
        return []
    steps = ", ".join(_code(name) for name, count in cuda["steps"].items() if count)
    return [("made for", f"CUDA alone, texts padded on the right; graph steps: {steps}")]


def _quantization(content: Mapping[str, Any], quantization: Mapping[str, Any]) -> list[str]:
    """What quantization cost, in brief."""
    kept = findings.kept(quantization)
    held_out = reading.mapping(quantization, "held_out")
    calibrated = reading.mapping(quantization, "calibration")
    precisions = {one.name: one for one in findings.precisions(quantization, {}, content)}
    own = precisions.get(content["precision"])
    rows = [
        ("held-out texts", reading.count(held_out.get("texts"))),
        *(
            (f"held-out {one.words}", one.shown(reading.value(kept, one.key)))
            for one in findings.MEASURES
        ),
        ("linear layers", _plain("; ".join(findings.layers_in_brief(quantization)))),
        *_special(quantization),
        ("size of graph and weights", own.size_in_words if own else ""),
        ("calibrated with", _texts(calibrated)),
    ]
    outcome = "reached" if quantization.get("reached") is True else "NOT reached"
    return [
        f"## What {_plain(content['precision'])} cost",
        "",
        "Against the same graph in fp32, on texts that calibration never saw; the goals were "
        f"{outcome}.",
        "By language and length, layer by layer, and all that was tried: `report.html`; the same",
        "as numbers: `quantization.json`.",
        "",
        _table(("measure", "value"), [row for row in rows if row[1] not in ("", reading.MISSING)]),
        "",
    ]


def _special(quantization: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which layers are not plain int8, by precision."""
    rows = []
    for precision, _, _ in findings.layer_precisions(quantization):
        if precision in findings.PLAIN:
            continue
        names = [
            _code(str(matrix.get("name")))
            for matrix in reading.rows(quantization, "matrices")
            if str(matrix.get("treatment")) == precision
        ]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        rows.append(
            (f"layers in {_plain(findings.label(precision))}", ", ".join(names[:NAMED]) + more)
        )
    return rows


def _texts(texts: Mapping[str, Any]) -> str:
    """Name, counts and digest of a set of texts."""
    if not texts:
        return ""
    digest = f", SHA-256 {_code(str(texts['sha256']))}" if texts.get("sha256") else ""
    name = _plain(str(texts.get("name") or "a set without a name"))
    return f"{name}: {reading.count(texts.get('texts'))} texts{digest}"


def _front_matter(content: Mapping[str, Any]) -> list[str]:
    licence = str(content["licence"]).lower() or "other"
    if not re.fullmatch(r"[a-z][a-z0-9.+-]*", licence) or licence in YAML_WORDS:
        licence = json.dumps(licence)  # a JSON string is a YAML string
    engine = content["engine"]["facts"].get(
        "tags", ["sentence-transformers", str(content["target"])]
    )
    tags = ["feature-extraction", "sentence-similarity", *engine]
    return [
        "---",
        f"license: {licence}",
        "pipeline_tag: feature-extraction",
        "tags:",
        *[f"- {tag}" for tag in tags],
        "---",
        "",
    ]


def _plain(text: str) -> str:
    """A checkpoint's own words as Markdown that shows them: no markup, one line, no cell's end."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """The same as a code span in a table: spaces stay, a line break is shown as \\n."""
    shown = json.dumps(text, ensure_ascii=False)[1:-1] if re.search(r"[\x00-\x1f]", text) else text
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    # Markdown takes one space off both ends when there is one at both.
    ends = shown[:1] + shown[-1:] if shown.strip(" ") else ""
    padding = " " if "`" in ends or ends == "  " else ""
    return f"{fence}{padding}{shown}{padding}{fence}".replace("|", "\\|")


def _checkpoint(checkpoint: Mapping[str, Any]) -> str:
    revision = f" at {checkpoint['revision']}" if checkpoint["revision"] else ""
    return f"{checkpoint['name']}{revision} (layout {checkpoint['layout']})"


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


def _usage(content: Mapping[str, Any]) -> list[str]:
    """How to load it; a target that writes no graph says in its facts who else opens the folder."""
    engine = content["engine"]
    others = engine["facts"].get("use") or [
        f"The graph `{engine['files'][0]}` takes `input_ids` and",
        "`attention_mask` (int64 [batch, sequence]); pooling and normalisation are outside of it",
        "unless it has the output `sentence_embedding`.",
    ]
    if modules := content["embedding"].get("modules"):
        others = [*others, f"Texts become vectors by: {'; '.join(modules)}."]
    return [
        "## Use it",
        "",
        "```python",
        "import jexport",
        "",
        'with jexport.open_artifact("PATH/OF/THIS/FOLDER") as model:',
        '    vectors = model.encode(["a text", "another"])  # the prompt is put before each text',
        "```",
        "",
        "`jexport verify FOLDER` checks every file.",
        *others,
        "",
    ]


def _licence(content: Mapping[str, Any]) -> list[str]:
    licence = content["licence"]
    text = _plain(licence) or "not stated"
    lines = ["## Licence", "", f"The weights keep the checkpoint's licence: {text}."]
    if str(licence).upper().startswith(NON_COMMERCIAL):
        lines.append("It does not allow commercial use without an agreement with the authors.")
    return [*lines, ""]
