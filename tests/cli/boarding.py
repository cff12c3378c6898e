"""`boarding.py many|foreign|short`: the table of many jobs, driven by events and not by builds.

It goes on after each line that it reads from stdin, so that a test can look at the screen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

from jexport.cli.jobs import Board
from jexport.jobs.matrix import Job
from jexport.workspace.run import Event

TASKS = ("retrieval.query", "retrieval.passage", "separation")
BAR = b"\r 10 %\r\x1b[31m 55 %\x1b[0m\r100 %\n"


def wait() -> None:
    sys.stdin.readline()


def many(count: int) -> None:
    jobs = [Job(task=f"task{number}", target="onnx", precision="fp32") for number in range(count)]
    with Board(jobs, quiet=False, json_lines=False) as board:
        wait()
        for number, job in enumerate(jobs):
            board(job, Event(kind="begin", stage=""))
            board(job, Event(kind="start", stage="export"))
            if number == count - 5:
                wait()
            said = "failed: of itself" if number in (3, 4) else f"/out/m/{job.task}/v{number}"
            board(job, Event(kind="end", stage="", text=said, seconds=number))
    print("that was all")


def foreign() -> None:
    jobs = [Job(task=task, target="onnx", precision="fp32") for task in TASKS]
    with Board(jobs, quiet=False, json_lines=False) as board:
        board(jobs[0], Event(kind="begin", stage=""))
        os.write(2, b"from a library\n" + BAR + b"half ")
        subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
        warnings.warn("from Python", stacklevel=1)
        os.write(2, b"long " * 20 + b"\n\x1b[2Jclears\tnothing\n")
        board(jobs[0], Event(kind="note", stage="quantize", text="two\nlines \x1b[5A"))
        wait()
        os.write(2, b"the last, without an end")
    os.write(2, b"told afterwards\n")


if sys.argv[1] == "foreign":
    foreign()
else:
    many(int(sys.argv[2]))
