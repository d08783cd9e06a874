"""The compiled library as it is found, or the reason why not, for each way to install the package or not to.

Each test runs in a virtual environment of its own, which sees what the package requires but not the package. The builds
take the library that is already compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import depthwise_jax
from depthwise_jax.lowering import library
from tests.support.compiling import QUICK_FLAGS

ROOT = Path(__file__).parents[1]
LIBRARY = library.find()
VERSION = depthwise_jax.__version__
pytestmark = pytest.mark.skipif(not isinstance(LIBRARY, Path), reason=str(LIBRARY))

# Packages the library that lies beside it, and compiles nothing.
CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.18)
project(packaged LANGUAGES NONE)
install(FILES libdepthwise_jax.so DESTINATION depthwise_jax/lowering)
"""
PROGRAM = """
import jax.numpy as jnp
from depthwise_jax import __main__, depthwise_conv, explain
from depthwise_jax.lowering import native
x, kernel = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 1))
assert (depthwise_conv(x, kernel) == 9).all()
status, forward = native.status(), explain(x, kernel, platform="cpu").forward
if status.instruction_set is None:
    assert __main__.compiled_kernels() == f"none ({status.reason})"
    assert f"not native: {status.reason}" in forward.reason, forward
else:
    assert status.reason == "" and __main__.compiled_kernels() == status.instruction_set
    assert forward.lowering == "native", forward
print(status.reason or "found")
"""


class Environment:
    """A virtual environment."""

    def __init__(self, path: Path, requirements: Path) -> None:
        venv.create(path, symlinks=True)
        self.python = path / "bin" / "python"
        (self.packages,) = path.glob("lib/python*/site-packages")
        (self.packages / "requirements.pth").write_text(f"{requirements}\n")

    @property
    def library(self) -> Path:
        """Where the library is installed."""
        return self.packages / "depthwise_jax" / "lowering" / "libdepthwise_jax.so"

    def install(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "install"]
        _run([*command, "--no-deps", "--no-build-isolation", *arguments], cwd=ROOT)

    def reason(self, folder: Path, **environment: str) -> str:
        """What the package gives as the reason in a process that is started in a folder, or "found"."""
        return _run([self.python, "-c", PROGRAM], cwd=folder, **environment).splitlines()[-1]


def _run(command: list[object], cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        env={**inherited, "XLA_FLAGS": QUICK_FLAGS, "DEPTHWISE_JAX_ISA": "", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def requirements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all installed packages but this one."""
    folder = tmp_path_factory.mktemp("requirements")
    for entry in filter(lambda entry: Path(entry).name in ("site-packages", "dist-packages"), sys.path):
        for path in Path(entry).iterdir():
            if "depthwise_jax" not in path.name and path.suffix != ".pth" and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, without a library."""
    folder = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "depthwise_jax", folder / "depthwise_jax", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """pip's arguments for a build that packages the compiled library."""
    folder = tmp_path_factory.mktemp("packaged")
    (folder / "CMakeLists.txt").write_text(CMAKE_LISTS)
    shutil.copy(LIBRARY, folder)
    return f"--config-settings=cmake.source-dir={folder}", f"--config-settings=build-dir={folder}/build"


@pytest.fixture(scope="module")
def installed(
    tmp_path_factory: pytest.TempPathFactory, requirements: Path, clone: Path, packaged: tuple[str, ...]
) -> Environment:
    """An environment in which the package is installed as README says."""
    environment = Environment(tmp_path_factory.mktemp("installed"), requirements)
    environment.install(*packaged, clone)
    return environment


def test_installed_and_run_elsewhere(installed: Environment, tmp_path: Path) -> None:
    assert installed.reason(tmp_path) == "found"


def test_installed_and_run_in_the_clone(installed: Environment, clone: Path) -> None:
    assert installed.reason(clone) == "found"


def test_turned_off(installed: Environment, clone: Path) -> None:
    assert installed.reason(clone, DEPTHWISE_JAX_ISA="none") == "turned off by DEPTHWISE_JAX_ISA=none"


def test_another_version_is_installed_than_is_imported(installed: Environment, clone: Path, tmp_path: Path) -> None:
    newer = shutil.copytree(clone, tmp_path / "newer")
    module = newer / "depthwise_jax" / "version.py"
    module.write_text(module.read_text().replace(f'__version__ = "{VERSION}"', '__version__ = "99.0"'))
    reason = (
        f"depthwise_jax 99.0 is imported from {newer}/depthwise_jax, but version {VERSION} is installed: install it"
    )
    assert reason in installed.reason(newer)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("another ABI", "belongs to another version of depthwise_jax, install it again: .*depthwise_jax_input_grad_v"),
        ("half", "could not be used, install depthwise_jax again: it has {half} bytes of {whole}$"),
        ("no library", "could not be used, install depthwise_jax again: "),
        ("empty", "could not be used, install depthwise_jax again: "),
        ("gone", "was installed but is gone: install depthwise_jax again$"),
    ],
)
def test_a_library_that_cannot_be_used(installed: Environment, clone: Path, what: str, reason: str) -> None:
    whole = installed.library.read_bytes()
    half = len(whole) // 2
    contents = {
        "another ABI": whole.replace(b"depthwise_jax_input_grad_v", b"depthwise_jax_input_grad_w"),
        "half": whole[:half],
        "no library": b"no library",
        "empty": b"",
    }
    installed.library.unlink()
    try:
        if what in contents:
            installed.library.write_bytes(contents[what])
        told = installed.reason(clone)
    finally:
        installed.library.write_bytes(whole)
    assert told.startswith(f"{installed.library.resolve()} "), told
    assert re.search(reason.format(half=half, whole=len(whole)), told), told


def test_editable(tmp_path: Path, requirements: Path, clone: Path, packaged: tuple[str, ...]) -> None:
    environment = Environment(tmp_path / "environment", requirements)
    environment.install(*packaged, "--editable", clone)
    assert not (environment.library.parent / "native.py").exists()
    assert environment.reason(tmp_path) == "found"


def test_a_wheel_without_library(tmp_path: Path, requirements: Path, clone: Path) -> None:
    environment = Environment(tmp_path / "environment", requirements)
    environment.install("--config-settings=wheel.cmake=false", clone)
    reason = f"depthwise_jax {VERSION} is imported from {{}}/depthwise_jax, and was installed without its library"
    assert reason.format(environment.packages) in environment.reason(tmp_path)
    assert reason.format(clone) in environment.reason(clone)


def test_never_installed(tmp_path: Path, requirements: Path, clone: Path) -> None:
    environment = Environment(tmp_path / "environment", requirements)
    reason = (
        f"depthwise_jax {VERSION} is imported from {clone}/depthwise_jax, which has no library and was not installed"
    )
    assert reason in environment.reason(clone)
    assert reason in environment.reason(tmp_path, PYTHONPATH=str(clone))
