"""What all tests share: eight CPU devices, quick compilation, the lowerings, x64."""

from __future__ import annotations

import os
import shutil
import tempfile

from tests.support.compiling import compile_quickly

# Before jax is imported anywhere. The first process of a run makes the folder; xdist's workers find it in the variable.
_CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="depthwise_jax-programs-")
compile_quickly(devices=8, cache=_CACHE)
os.environ.setdefault("KERAS_BACKEND", "jax")

from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import pytest

from tests.support.cases import LOWERINGS, PLAIN

# Compiling takes the time, so no deadline; the same examples at every run, so that others see the same failures.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("repository")


def pytest_unconfigure() -> None:
    """Removes the compiled programs that this process made the folder for."""
    if _CACHE is not None:
        shutil.rmtree(_CACHE, ignore_errors=True)


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
