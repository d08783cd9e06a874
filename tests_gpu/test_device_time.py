"""The reading of a profile: kernels of the streams of GPUs, those side by side once."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks.device_time import busy, measure


def line(name: str, *events: tuple[int, int]) -> str:
    """A line of a profile with events, (start, duration) in nanoseconds."""
    times = (f"events {{ metadata_id: 1 offset_ps: {1000 * s} duration_ps: {1000 * d} }}" for s, d in events)
    return f'lines {{ name: "{name}" timestamp_ns: 50 {" ".join(times)} }}'


def plane(name: str, *lines: str) -> str:
    return f'planes {{ name: "{name}" {" ".join(lines)} event_metadata {{ key: 1 value {{ id: 1 name: "k" }} }} }}'


@pytest.mark.parametrize(
    ("planes", "nanoseconds", "kernels"),
    [
        ([plane("/device:GPU:0", line("Stream #7(Compute)", (0, 10), (20, 5)))], 15, 2),
        ([plane("/device:GPU:0", line("Stream #7(Compute)", (0, 10)), line("Stream #9(MemcpyD2D)", (5, 10)))], 15, 2),
        ([plane("/device:GPU:0", line("Stream #7(Compute)", (0, 100)), line("Stream #9(Compute)", (5, 10)))], 100, 2),
        ([plane("/device:GPU:0", line("Stream #7(Compute)", (0, 10)), line("XLA Ops", (0, 10)))], 10, 1),
        ([plane("/host:CPU", line("Stream #7(Compute)", (0, 10)))], 0, 0),
        ([], 0, 0),
    ],
)
def test_busy_time(planes: list[str], nanoseconds: float, kernels: int) -> None:
    seconds, count = busy(ProfileData.from_text_proto(" ".join(planes)))
    assert seconds == pytest.approx(1e-9 * nanoseconds)
    assert count == kernels


def test_without_a_gpu_there_is_the_wall_time() -> None:
    seen: list[int] = []

    def call(i: int) -> object:
        seen.append(i)
        return jnp.zeros(3)

    found = measure(call, 4, lambda result: result.block_until_ready())
    assert (found.device, found.kernels) == (None, 0)
    assert found.seconds == found.wall > 0
    assert seen == [0, 1, 2, 3] * 3
