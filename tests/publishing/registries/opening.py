"""`opening.py SEED COUNT REF...`: opens COUNT of the refs by chance, reading each while it is open.

Prints how many it opened, and how often one was not in the cache yet.
"""

from __future__ import annotations

import random
import sys
import time

from jexport.artifacts import manifest
from jexport.publishing import pull_cache

chance = random.Random(int(sys.argv[1]))
count, refs = int(sys.argv[2]), sys.argv[3:]
absent = 0
for _ in range(count):
    ref = chance.choice(refs)
    absent += not (pull_cache.root() / ref.rpartition("@")[2].replace(":", "-")).is_dir()
    with pull_cache.opened(ref) as folder:
        for _ in range(3):
            manifest.verify(folder)
            time.sleep(chance.random() / 100)
print(count, absent)
