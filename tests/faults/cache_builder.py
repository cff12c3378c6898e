"""A program for tests: one builder of a cache. Arguments: the cache, a key, a file to count in."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from jexport.cache.stages import Cache, StageKey
from jexport.types import CompiledModel, Signature


def main() -> None:
    root, key, tally = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

    def make(folder: Path) -> CompiledModel:
        with open(tally, "ab") as stream:
            stream.write(f"{key}\n".encode())
        for number in range(20):  # long enough for all others to come meanwhile
            (folder / f"{number}").write_bytes(key.encode() * 5000)
            time.sleep(0.01)
        return CompiledModel(
            target="t",
            precision="fp32",
            folder=folder,
            facts={},
            files=("0",),
            signature=Signature(inputs=(), outputs=()),
        )

    sys.stdin.readline()  # all begin together
    with Cache(root=root).lease() as lease:
        wanted = StageKey(stage="compile", inputs={"key": key})
        made = lease.get_or_build(wanted, make, work_dir=lambda: os.abort())  # type: ignore[arg-type,return-value]
        for number in range(20):
            assert (made.folder / f"{number}").read_bytes() == key.encode() * 5000


if __name__ == "__main__":
    main()
