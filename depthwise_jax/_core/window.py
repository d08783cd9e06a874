"""The window of a convolution: all rules of shape arithmetic, and all geometry errors.

Along one axis of n positions, a window of k taps with dilation d spans e = (k - 1)*d + 1 positions; padded by (low,
high) and moved in steps of s it gives (n + low + high - e) // s + 1 outputs, and output o reads input o*s + t*d - low
through tap t.

The transposed convolution has the same window, with input and output exchanged: input i adds to output i*s + t*d - low
through tap t.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from jax import lax
from jax.core import Tracer

from depthwise_jax._core import hints

# Names count in any case; type checkers know these.
TransposedPaddingName = Literal["valid", "same", "VALID", "SAME"]
PaddingName = Literal[
    TransposedPaddingName, "causal", "reflect", "circular", "edge", "CAUSAL", "REFLECT", "CIRCULAR", "EDGE"
]
TransposedPadding = TransposedPaddingName | int | Sequence[tuple[int, int]]
Padding = PaddingName | int | Sequence[tuple[int, int]]

PADDINGS: tuple[PaddingName, ...] = tuple(name for name in get_args(PaddingName) if name.islower())
TRANSPOSED_PADDINGS: tuple[PaddingName, ...] = tuple(name for name in get_args(TransposedPaddingName) if name.islower())
# jnp.pad's names for the paddings that repeat the input.
_PAD_MODES = {"reflect": "reflect", "circular": "wrap", "edge": "edge"}


@dataclass(frozen=True)
class Window:
    """A window with everything that its shape arithmetic needs; one entry per spatial axis.

    Attributes:
        size: number of taps.
        strides: steps between outputs, in input positions.
        padding: (low, high) zeros around the input, in input positions, never negative. Symbolic only for "same" with
            strides above 1 over a symbolic size.
        dilation: distance between taps, in input positions.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.size)

    @property
    def extent(self) -> tuple[int, ...]:
        """Input positions that the window spans: (k - 1)*d + 1."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True))

    @property
    def taps(self) -> int:
        """Number of taps over all axes."""
        return math.prod(self.size)

    def output_shape(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the output for an input's spatial shape.

        Raises:
            ValueError: the output would be empty.
        """
        steps = [n + low + high - e for n, (low, high), e in zip(spatial, self.padding, self.extent, strict=True)]
        if any(isinstance(n, int) and n < 0 for n in steps):
            raise ValueError(
                f"the output would be empty: input with spatial shape {tuple(spatial)}, kernel_size={self.size}, "
                f"dilation_rate={self.dilation} (a span of {self.extent}), padding={self.padding}; "
                "expected the padded input to be at least as large as the window's span"
                f"{hints.of_window(self.size, spatial)}"
            )
        return tuple(n // s + 1 for n, s in zip(steps, self.strides, strict=True))


@dataclass(frozen=True)
class InputPadding:
    """Padding that repeats the input, applied before the convolution: jnp.pad's mode and (low, high) per axis."""

    mode: str
    amounts: tuple[tuple[int, int], ...]


def per_axis(value: Any, rank: int, argument: str, least: int = 1) -> tuple[int, ...]:
    """One integer of at least `least` per spatial axis, from an integer for all axes or a sequence of `rank` of them.

    Raises:
        TypeError: a value is not an integer (booleans and floats are not).
        ValueError: the wrong number of values, or one below `least`.
    """
    expected = f"{argument} must be a {'positive' if least else 'non-negative'} integer or {rank} of them"
    values = tuple(value) if _is_sequence(value) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{expected}; got {value!r}")
    numbers = tuple(_integer(v, f"{expected}; got {value!r}") for v in values)
    if any(number < least for number in numbers):
        raise ValueError(f"{expected}; got {value!r}")
    return numbers


def canonical_padding(
    padding: Any, rank: int, names: tuple[PaddingName, ...] = PADDINGS
) -> PaddingName | tuple[tuple[int, int], ...]:
    """A padding argument as a lower-case name or as (low, high) pairs, independent of the input's size.

    Args:
        padding: the argument.
        rank: the number of spatial axes.
        names: the allowed names, PADDINGS or TRANSPOSED_PADDINGS.

    Raises:
        TypeError: neither a name, an integer nor pairs of integers.
        ValueError: an unknown name, a negative amount, the wrong number of pairs, or "causal" with several axes.
    """
    expected = (
        f"padding must be one of {names}, an integer, or one (low, high) pair for each of the {rank} spatial axes, "
        f"none negative; got {padding!r}{hints.of_padding(padding, rank, names)}"
    )
    if isinstance(padding, str):
        name = padding.lower()
        if name not in names:
            raise ValueError(expected)
        if name == "causal" and rank != 1:
            raise ValueError(
                "padding='causal' is for sequences with one spatial axis, time: all zeros go before it, and no output "
                f"sees a later input; got {rank} spatial axes: pass pairs instead, with "
                "((kernel_size - 1)*dilation_rate, 0) for the time axis"
            )
        return name
    if not _is_sequence(padding):
        amount = _integer(padding, expected)
        pairs = ((amount, amount),) * rank
    else:
        if len(padding) != rank:
            raise ValueError(expected)
        if not all(_is_sequence(pair) for pair in padding):
            raise TypeError(expected)
        if not all(len(pair) == 2 for pair in padding):
            raise ValueError(expected)
        pairs = tuple((_integer(low, expected), _integer(high, expected)) for low, high in padding)
    if any(amount < 0 for pair in pairs for amount in pair):
        raise ValueError(expected)
    return pairs


def resolve(
    spatial: Sequence[int], kernel_size: Any, strides: Any, padding: Any, dilation_rate: Any
) -> tuple[Window, InputPadding | None]:
    """The window that these arguments mean for an input of this spatial shape, and the padding to apply before it.

    "same" gives ceil(n / s) outputs; if this needs an odd number of zeros, the end gets one more. "reflect", "circular"
    and "edge" add (e - 1) // 2 positions before and e // 2 after, for any stride.

    Args:
        spatial: the input's spatial shape; its length is the rank.
        kernel_size, strides, dilation_rate: a positive integer or one per axis.
        padding: a name of PADDINGS in any case, an integer, or one (low, high) pair per axis.

    Raises:
        TypeError, ValueError: an argument is not one of these, or the output would be empty.
    """
    rank = len(spatial)
    window = _unpadded(rank, kernel_size, strides, dilation_rate)
    kind = canonical_padding(padding, rank)
    input_padding = None
    if kind == "same":
        pairs = tuple(_same(n, e, s) for n, e, s in zip(spatial, window.extent, window.strides, strict=True))
        window = replace(window, padding=pairs)
    elif kind == "causal":
        window = replace(window, padding=((window.extent[0] - 1, 0),))
    elif isinstance(kind, tuple):
        window = replace(window, padding=kind)
    elif kind in _PAD_MODES:
        input_padding = InputPadding(_PAD_MODES[kind], tuple(((e - 1) // 2, e // 2) for e in window.extent))
        if any(isinstance(n, int) and n == 0 for n in spatial):
            raise ValueError(
                f"padding={kind!r} repeats the input, which must not be empty; got spatial shape {tuple(spatial)}"
            )
        spatial = [n + low + high for n, (low, high) in zip(spatial, input_padding.amounts, strict=True)]
    return _tightened(window, spatial, window.output_shape(spatial)), input_padding


def _unpadded(rank: int, kernel_size: Any, strides: Any, dilation_rate: Any) -> Window:
    """The window of these arguments without padding."""
    size = per_axis(kernel_size, rank, "kernel_size")
    steps = per_axis(strides, rank, "strides")
    return Window(size, steps, ((0, 0),) * rank, per_axis(dilation_rate, rank, "dilation_rate"))


def canonical_output_padding(
    output_padding: Any, strides: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...] | None:
    """A transposed convolution's output_padding argument as one integer per spatial axis, or None.

    Raises:
        TypeError: neither None nor integers.
        ValueError: the wrong number of them, a negative one, or one larger than PyTorch accepts.
    """
    if output_padding is None:
        return None
    amounts = per_axis(output_padding, len(strides), "output_padding", least=0)
    if any(amount >= max(s, d) for amount, s, d in zip(amounts, strides, dilation, strict=True)):
        raise ValueError(
            "output_padding must be smaller than the larger of strides and dilation_rate along each axis; "
            f"got {output_padding!r} with strides={tuple(strides)} and dilation_rate={tuple(dilation)}"
        )
    return amounts


@dataclass(frozen=True)
class Transposed:
    """What a transposed convolution computes: the transpose of a window's convolution, followed by zeros.

    Attributes:
        window: the window, over the outputs.
        spatial: the outputs' spatial shape without those zeros.
        beyond: how many zeros follow, per axis: outputs that are too far from the last input for this window.
    """

    window: Window
    spatial: tuple[int, ...]
    beyond: tuple[int, ...]


def resolve_transposed(
    spatial: Sequence[int], kernel_size: Any, strides: Any, padding: Any, output_padding: Any, dilation_rate: Any
) -> Transposed:
    """What these arguments of a transposed convolution mean for an input of this spatial shape.

    Input i adds to the outputs from i*s - low on, and there are (n - 1)*s + r outputs. As in Keras, "valid" cuts
    nothing and "same" gives n*s outputs, cut or extended at the end; with an output_padding p, r is e + p and e % 2 +
    p. As in PyTorch, pairs cut the outputs by (low, high), and r is e - low - high + p.

    Args:
        spatial: the input's spatial shape; its length is the rank.
        kernel_size, strides, dilation_rate: a positive integer or one per axis.
        padding: a name of TRANSPOSED_PADDINGS in any case, an integer, or one (low, high) pair per axis.
        output_padding: None, or an integer or one per axis.

    Raises:
        TypeError, ValueError: an argument is not one of these, or the output would be empty.
    """
    rank = len(spatial)
    window = _unpadded(rank, kernel_size, strides, dilation_rate)
    kind = canonical_padding(padding, rank, TRANSPOSED_PADDINGS)
    extra = canonical_output_padding(output_padding, window.strides, window.dilation)
    pairs, outputs, beyond = [], [], []
    for axis, (n, e, s) in enumerate(zip(spatial, window.extent, window.strides, strict=True)):
        p = None if extra is None else extra[axis]
        if kind == "valid":
            low, rest = 0, max(e, s) if p is None else e + p
        elif kind == "same":
            rest = s if p is None else e % 2 + p
            low = max(e - rest, 0) // 2
        else:
            low, high = kind[axis]
            assert isinstance(low, int)
            assert isinstance(high, int)
            rest = e - low - high + (p or 0)
        # The window's convolution of these outputs gives n again if 0 <= rest + low + high - e < s.
        zeros = max(rest + low - e - (s - 1), 0)
        outputs.append((n - 1) * s + rest - zeros)
        pairs.append((low, max(e - rest - low, 0)))
        beyond.append(zeros)
    if any(isinstance(n, int) and (n < 1 or o < 1) for n, o in zip(spatial, outputs, strict=True)):
        raise ValueError(
            f"the output would be empty: input with spatial shape {tuple(spatial)}, kernel_size={window.size}, "
            f"strides={window.strides}, dilation_rate={window.dilation}, padding={padding!r}, "
            f"output_padding={output_padding!r}; "
            "expected a non-empty input, and a padding that does not cut all outputs"
        )
    window = replace(window, padding=tuple(pairs))
    return Transposed(_tightened(window, outputs, spatial), tuple(outputs), tuple(beyond))


def _tightened(window: Window, spatial: Sequence[int], out: Sequence[int]) -> Window:
    """An equivalent window with strides and dilations no larger than necessary: each output reads the same inputs.

    So a stride of 2**40 works like one that fits an array index. A stride and a dilation can both stay large if they
    are similar, where outputs of one meet taps of the other.
    """
    size, strides, dilation, padding = window.size, list(window.strides), list(window.dilation), list(window.padding)
    for axis, (n, o) in enumerate(zip(spatial, out, strict=True)):
        if not isinstance(n, int):
            continue
        k, s, d, (low, high) = size[axis], strides[axis], dilation[axis], padding[axis]
        rest = n + low + high - ((k - 1) * d + 1) - (o - 1) * s
        s, low = _tightened_step(s, o, low, (k - 1) * d + 1, n)
        d, low = _tightened_step(d, k, low, (o - 1) * s + 1, n)
        high = (o - 1) * s + min(rest, s - 1) + (k - 1) * d + 1 - n - low
        strides[axis], dilation[axis], padding[axis] = s, d, (low, high)
    return Window(size, tuple(strides), tuple(padding), tuple(dilation))


def _tightened_step(step: int, count: int, low: int, width: int, n: int) -> tuple[int, int]:
    """The smaller of a step and one that is large enough, with its low padding.

    There are `count` spans of `width` positions, `step` apart, starting at -low. With a step above n + width, at most
    one of them meets the n positions of the input. That one stays in place, and the others also miss the input with a
    step of n + width.
    """
    if step <= n + width:
        return step, low
    meeting = min(max(0, (low - width) // step + 1), count - 1)  # the first that does not end before the input
    start = min(max(meeting * step - low, -width), n)
    return n + width, meeting * (n + width) - start


def _same(n: int, extent: int, stride: int) -> tuple[int, int]:
    total = -(-n // stride) * stride - stride + extent - n
    if not isinstance(total, int):
        return lax.padtype_to_pads([n], [extent], [stride], "SAME")[0]  # max(total, 0) of a symbolic total
    return max(total, 0) // 2, max(total, 0) - max(total, 0) // 2


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple | range) or getattr(value, "ndim", None) == 1


def _integer(value: Any, message: str) -> int:
    if isinstance(value, bool):
        raise TypeError(message)
    if isinstance(value, Tracer):
        raise TypeError(f"{message}; it is traced: make it static, as in jax.jit(..., static_argnames=...)")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(message) from None
