"""`make gpu-check`: tests/gpu, the benchmark and a summary, on a GPU machine within eight minutes.

    python -m benchmarks.gpu_check --out DIR [--provider cuda|cpu] [--small] [--seconds 480]

Runs with the interpreter it is started by and installs nothing from a network: what
tests/gpu/provider/prepare.py packed into .gpu is unpacked first, where that folder is there. Each
part is a process of its own with a time limit; whatever fails or is cut off, the rest goes on and
DIR/summary.txt is written. DIR also gets the log of each part and the benchmark's JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINES, WIDTH = 40, 200
RESERVE_S = 10.0
"""For the summary."""

SMALL_TESTS = (
    "tests/gpu/test_onnx_on_device.py",
    "tests/gpu/test_onnx_on_cuda.py",
    "tests/gpu/test_trt_on_gpu.py",
)
FULL_TESTS = ("tests/gpu/test_full_size.py",)


@dataclass(kw_only=True)
class Part:
    """One process: its command, its limit, and what became of it."""

    name: str
    command: Sequence[str]
    limit_s: float
    log: Path
    env: dict[str, str]
    seconds: float = 0.0
    status: str = "not run"
    _began: float = field(default=0.0, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Begin it."""
        self._began = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.env,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait for its end, or end it with all that it started when its time is over."""
        assert self._process is not None
        left = self.limit_s - (time.monotonic() - self._began)
        try:
            code = self._process.wait(timeout=max(0.0, left))
            self.status = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.status = f"cut off after {self.limit_s:.0f} s"
        self.seconds = time.monotonic() - self._began

    def run(self) -> None:
        """Begin it and wait."""
        self.start()
        self.wait()


class Check:
    """The whole run: parts that share an environment, a folder for results, and the time."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.out: Path = asked.out.resolve()
        self.work: Path = asked.work.resolve()
        self.parts: list[Part] = []
        self.notes: list[str] = []
        self._end = time.monotonic() + asked.seconds - RESERVE_S
        self.env = {
            **os.environ,
            "JEXPORT_TEST_PROVIDER": asked.provider,
            "JEXPORT_GPU_WORK": str(self.work),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # Two processes build and test beside each other.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
        }

    def left_s(self) -> float:
        """Seconds until the summary must be begun."""
        return self._end - time.monotonic()

    def part(self, name: str, *words: str, limit_s: float) -> Part:
        """A process of this interpreter, not begun; never longer than the time that is left."""
        made = Part(
            name=name,
            command=(sys.executable, *words),
            env=self.env,
            limit_s=min(limit_s, self.left_s()),
            log=self.out / f"{name}.log",
        )
        made.log.unlink(missing_ok=True)
        self.parts.append(made)
        return made

    def on_path(self, folder: Path) -> None:
        """Import from there first."""
        known = self.env.get("PYTHONPATH", "")
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), known)))

    def succeeds(self, statement: str) -> bool:
        """Whether a line of Python ends well in the parts' environment."""
        return not subprocess.run(
            [sys.executable, "-c", statement],
            cwd=ROOT,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        ).returncode


