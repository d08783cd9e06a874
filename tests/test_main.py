"""`python -m depthwise_jax`: what it prints, and that it finds a lowering that is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import depthwise_jax
from depthwise_jax import __main__ as command
from depthwise_jax import lowering
from tests.support.compiling import QUICK_FLAGS

ROOT = Path(__file__).resolve().parent.parent


def test_prints_what_is_there_and_exits_with_0() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "depthwise_jax"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"python {sys.version.split()[0]}" in done.stdout
    for package in ("jax", "jaxlib", "flax", "optax"):
        assert re.search(rf"\b{package} {re.escape(version(package))}(,|$)", done.stdout, re.MULTILINE)
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
