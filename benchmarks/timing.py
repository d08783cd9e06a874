"""Times functions against each other, interleaved in one process: other load on the machine then affects all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

LEAST_ROUNDS = 3
# The least length of a sample, which keeps the clock or a late thread from deciding it.
_SAMPLE = 8e-3
# A median this far above the fastest sample means that something else was running.
NOISY = 1.25
# Functions that take this many times as long as the fastest are timed after the others. The state in which they leave
# caches and allocator would slow down the others, and the machine's noise is small compared with such a ratio.
_APART = 10
# The pause between functions: OpenMP's threads spin for up to 10 ms after their work, on processors that the next
# function needs.
_SETTLE = 20e-3


def finished(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call of a JAX function that waits for its result."""
    return lambda: jax.block_until_ready(function(*arguments))


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample per round; functions that are far slower come after the others.

    Args:
        functions: by name; each has been called once before, and returns when its work is done.
        rounds: the number of samples of each.
        seconds: a function whose samples would take longer than this gets fewer, at least LEAST_ROUNDS (or `rounds`, if
            that is less).

    Returns:
        The samples of each function by name: those of the first rounds, which all functions share.
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
    """Repeats `interleaved` while any function's samples are noisy, whichever function the noise favours.

    Args:
        functions, rounds, seconds: as for `interleaved`.
        attempts: the most attempts.

    Returns:
        The samples of the attempt whose largest spread is the smallest, and the number of attempts.
    """
    taken: list[tuple[float, dict[str, list[float]]]] = []
    while len(taken) < attempts and not (taken and taken[-1][0] <= NOISY):
        samples = interleaved(functions, rounds, seconds)
        taken.append((max(map(spread, samples.values()), default=0.0), samples))
    return min(taken, key=lambda attempt: attempt[0])[1], len(taken)
