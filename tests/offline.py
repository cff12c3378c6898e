"""Run a script as a program that may not leave this machine: `python offline.py SCRIPT WORDS...`.

An attempt to connect elsewhere, or to look up a name, is an AssertionError. It sees what goes
through Python's sockets; a library that opens its own in C is not seen. Imports no jexport.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

HERE = ("127.0.0.1", "::1", "localhost", None)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what is not of this machine; a str or bytes is a socket in the file system."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        assert arguments[1][0] in HERE, f"connects to {arguments[1]}"
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        assert arguments[0] in HERE, f"looks up {arguments[0]}"


if __name__ == "__main__":
    sys.addaudithook(watch)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])  # as `python SCRIPT` has it
    runpy.run_path(sys.argv[0], run_name="__main__")
