# A machine with an NVIDIA GPU runs the GPU tests in here:
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
RUN make setup \
 && .venv/bin/pip install --no-cache-dir "tensorrt-cu13==11.4.0.106"
COPY tests tests
# What nvidia-container-toolkit passes through: the driver's compute part.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["make", "test-gpu"]
