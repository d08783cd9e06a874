"""Times the lowerings against each other on this machine: the measurements behind `TABLE` in depthwise_jax.lowering.

Run as `python -m benchmarks.lowerings` from the repository's root. Each row is a layer of a known network; each figure
is the median milliseconds of one call, and the ratio is the median over rounds of the pairwise ratio, taken interleaved
in one process. Every result is compared with lax's before it is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from depthwise_jax import depthwise_conv
from tests.cases import LOWERINGS, NETWORKS, Case


def maps(case: Case, implementation: str) -> dict[str, Callable[..., Any]]:
    """The forward pass, dx and dw of a case, each compiled by itself, as functions of x, kernel and g."""
    conv = partial(depthwise_conv, **case.geometry, implementation=implementation)
    return {
        "forward": jax.jit(lambda x, kernel, g: conv(x, kernel)),
        "dx": jax.jit(lambda x, kernel, g: jax.vjp(lambda x: conv(x, kernel), x)[1](g)[0]),
        "dw": jax.jit(lambda x, kernel, g: jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](g)[0]),
    }


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of median milliseconds, first-call seconds (compilation) and median ratios to the first lowering."""
    x, kernel, g = (jnp.asarray(operand) for operand in case.operands())
    compiled = {name: maps(case, name) for name in LOWERINGS}
    rows = []
    for direction in ("forward", "dx", "dw"):
        times: dict[str, list[float]] = {name: [] for name in LOWERINGS}
        first: dict[str, float] = {}
        results = {}
        for name in LOWERINGS:
            start = time.perf_counter()
            results[name] = jax.block_until_ready(compiled[name][direction](x, kernel, g))
            first[name] = time.perf_counter() - start
        truth = np.asarray(results[LOWERINGS[0]], np.float64)
        for name in LOWERINGS:
            np.testing.assert_allclose(results[name], truth, rtol=0, atol=1e-4 * np.abs(truth).max())
        for _ in range(rounds + 1):
            for name in LOWERINGS:
                start = time.perf_counter()
                jax.block_until_ready(compiled[name][direction](x, kernel, g))
                times[name].append(time.perf_counter() - start)
        row: dict[str, Any] = {"layer": case.name, "map": direction}
        for name in LOWERINGS:
            row[name] = {
                "ms": round(1e3 * float(np.median(times[name][1:])), 3),
                "first call s": round(first[name], 2),
                "ratio": round(float(np.median(np.divide(times[name][1:], times[LOWERINGS[0]][1:]))), 4),
            }
        rows.append(row)
    return rows


def main() -> None:
    """Measures, prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform} ({device.device_kind}); ratios to {LOWERINGS[0]}")
    print(f"{'layer':28}{'map':9}" + "".join(f"{name + ' ms':>12}{'ratio':>9}{'first s':>9}" for name in LOWERINGS))
    rows = []
    for case in NETWORKS:
        if arguments.layers not in case.name:
            continue
        for row in measure(case, arguments.rounds):
            cells = (row[name] for name in LOWERINGS)
            print(
                f"{row['layer']:28}{row['map']:9}"
                + "".join(f"{cell['ms']:12.2f}{cell['ratio']:9.3f}{cell['first call s']:9.2f}" for cell in cells),
                flush=True,
            )
            rows.append(row)
    ratios = {name: np.exp(np.mean([np.log(row[name]["ratio"]) for row in rows])) for name in LOWERINGS}
    print("geometric means of the ratios: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"jax": jax.__version__, "device": device.device_kind, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
