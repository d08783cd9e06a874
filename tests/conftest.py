"""What all tests share: eight CPU devices, quick compilation, the lowerings, x64."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile

from tests.support.compiling import environment

# Before jax is imported anywhere. The first process of a run makes the folder; xdist's workers find it in the variable.
_PROGRAMS = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="depthwise_jax-programs-")
os.environ.update(environment(_PROGRAMS or os.environ["JAX_COMPILATION_CACHE_DIR"]))
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ.setdefault("KERAS_BACKEND", "jax")

import functools
from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir

from tests.support.cases import LOWERINGS, PLAIN

# Compiling takes the time, so no deadline; the same examples at every run, so that others see the same failures.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("repository")

# One MLIR context for all programs of a process: JAX makes one for each, which is most of the time to lower a small
# program.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def pytest_collection_finish() -> None:
    """Keeps Python's collector away from what is there by now: modules, which are most objects, and the tests."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Removes the compiled programs that this process made the folder for."""
    if _PROGRAMS is not None:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Frees the programs of a module's tests, which would fill the memory together."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", params=LOWERINGS)
def implementation(request: pytest.FixtureRequest) -> str:
    """A lowering by its name: a test that takes it runs over all of them."""
    return request.param


@pytest.fixture(scope="session", params=PLAIN)
def plain(request: pytest.FixtureRequest) -> str:
    """A lowering in plain XLA by its name, for tests of what compiled kernels refuse."""
    return request.param


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types while the test runs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch. `make test` goes without it, and `make test-torch`, which CI runs, fails where it is missing."""
    return pytest.importorskip("torch", reason="PyTorch is not installed: the extra `torch` brings it")
