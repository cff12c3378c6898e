# A machine with an NVIDIA GPU runs the GPU tests in here, or `make gpu-check OUT=/out` (README):
#   docker build -f docker/gpu.Dockerfile -t jexport-gpu . && docker run --rm --gpus all jexport-gpu
# Only the driver comes from outside (r580 or newer for CUDA 13); CUDA and TensorRT come with pip.
FROM python:3.11-slim

RUN apt-get update \
 && apt-get install --yes --no-install-recommends make git \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /jexport
COPY requirements.lock pyproject.toml Makefile README.md ./
COPY jexport jexport
COPY recipes recipes
COPY calibration_data calibration_data
# onnxruntime and onnxruntime-gpu are one package folder: the one for CPUs goes first.
RUN make setup \
 && .venv/bin/pip install --no-cache-dir "tensorrt-cu13==11.4.0.106" \
 && .venv/bin/pip uninstall --yes onnxruntime \
 && .venv/bin/pip install --no-cache-dir --no-deps "onnxruntime-gpu==1.30.0"
COPY benchmarks benchmarks
COPY tests tests
ENV GPU_PYTHON=.venv/bin/python
# What nvidia-container-toolkit passes through: the driver's compute part.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["make", "test-gpu"]
