# make demo: from nothing to triggered images flagged on a real Triton.  make test: lint, types, all tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.installed

.PHONY: demo test lint matrix gpu-check check-python clean

demo: $(READY)
	$(BIN)/diffense demo

test: lint
	$(BIN)/pytest -q

matrix: $(READY)
	$(BIN)/python -m benchmarks.matrix
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.plots

# On a machine with an NVIDIA GPU: what could not be run without one, as benchmarks/results/gpu.json and gpu.md.
gpu-check: $(READY)
	$(BIN)/python -m benchmarks.gpu_check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt | check-python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Diffense needs Python 3.11 or 3.12, $(PYTHON) is another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }

clean:
	rm -rf $(VENV) runs dist build
