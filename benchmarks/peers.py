"""Times depthwise convolutions of real layers against other libraries in one process.

    python -m benchmarks.peers                                    # everything that is installed; an hour or more
    python -m benchmarks.peers --layers mobilenet-v2 --peers ours,torch_channels_last,lax
    python -m benchmarks.peers --json benchmarks/results/cpu.json --check
    python -m benchmarks.peers --read benchmarks/results/cpu.json --check   # prints and checks, measures nothing

The layers are those of workloads/layers.py. Every result is compared with a float64 reference (benchmarks/work.py:
NumPy over the window's taps) before it is timed. Samples are taken in turn, one of each contestant per round; those
that are ten times slower than the fastest come after the others. A ratio is the median over rounds of the pairwise
ratio, ours / theirs, so less than 1 means that ours is faster. A row in which any contestant's samples are noisy is
measured again, and the calmest measurement counts. On CPU all contestants have the same number of threads. On a GPU the
same command times the contestants that run there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from benchmarks import command, environment, limits, work
from benchmarks.chains import CHAIN
from benchmarks.contestants import CONTESTANTS, DEFAULT, MissingError, UnsupportedError, latency
from benchmarks.report import Verdict, table
from benchmarks.timing import NOISY, calm, spread
from depthwise_jax.lowering import DIRECTIONS, native
from workloads import results
from workloads.layers import NETWORKS
from workloads.workload import Workload

MODES = ("single", "chain")
DTYPES = ("float32", "bfloat16")
# A contestant whose single call takes this many times as long as the fastest is not timed in chains.
_HOPELESS = 100


def label(peer: str, dtype: str) -> str:
    """A contestant's name in the results."""
    return peer if dtype == "float32" else f"{peer} {dtype}"


