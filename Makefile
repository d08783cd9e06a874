# Each target makes the virtual environment it needs; `make demo` and `make test` run from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARGS ?=
ITERATIONS ?= 5000
SEED ?= 1

.PHONY: demo test test-torch test-tpu tpu-floor notebooks test-notebooks lint format docs sanitize sanitize-address sanitize-thread clean

demo: $(VENV)/demo.installed
	$(BIN)/python notebooks/demo.py

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

# The conversion of PyTorch's own modules; plain `make test` needs no PyTorch and passes these over.
test-torch: $(VENV)/test.installed $(VENV)/torch.installed
	$(BIN)/python -c "import torch"  # those tests pass it over where it is missing; here it must be there
	$(BIN)/python -m pytest -q tests/test_interop_torch.py tests/test_comparison.py

# Executes notebooks/*.py in new kernels and writes the .ipynb beside them; ARGS may name some, such as 01_quickstart.
notebooks: $(VENV)/notebooks.installed
	$(BIN)/python notebooks/execute.py --write $(ARGS)

# The same without writing: fails if a cell fails.
test-notebooks: $(VENV)/notebooks.installed
	$(BIN)/python notebooks/execute.py $(ARGS)

# What the TPU compiler makes of the package, without a TPU; libtpu has a virtual environment of its own.
test-tpu: $(VENV)-tpu/installed
	$(VENV)-tpu/bin/python -m pytest -q $(ARGS) tests_tpu

# Cycles by the TPU compiler's schedules, without a TPU, into benchmarks/results/tpu_floor.md; ARGS may choose, such as
# "--groups training". Compiles what the results do not have yet, for hours if that is everything.
tpu-floor: $(VENV)-tpu/installed
	$(VENV)-tpu/bin/python -m benchmarks.tpu_floor $(ARGS)

$(VENV)-tpu/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,tpu]'
	touch $@

lint: $(VENV)/test.installed $(VENV)/notebooks.installed $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/lint.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The API reference into site/, warnings as errors; it needs no network.
docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The compiled kernels under sanitizers: random convolutions, on every instruction set that this machine has.
sanitize: sanitize-address sanitize-thread

sanitize-address: SANITIZERS = address,undefined
sanitize-thread: SANITIZERS = thread
sanitize-address sanitize-thread:
	cmake -S depthwise_jax/lowering/csrc -B build/$@ -DDEPTHWISE_HARNESS=ON -DDEPTHWISE_SANITIZE=$(SANITIZERS)
	cmake --build build/$@ --parallel $(JOBS)
	set -e; for isa in avx512 avx2 baseline neon; do DEPTHWISE_JAX_ISA=$$isa build/$@/harness $(ITERATIONS) $(SEED); done

$(VENV)/%.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VENV)-tpu build site demo.png
