"""The benchmarks as commands: they run, and read and judge what was measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from workloads import results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def run(module: str, *arguments: object) -> str:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("module", "name", "checks"), [("peers", "cpu", 8), ("training", "training", 2)])
def test_kept_results_are_read_and_pass(module: str, name: str, checks: int) -> None:
    printed = run(module, "--read", RESULTS / f"{name}.json", "--check")
    *_, verdicts = printed.strip().split("\n\n")
    header, _, *lines = verdicts.splitlines()
    assert header == "| check | measured | layers | |"
    assert len(lines) == checks
    assert all(line.endswith("| PASS |") for line in lines), verdicts


def test_timed_in_turn() -> None:
    # Without a limit on the seconds: as many rounds as were asked for.
    printed = run("projection_cost", "--rounds", 1)
    assert "constrained in 17 kernels" in printed
    assert len(re.findall(r"adam \d+\.\d+ ms, projected \d+\.\d+ ms", printed)) == 2


def test_a_row_a_line(tmp_path: Path) -> None:
    written = tmp_path / "new" / "cpu.json"
    kept = RESULTS / "cpu.json"
    results.write(results.read(kept), written)
    assert written.read_text() == kept.read_text()
