"""Times functions against each other: interleaved in one process: what else the machine does then hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

LEAST_ROUNDS = 3
# A sample lasts at least this long: then neither the clock nor one late thread decides it.
_SAMPLE = 8e-3
# A median so far above the fastest sample says that something else was running.
NOISY = 1.25
# Functions that take so many times the fastest one's time are timed after the others: caches and an allocator that they
# leave behind would cost the others, and the machine's noise is small beside such a ratio.
_APART = 10
# Between two functions: OpenMP's threads spin for up to 10 ms after their work, on processors that the next one needs.
_SETTLE = 20e-3


def finished(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """The call of a function of JAX, which returns when its result is there."""
    return lambda: jax.block_until_ready(function(*arguments))


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample a round; those that are far slower than the rest after the rest.

    Args:
        functions: by name; each has been called once before, and returns when its work is done.
        rounds: samples of each.
        seconds: a function that would take longer than this for all of them gets fewer, at least LEAST_ROUNDS (or
            `rounds`, if less).

    Returns:
        By name, its samples: those of the first rounds, which all functions have in common.
    """
    durations: dict[str, float] = {}
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        durations[name] = time.perf_counter() - start
    samples: dict[str, list[float]] = {name: [] for name in functions}
    apart = {name for name, duration in durations.items() if duration > _APART * min(durations.values())}
    for names in ([name for name in functions if name not in apart], [name for name in functions if name in apart]):
        for round_ in range(rounds):
            names[:] = names[1:] + names[:1]
            for name in names:
                function, repeats = functions[name], max(1, round(_SAMPLE / durations[name]))
                if round_ + 1 > max(LEAST_ROUNDS, seconds / (durations[name] * (repeats + 1))):
                    continue
                time.sleep(_SETTLE)
                function()  # wakes its threads
                start = time.perf_counter()
                for _ in range(repeats):
                    function()
                samples[name].append((time.perf_counter() - start) / repeats)
    return samples


def spread(samples: list[float]) -> float:
    """The median over the fastest."""
    return float(np.median(samples) / min(samples))


def calm(
    functions: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, attempts: int
) -> tuple[dict[str, list[float]], int]:
    """As `interleaved`, again while any function's samples are noisy, whoever gains by it.

    Args:
        functions, rounds, seconds: as for `interleaved`.
        attempts: how often at most.

    Returns:
        The samples of the attempt whose largest spread is the smallest, and the number of attempts.
    """
    taken: list[tuple[float, dict[str, list[float]]]] = []
    while len(taken) < attempts and not (taken and taken[-1][0] <= NOISY):
        samples = interleaved(functions, rounds, seconds)
        taken.append((max(map(spread, samples.values()), default=0.0), samples))
    return min(taken, key=lambda attempt: attempt[0])[1], len(taken)
