"""Times functions against each other: interleaved in one process, so that what the machine does meanwhile hits all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LEAST_ROUNDS = 3
# A sample lasts at least this long, so that the clock and one late thread do not decide it.
_SAMPLE = 8e-3
# A median so far above the fastest sample says that something else was running.
NOISY = 1.5
# Between two functions: the threads of OpenMP spin for a while after their work, on processors that the next one needs.
_SETTLE = 10e-3


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample a round.

    Args:
        functions: by name; each has been called once before, and returns when its work is done.
        rounds: samples of each.
        seconds: a function that would take longer than this for all of them gets fewer, at least LEAST_ROUNDS (or
            `rounds`, if less).

    Returns:
        By name, its samples: those of the first rounds, which all functions have in common.
    """
    calls: dict[str, int] = {}
    allowed: dict[str, int] = {}
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        duration = time.perf_counter() - start
        calls[name] = max(1, round(_SAMPLE / duration))
        allowed[name] = int(min(rounds, max(LEAST_ROUNDS, seconds / (duration * (calls[name] + 1)))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for round_ in range(rounds):
        names = names[1:] + names[:1]
        for name in names:
            if round_ >= allowed[name]:
                continue
            function, repeats = functions[name], calls[name]
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


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of ours / theirs, over the rounds that both have."""
    common = min(len(ours), len(theirs))
    return float(np.median(np.divide(ours[:common], theirs[:common])))