def main(words: Sequence[str] | None = None) -> int:
    """Run everything; 0 when all parts ended well."""
    asked = _asked(words)
    check = Check(asked)
    check.out.mkdir(parents=True, exist_ok=True)
    try:
        _run(check)
    except Exception as error:  # a partial result is a result
        check.notes.append(f"{type(error).__name__}: {error}")
    lines = summary(check)
    (check.out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return int(bool(check.notes) or any(part.status != "ok" for part in check.parts))


def _run(check: Check) -> None:
    asked = check.asked
    if asked.packed.is_dir():
        _unpack(check)
    if asked.provider == "cuda" and not check.succeeds("import torch; torch.cuda.mem_get_info()"):
        check.notes.append(
            "nothing ran: torch has no CUDA device here (PROVIDER=cpu SMALL=1 runs "
            "every line without one)"
        )
        return
    device = ("--provider", asked.provider, *(["--small"] if asked.small else []))
    words = ("-m", "benchmarks.gpu", *device, "--work", str(check.work), "--out", str(check.out))
    building = check.part("build", *words, "--prepare-only", limit_s=240)
    building.start()
    tests = check.succeeds("import pytest")
    if tests:
        _tests(check, "tests", SMALL_TESTS, limit_s=180).run()
    else:
        check.notes.append(
            "tests/gpu did not run: this interpreter has no pytest "
            "(tests/gpu/provider/prepare.py packs one)"
        )
    building.wait()
    if tests:
        _tests(check, "tests-full-size", FULL_TESTS, limit_s=60).run()
    # Steps end well before the limit: one that has begun is not stopped.
    seconds = max(1.0, check.left_s() - (2 if asked.small else 30))
    check.part("bench", *words, "--seconds", f"{seconds:.0f}", limit_s=check.left_s()).run()


def _unpack(check: Check) -> None:
    """Unpack what was packed: Python packages, and the provider over the installed onnxruntime."""
    packed: Path = check.asked.packed.resolve()
    wheels = sorted((packed / "wheels").glob("*.whl"))
    if wheels and not check.succeeds("import pytest"):
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(check.work / "packages")
        check.on_path(check.work / "packages")
    if check.asked.provider == "cuda" and (packed / "provider").is_dir():
        script = ROOT / "tests" / "gpu" / "provider" / "overlay.py"
        site = check.work / "site"
        check.part("overlay", str(script), str(packed / "provider"), str(site), limit_s=90).run()
        if check.parts[-1].status == "ok":
            check.on_path(site)


def _tests(check: Check, name: str, paths: Sequence[str], *, limit_s: float) -> Part:
    words = ("-m", "pytest", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider")
    return check.part(name, *words, *paths, limit_s=limit_s)


# --- the summary ----------------------------------------------------------------------------------

_OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (\S+::.+)$")


def outcomes(log: str) -> dict[str, list[str]]:
    """Names of tests by outcome, out of what `pytest -v` wrote, if only in part."""
    found: dict[str, list[str]] = {}
    for line in log.splitlines():
        match = _OUTCOME.match(line)
        if match:
            found.setdefault(match[2], []).append(match[1])
    return found


def summary(check: Check) -> list[str]:
    """At most LINES lines: the parts, the tests that failed, the goals, the best numbers."""
    asked = check.asked
    small = ", small: no number means anything" if asked.small else ""
    lines = [f"gpu-check, provider {asked.provider}{small}; results in {check.out}"]
    lines += [f"{part.name}: {part.status}, {part.seconds:.0f} s" for part in check.parts]
    lines += check.notes[:4]
    for part in check.parts:
        if part.name.startswith("tests"):
            lines += _tests_lines(part)
    lines += _bench_lines(check.out / "bench-gpu.json")
    return [line.replace("\n", " ")[:WIDTH] for line in lines][:LINES]


def _tests_lines(part: Part) -> list[str]:
    log = part.log.read_text(encoding="utf-8", errors="replace") if part.log.is_file() else ""
    found = outcomes(log)
    counts = ", ".join(f"{len(names)} {outcome.lower()}" for outcome, names in found.items())
    lines = [f"{part.name}: {counts or 'no test ended'}"]
    reasons = [match[1] for line in log.splitlines() if (match := _REASON.match(line))]
    named = reasons or [*found.get("FAILED", []), *found.get("ERROR", [])]
    lines += [f"  {name}" for name in named[:5]]
    if len(named) > 5:
        lines.append(f"  and {len(named) - 5} more: {part.log.name}")
    return lines


def _bench_lines(path: Path) -> list[str]:
    if not path.is_file():
        return ["bench: it left no result"]
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    from benchmarks.on_gpu import report

    (path.parent / "bench-gpu.md").write_text(report.section(content), encoding="utf-8")
    return report.summary(content)


def _asked(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="all results")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: exercises the lines")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".gpu" / "work", help="checkpoints and artifacts"
    )
    parser.add_argument("--packed", type=Path, default=ROOT / ".gpu", help="what prepare.py packed")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
