"""Every figure of speed in README and docs is one that a command of the repository prints, or that its table holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from workloads import results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
SPEED = README[README.index("## Speed") : README.index("## Comparison")]


@pytest.fixture(scope="module")
def printed() -> str:
    """What the check of the CPU's results prints."""
    command = [sys.executable, "-m", "benchmarks.peers", "--read", str(RESULTS / "cpu.json"), "--check"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("row", "direction"), [("forward", "forward"), ("gradient of the input", "dx"), ("gradient of the kernel", "dw")]
)
def test_the_readme_s_times_on_cpu(row: str, direction: str, printed: str) -> None:
    cells = re.search(rf"^\| {row} \| (.*) \| (.*) \|$", SPEED, re.MULTILINE)
    assert cells is not None
    for cell, mode in zip(cells.groups(), ("single", "chain"), strict=True):
        pattern = rf"^{direction}, {mode}: ours / torch_channels_last: geometric mean ([\d.]+), worst ([\d.]+)"
        measured = re.search(pattern, printed, re.MULTILINE)
        assert measured is not None
        mean, worst = (float(value) for value in measured.groups())
        found = [float(value) for value in re.findall(r"[\d.]+", cell)]
        assert found == pytest.approx([mean, worst], abs=0.0051), (row, mode)


def test_the_readme_s_times_of_lax(printed: str) -> None:
    mean, worst = (int(value) for value in re.findall(r"1/(\d+)", SPEED))
    measured = re.search(r"against lax \| ([\d.]+)x \(at least 40x\), worst ([\d.]+)x", printed)
    assert measured is not None
    assert (mean, worst) == tuple(int(float(value)) for value in measured.groups())
    layers = re.search(r"(\d+) layers of known networks", SPEED)
    assert layers is not None
    assert f"| {layers[1]} of {layers[1]} | PASS |" in printed


def cycles(case: str, direction: str, dtype: str = "bfloat16") -> dict[str, str]:
    """A row of the TPU's table, by its columns."""
    text = (RESULTS / "tpu_floor.md").read_text()
    for section in text.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        if not lines:
            continue
        columns = [cell.strip() for cell in lines[0].strip("|").split("|")]
        for line in lines[2:]:
            row = dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
            if (row.get("case"), row.get("direction"), row.get("dtype")) == (case, direction, dtype):
                return row
    raise AssertionError(f"no row of {case}, {direction}, {dtype}")


def test_the_readme_s_cycles_on_tpu() -> None:
    found = re.search(r"takes (\d+)\s+thousand cycles .*?takes\s+(\d+), (\d+) and (\d+)\.", SPEED, re.DOTALL)
    assert found is not None
    ours, *theirs = (int(value) for value in found.groups())
    rows = [cycles("1D k4 8x2048x2048", direction) for direction in ("forward", "dx", "dw")]
    assert {round(float(row["ours"])) for row in rows} == {ours}
    assert [round(float(row["flax"])) for row in rows] == theirs
    assert {row["ours / floor"] for row in rows} == {"1.00"}


def test_the_figures_of_the_page_on_tpu() -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    section = page[page.index("## TPU") : page.index("## GPU")].replace(",", "")
    table = (RESULTS / "tpu_floor.md").read_text().replace(",", "")
    known = {float(value) for value in re.findall(r"\d+\.\d+", table)}
    figures = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", section)
    assert len(figures) > 10
    for figure in figures:
        decimals = len(figure.split(".")[1])
        assert any(round(value, decimals) == float(figure) for value in known), figure


def test_the_figures_of_the_page_on_gpu() -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    section = page[page.index("## GPU") : page.index("## What costs time")]
    table = {float(value) for value in re.findall(r"\d+\.\d", (RESULTS / "gpu_compiler.md").read_text())}
    figures = re.findall(r"(\d+) MB|(\d+) MB instead of (\d+)", section)
    assert figures
    for figure in filter(None, (figure for group in figures for figure in group)):
        assert any(abs(value - int(figure)) <= 0.5 for value in table), figure


def test_the_figures_of_the_page_on_sequences() -> None:
    rows = {(row["what"], row["by"]): row["milliseconds"] for row in results.read(RESULTS / "sequences.json")["rows"]}
    page = (ROOT / "docs" / "sequences.md").read_text()
    section = page[page.index("## What packing costs") : page.index("## Initial values")]
    found = [float(value) for value in re.findall(r"(\d+\.\d+)\s+times", section)]
    measured = [
        results.ratio(rows[what, by], rows[what, beside])
        for what, by, beside in (
            ("training", "packed", "unpacked"),
            ("training", "masked shifts", "unpacked"),
            ("decoding", "causal_conv1d", "valid"),
        )
    ]
    assert found == pytest.approx(measured, abs=0.0051)
