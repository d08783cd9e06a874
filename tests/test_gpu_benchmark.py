"""benchmarks/gpu.py starts, is right, and goes on where it stopped: on its small scale, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", str(results), *options]
    # One device, as a machine with one GPU has; the other tests ask for eight.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_layer_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    options = ("--piece", "table", "--scale", "small", "--only", "k3 d2 m2 | dw | bfloat16")
    stopped = run(path, *options, "--minutes", "0")
    assert stopped.returncode == 0, stopped.stderr
    assert "left for another call" in stopped.stdout
    assert not json.loads(path.read_text())["rows"] if path.exists() else True
    first = run(path, *options)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.rstrip().endswith("done")
    rows = json.loads(path.read_text())["rows"]
    assert {"ours", "taps", "lax"} <= {row["by"] for row in rows}
    for row in rows:
        assert row["right"], row
        assert row["clock"] == "wall", row
        assert row["us"] > 0, row
    again = run(path, *options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(path.read_text())["rows"] == rows
    read = run(path, "--read", str(path))
    assert "k3 d2 m2 | dw | bfloat16" in read.stdout


def test_a_network_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    trained = run(path, "--piece", "training", "--scale", "small", "--only", "ConvNeXt-T | float32")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {"ours", "flax"} <= {row["by"] for row in rows}
    assert all("failed" not in row and len(row["losses"]) == 3 for row in rows)


@pytest.mark.parametrize(("options", "words"), [(("--piece", "table"), "needs a GPU"), ((), "--piece or --read")])
def test_what_cannot_run_says_why(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    refused = run(tmp_path / "gpu.json", *options)
    assert refused.returncode != 0
    assert words in refused.stderr
