"""Numbers that do not depend on how many threads there are: matrix products of a fixed order.

A BLAS library cuts a product into one part a thread, and some kernels add up the edge of a part in
another order than its middle. OpenBLAS 0.3.31 on AVX2 gave other last bits on 2 threads than on 1
for float32 products of all sizes tried (64 to 1,536); its AVX512 kernels did not. On one thread all
gave the same bits every time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def one_blas_thread() -> Iterator[int]:
    """Limit numpy's and scipy's BLAS to one thread meanwhile, in the whole process.

    Whoever has independent products runs them side by side in threads of their own.

    Yields:
        How many threads BLAS would have used: so many of one's own are worth it.
    """
    try:
        import threadpoolctl
    except ImportError:
        # Only where nothing is built but an engine is compiled (`jexport compile`): such an
        # artifact says `reproducible: false`.
        yield len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        return
    before = [
        library["num_threads"]
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "blas"
    ]
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        yield max(before, default=1)
