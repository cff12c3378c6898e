"""What a sample says of a mean, with how much confidence.

Plain numpy: a machine that compiles an engine validates with it, and has no scipy.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from jexport.evaluation.ranking import Floats
from jexport.gates import CONFIDENCE


def mean_at_least(values: Floats, confidence: float = CONFIDENCE) -> float:
    """The one-sided lower confidence bound of the mean that values were drawn from.

    mean - t s / sqrt(n), with Student's t of n - 1 degrees of freedom. Losses are skewed to the
    right, where this bound is too low rather than too high (Johnson 1978, Modified t tests): one
    text that lost much does not make its group fail, a loss that most of its texts share does.

    Args:
        values: float64 [n], at least 0.
        confidence: 0.5 to 1, 1 excluded.

    Returns:
        The bound, at least 0; 0 of a single value, which has no interval.
    """
    count = len(values)
    if count < 2:
        return 0.0
    spread = float(values.std(ddof=1)) / math.sqrt(count)
    return max(0.0, float(values.mean()) - student_t(confidence, count - 1) * spread)


def student_t(confidence: float, degrees: int) -> float:
    """Student's t that is exceeded with probability 1 - confidence.

    Exact for one and two degrees of freedom, else the expansion 26.7.5 of Abramowitz and Stegun
    1964 (Handbook of Mathematical Functions), to 1 % from three on at a confidence of 0.99.

    Args:
        confidence: 0.5 to 1, 1 excluded.
        degrees: of freedom, 1 or more.

    Returns:
        t, at least 0.
    """
    if degrees == 1:
        return math.tan(math.pi * (confidence - 0.5))
    if degrees == 2:
        above = 2 * confidence - 1
        return above * math.sqrt(2 / ((1 - above) * (1 + above)))
    z = NormalDist().inv_cdf(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, 1))
