"""The report of an int8 artifact: quantization.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jexport.artifacts import manifest, store
from jexport.artifacts.report import page as report_page

PAGE = "report.html"


def summary(report_path: Path) -> str:
    """How many MatMul layers were quantized how, in words.

    Args:
        report_path: quantization.json as the quantize stage wrote it.

    Returns:
        One line, with the held-out top-10 overlap.
    """
    report = _read(report_path)
    kinds = [matrix["treatment"] for matrix in report["matrices"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{counts}; held-out top-10 {report['chosen']['top10_overlap']:.3f}"


def write(
    report_path: Path,
    parity_path: Path,
    more: Mapping[str, Any],
    slot: store.Slot,
    out_dir: Path,
) -> tuple[Path, Path]:
    """Write quantization.json with what only the build knows, and report.html made of it.

    Args:
        report_path: quantization.json as the quantize stage wrote it.
        parity_path: parity.json.
        more: keys of quantization.json that only the build knows; `sizes` in bytes by precision.
        slot: names the artifact.
        out_dir: takes both files.

    Returns:
        The two files.
    """
    path = out_dir / report_path.name
    content = _read(report_path) | dict(more)
    content["bytes"] = dict(content.pop("sizes"))
    manifest.write_json(path, content)
    facts = {
        "name": slot.model,
        "task": slot.task,
        "target": slot.target,
        "precision": slot.precision,
        "version": slot.version,
    }
    page = path.with_name(PAGE)
    page.write_text(report_page.render(content, _read(parity_path), facts), encoding="utf-8")
    return path, page


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
