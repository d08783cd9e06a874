"""`python -m depthwise_jax`: what it prints, and that it finds a lowering that is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import depthwise_jax
from depthwise_jax import __main__ as command
from depthwise_jax import lowering, version
from depthwise_jax.lowering import library, native
from tests.support.compiling import QUICK_FLAGS

ROOT = Path(__file__).resolve().parent.parent


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "depthwise_jax"],
        env={**os.environ, "XLA_FLAGS": QUICK_FLAGS, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_prints_what_is_there_and_exits_with_0() -> None:
    done = run(JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"python {sys.version.split()[0]}" in done.stdout
    for package in ("jax", "jaxlib", "flax", "optax"):
        assert re.search(rf"\b{package} {re.escape(metadata.version(package))}(,|$)", done.stdout, re.MULTILINE)
    assert f"depthwise_jax {depthwise_jax.__version__}," in done.stdout
    assert "devices: 1 cpu" in done.stdout
    assert re.search(r"^compiled kernels: \w+", done.stdout, re.MULTILINE)
    assert len(re.findall(r"\bforward\b.*: \w+: \w+", done.stdout)) == len(command.TIMED)
    for name in command.available():
        assert re.search(rf"^  {name}: (\d+) of \1 calls right", done.stdout, re.MULTILINE)
    rows = re.findall(r"(?:\d+\.\d\d ms +\d+\.\dx *){3}$", done.stdout, re.MULTILINE)
    assert len(rows) == len(command.TIMED)
    assert done.stdout.endswith("all values right\n")


@pytest.mark.parametrize("broken", lowering.MAPS)
def test_names_the_lowering_and_the_map_that_are_wrong(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(lowering.LOWERINGS["taps"], broken)
    # One part in ten thousand, in one place.
    monkeypatch.setattr(lowering.LOWERINGS["taps"], broken, lambda *args, **kwargs: _nudged(right(*args, **kwargs)))
    monkeypatch.setattr(command, "CHECKED", command.CHECKED[:1])
    assert command.main() == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    name = list(lowering.DIRECTIONS)[lowering.MAPS.index(broken)]
    assert len(failed) == 1
    assert failed[0].startswith(f"FAILED taps: {command.CHECKED[0]}: {name} is off by")
    assert "conv: 1 of 1 calls right" in printed


def test_a_lowering_that_raises_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(lowering.LOWERINGS["conv"], "forward", forward)
    monkeypatch.setattr(command, "CHECKED", command.CHECKED[:1])
    assert command.main() == 1
    assert (
        "FAILED conv: float32 x[2, 12, 11, 37] kernel[3, 3, 37, 1]: RuntimeError: no kernel" in capsys.readouterr().out
    )


@pytest.fixture
def unloaded() -> Iterator[None]:
    """The library is looked for again in the test, and after it."""
    native.status.cache_clear()
    yield
    native.status.cache_clear()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a library", r"none \({path} could not be used, install depthwise_jax again: .*\)"),
        (None, r"none \(.* there was no C\+\+ compiler .*`pip install --verbose` shows why\)"),
    ],
    ids=["broken library", "no compiler"],
)
def test_without_kernels_it_says_why_and_exits_with_0(
    content: bytes | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / library.NAME
    if content is None:
        # Installed without a library: the record of the installation has none, and neither has the folder.
        (tmp_path / "depthwise_jax.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: depthwise_jax\nVersion: {version.__version__}\n"
        (tmp_path / "depthwise_jax.dist-info" / "METADATA").write_text(text)
        (tmp_path / "depthwise_jax.dist-info" / "RECORD").write_text("depthwise_jax/__init__.py,,\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(lowering, "__path__", [str(tmp_path)])
    else:
        path.write_bytes(content)
        monkeypatch.setattr(library, "find", lambda: path)
    monkeypatch.delenv("DEPTHWISE_JAX_ISA", raising=False)
    monkeypatch.setattr(command, "CHECKED", command.CHECKED[:1])
    monkeypatch.setattr(command, "TIMED", {"small": command.Example((1, 8, 8, 4), (3, 3, 4, 1))})
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert re.search(f"^compiled kernels: {reason.format(path=re.escape(str(path)))}$", printed, re.MULTILINE), printed
    assert "forward, input_grad, kernel_grad: taps: " in printed
    assert printed.endswith("all values right\n")


def test_a_platform_that_jax_cannot_use_is_said_in_a_sentence() -> None:
    done = run(JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stdout + done.stderr
    sentence = (
        "devices: none that JAX can use; JAX_PLATFORMS=cuda allows none: unset it, or install JAX for that platform"
    )
    assert done.stdout.splitlines()[-1] == sentence
    assert "Traceback" not in done.stderr


def test_a_jax_that_is_too_old_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text('__version__ = "0.9.2"\n__version_info__ = (0, 9, 2)\n')
    done = run(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    sentence = (
        f"depthwise_jax {version.__version__} needs jax 0.10 or newer; got jax 0.9.2: run pip install --upgrade jax"
    )
    assert done.stderr.splitlines()[-1] == f"ImportError: {sentence}"


def test_the_oldest_jax_is_that_of_the_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"jax>={'.'.join(map(str, version.OLDEST_JAX))}" in project["dependencies"]


def test_a_wrong_value_in_the_benchmark_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    call = command.Example((1, 8, 8, 4), (3, 3, 4, 1))
    assert command.benchmark(call)[1] == []
    right = command.depthwise_conv
    monkeypatch.setattr(command, "depthwise_conv", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    _, wrong = command.benchmark(call)
    assert [message.split()[0] for message in wrong] == list(lowering.DIRECTIONS)


def _nudged(result: Any) -> Any:
    index = (0,) * result.ndim
    return result.at[index].add(1e-4 * jnp.max(jnp.abs(result)))
