# `make demo` and `make test` set everything up by themselves. VENV=DIR uses another virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.styleloom-ready

.PHONY: help setup demo test lint types clean

help:
	@echo "make demo    set up, then train a small StyleGAN2 on embedded pictures and show what it draws"
	@echo "make test    set up, then formatting, lint, types and all tests"
	@echo "make setup   a virtual environment in $(VENV) with styleloom, its demo pictures and its development tools"

setup: $(READY)

$(READY): setup.py pyproject.toml
	@echo "== Setting up $(VENV): torch and its CUDA libraries are about 6 GB, a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "styleloom needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	@touch $@

demo: setup
	@echo "== The demo: about ten minutes on two CPU cores"
	$(BIN)/styleloom demo --out runs/demo

# Pyright does not follow editable installs of mapped folders: this link gives it the installed names.
types: setup
	@mkdir -p build/types && ln -sfn ../.. build/types/styleloom
	@echo "== Types"
	$(BIN)/pyright --pythonpath $(BIN)/python

lint: setup
	@echo "== Format and lint"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

test: lint types
	@echo "== Tests"
	$(BIN)/python -m pytest

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
