"""`killed.py N publish ARTIFACT DEST` or `killed.py N pull REF DIR`: killed (-9) at the Nth change.

A change is an fsync, a rename, a link or a removal. With N = 0 it runs to its end and prints how
many there were.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir", "symlink")
count, lock = [0], threading.Lock()
last = int(sys.argv[1])


def dying(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*words: Any, **options: Any) -> Any:
        with lock:
            count[0] += 1
            if count[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*words, **options)

    return call


def main() -> None:
    from jexport.artifacts import manifest
    from jexport.publishing import pull, registries
    from jexport.stages import publish
    from jexport.types import Artifact

    verb, first, second = sys.argv[2:]
    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name)))
    if verb == "publish":
        artifact = Artifact(path=Path(first), manifest=manifest.read(Path(first)))
        publish.run(artifact, second, publish.PublishSpec(tags=("latest",), threads=1))
    else:
        pull.run(registries.parse(first), Path(second), threads=1)
    print(count[0])


main()
