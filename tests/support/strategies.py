"""Random calls for Hypothesis, on a logarithmic scale over all that the functions accept."""

from __future__ import annotations

import contextlib
import math

import hypothesis.strategies as st
from hypothesis import assume

from tests.support.cases import Case
from workloads.workload import EmptyOutputError

# Products of an output with a tap, for the oracle's loops.
_WORK = 3000
# Elements of an image.
_ELEMENTS = 300_000
# Above this, not both of a stride and a dilation: taps and lax pad for the outputs of one that meet taps of the other.
_LARGE = 300


def _orders(*ranges: tuple[int, int]) -> st.SearchStrategy[int]:
    """An integer of one of the ranges; those that stand there several times come more often."""
    return st.sampled_from(ranges).flatmap(lambda ends: st.integers(*ends))


STEPS = _orders(
    *[(1, 3)] * 6,
    *[(4, 10)] * 3,
    *[(11, 30)] * 4,
    *[(31, 70)] * 2,
    (71, 1000),
    (1001, 2**31 - 2),
    (2**31 - 1, 2**31 + 1),
    (2**32, 2**70),
)
WINDOWS = _orders(*[(1, 6)] * 7, *[(5, 15)] * 3, (16, 32), (33, 90))
SIZES = _orders(*[(2, 10)] * 5, (0, 1), *[(11, 70)] * 4, *[(71, 300)] * 2)
# Below, at and above the vectors of each instruction set, and of one channel.
CHANNELS = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 72, 100, 130])
MULTIPLIERS = st.sampled_from([1, 1, 1, 1, 1, 2, 2, 3, 4, 9])
BATCHES = st.sampled_from([(), (1,), (1,), (2,), (2,), (0,), (2, 3), (9,)])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A call that the oracle can check, or one whose output is empty."""
    rank = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    # What an axis may take of the work: all alike, or most of it for the first or the last.
    shares = draw(st.sampled_from([(1,) * rank, (1,) * (rank - 1) + (3,), (3,) + (1,) * (rank - 1)]))
    axes = [_axis(draw, int(_WORK ** (share / sum(shares)))) for share in shares]
    sizes, window, strides, dilation, pairs = zip(*axes, strict=True)
    extents = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    named = ["same", *(["causal"] if rank == 1 else [])]
    if max(extents) <= 200:  # these make an input as large
        named += ["reflect", "circular", "edge"]
    if all(n >= e for n, e in zip(sizes, extents, strict=True)) or draw(st.integers(0, 19)) == 19:
        named += ["valid", "valid", draw(st.integers(0, 3))]
    padding = draw(st.one_of(st.just(pairs), st.just(pairs), st.sampled_from(named)))
    channels, multiplier, batch = draw(CHANNELS), draw(MULTIPLIERS), draw(BATCHES)
    channels = max(1, min(channels, _ELEMENTS // max(1, math.prod(sizes))))
    data_format = draw(st.sampled_from(["channels_last", "channels_last", "channels_first"]))
    geometry = {"strides": strides, "padding": padding, "dilation_rate": dilation, "data_format": data_format}
    for name in ("strides", "dilation_rate"):
        if len(set(geometry[name])) == 1 and draw(st.booleans()):
            geometry[name] = geometry[name][0]
    case = Case(
        "random",
        (*batch, *sizes, channels) if data_format == "channels_last" else (*batch, channels, *sizes),
        (*window, channels, multiplier),
        geometry,
    )
    with contextlib.suppress(EmptyOutputError):
        assume(math.prod(case.oracle.out) * math.prod(window) <= 2 * _WORK)
    return case


def _axis(draw: st.DrawFn, work: int) -> tuple[int, int, int, int, tuple[int, int]]:
    """Size, taps, stride, dilation and padding along an axis, with at most about `work` pairs of output and tap."""
    k = min(draw(WINDOWS), work)
    s, d = draw(STEPS), draw(st.one_of(st.just(1), STEPS))
    if min(s, d) > _LARGE:
        s, d = draw(st.sampled_from([(1, d), (s, 1), (2, d), (s, 2)]))
    n = min(draw(SIZES), max(1, work // k) * min(s, 300))
    out, rest = draw(st.integers(1, max(1, min(work // k, 12)))), draw(st.integers(0, min(s - 1, 3)))
    span = (out - 1) * s + (k - 1) * d + 1 + rest
    if span <= _LARGE and draw(st.booleans()):  # outputs inside the input, as those of most layers
        low, high = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        return max(0, span - low - high), k, s, d, (low, high)
    # One output is to read one position, or to miss it narrowly, through one tap: else large numbers meet nothing.
    meeting, tap, position = draw(st.integers(0, out - 1)), draw(st.integers(0, k - 1)), draw(st.integers(-2, n + 1))
    low = max(0, meeting * s + tap * d - position)
    return n, k, s, d, (low, max(0, span - n - low))
