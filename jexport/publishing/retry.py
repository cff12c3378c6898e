"""Trying again: for faults that pass, so many times, with a pause that grows.

Knows no service: whoever calls one says with TransientError what may pass.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from jexport.errors import RegistryError

T = TypeVar("T")

ATTEMPTS = 6
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0


class TransientError(Exception):
    """A fault that may pass: 5xx, 429, a timeout, a connection that broke. Its text has no secret.

    pause_s: how long the service asked to wait. tries: how many the caller's library has made.
    """

    def __init__(self, text: str, *, pause_s: float = 0.0, tries: int = 1) -> None:
        super().__init__(text)
        self.pause_s, self.tries = pause_s, tries


def call_with_retry(
    call: Callable[[], T],
    *,
    what: str,
    reached: Callable[[], int] = lambda: 0,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until it does not raise TransientError: ATTEMPTS times since anything was `reached`.

    About 15 s of pauses in a row.

    Args:
        call: what may fail.
        what: it does, for the error.
        reached: how far the work is; a call that got farther before it failed starts the count
            anew, so a large file comes through a bad line.
        sleep: pauses so many seconds; may raise to end it all.

    Returns:
        What the call returned.

    Raises:
        RegistryError: every attempt failed; with the last fault.
    """
    before, failures = reached(), 0
    while True:
        try:
            return call()
        except TransientError as fault:
            now = reached()
            failures = fault.tries + (0 if now > before else failures)
            before = now
            if failures >= ATTEMPTS:
                raise RegistryError(
                    f"{what} failed {failures} times",
                    evidence=str(fault),
                    fix="try again later: what is there already is not sent or fetched again",
                ) from fault
            pause = min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
            asked = min(fault.pause_s, 2 * LONGEST_PAUSE_S)
            sleep(max(pause * random.uniform(0.5, 1.0), asked))
