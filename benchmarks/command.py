"""Runs a benchmark as a command: common options; then it measures or reads, writes, prints and judges the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.report import Verdict, judge
from workloads import results
from workloads.layers import NETWORKS
from workloads.workload import Workload

Results = dict[str, Any]


def add_results_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `run` reads."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--read", type=Path, help="results to print instead of measuring")
    parser.add_argument("--check", action="store_true", help="judge by the thresholds; exits 1 if one fails")


def run(
    module: str,
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace], tuple[Results, list[str]]],
    report: Callable[[Results], None],
    verdicts: Callable[[Results], Sequence[Verdict]],
) -> None:
    """Measures or reads results, writes and prints them, and ends the process: with 1 if a value or a verdict is wrong.

    Args:
        module: the benchmark's, as in `python -m module`.
        arguments: with the options above, and perhaps `isa` for environment.enter.
        measure: returns the results, and which values were wrong.
        report: prints the results.
        verdicts: judges them.
    """
    wrong: list[str] = []
    if arguments.read:
        found = results.read(arguments.read)
    else:
        environment.enter(module, arguments.threads, getattr(arguments, "isa", None))
        found, wrong = measure(arguments)
        if arguments.json:
            results.write(found, arguments.json)
    report(found)
    passed = judge(verdicts(found)) if arguments.check else True
    sys.exit(0 if passed and not wrong else 1)


def names(text: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    """The comma-separated names of an option.

    Raises:
        SystemExit: a name is unknown.
    """
    given = tuple(text.split(","))
    for name in given:
        if name not in known:
            raise SystemExit(f"--{option} must name some of {', '.join(known)}; got {name!r}")
    return given


def add_layers_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `layers` reads."""
    parser.add_argument("--layers", default="", help="comma-separated; layers whose name contains one of these")


def layers(arguments: argparse.Namespace) -> list[Workload]:
    """The layers whose name contains one of the parts in --layers.

    Raises:
        SystemExit: no layer matches.
    """
    found = [layer for layer in NETWORKS if any(part in layer.name for part in arguments.layers.split(","))]
    if not found:
        raise SystemExit(f"--layers must match layers of workloads/layers.py; got {arguments.layers!r}")
    return found
