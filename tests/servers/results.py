"""What `make test-servers` measured, in results.json, and the tables made of it.

    python tests/servers/results.py     # writes them into docs/servers.md and, short, README.md

Every way in which jexport.serving.servers says that an engine loads an artifact is a row: measured,
or with the reason why it was not run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from jexport.serving.servers import ENGINES
from jexport.tasks import JINA_V3_PROMPTS

FILE = Path(__file__).with_name("results.json")
SERVERS = Path(__file__).parents[2] / ".servers"
PROJECT = Path(__file__).parents[2]
PAGE, README = PROJECT / "docs" / "servers.md", PROJECT / "README.md"
BEGIN, END = "<!-- servers: begin -->", "<!-- servers: end -->"
NOT_RUN = {
    "jexport": "by `make test`, in an environment without torch",
    "openvino/openvino": "by `make test`",
    "tei/vllm": "not run (it is not on PyPI): config keys and tensor names checked against its "
    "candle loader",
    "openvino-model-server/openvino": "not run (no package): the same files load in OpenVINO GenAI",
    "triton/onnx": "not run (no package): config.pbtxt checked against its protobuf, the client "
    "against a stand-in",
    "triton/trt": "not run: no GPU here",
}
"""Why a row has no cosine, by engine or engine/target."""

EMULATED = {
    "tei/onnx": "emulated in ONNX Runtime, after its loader's rules; itself when on the PATH"
}
SHORT_HEAD = ("engine", "targets", "lowest cosine")
HEAD = ("engine", "versions", "target", "tasks", "precision", "start it", "lowest cosine")


def read() -> dict[str, Any]:
    """What was kept, by `engine/target`."""
    kept: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    return kept


def keep(
    *,
    engine: str,
    target: str,
    versions: Mapping[str, str],
    tasks: Sequence[str],
    precision: str,
    line: str,
    lowest: Mapping[str, float],
) -> None:
    """Put one engine's result in the place of its last one. lowest: cosine by model and task."""
    row = {
        "versions": dict(versions),
        "tasks": list(tasks),
        "precision": precision,
        "line": line,
        "lowest_cosine": min(lowest.values()),
    }
    SERVERS.mkdir(exist_ok=True)
    with FileLock(SERVERS / "results.lock"):  # checks run in two processes
        kept = {**read(), f"{engine}/{target}": row}
        text = json.dumps(dict(sorted(kept.items())), indent=1)
        FILE.write_text(text + "\n", encoding="utf-8")


def table(kept: Mapping[str, Any]) -> str:
    """The table in Markdown. Raises KeyError for a way that was neither run nor said why not."""
    rows = []
    for name, engine in ENGINES.items():
        for target in engine.ways:
            key = f"{name}/{target}"
            if key in kept:
                rows.append(_measured(engine.title, target, kept[key], EMULATED.get(key, "")))
            elif name not in NOT_RUN:
                rows.append((engine.title, "", target, "", "", "", NOT_RUN[key]))
        if name in NOT_RUN:
            rows.append((engine.title, "", ", ".join(engine.ways), "", "", "", NOT_RUN[name]))
    return _markdown(HEAD, rows)


def short(kept: Mapping[str, Any]) -> str:
    """A row for each engine: its targets and the lowest cosine of all that was measured."""
    rows = []
    for name, engine in ENGINES.items():
        ways = {target: f"{name}/{target}" for target in engine.ways}
        measured = [kept[key]["lowest_cosine"] for key in ways.values() if key in kept]
        why_not = NOT_RUN.get(name) or NOT_RUN.get(next(iter(ways.values())), "")
        cell = _down(min(measured)) if measured else why_not
        emulated = any(key in EMULATED for key in ways.values())
        targets = ", ".join(f"`{target}`" for target in ways)
        rows.append((engine.title, targets, f"{cell} (emulated)" if emulated else cell))
    return _markdown(SHORT_HEAD, rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)


def _down(cosine: float) -> str:
    """Seven digits, rounded down: 0.99999996 is not 1."""
    return f"{int(cosine * 1e7) / 1e7:.7f}"


def _measured(title: str, target: str, row: Mapping[str, Any], remark: str) -> tuple[str, ...]:
    versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    whole = row["tasks"] == list(JINA_V3_PROMPTS)
    tasks = "all five, none" if whole else ", ".join([*row["tasks"], "none"])
    cosine = _down(row["lowest_cosine"])
    line = f"`{row['line']}`".replace("|", "\\|")
    return (
        title,
        versions,
        target,
        tasks,
        row["precision"],
        line,
        f"{cosine} ({remark})" if remark else cosine,
    )


def put(page: str, rows: str) -> str:
    """The page with the table between its marks replaced."""
    assert page.count(BEGIN) == page.count(END) == 1
    return re.sub(
        f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{rows}\n{END}", page
    )


if __name__ == "__main__":
    for path, made in ((PAGE, table), (README, short)):
        path.write_text(put(path.read_text(encoding="utf-8"), made(read())), encoding="utf-8")