def contestants(peers: Sequence[str], dtypes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each (peer, dtype) to time: on CPU other libraries only in float32, since their bfloat16 is not comparable."""
    for dtype in dtypes:
        for peer in peers:
            if dtype == "float32" or peer in ("ours", "native", "taps") or jax.default_backend() == "gpu":
                yield peer, dtype


@dataclass
class Run:
    """A measurement of many layers: its options, and its results so far."""

    peers: Sequence[str]
    directions: Sequence[str]
    modes: Sequence[str]
    dtypes: Sequence[str]
    rounds: int
    seconds: float
    attempts: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    unsupported: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def layer(self, case: Workload) -> None:
        """Adds the rows of a layer."""
        operands = work.operands(case)
        for direction in self.directions:
            truth = work.truth(case, direction, operands)
            slow: set[str] = set()
            for mode in self.modes:
                tasks = {}
                for peer, dtype in contestants(self.peers, self.dtypes):
                    name = label(peer, dtype)
                    if name in slow or peer in self.missing:
                        continue
                    where = f"{case.name} {direction} {mode} {name}"
                    try:
                        task = CONTESTANTS[peer](case, operands, direction, dtype, mode == "chain")
                    except MissingError as error:
                        self.missing[peer] = str(error)
                        continue
                    except UnsupportedError as error:
                        self.unsupported[f"{peer}: {error}"] += 1
                        continue
                    error = work.error(task.read(task.run()), truth)
                    if error <= work.tolerance(direction, dtype):
                        tasks[name] = task.run
                    else:
                        self.wrong.append(f"{where}: relative error {error:.2e}")
                        print(f"WRONG {self.wrong[-1]}", flush=True)
                samples, attempts = calm(tasks, self.rounds, self.seconds, self.attempts)
                medians = {name: float(np.median(taken)) for name, taken in samples.items()}
                fastest = min(medians.values(), default=0)
                slow = {name for name, t in medians.items() if t > _HOPELESS * fastest and CHAIN * t > self.seconds}
                calls = CHAIN if mode == "chain" else 1
                row = {
                    "layer": case.name,
                    "direction": direction,
                    "mode": mode,
                    "bytes": work.traffic(case, direction, 4),
                    "multiply_adds": work.multiplications(case),
                    "attempts": attempts,
                    "ms": {name: results.milliseconds(taken, calls) for name, taken in samples.items()},
                }
                self.rows.append(row)
                _print_row(row)
        jax.clear_caches()


def _print_row(row: dict[str, Any]) -> None:
    cells = (
        f"{name} {np.median(taken):.4g} ms" + ("" if name == "ours" else f" ({_of(row, 'ours', name):.3g})")
        for name, taken in row["ms"].items()
    )
    print(f"{row['layer']} {row['direction']} {row['mode']}: " + ", ".join(cells), flush=True)


def _of(row: dict[str, Any], ours: str, theirs: str) -> float:
    """ours / theirs in a row, NaN if either is missing."""
    taken = row["ms"]
    return results.ratio(taken[ours], taken[theirs]) if ours in taken and theirs in taken else float("nan")


def call_latency(rounds: int, attempts: int) -> dict[str, Any]:
    """Microseconds of one more call in a compiled program, with the small sum that chains it to the call before."""
    chains = latency(None)
    for chain in chains.values():
        chain()
    samples, _ = calm(chains, max(rounds, 9), 5, attempts)
    each = np.subtract(samples["long"], samples["short"]) / (7 * CHAIN)
    return {"us": float(f"{1e6 * np.median(each):.4g}"), "call": "forward, 1x7x7x64, window 3, float32"}


@dataclass(frozen=True)
class Threshold:
    """Limits on the ratios of two contestants over all layers: on their geometric mean, and on the worst, if any."""

    name: str
    directions: tuple[str, ...]
    mode: str
    ours: str
    theirs: str
    mean: float
    worst: float | None

    def ratios(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """ours / theirs by layer (and by direction, if there are several)."""
        found = {}
        for row in rows:
            if row["mode"] == self.mode and row["direction"] in self.directions:
                value = _of(row, self.ours, self.theirs)
                if not np.isnan(value):
                    suffix = f" {row['direction']}" if len(self.directions) > 1 else ""
                    found[row["layer"] + suffix] = value
        return found


_TORCH = "torch_channels_last"
THRESHOLDS = (
    Threshold("forward", ("forward",), "chain", "ours", _TORCH, 0.75, 1.05),
    Threshold("dx", ("dx",), "chain", "ours", _TORCH, 0.6, 1.05),
    Threshold("dw", ("dw",), "chain", "ours", _TORCH, 0.3, 1.0),
    Threshold("forward, bias and relu", ("bias_relu",), "chain", "ours", _TORCH, 0.65, 1.0),
    Threshold("forward, single calls", ("forward",), "single", "ours", _TORCH, 0.95, None),
    Threshold("bfloat16 against float32", tuple(DIRECTIONS), "chain", "ours bfloat16", "ours", 1.0, 1.3),
)
THRESHOLDS_AVX2 = (
    Threshold("forward, AVX2", ("forward",), "chain", "ours", _TORCH, 0.8, None),
    Threshold("dx, AVX2", ("dx",), "chain", "ours", _TORCH, 0.8, None),
    Threshold("dw, AVX2", ("dw",), "chain", "ours", _TORCH, 0.5, None),
)
# forward + dx + dw against plain lax: how many times faster, over all layers and in the worst.
_LAX_MEAN, _LAX_WORST = 40, 8
_LATENCY_US = 3.0


def against_lax(rows: list[dict[str, Any]]) -> dict[str, float]:
    """lax's milliseconds for forward + dx + dw over ours by layer, in chains; single calls if lax has no chains."""
    times: dict[tuple[str, str, str], dict[str, float]] = {
        (row["layer"], row["direction"], row["mode"]): {name: float(np.median(ms)) for name, ms in row["ms"].items()}
        for row in rows
    }
    result = {}
    for layer in dict.fromkeys(row["layer"] for row in rows):
        sums = {"ours": 0.0, "lax": 0.0}
        for direction in tuple(DIRECTIONS):
            for name in sums:
                found = (times.get((layer, direction, mode), {}).get(name) for mode in ("chain", "single"))
                sums[name] += next((ms for ms in found if ms is not None), float("nan"))
        if not np.isnan(sums["lax"] / sums["ours"]):
            result[layer] = sums["lax"] / sums["ours"]
    return result


def verdicts(data: dict[str, Any]) -> list[Verdict]:
    """A verdict for each threshold."""
    rows, found = data["rows"], []
    for threshold in THRESHOLDS_AVX2 if data["isa"] == "avx2" else THRESHOLDS:
        ratios = threshold.ratios(rows)
        layers = len(ratios) // len(threshold.directions), len(NETWORKS)
        if not ratios:
            found.append(Verdict(threshold.name, None, layers=layers))
            continue
        mean, (worst, value) = results.mean(ratios.values()), max(ratios.items(), key=lambda item: item[1])
        limit = "" if threshold.worst is None else f" (at most {threshold.worst})"
        passed = mean <= threshold.mean and (threshold.worst is None or value <= threshold.worst)
        text = f"{mean:.3f} (at most {threshold.mean}), worst {value:.3f}{limit} {worst}"
        found.append(Verdict(threshold.name, passed, text, layers))
    if data["isa"] is None:
        times = against_lax(rows)
        passed, text = None, ""
        if times:
            mean, (worst, value) = results.mean(times.values()), min(times.items(), key=lambda item: item[1])
            passed = mean >= _LAX_MEAN and value >= _LAX_WORST
            text = f"{mean:.1f}x (at least {_LAX_MEAN}x), worst {value:.1f}x (at least {_LAX_WORST}x) {worst}"
        found.append(Verdict("forward + dx + dw against lax", passed, text, (len(times), len(NETWORKS))))
        us = data["latency"]["us"]
        found.append(Verdict("smallest call", us <= _LATENCY_US, f"{us:.2f} us (at most {_LATENCY_US})"))
    return found


def report(data: dict[str, Any]) -> None:
    """Prints a table per direction and mode, and a line for each pair of contestants."""
    rows = data["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["ms"] if name != "ours"))
    for direction in dict.fromkeys(row["direction"] for row in rows):
        for mode in MODES:
            chosen = [row for row in rows if row["direction"] == direction and row["mode"] == mode]
            if not chosen:
                continue
            print(f"\n{direction}, {mode} calls: ours and the limits in ms, then ours / theirs\n")
            lines = []
            for row in chosen:
                ours = np.median(row["ms"]["ours"]) if "ours" in row["ms"] else float("nan")
                least = (
                    results.memory_ms(data["limits"], row["bytes"]),
                    results.arithmetic_ms(data["limits"], row["multiply_adds"]),
                )
                cells = [f"{value:.4f}" for value in (*least, ours)]
                cells += [f"{_of(row, 'ours', name):.3f}" for name in names]
                lines.append((row["layer"], *(cell.replace("nan", "") for cell in cells)))
            means = []
            for name in names:
                found = [value for row in chosen if not np.isnan(value := _of(row, "ours", name))]
                means.append(f"{results.mean(found):.3f}" if found else "")
            table(("layer", "memory", "arithmetic", "ours", *names), [*lines, ("geometric mean", "", "", "", *means)])
    print()
    for direction in dict.fromkeys(row["direction"] for row in rows):
        for mode in MODES:
            for ours, theirs in (("ours", _TORCH), ("ours", "lax"), ("ours bfloat16", "ours")):
                found = Threshold("", (direction,), mode, ours, theirs, 0, None).ratios(rows)
                if found:
                    worst, value = max(found.items(), key=lambda item: item[1])
                    print(
                        f"{direction}, {mode}: {ours} / {theirs}: geometric mean {results.mean(found.values()):.3f}, "
                        f"worst {value:.3f} ({worst}), {len(found)} layers"
                    )

    for name in ("ours", *names):
        noisy = [row for row in rows if spread(row["ms"].get(name, [1.0])) > NOISY]
        if noisy:
            print(f"{name}: median over {NOISY} times the minimum in {len(noisy)} of {len(rows)} rows")


def main() -> None:
    """Measures or reads, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_layers_option(parser)
    parser.add_argument("--peers", help=f"comma-separated: {', '.join(CONTESTANTS)}")
    parser.add_argument("--directions", default=",".join(work.TIMED))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="for a contestant's samples of one map; see timing")
    parser.add_argument("--attempts", type=int, default=6, help="at a row, while a contestant's samples are noisy")
    parser.add_argument("--minutes", type=float, help="layers that are not begun by then are left out, and named")
    parser.add_argument("--isa", choices=environment.INSTRUCTION_SETS, help="hold all contestants to it")
    command.add_results_options(parser)
    command.run("benchmarks.peers", parser.parse_args(), measure, report, verdicts)


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The results of a run, and which of them were wrong."""
    platform = jax.default_backend()
    if platform not in DEFAULT:
        raise SystemExit(f"there are contestants for {', '.join(DEFAULT)}, not for {platform}")
    run = Run(
        peers=command.names(arguments.peers, tuple(CONTESTANTS), "peers") if arguments.peers else DEFAULT[platform],
        directions=command.names(arguments.directions, work.TIMED, "directions"),
        modes=command.names(arguments.modes, MODES, "modes"),
        dtypes=command.names(arguments.dtypes, DTYPES, "dtypes"),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        attempts=arguments.attempts,
    )
    cases = command.layers(arguments)
    status = native.status()
    data: dict[str, Any] = {
        "machine": environment.machine(),
        "device": jax.devices()[0].device_kind,
        "versions": environment.versions(),
        "threads": arguments.threads,
        "isa": arguments.isa,
        "compiled_kernels": status.instruction_set or status.reason,
        "limits": limits.measure(arguments.threads),
        "latency": call_latency(arguments.rounds, arguments.attempts),
        "rows": run.rows,
        "missing": run.missing,
        "unsupported": run.unsupported,
        "left_out": [],
    }
    print(json.dumps({key: value for key, value in data.items() if key != "rows"}, indent=1), flush=True)
    end = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    for case in cases:
        if time.monotonic() < end:
            run.layer(case)
        else:
            data["left_out"].append(case.name)
    for name, reason in run.missing.items():
        print(f"not timed: {name}: {reason}")
    for reason, count in run.unsupported.items():
        print(f"not timed: {reason} ({count} times)")
    if data["left_out"]:
        print(f"left out for lack of time: {', '.join(data['left_out'])}")
    return data, run.wrong


if __name__ == "__main__":
    main()
