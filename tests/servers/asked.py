"""What every embed.py here begins and ends with: `python embed.py ASKED.json`.

ASKED.json holds `jobs`; each is a dict with folder, texts, prompt, and what else an engine has to
be told. A job's vectors, float32 [texts, dimension], are saved where it says. Imports no jexport.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

START_S = 240
"""How long a server may take until it answers: vLLM needs most of a minute on two busy cores."""

Job = dict[str, Any]


def answer(embed: Callable[[Job], Any], *packages: str) -> None:
    """Do every job, save its vectors; run the first one's line; print versions of `packages`."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for job in asked["jobs"]:
        np.save(job["output"], np.asarray(embed(job), dtype=np.float32))
    line = asked["jobs"][0]["line"]
    if line.startswith("python "):
        subprocess.run(["bash", "-c", line], check=True, stdout=subprocess.DEVNULL)
    print(json.dumps({name: metadata.version(name) for name in packages}))


def prompted(job: Job) -> list[str]:
    """The texts with the prompt before each, for an engine that puts none."""
    return [job["prompt"] + text for text in job["texts"]]


def batches(texts: list[str], size: int = 4) -> Iterator[list[str]]:
    """A few texts at a time, in order."""
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def pooled(tokens: Any, mask: Any, job: Job) -> Any:
    """Token vectors [batch, sequence, dim] to vectors of length 1, by the mean over the mask."""
    says = json.loads((Path(job["folder"]) / "1_Pooling" / "config.json").read_text())
    assert says["pooling_mode_mean_tokens"] is True, says
    weights = np.asarray(mask, dtype=np.float32)[..., None]
    mean = (np.asarray(tokens) * weights).sum(axis=1) / weights.sum(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@contextlib.contextmanager
def started(job: Job, path: str) -> Iterator[str]:
    """Run the job's line until `path` answers; gives the address, stops the server at the end."""
    address = f"http://127.0.0.1:{job['port']}"
    log = Path(job["output"]).with_suffix(".log")
    with log.open("w") as told:
        server = subprocess.Popen(
            ["bash", "-c", job["line"]], stdout=told, stderr=told, start_new_session=True
        )
    try:
        _wait(server, address + path, log)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server stopped:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            if urllib.request.urlopen(address, timeout=5).status == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"no answer from {address} in {START_S} s:\n{log.read_text()[-4000:]}")
