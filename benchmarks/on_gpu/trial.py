"""Figures of another run, for comparison only: they are never written as rows of a measurement."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = (
    "one trial on an H200 (CUDA 13, driver 580, onnxruntime 1.30 with its CUDA provider, torch "
    "2.11, transformers 5.17), the full-size checkpoint, retrieval.passage, fp16, before any work "
    "on CUDA; reported, not measured by this benchmark"
)
PEAK_TFLOPS = 790.0
"""A large fp16 matrix product there, about."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One batch shape: texts a second of the bare onnx graph and of torch fp16 with SDPA."""

    batch: int
    tokens: int
    onnx: float
    torch: float


POINTS = (
    Point(batch=64, tokens=16, onnx=14_916.0, torch=5_802.0),
    Point(batch=64, tokens=128, onnx=3_225.0, torch=3_676.0),
    Point(batch=32, tokens=512, onnx=803.0, torch=899.0),
    Point(batch=8, tokens=2048, onnx=178.0, torch=194.0),
    Point(batch=2, tokens=8192, onnx=30.0, torch=32.0),
)
ONE_TEXT_MS = {"onnx": 4.1, "torch": 14.7}
"""One text of 16 tokens."""

ENCODE = {"default batches": 274.0, "max_batch_tokens=65536": 510.0}
"""Texts a second of `encode`, 4,096 texts of 318 tokens on average."""
