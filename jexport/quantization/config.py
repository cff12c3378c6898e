"""What is chosen for all linear layers at once, and which choices `--effort full` tries.

Knows no weight and no measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

INT8, INT8_RESIDUAL, INT8_WEIGHTS = "int8", "int8x2", "int8-weights"
"""Precisions of a layer, as quantization.json names them: int8 activations and weights; the same
with a second int8 term for what rounding left of the activations; int8 weights alone."""

LAYER_PRECISIONS = (INT8, INT8_RESIDUAL, INT8_WEIGHTS)

FULL_EFFORT_GRID = ((0.85, 1.0), (0.5, 1.0), (0.85, 0.9))
"""SmoothQuant's strength, which balanced factors start from, and clip that `full` tries, the
recipe's own first."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """What is chosen for all linear layers at once.

    Args:
        scheme: of the activations, one of quant_params.SCHEMES.
        smoothing: SmoothQuant's strength, 0 to 1; 0 for no factors.
        clip: share of the range that is kept of inputs with more channels than the output (an
            MLP's second matrix); 1 for all of it.
        precision: of the layers, one of LAYER_PRECISIONS.
        gptq: round weights by GPTQ, else to nearest.
        balance: move SmoothQuant's factors to the least noise, else its formula's.
    """

    scheme: str
    smoothing: float
    clip: float = 1.0
    precision: str = INT8
    gptq: bool = True
    balance: bool = True

    def key(self, fallback: Sequence[str]) -> str:
        """The name of one trial, for files and the trial log.

        Args:
            fallback: names of the layers in higher precision, in any order.

        Returns:
            All that is chosen, joined by '-'.
        """
        parts = [self.scheme, self.precision, f"{self.smoothing:g}", f"{self.clip:g}"]
        parts += ["gptq" if self.gptq else "nearest"] + ["balanced"] * self.balance
        return "-".join([*parts, *sorted(fallback)])


def candidate_configs(own: QuantizationConfig) -> Iterator[tuple[str, QuantizationConfig]]:
    """Ablations of the recipe's config, then other strengths and clips.

    Args:
        own: the recipe's config.

    Yields:
        What each is, in words, and the config; the recipe's own is among them once.
    """
    plain = replace(own, smoothing=0.0, clip=1.0, gptq=False, balance=False)
    yield "round to nearest", plain
    yield (
        f"SmoothQuant {own.smoothing:g}, round to nearest",
        replace(plain, smoothing=own.smoothing),
    )
    yield "GPTQ", replace(plain, gptq=True)
    formula = replace(plain, smoothing=own.smoothing, gptq=True)
    yield f"SmoothQuant {own.smoothing:g}, GPTQ", formula
    pairs = [(own.smoothing, own.clip)]
    pairs += [pair for pair in FULL_EFFORT_GRID if pair not in pairs]
    for smoothing, clip in pairs:
        clipped = "" if clip == 1 else f", clip {clip:g}"
        yield (
            f"SmoothQuant {smoothing:g} balanced, GPTQ{clipped}",
            replace(own, smoothing=smoothing, clip=clip),
        )
