# make help says what there is. Set-up happens by itself, once, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Any version from 2.11 on: make TORCH=torch==2.11.0 quickstart
TORCH ?= $(shell grep '^torch==' constraints.txt)
# Linux wheels of torch on PyPI carry CUDA (several GB). Without a GPU, name an index of CPU builds:
# make TORCH_INDEX=https://... quickstart
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help quickstart setup setup-dev test test-slow check format clean

help:  ## Show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: setup  ## Set up, train a small Mamba-2 on Jane Austen's novels, write a sample of text
	$(BIN)/python train.py

setup: $(VENV)/.installed  ## Create .venv with what training and generation need

setup-dev: $(VENV)/.installed-dev  ## Add what tests and checks need

test: setup-dev  ## Run every CPU test (GPU tests are skipped without a GPU)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup-dev  ## Run the slow tests too
	$(BIN)/python -m pytest -n 2 --dist loadfile --slow

check: setup-dev  ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup-dev  ## Put the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	@touch $@
