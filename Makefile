# make bench       measure every precision that can run here
# make bench-gpu   measure the decode modes against their targets for an H100
# make test        linters, type checks and all tests
# make test-fast   the tests that need neither minutes nor a GPU
# make golden      rewrite golden texts after a change of wording
# make coverage    all tests, and how much of the parent they cover: at least 92 %
# make bundle      collect what a GPU machine without a network lacks, in one small folder

VENV := .venv
BIN  := $(VENV)/bin

# The first Python that is new enough. Each is run, since a version manager has shims even for missing ones.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$python; break; }; done)

# Without an NVIDIA GPU, torch's CPU build: a quarter of the download. If that index is unreachable, pip
# continues after one retry with its configured indexes.
TORCH ?= torch==2.13.0
HAS_GPU := $(wildcard /dev/nvidiactl /proc/driver/nvidia /usr/lib/wsl/lib/libcuda.so.1)
TORCH_INDEX := $(if $(HAS_GPU),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15)

# Tests run in parallel, and torch's threads keep a core busy while they wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: bench bench-gpu test test-fast golden coverage lint bundle clean

bench: $(VENV)/.with-all
	$(BIN)/qbench-orchestrate --all

bench-gpu: $(VENV)/.with-all
	PYTHONPATH=. $(BIN)/python benchmarks/bench_gpu.py bench-gpu

test: lint
	$(ONE_THREAD) $(BIN)/pytest --numprocesses 2 --dist loadfile

test-fast: $(VENV)/.with-all,dev
	$(ONE_THREAD) $(BIN)/pytest -m "not slow and not gpu" --numprocesses 2

coverage: $(VENV)/.with-all,dev
	$(ONE_THREAD) $(BIN)/pytest --numprocesses 2 --dist loadfile --cov

golden: $(VENV)/.with-all,dev
	$(ONE_THREAD) $(BIN)/pytest --renew --numprocesses 2 --dist loadfile

lint: $(VENV)/.with-all,dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bundle: $(VENV)/.with-all
	rm -rf .bundle
	$(BIN)/python -m orchestrator.precisions.bundle .bundle

clean:
	rm -rf $(VENV) .bundle dist .mypy_cache .pytest_cache .ruff_cache

# Stamps, so that each step is done once: torch first, then the project with the extras in the stamp's name.
$(VENV)/.torch:
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' 2>/dev/null || \
		{ echo "qbench needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)' $(TORCH_INDEX)
	@touch $@

$(VENV)/.with-%: $(VENV)/.torch pyproject.toml hatch_build.py
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@
