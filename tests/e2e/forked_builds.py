"""A program for tests: runs jexport commands in forked children of a process that is warm.

Importing torch and tracing a first graph takes most of a small build. This process does it once;
each command then runs in a child that can be killed, interrupted or run beside another.
One JSON object a line on stdin, one answer a line on stdout: {"do": "start", "words": [...],
"err": FILE, "out": FILE} -> {"pid": N}; {"do": "wait", "pid": N} -> {"code": N}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys


def run_and_exit(words: list[str], out: str, err: str) -> None:
    from jexport.cli import main

    for number, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["jexport", *words]
    code = 1
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from jexport import cli

    stdout, sys.stdout = sys.stdout, sys.stderr
    with contextlib.suppress(SystemExit):
        cli.main()  # the words of the warm-up are this program's own
    sys.stdout = stdout
    # Else each collection in a child copies every page that its counters are on.
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            pid = os.fork()
            if pid == 0:
                run_and_exit(order["words"], order["out"], order["err"])
            print(json.dumps({"pid": pid}), flush=True)
        else:
            _, status = os.waitpid(order["pid"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
