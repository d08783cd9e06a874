"""The three maps as shifted multiply-adds in plain XLA: no convolution; portable, and partitioned without help.

Taps that fall outside the input contribute nothing, whatever they hold: a NaN in the kernel does not spread through the
padding. Windows of many taps run in a loop of unrolled rows, so that a program's size does not grow with the window.

Inside, every array has its channels split as (C, M), so that each map is a sum of broadcast products:

    forward       y[o, c, m]  = sum over t of x[o*s + t*d - low, c] * kernel[t, c, m]
    input_grad    dx[i, c]    = sum over t, m with (i + low - t*d) / s = o whole of g[o, c, m] * kernel[t, c, m]
    kernel_grad   dw[t, c, m] = sum over o of x[o*s + t*d - low, c] * g[o, c, m]
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from depthwise_jax.convolution import Convolution
from depthwise_jax.dtypes import widened
from depthwise_jax.layout import Layout
from depthwise_jax.lowering.call import Call

# Windows of more taps than this run in a loop: from there on unrolling gains nothing and compiles for seconds.
_UNROLLED = 64
# Positions along an axis, padding included, are counted in int32.
_POSITIONS = 2**31 - 1
# kernel_grad adds up this many products before each contraction.
_SLABS = 8

# An index along one axis: an int, or an array traced inside a loop over taps.
Index = Any
# The taps of a window along one axis, and where output 0 reads through each of them.
AxisTaps = tuple[range, range]
# One tap's position in the window, and where output 0 reads through it.
Tap = tuple[tuple[Index, ...], tuple[Index, ...]]


def refusal(call: Call) -> str | None:
    """Why taps cannot serve a call, or None."""
    convolution, window = call.convolution, call.convolution.window
    if call.symbolic:
        return f"it needs known spatial sizes, got the symbolic {convolution.spatial}"
    axes = zip(convolution.spatial, convolution.out, window.strides, window.padding, window.extent, strict=True)
    spans = tuple(low + n + (o - 1) * s + e for n, o, s, (low, _), e in axes)
    if max(spans) > _POSITIONS:
        return (
            f"it counts positions in 32 bits, and strides={window.strides} and dilation_rate={window.dilation} move "
            f"{convolution.out} outputs over {spans} of them"
        )
    return None


def operand_dtype(call: Call) -> Any:
    """float32 for narrow floats: XLA would sum them in steps that round."""
    return widened(call.dtype)


def forward(x: Array, kernel: Array, call: Call) -> Array:
    """y, in the operands' common dtype: one fused loop."""
    convolution, layout = call.convolution, call.convolution.layout
    x = _split(x, layout, convolution.channels(x.shape))
    taps = _window_taps(convolution)
    read = _reader(x, layout, taps, convolution.out, convolution.window.strides, call)

    def product(tap: Tap) -> Array:
        position, starts = tap
        part, inside = read(starts)
        return _where(inside, part * _weights(kernel, position, x.ndim, layout))

    return _merge(_sum(taps, product), layout)


