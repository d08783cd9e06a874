"""Draws the chart of the results of benchmarks.peers (workloads/chart.py).

    python -m benchmarks.plot benchmarks/results/cpu.json                 # writes benchmarks/results/cpu.svg
    python -m benchmarks.plot benchmarks/results/cpu.json --output a.png --mode single
    python -m benchmarks.plot benchmarks/results/cpu.json --brief --mode single --output docs/speed.svg

A chart of one mode's rows: single calls, or calls in chains.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib

from workloads import results
from workloads.chart import draw


def brief(data: dict[str, Any]) -> dict[str, Any]:
    """The results of the first layer of each network, without the fused activation, for three contestants."""
    networks: dict[str, str] = {}
    for row in data["rows"]:
        networks.setdefault(re.split(r"-\d+x", row["layer"])[0], row["layer"])
    rows = [row for row in data["rows"] if row["layer"] in networks.values() and row["direction"] != "bias_relu"]
    names = ("ours", "torch_channels_last", "lax")
    return data | {"rows": [row | {"ms": {n: ms for n, ms in row["ms"].items() if n in names}} for row in rows]}


def main() -> None:
    """Reads, draws, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, help="an .svg or .png file; the results' name with .svg if not given")
    parser.add_argument("--mode", choices=("single", "chain"), default="chain")
    parser.add_argument("--brief", action="store_true", help="one layer of each network, against PyTorch and lax")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    output = arguments.output or arguments.results.with_suffix(".svg")
    # Without a date and random ids the same results give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "depthwise_jax"
    data = results.read(arguments.results)
    figure = draw(brief(data) if arguments.brief else data, arguments.mode)
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)
    print(output)


if __name__ == "__main__":
    main()
