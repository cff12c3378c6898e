"""`make bench-gpu`: jexport's onnx artifacts on a GPU against torch, in one process, in turn.

    python -m benchmarks.gpu [--provider cuda|cpu] [--small] [--work DIR] [--out DIR] [--seconds N]
    python -m benchmarks.gpu --from FILE        # the section of BENCHMARKS.md out of a run's JSON

On the full-size seeded checkpoint and on MiniLM's shape: `encode` end to end and the bare graph,
fp32 and fp16, against torch fp16 with SDPA as transformers and sentence-transformers run it, and
the same under torch.compile. Writes bench-gpu.json and the section bench-gpu.md to --out, and with
--page the section into BENCHMARKS.md. `--provider cpu --small` exercises every line on tiny models;
its numbers mean nothing and go nowhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.on_gpu import measure, models, report, run

# Their tables of loaded weights are not asked for here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
RESULTS, SECTION = "bench-gpu.json", "bench-gpu.md"
PACKAGES = ("torch", "transformers", "sentence-transformers", "onnxruntime", "onnxruntime-gpu")


def main(words: list[str] | None = None) -> None:
    """Measure, or write the section of a former run."""
    asked = _asked(sys.argv[1:] if words is None else words)
    if asked.source:
        content = json.loads(asked.source.read_text(encoding="utf-8"))
        table.put(report.TITLE, report.section(content))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    deadline = measure.Deadline(asked.seconds)
    index = models.prepare(asked.work, small=asked.small, provider=asked.provider)
    if asked.prepare_only:
        for what, why in index["failed"].items():
            print(f"not built: {what}: {why}")
        raise SystemExit(bool(index["failed"]))
    content = measured(asked, index, deadline)
    section = report.section(content)
    (asked.out / SECTION).write_text(section, encoding="utf-8")
    if asked.page and not asked.small:
        table.put(report.TITLE, section)
    else:
        print(section)


def measured(
    asked: argparse.Namespace, index: dict[str, Any], deadline: measure.Deadline
) -> dict[str, Any]:
    """Run every step that there is time for; the content of the JSON file."""
    how = run.SMALL if asked.small else run.Settings()
    book = run.Book(asked.out / RESULTS, about(asked.provider, small=asked.small))
    for what, why in index["failed"].items():
        book.leave_out(f"artifact {what}", why)
    size = how.matmul if asked.provider == "cuda" else run.SMALL.matmul
    try:
        tflops = measure.matmul_tflops(asked.provider, size, seconds=3)
        book.put(peak={"size": size, "tflops": tflops})
    except Exception as error:
        book.leave_out("the large matrix product", measure.one_line(error))
    benches = [run.Bench(model, index, book, how) for model in models.models(small=asked.small)]
    book.put(
        models=[{"name": one.model.name, "max_tokens": one.model.max_tokens} for one in benches]
    )
    try:
        for name, step in run.steps(benches):
            if deadline.left_s < 0:
                book.leave_out(name, "the time was over")
                continue
            print(f"{deadline.left_s:5.0f} s left: {name}", file=sys.stderr, flush=True)
            book.group = name
            try:
                step()
            except Exception as error:
                book.leave_out(name, measure.one_line(error))
    finally:
        for bench in benches:
            bench.close()
    return book.content


def about(provider: str, *, small: bool) -> dict[str, Any]:
    """Provider, card, driver, versions and day of a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "provider": provider,
        "small": small,
        "date": date.today().isoformat(),
        "card": measure.card(provider),
        "machine": table.cores(),
        "versions": versions,
    }


def build(words: list[str]) -> None:
    """`build WORK MODEL VARIANT`: one artifact in a process of its own; prints its folder."""
    work, folder, variant = words
    model = next(one for one in models.models(small=False) if one.folder == folder)
    print(models.build(Path(work), model, variant))


def _asked(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, few rounds")
    parser.add_argument(
        "--work", type=Path, default=Path(".gpu/work"), help="checkpoints and artifacts, built once"
    )
    parser.add_argument("--out", type=Path, default=Path(".gpu/out"), help="where results go")
    parser.add_argument("--seconds", type=float, default=900.0, help="then no step begins")
    parser.add_argument("--page", action="store_true", help="write BENCHMARKS.md, too")
    parser.add_argument("--prepare-only", action="store_true", help="build, measure nothing")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE")
    return parser.parse_args(words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(sys.argv[2:])
    else:
        main()
