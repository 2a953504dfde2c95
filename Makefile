# `make demo` and `make test` are all a new clone needs: each makes .venv and installs what it uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
AUDIT := $(VENV)-audit

# Two test processes with a thread each keep two cores busy; more threads only fight over them.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-slow scorecard check lock locked audit bench gpu clean

demo: $(VENV)/.core
	$(BIN)/lorica demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

# The rows of docs/reliability.md, each with how its tests ended.
scorecard: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "reliability and not gpu"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# requirements.lock: every package of the tests with its hash, for Linux, Python 3.11 and a CPU.
lock: $(VENV)/.dev
	$(BIN)/python scripts/lock.py

# Installs from the lock alone; a file of another hash is refused.
locked: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(VENV)/.core $(VENV)/.dev

# What is known against the packages of the lock, and their bill of materials, sbom.json. Needs the network.
audit:
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet 'pip-audit>=2.9,<3'; } \
	  || { echo "make audit: pip-audit could not be installed into $(AUDIT), which takes the network" >&2; exit 2; }
	@$(PYTHON) scripts/audit.py $(AUDIT)/bin/pip-audit

# About 100 minutes on two cores that do nothing else; what docs/results/speed holds already is not measured again.
bench: export OMP_NUM_THREADS = 2
bench: $(VENV)/.dev
	$(BIN)/python scripts/leakage_table.py
	$(BIN)/python benchmarks/arithmetic.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/tasks.py
	$(BIN)/python scripts/split_time.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/peak_memory.py
	$(BIN)/python benchmarks/source_time.py
	$(BIN)/python benchmarks/calibration_time.py
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
	rm -rf $(VENV) $(AUDIT) lorica-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
