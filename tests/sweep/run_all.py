"""`make sweep`: every text model of the installed transformers, tiny, each in a process of its own.

Writes SWEEP.md and exits with 1 where a row says `traceback`, `wrong` or `timeout`. A process is
forked from one that has imported everything, and is ended after --limit seconds. Types may be
named. Rows are kept in --rows until all are there, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

LIMIT_S = 300.0
TABLE = HERE.parents[1] / "SWEEP.md"
LONGEST = 160


def main() -> int:
    """Run the types that are named, or all of them; 1 when a row must not be."""
    words = argparse.ArgumentParser()
    words.add_argument("types", nargs="*")
    words.add_argument("--rows", type=Path, default=Path("sweep.jsonl"))
    words.add_argument("--limit", type=float, default=LIMIT_S)
    options = words.parse_args()
    import_all()
    import one
    import tiny

    rows: dict[str, Any] = {}
    if options.rows.exists():
        with options.rows.open(encoding="utf-8") as stream:
            rows = {row["model_type"]: row for row in map(json.loads, stream)}
    for name in options.types or tiny.text_types():
        if name in rows and not options.types:
            continue
        begin = time.monotonic()
        rows[name] = in_own_process(name, options.limit)
        with options.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(rows[name]) + "\n")
        seconds = time.monotonic() - begin
        print(f"{seconds:6.1f} s  {line(rows[name])}", flush=True)
    if not options.types:
        TABLE.write_text(table(rows), encoding="utf-8")
        options.rows.unlink(missing_ok=True)
    bad = [row for row in rows.values() if row["result"] in one.NEVER]
    for row in bad:
        print(f"\n{row['model_type']}: {row['result']}\n{row['detail']}", file=sys.stderr)
    return 1 if bad else 0


def import_all() -> None:
    """What every process needs, once; nothing here starts a thread."""
    warnings.simplefilter("ignore")
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import sentence_transformers  # noqa: F401
    import torch
    import torch.onnx
    import transformers

    import jexport.building.pipeline  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)


def in_own_process(name: str, limit_s: float) -> dict[str, Any]:
    """The row of one model type."""
    import one

    folder = Path(tempfile.mkdtemp(prefix="jexport-sweep-"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(reading)
        _child(name, folder, writing)
    os.close(writing)
    text, until = b"", time.monotonic() + limit_s
    with os.fdopen(reading, "rb", 0) as pipe:
        while (left := until - time.monotonic()) > 0:
            if select.select([pipe], [], [], left)[0]:
                piece = pipe.read(1 << 16)
                if not piece:
                    break
                text += piece
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        row: dict[str, Any] = json.loads(text)
    except ValueError:
        result = one.TIMEOUT if time.monotonic() >= until else one.TRACEBACK
        row = one.row(name, result, detail=f"ended with status {status} after {limit_s:.0f} s")
    return row


def _child(name: str, folder: Path, writing: int) -> None:
    import one

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        row = one.run(name, folder)
    except BaseException:
        row = one.row(name, one.TRACEBACK, detail=traceback.format_exc())
    os.write(writing, json.dumps(row).encode())
    os._exit(0)


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    why = " ".join(row["detail"].split())
    # Where the checkpoint and the packages lie is of this machine and run.
    why = re.sub(r"[^\s']*/(?:jexport-sweep-\w+|site-packages)", "...", why)
    why = why.replace("|", "/")[:LONGEST]
    cosine = f"{row['cosine']:.7f}" if row["cosine"] else ""
    return f"| {row['model_type']} | {row['result']} | {cosine} | {why} |"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """SWEEP.md."""
    import transformers

    counts = Counter(row["result"] for row in rows.values())
    told = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    return "\n".join(
        [
            "# Sweep",
            "",
            "Every text model of transformers"
            f" {transformers.__version__}, tiny and seeded, built for `onnx` and compared with",
            "sentence-transformers' own `encode` (`make sweep` writes this). `not tiny`: no small",
            "checkpoint could be made; `no judge`: sentence-transformers gives no vectors either.",
            "",
            f"{len(rows)} model types: {told}.",
            "",
            "| model type | result | lowest cosine | why |",
            "| --- | --- | --- | --- |",
            *(line(rows[name]) for name in sorted(rows)),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
