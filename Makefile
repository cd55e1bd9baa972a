# `make train` and `make test` set everything up on first use.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

.PHONY: train test lint clean

train: $(VENV)/.installed-train
	$(BIN)/python train/run.py $(ARGS)

# Triton kernels run interpreted, in a process of their own: what `@triton.jit` makes is decided at import.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/kernels

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "esl_fast needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": choose another with `make PYTHON=...`")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
