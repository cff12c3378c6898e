"""What is chosen for all products at once, and which choices `full` tries.

Knows no weight and no measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jexport.quantization.treatment import INT8

FULL_SETTINGS = ((0.8, 1.0), (0.85, 1.0), (0.9, 1.0), (0.85, 0.9))
"""Smoothing strength and clip that `full` tries, the recipe's own first."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is chosen for all products at once.

    scheme: of the activations. smoothing: SmoothQuant's strength. clip: share of the range that is
    kept of inputs that are wider than their outputs (the second MLP matrix), 1 for all of it.
    kind: 'int8', or 'int8-weights' for float activations. compensate: round weights by GPTQ, else
    to nearest.
    """

    scheme: str
    smoothing: float
    clip: float = 1.0
    kind: str = INT8
    compensate: bool = True

    def key(self, wide: Sequence[str]) -> str:
        """A plain name of one trial with these products wide: a file's, and a journal's."""
        parts = [self.scheme, self.kind, f"{self.smoothing:g}", f"{self.clip:g}"]
        return "-".join([*parts, "gptq" if self.compensate else "nearest", *sorted(wide)])


def tried(own: Setting) -> Iterator[tuple[str, Setting]]:
    """The recipe's setting with its parts left out one by one, then other strengths and clips."""
    plain = replace(own, smoothing=0.0, clip=1.0, compensate=False)
    yield "round to nearest", plain
    yield (
        f"SmoothQuant {own.smoothing:g}, round to nearest",
        replace(plain, smoothing=own.smoothing),
    )
    yield "GPTQ", replace(plain, compensate=True)
    pairs = [(own.smoothing, own.clip)]
    pairs += [pair for pair in FULL_SETTINGS if pair not in pairs]
    for smoothing, clip in pairs:
        clipped = "" if clip == 1 else f", clip {clip:g}"
        yield (
            f"SmoothQuant {smoothing:g}, GPTQ{clipped}",
            replace(own, smoothing=smoothing, clip=clip),
        )
