# Two commands do everything: `make train` and `make test`. Both make .venv and install first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-backends check faults conformance harness install

train: .venv/installed
	$(BIN)/cllm-spheres train --preset small --steps 1500
	$(BIN)/cllm-spheres generate --prompt "def " --tokens 150

test: .venv/installed-dev
	$(BIN)/python -m pytest

# All tests once for each lesser CPU that this one can be taken for, such as one that has AVX2 and no AVX-512.
test-backends: .venv/installed-dev
	for level in $$($(BIN)/python -m cllm_spheres.crystal.cpu | head -n -1); do \
		echo "CLLM_SPHERES_CPU=$$level" && CLLM_SPHERES_CPU=$$level $(BIN)/python -m pytest || exit 1; done

# The measures of docs/operations.md in full: about 50 minutes on two cores. `make test` has a short form of each.
faults: .venv/installed-dev
	CLLM_FAULTS=whole $(BIN)/python -m pytest -s --timeout 7200 tests/faults tests/checkpoint tests/training/test_start.py
	$(BIN)/cllm-spheres bench faults --kills 200
	$(BIN)/cllm-spheres bench faults --minutes 30 --workers 7 --preset tiny

# Export and import against transformers and llama.cpp, with the golden files of the tests made anew. Two minutes, and
# a virtual environment of its own for what nothing else needs.
conformance: .venv-conformance/installed
	.venv-conformance/bin/python -m cllm_spheres_bench.conformance --llama .venv-conformance/llama --golden tests/golden

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" --timeout 120

# What lm-evaluation-harness says of a run behind our server: make harness RUN=runs/NAME. It takes about 1 GB of disk.
harness: .venv/installed .venv-harness/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[web]'
	$(BIN)/python -m cllm_spheres_bench.harness $(RUN) --python .venv-harness/bin/python

.venv-harness/installed:
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/python -m pip install --quiet --disable-pip-version-check 'lm-eval[api]==0.4.13' 'transformers>=5,<6'
	@touch $@

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'cllm-spheres needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv-conformance/installed: pyproject.toml
	$(PYTHON) -m venv .venv-conformance
	.venv-conformance/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[conformance]'
	mkdir -p .venv-conformance/llama
	cd .venv-conformance/llama && tar xzf "$$(npm pack --silent @node-llama-cpp/linux-x64@3.22.0)"
	@touch $@
