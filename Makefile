# Each target makes the virtual environment it needs; `make demo` and `make test` run from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARGS ?=

.PHONY: demo test test-torch lint format clean

demo: $(VENV)/demo.installed
	$(BIN)/python notebooks/demo.py

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

# The conversion of PyTorch's own modules; plain `make test` needs no PyTorch and passes these over.
test-torch: $(VENV)/test.installed $(VENV)/torch.installed
	$(BIN)/python -c "import torch"  # those tests pass it over where it is missing; here it must be there
	$(BIN)/python -m pytest -q tests/test_interop_torch.py

lint: $(VENV)/test.installed $(VENV)/demo.installed $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/lint.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/%.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) demo.png
