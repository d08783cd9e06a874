"""The three maps as shifted multiply-adds in plain XLA, without a convolution: portable, and partitioned by XLA itself.

Taps that fall outside the input contribute nothing, whatever their value: a NaN in the kernel does not spread through
the padding. (On TPU it does, see masks_padding.) Windows of many taps run in a loop of unrolled rows, so a program's
size does not grow with the window.

One operand is padded once, in its own dtype, and each tap reads a slice of it. Narrow floats are widened after that:
XLA then fuses padding, slices and sum into one loop that reads the operands once, and no wide array is ever in memory.
(A few images on TPU are the exception, see is_widened_once.)

Inside, the channels of every array are split as (C, M) if there are several kernels per channel, and each map is a sum
of broadcast products:

    forward       y[o, c, m]  = sum over t of x[o*s + t*d - low, c] * kernel[t, c, m]
    input_grad    dx[i, c]    = sum over t, m with an integer o = (i + low - t*d) / s of g[o, c, m] * kernel[t, c, m]
    kernel_grad   dw[t, c, m] = sum over o of x[o*s + t*d - low, c] * g[o, c, m]
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from depthwise_jax._core.convolution import Convolution
from depthwise_jax._core.dtypes import widened
from depthwise_jax.lowering.call import Call

# Windows of more taps run in a loop: beyond this, unrolling gains nothing and compiles for seconds.
_UNROLLED = 64
# Positions along an axis, padding included, are counted in int32.
_POSITIONS = 2**31 - 1
# The most positions of a mask that is a constant of the program, a byte each.
_CONSTANT = 2**16
# kernel_grad adds up this many parts of a product before each contraction.
_PARTS = 8
# XLA's TPU compiler computes both gradients of windows of up to 8 taps in one loop. That pays up to this many. By
# benchmarks/tpu_floor.py, with this number at 8 and at 0, in thousands of cycles for (8, 2048, 2048): a window of 6
# takes 472 in one loop and 492 in two, a window of 7 takes 774 and 580, a window of 8 takes 1,029 and 638.
_JOINED = 6
# The rows and the lanes of a TPU's registers.
ROWS, _LANES = 8, 128
# XLA's TPU compiler keeps the padded and widened operand of a few images in VMEM, so no byte of HBM is moved for it,
# and each tap is spared a conversion and a mask. By benchmarks/tpu_floor.py, in thousands of cycles for 3x3 with and
# without: (4, 56, 56, 128) takes 18.7 and 23.4 forward, 19.1 and 25.8 for the kernel's gradient, 35.3 and 50.0 for both
# gradients; (4, 28, 28, 256) 10.3 and 14.6 forward. Up to this many bytes it is stored, a quarter of a v5e's VMEM.
_WIDENED_BYTES = 2**25
# Narrower images than this do not gain if they lie side by side: (4, 14, 14, 512) 7.8 and 6.7 forward.
_WIDENED_SIDE_BY_SIDE = 16

# An index along one axis: an int, or an array traced inside a loop over taps.
Index = Any
# The taps of a window along one axis, and where output 0 reads through each of them.
AxisTaps = tuple[range, range]
# One tap's position in the window, and where output 0 reads through it.
Tap = tuple[tuple[Index, ...], tuple[Index, ...]]
# Maps the position that output 0 reads to the values that all outputs read, and a mask of those inside (None if all).
Read = Callable[[Sequence[Index]], tuple[Array, Array | None]]


def refusal(call: Call) -> str | None:
    """Why taps cannot compute a call, or None."""
    convolution, window = call.convolution, call.convolution.window
    if call.symbolic:
        return f"it needs known spatial sizes, not the symbolic {convolution.spatial}"
    axes = zip(convolution.spatial, convolution.out, window.strides, window.padding, window.extent, strict=True)
    spans = tuple(low + n + (o - 1) * s + e for n, o, s, (low, _), e in axes)
    if max(spans) > _POSITIONS:
        return (
            f"it counts positions in 32 bits, but with strides={window.strides} and dilation_rate={window.dilation} "
            f"{convolution.out} outputs over {spans} positions are read"
        )
    return None


def operand_dtype(call: Call) -> Any:
    """float32 for narrow floats on CPU, else the call's dtype; values are then widened where they are multiplied.

    XLA's CPU compiler would widen each position once for every tap that reads it.
    """
    return widened(call.dtype) if call.platform == "cpu" else call.dtype


def keeps_value(call: Call) -> bool:
    """Whether a value must be kept for the backward pass.

    XLA's TPU compiler would recompute an elementwise sum there, within a matrix product that gains nothing from it: a
    training step with a window of 4 takes 1.18 times as long (benchmarks/results/tpu_floor.md, "Blocks").
    """
    return call.differentiated and call.platform == "tpu"


def masks_padding(call: Call) -> bool:
    """Whether products with the padding are masked, to keep a kernel that is not finite from giving NaN there.

    On TPU the padding's zeros are multiplied too. With masks each map of a window of 4 takes as long on its own, but
    both gradients in one loop take 1.23 times as long (benchmarks/results/tpu_floor.md, "Training").
    """
    return call.platform != "tpu"


def is_side_by_side(call: Call) -> bool:
    """Whether XLA's TPU compiler lays images side by side in registers, where each row is of another image.

    It lays a single image along its width if that is a multiple of the rows, or if the number of images is odd.
    """
    batch = call.partitioning.batch
    return batch is not None and batch % 2 == 0 and call.convolution.spatial[-1] % ROWS != 0


def is_widened_once(call: Call) -> bool:
    """Whether the padded operand is widened once and stored on TPU, instead of widened at each read."""
    convolution, partitioning, itemsize = call.convolution, call.partitioning, jnp.dtype(call.sum_dtype).itemsize
    window, batch = convolution.window, partitioning.batch
    if call.platform != "tpu" or batch is None or call.symbolic or partitioning.sharded_rows:
        return False
    if window.rank == 1 or max(window.strides) > 1 or call.multiplier > 1 or jnp.dtype(call.dtype).itemsize == itemsize:
        return False
    if is_side_by_side(call) and convolution.spatial[-1] < _WIDENED_SIDE_BY_SIDE:
        return False
    positions = math.prod(n + extent - 1 for n, extent in zip(convolution.spatial, window.extent, strict=True))
    lanes = -(-call.channels // _LANES) * _LANES
    return batch * positions * lanes * itemsize <= _WIDENED_BYTES


def forward(x: Array, kernel: Array, call: Call) -> Array:
    """y, in the dtype of the sums: one fused loop."""
    convolution, layout = call.convolution, call.convolution.layout
    channels, _, axes = _channels(kernel.shape)
    x = layout.split(x, *channels)
    taps = _window_taps(convolution)
    spatial_axes = layout.split_spatial(x.ndim, axes)
    read = _reader(x, spatial_axes, taps, convolution.out, convolution.window.strides, call)

    def product(tap: Tap) -> Array:
        position, starts = tap
        part, inside = read(starts)
        return _where(inside, lax.mul(_widen(part, call), _weights(kernel, position, x.ndim, call)))

    return layout.merge(_sum(taps, product), axes)


def input_grad(g: Array, kernel: Array, call: Call) -> Array:
    """dx, in the dtype of the sums.

    Along an axis of stride s, the input positions i with i % s = p form phase p. Each phase meets its own taps, those
    with (p + low - t*d) % s = 0, at stride one. The phases are computed separately and interleaved, without a dilated
    g.
    """
    convolution = call.convolution
    window, layout = convolution.window, convolution.layout
    channels, outputs, axes = _channels(kernel.shape)
    g = layout.split(g, *outputs)
    counts = [-(-n // s) for n, s in zip(convolution.spatial, window.strides, strict=True)]
    # Phases beyond the input have no position; an empty axis keeps one phase, which is empty too.
    numbers = [max(1, min(n, s)) for n, s in zip(convolution.spatial, window.strides, strict=True)]
    lead = g.shape[: g.ndim - window.rank - axes]
    spatial_axes = layout.split_spatial(g.ndim, axes)
    *_, last_axis = layout.split_channels(g.ndim, axes)

    def phase(phases: tuple[int, ...]) -> Array:
        taps = _phases_taps(convolution, phases)
        if _is_joined(call):
            # From the lowest position up: for a window of 4 at (16, 1024, 1024) the loop of both gradients then takes
            # 199 thousand cycles, and in the taps' order 216.
            taps = [(positions[::-1], starts[::-1]) for positions, starts in taps]
        read = _reader(g, spatial_axes, taps, counts, (1,) * window.rank, call)

        def product(tap: Tap) -> Array:
            position, starts = tap
            part, inside = read(starts)
            products = _where(inside, lax.mul(_widen(part, call), _weights(kernel, position, g.ndim, call)))
            if axes == 1:
                return products
            return _total(lax.slice_in_dim(products, m, m + 1, axis=last_axis) for m in range(outputs[-1]))

        return _sum(taps, product)

    def interleave(phases: tuple[int, ...]) -> Array:
        """The phases of the following axes, interleaved, for one phase of each preceding axis."""
        index = len(phases)
        if index == window.rank:
            return phase(phases)
        if window.strides[index] == 1:
            return interleave((*phases, 0))
        axis, number = spatial_axes[index], numbers[index]
        done = [c * m for c, m in zip(counts[index + 1 :], numbers[index + 1 :], strict=True)]
        shape = layout.arrange(lead, [*counts[: index + 1], *done], *channels)

        def zeros(phases: int) -> Array:
            return jnp.zeros((*shape[: axis + 1], phases, *shape[axis + 1 :]), call.sum_dtype)

        # With a stride above the window most phases meet no tap: each run of them is one piece of zeros.
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
    return layout.merge(dx, axes)


def kernel_grad(x: Array, g: Array, call: Call) -> Array:
    """dw, in the dtype of the sums.

    At stride one g moves and x stays, as in input_grad, so XLA computes both gradients of a training step in one loop
    that reads x and g once:

        dw[t, c, m] = sum over i of x[i, c] * g[i + low - t*d, c, m]

    XLA's CPU compiler turns a sum over positions for each channel into a strided scalar loop, but a matrix product with
    ones is fast. So on CPU a few parts of the batch and of the first spatial axis are added up elementwise, and the
    remaining rows are contracted with ones.

    Args:
        x: (*batch, *spatial, C), or channels first.
        g: (*batch, *out, C*M), or channels first.
        call: the call. A partitioned program is summed without parts, which would cut across shards.
    """
    convolution = call.convolution
    window, layout = convolution.window, convolution.layout
    kernel = convolution.kernel_grad_shape(x.shape, g.shape)
    channels, outputs, axes = _channels(kernel)
    batch = math.prod(convolution.batch(g.shape))
    x, g = (a.reshape(batch, *a.shape[a.ndim - window.rank - 1 :]) for a in (x, g))
    x, g = layout.split(x, *channels), layout.split(g, *outputs)
    if max(window.strides) == 1:
        if call.platform == "tpu" and not _is_joined(call) and not is_widened_once(call):
            g = lax.optimization_barrier(g)
        still, moving, counts, taps = x, g, convolution.spatial, _phases_taps(convolution, (0,) * window.rank)
    else:
        still, moving, counts, taps = g, x, convolution.out, _window_taps(convolution)
    spatial_axes = layout.split_spatial(g.ndim, axes)
    read = _reader(moving, spatial_axes, taps, counts, window.strides, call)
    still = _widen(still, call)
    summed = (0, *spatial_axes)
    images = _divisor(batch, _PARTS)
    bands = _divisor(counts[0], _PARTS // images)

    def part_of(product: Array, image: int, band: int) -> Array:
        for axis, size, parts, i in ((0, batch, images, image), (spatial_axes[0], counts[0], bands, band)):
            if parts > 1:
                product = lax.slice_in_dim(product, i * size // parts, (i + 1) * size // parts, axis=axis)
        return product

    def gradient(tap: Tap) -> Array:
        part, inside = read(tap[1])
        product = _where(inside, lax.mul(_widen(part, call), still))
        if call.partitioning.devices > 1 or call.platform == "tpu":
            return product.sum(summed)
        product = _total(part_of(product, *index) for index in itertools.product(range(images), range(bands)))
        ones = jnp.ones([product.shape[axis] for axis in summed], product.dtype)
        contracted = (tuple(range(len(summed))), summed)
        # At the highest precision: a sum must not be rounded to a matrix unit's input format.
        return lax.dot_general(ones, product, (contracted, ((), ())), precision=lax.Precision.HIGHEST)

    blocks, block = _blocks(taps)
    if blocks == 1:
        gradients = jnp.stack([gradient(tap) for tap in block(0)])
    else:
        gradients = lax.map(lambda i: jnp.stack([gradient(tap) for tap in block(i)]), jnp.arange(blocks))
    return gradients.reshape(kernel)


def _is_joined(call: Call) -> bool:
    """Whether XLA should compute both gradients in one loop."""
    return call.platform == "tpu" and math.prod(call.convolution.window.size) <= _JOINED


def _channels(kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The channel axes of x and of y for a kernel of this shape, and their number.

    With one kernel per channel there is one axis: XLA's TPU compiler does not fuse some sums over an axis of size one.
    """
    *_, channels, multiplier = kernel
    if multiplier == 1:
        return (channels,), (channels,), 1
    return (channels, 1), (channels, multiplier), 2


