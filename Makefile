# Two commands do everything: `make train` and `make test`. Both make .venv and install first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check install

train: .venv/installed
	$(BIN)/cllm-spheres train --preset small --steps 1500
	$(BIN)/cllm-spheres generate --prompt "def " --tokens 150

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" --timeout 120

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'cllm-spheres needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
