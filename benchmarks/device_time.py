"""Measures the time of a call on a GPU: that of its kernels, and that of a queue of calls.

Kernels are read from a JAX profile, in which CUPTI records all of a process's kernels, including PyTorch's. Their time
excludes launches, which a network hides behind other kernels but a single short call cannot hide. It is the time during
which any kernel ran, so parallel kernels count once. The queue's wall time is a check: for calls that are longer than a
launch the two agree. Without a GPU, or if profiling is not allowed, only the wall time is measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData


@dataclass(frozen=True)
class Time:
    """The times of one call.

    Attributes:
        device: seconds during which its kernels ran; None if no kernel was seen.
        wall: seconds in a queue of calls.
        kernels: the number of kernels that it starts, including copies.
    """

    device: float | None
    wall: float
    kernels: float

    @property
    def seconds(self) -> float:
        """The device's time if known, else the wall time."""
        return self.wall if self.device is None else self.device


def busy(profile: Any) -> tuple[float, int]:
    """Seconds during which any kernel or copy ran on a GPU, and their number."""
    intervals = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")  # the others are derived from these
        for event in line.events
    )
    total = end = 0.0
    for start, stop in intervals:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1e-9 * total, len(intervals)


def measure(call: Callable[[int], Any], calls: int, finish: Callable[[Any], Any]) -> Time:
    """Times a call.

    Args:
        call: queues the i-th call, whose operands must not be in a cache, and returns its result.
        calls: the number of calls.
        finish: waits for the last result.
    """

    def queue() -> None:
        result = None
        for i in range(calls):
            result = call(i)
        finish(result)

    queue()  # allocates memory and raises the clocks
    start = time.perf_counter()
    queue()
    wall = (time.perf_counter() - start) / calls
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            queue()
        profiles = [ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
    seen = [busy(profile) for profile in profiles]
    device, kernels = sum(seconds for seconds, _ in seen), sum(count for _, count in seen)
    return Time(device / calls if kernels else None, wall, kernels / calls)