def input_grad(g: Array, kernel: Array, call: Call) -> Array:
    """dx, in the operands' common dtype.

    Along an axis of stride s, the input positions i with i % s = p form phase p. Each phase meets its own taps, those
    with (p + low - t*d) % s = 0, at stride one; the phases are computed apart and interleaved, so no dilated g is ever
    made.
    """
    convolution = call.convolution
    window, layout = convolution.window, convolution.layout
    *_, channels, multiplier = kernel.shape
    g = _split(g, layout, channels)
    counts = [-(-n // s) for n, s in zip(convolution.spatial, window.strides, strict=True)]
    # Phases beyond the input have no position; an axis of none keeps one phase, which is as empty.
    numbers = [max(1, min(n, s)) for n, s in zip(convolution.spatial, window.strides, strict=True)]
    lead = g.shape[: g.ndim - window.rank - 2]
    spatial_axes = _spatial_axes(g.ndim, layout)
    multiplier_axis = _channel_axes(g.ndim, layout)[1]

    def phase(phases: tuple[int, ...]) -> Array:
        taps = [
            _phase_taps(k, d, s, p + low)
            for k, d, s, p, (low, _) in zip(
                window.size, window.dilation, window.strides, phases, window.padding, strict=True
            )
        ]
        read = _reader(g, layout, taps, counts, (1,) * window.rank, call)

        def product(tap: Tap) -> Array:
            position, starts = tap
            part, inside = read(starts)
            products = _where(inside, part * _weights(kernel, position, g.ndim, layout))
            return _total(lax.slice_in_dim(products, m, m + 1, axis=multiplier_axis) for m in range(multiplier))

        return _sum(taps, product)

    def interleave(phases: tuple[int, ...]) -> Array:
        """The phases of the axes that follow, interleaved, for one phase each of those that go before."""
        index = len(phases)
        if index == window.rank:
            return phase(phases)
        axis, number = spatial_axes[index], numbers[index]
        done = [c * m for c, m in zip(counts[index + 1 :], numbers[index + 1 :], strict=True)]
        shape = layout.arrange(lead, [*counts[: index + 1], *done], channels, 1)

        def zeros(phases: int) -> Array:
            return jnp.zeros((*shape[: axis + 1], phases, *shape[axis + 1 :]), g.dtype)

        # Of a stride above the window most phases meet no tap: each run of those is one piece.
        parts, end = [], 0
        for p in _met_phases(window.size[index], window.dilation[index], window.strides[index], window.padding[index]):
            if p < number:
                parts += [zeros(p - end)] * (p > end)
                parts.append(jnp.expand_dims(interleave((*phases, p)), axis + 1))
                end = p + 1
        parts += [zeros(number - end)] * (number > end)
        return lax.concatenate(parts, axis + 1).reshape(*shape[:axis], counts[index] * number, *shape[axis + 1 :])

    dx = interleave(())
    for axis, n in zip(spatial_axes, convolution.spatial, strict=True):
        dx = lax.slice_in_dim(dx, 0, n, axis=axis)
    return _merge(dx, layout)


def kernel_grad(x: Array, g: Array, call: Call) -> Array:
    """dw, in the operands' common dtype.

    XLA compiles a sum over positions for each channel into a strided scalar loop, but a matrix product with ones well.
    So the products of a few slabs of the batch and of the first spatial axis are added up elementwise, and the rows
    that remain are contracted with ones.

    Args:
        x: (*batch, *spatial, C), or channels first.
        g: (*batch, *out, C*M), likewise.
        call: the call. Slabs would cut across the shards of a partitioned program, so it sums as it stands.
    """
    convolution = call.convolution
    window, layout = convolution.window, convolution.layout
    channels = convolution.channels(x.shape)
    batch = math.prod(convolution.batch(g.shape))
    x, g = (_split(a.reshape(batch, *a.shape[a.ndim - window.rank - 1 :]), layout, channels) for a in (x, g))
    taps = _window_taps(convolution)
    read = _reader(x, layout, taps, convolution.out, window.strides, call)
    rows_axis = _spatial_axes(g.ndim, layout)[0]
    rows = convolution.out[0]
    images = _divisor(batch, _SLABS)
    bands = _divisor(rows, _SLABS // images)
    summed = (0, *_spatial_axes(g.ndim, layout))

    def slab(product: Array, image: int, band: int) -> Array:
        if images > 1:
            product = lax.slice_in_dim(product, image * batch // images, (image + 1) * batch // images, axis=0)
        if bands > 1:
            product = lax.slice_in_dim(product, band * rows // bands, (band + 1) * rows // bands, axis=rows_axis)
        return product

    def gradient(tap: Tap) -> Array:
        part, inside = read(tap[1])
        product = _where(inside, part * g)
        if call.partitioning.devices > 1:
            return product.sum(summed)
        product = _total(slab(product, *index) for index in itertools.product(range(images), range(bands)))
        ones = jnp.ones([product.shape[axis] for axis in summed], product.dtype)
        contracted = (tuple(range(len(summed))), summed)
        # At the highest precision: a sum must not be rounded to a matrix unit's input format.
        return lax.dot_general(ones, product, (contracted, ((), ())), precision=lax.Precision.HIGHEST)

    blocks, block = _blocks(taps)
    if blocks == 1:
        gradients = jnp.stack([gradient(tap) for tap in block(0)])
    else:
        gradients = lax.map(lambda i: jnp.stack([gradient(tap) for tap in block(i)]), jnp.arange(blocks))
    return gradients.reshape(*window.size, *gradients.shape[-2:])


def _window_taps(convolution: Convolution) -> list[AxisTaps]:
    window = convolution.window
    return [
        (range(k), range(-low, k * d - low, d))
        for k, d, (low, _) in zip(window.size, window.dilation, window.padding, strict=True)
    ]


def _met_phases(k: int, d: int, s: int, padding: tuple[int, int]) -> list[int]:
    """The phases that meet a tap, in order."""
    return sorted({(t * d - padding[0]) % s for t in range(min(k, s // math.gcd(d, s)))})


def _phase_taps(k: int, d: int, s: int, r: int) -> AxisTaps:
    """The taps t with (r - t*d) % s = 0, every s / gcd(d, s), and where position r, the phase's first, reads g."""
    step = s // math.gcd(d, s)
    first = next((t for t in range(min(k, step)) if (r - t * d) % s == 0), k)
    positions = range(first, k, step)
    start, shift = (r - first * d) // s, step * d // s
    return positions, range(start, start - len(positions) * shift, -shift)


def _blocks(taps: Sequence[AxisTaps]) -> tuple[int, Callable[[Any], list[Tap]]]:
    """The taps of a window in equal blocks, in order: how many, and the taps of the i-th."""
    sizes = [len(positions) for positions, _ in taps]
    if math.prod(sizes) <= _UNROLLED:
        return 1, lambda i: [_tap(taps, index) for index in itertools.product(*map(range, sizes))]
    *outer, last = sizes
    inner = _divisor(last, _UNROLLED)
    shape = (*outer, last // inner)

    def block(i: Array) -> list[Tap]:
        *index, row = jnp.unravel_index(i, shape)
        return [_tap(taps, (*index, row * inner + j)) for j in range(inner)]

    return math.prod(shape), block


def _tap(taps: Sequence[AxisTaps], index: Iterable[Index]) -> Tap:
    chosen = [
        (positions.start + i * positions.step, starts.start + i * starts.step)
        for (positions, starts), i in zip(taps, index, strict=True)
    ]
    return tuple(position for position, _ in chosen), tuple(start for _, start in chosen)


def _sum(taps: Sequence[AxisTaps], term: Callable[[Tap], Array]) -> Array:
    """The sum of a term over the taps."""
    blocks, block = _blocks(taps)
    if blocks == 1:
        return _total(map(term, block(0)))
    zeros = jax.eval_shape(lambda i: term(block(i)[0]), 0)
    return lax.fori_loop(
        0, blocks, lambda i, total: total + _total(map(term, block(i))), jnp.zeros(zeros.shape, zeros.dtype)
    )


def _reader(
    array: Array, layout: Layout, taps: Sequence[AxisTaps], counts: Sequence[int], steps: Sequence[int], call: Call
) -> Callable[[Sequence[Index]], tuple[Array, Array | None]]:
    """A function that reads `counts` positions, `steps` apart, from the starts of one of the taps.

    It returns what it read, and a mask of the positions that lie inside the array, None where all do.
    """
    axes = _spatial_axes(array.ndim, layout)
    lows = [min(*starts, 0) for _, starts in taps]
    ends = [max(starts) + (count - 1) * step + 1 for (_, starts), count, step in zip(taps, counts, steps, strict=True)]

    def pad(array: Array, first: int) -> Array:
        padding = [(0, 0, 0)] * array.ndim
        for axis, low, end in [*zip(axes, lows, ends, strict=True)][first:]:
            padding[axis] = (-low, max(0, end - array.shape[axis]), 0)
        return lax.pad(array, jnp.zeros((), array.dtype), padding)

    padded = pad(array, 0)

    @functools.cache
    def shifted(start: int) -> Array:
        rows = _shift(array, axes[0], start, counts[0], steps[0])
        # The barrier keeps XLA's CPU compiler from padding again for each tap.
        return lax.optimization_barrier(pad(rows, 1))

    def read(starts: Sequence[Index]) -> tuple[Array, Array | None]:
        # Of sharded rows, slices of one padded array would send more than the halo, and more on more devices.
        apart = call.partitioning.sharded_rows and isinstance(starts[0], int)
        part, inside = shifted(starts[0]) if apart else padded, None
        for axis, start, low, end, count, step in zip(axes, starts, lows, ends, counts, steps, strict=True):
            n, span = array.shape[axis], (count - 1) * step + 1
            if isinstance(start, int):
                if not (apart and axis == axes[0]):
                    part = lax.slice_in_dim(part, start - low, start - low + span, step, axis)
                within = start >= 0 and start + span <= n
            else:
                part = lax.dynamic_slice_in_dim(part, start - low, span, axis)
                part = lax.slice_in_dim(part, 0, span, step, axis)
                within = low == 0 and end <= n
            if not within:
                shape = [count if a == axis else 1 for a in range(array.ndim)]
                position = start + step * lax.broadcasted_iota(jnp.int32, shape, axis)
                mask = (position >= 0) & (position < n)
                inside = mask if inside is None else inside & mask
        return part, inside

    return read


def _shift(array: Array, axis: int, start: int, count: int, step: int) -> Array:
    """`count` positions, `step` apart, from `start`, zeros outside the array: of sharded rows only the halo moves."""
    offset, phase = divmod(start, step)
    zero = jnp.zeros((), array.dtype)

    def pad(array: Array, low: int, high: int) -> Array:
        return lax.pad(array, zero, [(low, high, 0) if a == axis else (0, 0, 0) for a in range(array.ndim)])

    if step > 1:
        array = pad(array, 0, -array.shape[axis] % step)
        array = array.reshape(*array.shape[:axis], -1, step, *array.shape[axis + 1 :])
        array = lax.index_in_dim(array, phase, axis + 1, keepdims=False)
    return pad(array, -offset, offset + count - array.shape[axis])


def _weights(kernel: Array, position: Sequence[Index], ndim: int, layout: Layout) -> Array:
    """One tap's (C, M) weights, shaped to broadcast against an array of split channels."""
    channels = kernel.shape[-2:]
    if all(isinstance(t, int) for t in position):
        weights = lax.slice(kernel, (*position, 0, 0), (*(t + 1 for t in position), *channels))
    else:
        start = [jnp.asarray(i, jnp.int32) for i in (*position, 0, 0)]
        weights = lax.dynamic_slice(kernel, start, (*(1,) * layout.rank, *channels))
    return weights.reshape(layout.arrange((1,) * (ndim - layout.rank - 2), (1,) * layout.rank, *channels))


def _split(array: Array, layout: Layout, channels: int) -> Array:
    """(*batch, *spatial, C*M) as (*batch, *spatial, C, M), or (*batch, C, M, *spatial)."""
    lead = array.shape[: array.ndim - layout.rank - 1]
    multiplier = array.shape[layout.channels] // channels
    return array.reshape(layout.arrange(lead, layout.spatial_shape(array.shape), channels, multiplier))


def _merge(array: Array, layout: Layout) -> Array:
    """The inverse of _split."""
    lead = array.shape[: array.ndim - layout.rank - 2]
    spatial = [array.shape[axis] for axis in _spatial_axes(array.ndim, layout)]
    channels, multiplier = (array.shape[axis] for axis in _channel_axes(array.ndim, layout))
    return array.reshape(layout.arrange(lead, spatial, channels * multiplier))


def _spatial_axes(ndim: int, layout: Layout) -> tuple[int, ...]:
    """The spatial axes of an array of split channels."""
    first = ndim - layout.rank - (2 if layout.channels == -1 else 0)
    return tuple(range(first, first + layout.rank))


def _channel_axes(ndim: int, layout: Layout) -> tuple[int, int]:
    """The axes C and M of an array of split channels."""
    first = ndim - 2 - (0 if layout.channels == -1 else layout.rank)
    return first, first + 1


def _where(inside: Array | None, array: Array) -> Array:
    return array if inside is None else jnp.where(inside, array, jnp.zeros((), array.dtype))


def _total(terms: Iterable[Array]) -> Array:
    first, *rest = terms
    return sum(rest, start=first)


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of a number up to a limit; 1 for an empty or symbolic axis."""
    if not isinstance(number, int) or number == 0:
        return 1
    return max(d for d in range(1, limit + 1) if number % d == 0)
