# `make demo` and `make test` are all a new clone needs: each makes .venv and installs what it uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

# Two test processes with a thread each keep two cores busy; more threads only fight over them.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-slow check bench gpu clean

demo: $(VENV)/.core
	$(BIN)/lorica demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About 50 minutes on two cores that do nothing else; what docs/results/speed holds already is not measured again.
bench: export OMP_NUM_THREADS = 2
bench: $(VENV)/.dev
	$(BIN)/python scripts/leakage_table.py
	$(BIN)/python benchmarks/arithmetic.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/tasks.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/peak_memory.py
	$(BIN)/python scripts/speed_page.py

# The machine's own Python: its torch is the one with CUDA. Nothing is installed.
gpu:
	$(PYTHON) benchmarks/gpu/suite.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lorica needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; a minute or two)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; a minute or two)"
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV) lorica-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
