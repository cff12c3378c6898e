"""The parts of `benchmarks/gpu.py`: models, sides, measurements, their order, and the report."""
