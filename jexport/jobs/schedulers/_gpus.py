"""What kinds of GPU are called: short names here and in Ray, labels of nodes in Kubernetes.

Names: Ray's ray.util.accelerators; GKE's accelerator types; the products that NVIDIA's GPU Feature
Discovery writes. A product or accelerator type is taken as the label's own value.
"""

from __future__ import annotations

from collections.abc import Mapping

from jexport.errors import MatrixError
from jexport.jobs.schedulers import GKE, PRODUCT

VALUES: Mapping[str, Mapping[str, str]] = {
    # One product each. A100, H100 and V100 are several, and older drivers leave 'NVIDIA-' out.
    PRODUCT: {
        "T4": "Tesla-T4",
        "L4": "NVIDIA-L4",
        "A10": "NVIDIA-A10",
        "A10G": "NVIDIA-A10G",
        "L40S": "NVIDIA-L40S",
    },
    GKE: {
        "T4": "nvidia-tesla-t4",
        "L4": "nvidia-l4",
        "V100": "nvidia-tesla-v100",
        "A100": "nvidia-tesla-a100",
        "A100-40G": "nvidia-tesla-a100",
        "A100-80G": "nvidia-a100-80gb",
        "H100": "nvidia-h100-80gb",
        "B200": "nvidia-b200",
    },
}

SEVERAL = ("V100", "A100", "A100-40G", "A100-80G", "H100", "H200", "B200")


def value(kind: str, label: str) -> str:
    """What a node's label says when it has GPUs of this kind.

    Args:
        kind: a short name, or the label's own value.
        label: one of GPU_LABELS, or another, where kinds are its own values.

    Returns:
        The label's value.

    Raises:
        MatrixError: the kind has several values for this label, or none that is known.
    """
    known = VALUES.get(label, {})
    if label == PRODUCT and kind in SEVERAL:
        raise MatrixError(
            f"{kind} is more than one product",
            evidence=f"the label {PRODUCT} says which, such as NVIDIA-A100-SXM4-40GB; TensorRT"
            " builds for one",
            fix=f"kubectl get nodes -L {PRODUCT}, then --gpu PRODUCT; or --gpu-label {GKE}",
        )
    if label == GKE and kind not in known and not kind.startswith("nvidia-"):
        raise MatrixError(
            f"GKE's name of {kind} is not known here",
            evidence=f"known: {', '.join(known)}",
            fix="give the accelerator's type, as `gcloud compute accelerator-types list` shows it",
        )
    return known.get(kind, kind)
