"""Measures the machine's limits: the bandwidth of a copy, by size, and the rate of multiply-adds."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.optional import library

# Bytes read and written by one copy, 256 KB to 256 MB.
SIZES = tuple(2**exponent for exponent in range(18, 29))
_SIDE = 2048  # of the square matrices
_SECONDS = 0.15


def measure(threads: int) -> dict[str, Any]:
    """The limits: "copy", a list of {"bytes", "GB/s"}; "multiply_add", G/s for float32 by number of threads."""
    copy = _copy_on_gpu if jax.default_backend() == "gpu" else partial(_copy, threads)
    return {
        "copy": [{"bytes": size, "GB/s": float(f"{copy(size):.4g}")} for size in SIZES],
        "copy_is": "each thread copies its part of the bytes from one buffer to another, again and again",
        "multiply_add": _multiply_adds(threads),
        "multiply_add_is": f"float32 product of two {_SIDE} x {_SIDE} matrices, G multiply-adds a second, best of five",
    }


def _copy(threads: int, size: int) -> float:
    """GB/s, read and written, of `threads` threads, each copying its own part of `size` bytes."""
    part = size // (2 * threads)
    buffers = [(np.ones(part, np.uint8), np.ones(part, np.uint8)) for _ in range(threads)]
    best = 0.0
    for _ in range(3):
        barrier = threading.Barrier(threads)
        rates = [0.0] * threads

        def work(
            index: int, source: Any, target: Any, barrier: threading.Barrier = barrier, rates: list[float] = rates
        ) -> None:
            barrier.wait()
            start, copies = time.perf_counter(), 0
            while time.perf_counter() - start < _SECONDS / 3:
                np.copyto(target, source)
                copies += 1
            rates[index] = 2e-9 * part * copies / (time.perf_counter() - start)

        workers = [threading.Thread(target=work, args=(i, *pair)) for i, pair in enumerate(buffers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(rates))
    return best


def _copy_on_gpu(size: int) -> float:
    x = jnp.ones(size // 8, jnp.float32)
    copy = jax.jit(lambda x: -x)  # reads and writes every element
    return 2e-9 * x.nbytes / _best(lambda: copy(x), 20, calls=20)


def _multiply_adds(threads: int) -> dict[str, float]:
    """By PyTorch if it is installed, since its number of threads can be set; else by JAX, on all threads."""
    work = 1e-9 * _SIDE**3
    torch = library("torch")
    if torch is None or jax.default_backend() == "gpu":
        matrix = jnp.ones((_SIDE, _SIDE), jnp.float32)
        product = jax.jit(partial(jnp.matmul, precision="highest"))
        return {"all": float(f"{work / _best(lambda: product(matrix, matrix), 5):.4g}")}
    matrix = torch.ones((_SIDE, _SIDE))
    rates = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        rates[str(count)] = float(f"{work / _best(lambda: matrix @ matrix, 5):.4g}")
    return rates


def _best(function: Any, rounds: int, calls: int = 1) -> float:
    """Seconds of one call in the fastest round, after an uncounted one; waits for JAX's results."""
    jax.block_until_ready(function())
    durations: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        results: Sequence[Any] = [function() for _ in range(calls)]
        jax.block_until_ready(results)
        durations.append((time.perf_counter() - start) / calls)
    return min(durations)
