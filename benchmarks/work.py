"""Defines a layer's maps for benchmarks: their true results, their multiplications and their memory traffic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from depthwise_jax.lowering import DIRECTIONS
from workloads.workload import Workload

# "bias_relu" is the forward pass followed by a bias and ReLU.
TIMED = (*DIRECTIONS, "bias_relu")

Array = np.ndarray[Any, np.dtype[Any]]
Operands = dict[str, Array]


def operands(case: Workload) -> Operands:
    """x, w, g (shaped like y) and the bias b, float32, all of them exact in bfloat16."""
    x, w, g = case.operands()
    arrays = {"x": x, "w": w, "g": g, "b": case.draw(g.shape[-1:], 3)}
    return {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in arrays.items()}


def pads(case: Workload) -> list[tuple[int, int]]:
    """The padding of each spatial axis, (low, high)."""
    padding = case.geometry.get("padding", "valid")
    oracle = case.resolved
    if isinstance(padding, int):
        return [(padding, padding)] * oracle.rank
    spans = [(k - 1) * d + 1 for k, d in zip(oracle.window, oracle.dilation, strict=True)]
    sizes = zip(oracle.out, oracle.strides, spans, oracle.spatial, oracle.low, strict=True)
    return [(low, max((out - 1) * s + span - n - low, 0)) for out, s, span, n, low in sizes]


def truth(case: Workload, direction: str, operands: Operands) -> Array:
    """The result of a map in float64: in NumPy, a slice of the padded input for each tap of the window."""
    oracle = case.resolved
    x, w, g, b = (operands[name].astype(np.float64) for name in ("x", "w", "g", "b"))
    padded = np.pad(x, [(0, 0), *pads(case), (0, 0)])
    g = g.reshape(*g.shape[:-1], oracle.channels, oracle.multiplier)
    if direction == "dw":
        rows = g.reshape(-1, *g.shape[-2:])
        return np.stack(
            [np.einsum("nc,ncm->cm", padded[read].reshape(len(rows), -1), rows) for _, read in _taps(case)]
        ).reshape(w.shape)
    if direction == "dx":
        dx = np.zeros_like(padded)
        for tap, read in _taps(case):
            dx[read] += (g * w[tap]).sum(-1)
        inside = (slice(low, low + n) for (low, _), n in zip(pads(case), oracle.spatial, strict=True))
        return dx[(slice(None), *inside)]
    y = np.zeros_like(g)
    for tap, read in _taps(case):
        y += padded[read][..., None] * w[tap]
    y = y.reshape(oracle.y_shape)
    return np.maximum(y + b, 0) if direction == "bias_relu" else y


def _taps(case: Workload) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Every tap, and the slice of the padded input that it reads."""
    oracle = case.resolved
    for tap in itertools.product(*map(range, oracle.window)):
        starts = [t * d for t, d in zip(tap, oracle.dilation, strict=True)]
        reads = (slice(i, i + (n - 1) * s + 1, s) for i, n, s in zip(starts, oracle.out, oracle.strides, strict=True))
        yield tap, (slice(None), *reads)


def tolerance(direction: str, dtype: str) -> float:
    """The allowed error, relative to the largest value: float32's sums, and the roundings to a narrower dtype.

    There may be two roundings if a bias is added to a rounded sum.
    """
    roundings = 0 if dtype == "float32" else 2 if direction == "bias_relu" else 1
    return (1e-4 if direction == "dw" else 1e-5) + roundings * 2.0**-8


def error(result: Array, truth: Array) -> float:
    """The largest error, relative to the largest value."""
    return float(np.max(np.abs(result - truth)) / np.max(np.abs(truth)))


def multiplications(case: Workload) -> int:
    """The fused multiply-adds of each map, without taps that fall on the padding."""
    oracle = case.resolved
    axes = zip(oracle.out, oracle.strides, oracle.window, oracle.dilation, oracle.low, oracle.spatial, strict=True)
    pairs = (sum(0 <= o * s + t * d - low < n for o in range(out) for t in range(k)) for out, s, k, d, low, n in axes)
    return math.prod(oracle.batch) * math.prod(pairs) * oracle.channels * oracle.multiplier


def traffic(case: Workload, direction: str, itemsize: int) -> int:
    """The bytes of the operands and of the result: each is read or written at least once."""
    sizes = {"x": math.prod(case.x), "w": math.prod(case.kernel), "g": math.prod(case.resolved.y_shape)}
    return itemsize * (sum(sizes.values()) + (case.resolved.y_shape[-1] if direction == "bias_relu" else 0))
