"""quantize: OnnxModel (fp32) -> OnnxModel (int8, Q/DQ).

No target declares int8 yet, so `pipeline` refuses the precision before it comes here. The room has
its door, its types and its precondition; the scheme will come from the target, the samples from
calibration_data/.
"""

from __future__ import annotations

from pathlib import Path

from jexport.errors import PrecisionError
from jexport.flow import CalibrationSet, OnnxModel


def run(model: OnnxModel, samples: CalibrationSet, scheme: str, *, out_dir: Path) -> OnnxModel:
    """Refuses with PrecisionError: jexport does not quantize yet."""
    raise PrecisionError(
        "jexport does not quantize yet",
        evidence=f"asked for scheme '{scheme}' with {len(samples.samples)} texts",
        fix="use --precision fp32 or fp16",
    )
