"""A program for tests: runs jexport commands in forked children of a process that is warm.

Importing torch and tracing a first graph takes most of a small build. This process does it once;
each command then runs in a child that can be killed, interrupted or run beside another.
One JSON object a line on stdin, one answer a line on stdout: {"do": "start", "words": [...],
"err": FILE, "out": FILE} -> {"pid": N}; {"do": "wait", "pid": N} -> {"code": N}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback


def write_to(out: str, err: str) -> None:
    """Send stdout and stderr to files, at the descriptors that libraries written in C use too."""
    for number, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
        os.close(handle)


def run_here(words: list[str]) -> int:
    from jexport.cli import main

    sys.argv = ["jexport", *words]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    return 1


def main() -> None:
    """Arguments: two files for what the warm-up writes, then its words."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    write_to(sys.argv[1], sys.argv[2])
    code = run_here(sys.argv[3:])
    # Else each collection in a child copies every page that its counters are on.
    gc.collect()
    gc.freeze()
    print(json.dumps({"code": code}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            pid = os.fork()
            if pid == 0:
                write_to(order["out"], order["err"])
                code = run_here(order["words"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            print(json.dumps({"pid": pid}), file=answers)
        else:
            _, status = os.waitpid(order["pid"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers)


if __name__ == "__main__":
    main()
