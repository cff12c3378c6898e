"""The candle backend's rules on folders of the target vllm: `python candle.py FOLDER...`."""

from __future__ import annotations

import sys
from pathlib import Path

from tei import loader

for folder in sys.argv[1:]:
    loader.router(Path(folder))
    loader.candle(Path(folder))
    print(folder)
