"""Reads and writes the results of benchmarks as JSON, and computes figures from their samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def read(path: Path) -> dict[str, Any]:
    """The results in a file."""
    return json.loads(path.read_text())


def write(results: dict[str, Any], path: Path) -> None:
    """Writes results, with each of "rows" on a separate line."""
    text = json.dumps(results | {"rows": []} if "rows" in results else results, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results.get("rows", ()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n")


def milliseconds(samples: Iterable[float], calls: int = 1) -> list[float]:
    """Samples in seconds, each of `calls` calls, as stored in results: milliseconds per call, to four digits."""
    return [float(f"{1e3 * sample / calls:.4g}") for sample in samples]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of ours / theirs, over the rounds that both have."""
    common = min(len(ours), len(theirs))
    return float(np.median(np.divide(ours[:common], theirs[:common])))


def mean(ratios: Iterable[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(list(ratios)))))


def memory_ms(limits: dict[str, Any], traffic: int) -> float:
    """Milliseconds of a copy that reads and writes `traffic` bytes together; interpolated between the sizes.

    Args:
        limits: the results of benchmarks/limits.py.
        traffic: the bytes.
    """
    sizes = np.log([point["bytes"] for point in limits["copy"]])
    rates = np.log([point["GB/s"] for point in limits["copy"]])
    return 1e3 * traffic / (1e9 * math.exp(np.interp(math.log(traffic), sizes, rates)))


def arithmetic_ms(limits: dict[str, Any], multiplications: int) -> float:
    """Milliseconds of float32 multiply-adds on all threads; `limits` as for `memory_ms`."""
    return 1e3 * multiplications / (1e9 * max(limits["multiply_add"].values()))
