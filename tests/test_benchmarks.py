"""The benchmarks as commands: they run, and read and judge what was measured."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.support.compiling import QUICK_FLAGS
from workloads import results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def run(module: str, *arguments: object, fails: bool = False) -> str:
    """What a benchmark prints, of errors if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": QUICK_FLAGS},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def main(module: str, *arguments: object) -> None:
    """Runs a benchmark that leaves no setting behind, in this process."""
    with mock.patch.object(sys, "argv", [module, *map(str, arguments)]):
        importlib.import_module(f"benchmarks.{module}").main()


@pytest.mark.parametrize(("module", "name", "checks"), [("peers", "cpu", 8), ("training", "training", 2)])
def test_kept_results_are_read_and_pass(
    module: str, name: str, checks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(module, "--read", RESULTS / f"{name}.json", "--check")
    *_, verdicts = capsys.readouterr().out.strip().split("\n\n")
    header, _, *lines = verdicts.splitlines()
    assert header == "| check | measured | layers | |"
    assert len(lines) == checks
    assert all(line.endswith("| PASS |") for line in lines), verdicts


def test_timed_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    # Without a limit on the seconds: as many rounds as were asked for.
    main("projection_cost", "--rounds", 1)
    printed = capsys.readouterr().out
    assert "constrained in 17 kernels" in printed
    assert len(re.findall(r"adam \d+\.\d+ ms, projected \d+\.\d+ ms", printed)) == 2


def test_a_row_a_line(tmp_path: Path) -> None:
    written = tmp_path / "new" / "cpu.json"
    kept = RESULTS / "cpu.json"
    results.write(results.read(kept), written)
    assert written.read_text() == kept.read_text()


# The benchmark for a GPU, on its small scale, which needs none.


def test_a_layer_on_a_gpu_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    options = ("--piece", "table", "--scale", "small", "--only", "k3 d2 m2 | dw | bfloat16", "--json", path)
    assert "left for another call" in run("gpu", *options, "--minutes", 0)
    assert not path.exists()
    assert run("gpu", *options).rstrip().endswith("done")
    rows = results.read(path)["rows"]
    assert {"ours", "taps", "lax"} <= {row["by"] for row in rows}
    for row in rows:
        assert row["right"], row
        assert row["clock"] == "wall", row
        assert row["us"] > 0, row
    run("gpu", *options)
    assert results.read(path)["rows"] == rows
    main("gpu", "--read", path)
    assert "| k3 d2 m2 | dw | bfloat16 |" in capsys.readouterr().out


def test_a_network_on_a_gpu_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    run("gpu", "--piece", "training", "--scale", "small", "--only", "ConvNeXt-T | float32", "--json", path)
    rows = results.read(path)["rows"]
    assert {"ours", "flax"} <= {row["by"] for row in rows}
    assert all(len(row["losses"]) == 3 for row in rows)


def test_it_needs_a_gpu() -> None:
    assert "needs a GPU" in run("gpu", "--piece", "table", fails=True)


def test_it_needs_a_piece(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main("gpu")
    assert "--piece or --read" in capsys.readouterr().err