def _window_taps(convolution: Convolution) -> list[AxisTaps]:
    window = convolution.window
    return [
        (range(k), range(-low, k * d - low, d))
        for k, d, (low, _) in zip(window.size, window.dilation, window.padding, strict=True)
    ]


def _phases_taps(convolution: Convolution, phases: Sequence[int]) -> list[AxisTaps]:
    """The taps that a phase of input_grad meets along each axis."""
    window = convolution.window
    return [
        _phase_taps(k, d, s, p + low)
        for k, d, s, p, (low, _) in zip(
            window.size, window.dilation, window.strides, phases, window.padding, strict=True
        )
    ]


def _met_phases(k: int, d: int, s: int, padding: tuple[int, int]) -> list[int]:
    """The phases that meet a tap, in order."""
    return sorted({(t * d - padding[0]) % s for t in range(min(k, s // math.gcd(d, s)))})


def _phase_taps(k: int, d: int, s: int, r: int) -> AxisTaps:
    """The taps t with (r - t*d) % s = 0, s / gcd(d, s) apart, and where position r, the phase's first, reads g."""
    step = s // math.gcd(d, s)
    first = next((t for t in range(min(k, step)) if (r - t * d) % s == 0), k)
    positions = range(first, k, step)
    start, shift = (r - first * d) // s, step * d // s
    return positions, range(start, start - len(positions) * shift, -shift)


def _blocks(taps: Sequence[AxisTaps]) -> tuple[int, Callable[[Any], list[Tap]]]:
    """The number of equal blocks of a window's taps, in order, and a function from i to the taps of the i-th."""
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


@dataclass(frozen=True)
class _Axis:
    """A spatial axis of an array, along which `count` positions, `step` apart, are read from each start.

    Attributes:
        axis: its number in the array.
        size: the array's size along it.
        starts: the starts of all taps.
        count, step: the number of positions, and their distance.
        constant: whether the masks of known starts are constants of the program.
    """

    axis: int
    size: int
    starts: range
    count: int
    step: int
    constant: bool

    @property
    def span(self) -> int:
        """The span of one start's positions."""
        return (self.count - 1) * self.step + 1

    @property
    def padding(self) -> tuple[int, int]:
        """How far the positions reach beyond the array on either side."""
        return max(0, -min(self.starts)), max(0, max(self.starts) + self.span - self.size)

    def inside(self, start: Index, ndim: int) -> Array:
        """Which of one start's positions lie inside the array."""
        shape = [self.count if axis == self.axis else 1 for axis in range(ndim)]
        # Steps from the start: the first position inside the array, and the first one beyond it.
        first, end = -(start // self.step), -((start - self.size) // self.step)
        if self.constant:
            index = np.arange(self.count, dtype=np.int32).reshape(shape)
            return jnp.asarray((index >= first) & (index < end))
        index = lax.broadcasted_iota(jnp.int32, shape, self.axis)
        first, end = (lax.convert_element_type(limit, jnp.int32) for limit in (first, end))
        return lax.bitwise_and(lax.ge(index, first), lax.lt(index, end))


def _reader(
    array: Array,
    spatial_axes: Sequence[int],
    taps: Sequence[AxisTaps],
    counts: Sequence[int],
    steps: Sequence[int],
    call: Call,
) -> Read:
    """The function that reads `counts` positions, `steps` apart, from the starts of one of the taps."""
    axes = [
        # XLA's GPU compiler computes a mask in a separate kernel, and starts it at every call.
        _Axis(axis, array.shape[axis], starts, count, step, call.platform == "cuda" and count <= _CONSTANT)
        for axis, (_, starts), count, step in zip(spatial_axes, taps, counts, steps, strict=True)
    ]
    if _blocks(taps)[0] > 1:
        return _read_in_loop(array, axes)
    masked = masks_padding(call)
    if call.partitioning.sharded_rows:
        return _read_shards(array, axes, masked)
    return _read_slices(array, axes, masked, call.sum_dtype if is_widened_once(call) else None)


def _read_slices(array: Array, axes: Sequence[_Axis], masked: bool, stored: Any) -> Read:
    """Slices of the padded array, which is stored in a dtype first unless that is None."""
    padded, inside = _pad(array, axes), _insides(axes, array.ndim)
    if stored is not None:
        padded = lax.optimization_barrier(padded.astype(stored))

    def read(starts: Sequence[Index]) -> tuple[Array, Array | None]:
        part = padded
        for axis, start in zip(axes, starts, strict=True):
            first = start + axis.padding[0]
            part = lax.slice_in_dim(part, first, first + axis.span, axis.step, axis.axis)
        return part, inside(starts) if masked else None

    return read


def _read_shards(array: Array, axes: Sequence[_Axis], masked: bool) -> Read:
    """Reads an array whose first spatial axis is sharded.

    Slices of one padded array would send more than the halo, growing with the number of devices. So along that axis the
    array is moved for each start.
    """
    first, *others = axes
    inside = _insides(axes, array.ndim)

    @functools.cache
    def shifted(start: int) -> Array:
        # The barrier keeps XLA's CPU compiler from padding again for each tap.
        return lax.optimization_barrier(_pad(_shift(array, first, start), others))

    def read(starts: Sequence[Index]) -> tuple[Array, Array | None]:
        part = shifted(starts[0])
        for axis, start in zip(others, starts[1:], strict=True):
            low = start + axis.padding[0]
            part = lax.slice_in_dim(part, low, low + axis.span, axis.step, axis.axis)
        return part, inside(starts) if masked else None

    return read


def _read_in_loop(array: Array, axes: Sequence[_Axis]) -> Read:
    """Slices of the padded array from starts that are known only when the program runs."""
    padded = _pad(array, axes)

    def read(starts: Sequence[Index]) -> tuple[Array, Array | None]:
        part, inside = padded, None
        for axis, start in zip(axes, starts, strict=True):
            part = lax.dynamic_slice_in_dim(part, start + axis.padding[0], axis.span, axis.axis)
            part = lax.slice_in_dim(part, 0, axis.span, axis.step, axis.axis)
            if any(axis.padding):
                inside = _both(inside, axis.inside(start, array.ndim))
        return part, inside

    return read


def _pad(array: Array, axes: Sequence[_Axis]) -> Array:
    """An array with zeros at the ends of some axes."""
    padding = [(0, 0, 0)] * array.ndim
    for axis in axes:
        padding[axis.axis] = (*axis.padding, 0)
    return lax.pad(array, jnp.zeros((), array.dtype), padding)


def _insides(axes: Sequence[_Axis], ndim: int) -> Callable[[Sequence[int]], Array | None]:
    """The function that tells which positions read from known starts lie inside the array; None if all do."""
    # The taps share an axis' masks: making each once takes a sixth off the time to lower a call.
    masks = functools.cache(lambda index, start: axes[index].inside(start, ndim))

    def inside(starts: Sequence[int]) -> Array | None:
        known = None
        for index, (axis, start) in enumerate(zip(axes, starts, strict=True)):
            if start < 0 or start + axis.span > axis.size:
                known = _both(known, masks(index, start))
        return known

    return inside


def _both(inside: Array | None, mask: Array) -> Array:
    return mask if inside is None else lax.bitwise_and(inside, mask)


def _shift(array: Array, along: _Axis, start: int) -> Array:
    """The values read along an axis from a start, with zeros outside the array; if sharded, only the halo moves."""
    axis, step = along.axis, along.step
    offset, phase = divmod(start, step)
    zero = jnp.zeros((), array.dtype)

    def pad(array: Array, low: int, high: int) -> Array:
        return lax.pad(array, zero, [(low, high, 0) if a == axis else (0, 0, 0) for a in range(array.ndim)])

    if step > 1:
        array = pad(array, 0, -array.shape[axis] % step)
        array = array.reshape(*array.shape[:axis], -1, step, *array.shape[axis + 1 :])
        array = lax.index_in_dim(array, phase, axis + 1, keepdims=False)
    return pad(array, -offset, offset + along.count - array.shape[axis])


def _weights(kernel: Array, position: Sequence[Index], ndim: int, call: Call) -> Array:
    """One tap's weights, widened and shaped to be multiplied with an array of `ndim` axes of split channels."""
    layout, (_, outputs, axes) = call.convolution.layout, _channels(kernel.shape)
    if all(isinstance(t, int) for t in position):
        weights = lax.slice(kernel, (*position, 0, 0), (*(t + 1 for t in position), *kernel.shape[-2:]))
    else:
        start = [jnp.asarray(i, jnp.int32) for i in (*position, 0, 0)]
        weights = lax.dynamic_slice(kernel, start, (*(1,) * layout.rank, *kernel.shape[-2:]))
    shape = layout.arrange((1,) * (ndim - layout.rank - axes), (1,) * layout.rank, *outputs)
    return lax.reshape(_widen(weights, call), shape)


def _widen(array: Array, call: Call) -> Array:
    return lax.convert_element_type(array, call.sum_dtype)


def _where(inside: Array | None, array: Array) -> Array:
    if inside is None:
        return array
    inside = lax.broadcast_in_dim(inside, array.shape, range(array.ndim))
    return lax.select(inside, array, lax.full_like(array, 0))


def _total(terms: Iterable[Array]) -> Array:
    return functools.reduce(lax.add, terms)


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of a number up to a limit; 1 for an empty or symbolic axis."""
    if not isinstance(number, int) or number == 0:
        return 1
    return max(d for d in range(1, limit + 1) if number % d == 0)
