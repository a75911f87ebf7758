# Two commands do everything: `make train` and `make test`. Both make .venv and install first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BEGAN := $(shell date +%s)
# A part of the work: says what it does, and at its end how long it took. $(call part,what,command)
part = @printf '%s ...\n' "$(1)"; began=$$(date +%s); $(2) && echo "... done in $$(($$(date +%s) - began)) s."

.PHONY: train test test-bench test-backends check faults conformance harness install

# The kernels that write are compiled beside the training, on what it leaves of the cores; `generate` compiles the rest.
train: .venv/installed
	@echo "Training a small model on the source text of Python's standard library; the kernels are compiled meanwhile ..."
	@nice -n 19 $(BIN)/python -c "import cllm_spheres.inference.ops, cllm_spheres.inference.writer" 2>/dev/null & compiler=$$!; \
	trap 'kill $$compiler 2>/dev/null' EXIT INT TERM; \
	$(BIN)/cllm-spheres train --preset small --steps 1500 || exit; kill $$compiler 2>/dev/null; \
	echo "Writing with it:" && $(BIN)/cllm-spheres generate --prompt "def " --tokens 150 && \
	echo "All of it took $$(($$(date +%s) - $(BEGAN))) s. More text: $(BIN)/cllm-spheres generate --prompt 'class '"

# Two tests at a time. The kernels are compiled first, because both processes would compile all of them.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 25

test: .venv/installed-dev
	$(BIN)/python -m tests.compile
	$(PYTEST) -m "not bench"

# Small runs of the benchmarks, one at a time, because they measure.
test-bench: .venv/installed-dev
	$(BIN)/python -m pytest tests/bench

# All tests once for each lesser CPU that this one can be taken for, such as one that has AVX2 and no AVX-512.
test-backends: .venv/installed-dev
	levels=$$($(BIN)/python -m cllm_spheres.crystal.cpu) || exit 1; \
	for level in $$(echo "$$levels" | head -n -1); do \
		echo "CLLM_SPHERES_CPU=$$level" && export CLLM_SPHERES_CPU=$$level && \
		$(BIN)/python -m tests.compile && $(PYTEST) -m "not bench" || exit 1; done

# The measures of docs/operations.md in full: about 50 minutes on two cores. `make test` has a short form of each.
faults: .venv/installed-dev
	CLLM_FAULTS=whole $(BIN)/python -m pytest -s --timeout 7200 tests/faults tests/checkpoint tests/training/test_start.py \
		tests/training/test_score.py tests/training/test_signals.py tests/spheres/test_exactness.py tests/test_dtypes.py
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
	$(BIN)/python -m tests.compile
	$(PYTEST) -m "not slow and not bench" --timeout 120

# What lm-evaluation-harness says of a run behind our server: make harness RUN=runs/NAME. It takes about 1 GB of disk.
harness: .venv/installed .venv-harness/installed
	$(PIP) --no-build-isolation --editable '.[web]'
	$(BIN)/python -m cllm_spheres_bench.harness $(RUN) --python .venv-harness/bin/python

.venv-harness/installed:
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/python -m pip install --quiet --disable-pip-version-check 'lm-eval[api]==0.4.13' 'transformers>=5,<6'
	@touch $@

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'cllm-spheres needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	$(call part,Making a virtual environment in .venv,$(PYTHON) -m venv .venv)
	$(call part,Installing numpy and numba and what else is needed (about 110 MB),$(PIP) --no-compile 'setuptools>=77' && \
	    $(PIP) --no-compile --no-build-isolation --editable . && ($(BIN)/python -m compileall -qq -j 0 .venv/lib || true))
	@touch $@

.venv/installed-dev: .venv/installed
	$(call part,Installing the development tools,$(PIP) --no-build-isolation --editable '.[dev]')
	@touch $@

.venv-conformance/installed: pyproject.toml
	$(PYTHON) -m venv .venv-conformance
	.venv-conformance/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[conformance]'
	mkdir -p .venv-conformance/llama
	cd .venv-conformance/llama && tar xzf "$$(npm pack --silent @node-llama-cpp/linux-x64@3.22.0)"
	@touch $@
