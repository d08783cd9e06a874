"""The three maps by lax.conv_general_dilated with feature_group_count and its linear transposes, on any platform.

For finite data these define the maps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from depthwise_jax._core.convolution import Convolution
from depthwise_jax._core.dtypes import widened
from depthwise_jax._core.layout import Layout
from depthwise_jax._core.window import Window
from depthwise_jax.lowering.call import Call

# Positions that a window may span along an axis. XLA's CPU convolution reads outside its arrays if a window of four
# taps spans 257,949,472 positions, or one of three 268,435,449; half of that was right in every case tried.
_EXTENT = 2**27
# Channels that one matrix product copies to the outputs' channels: the width of a TPU's registers and matrix units.
_BLOCK = 128


def refusal(call: Call) -> str | None:
    """Why lax's convolution cannot compute a call, or None."""
    extents = call.convolution.window.extent
    if call.platform == "cpu" and max(extents) > _EXTENT:
        return f"XLA's convolution is wrong for windows that span more than about {_EXTENT} positions: {extents}"
    if call.direction != "forward" and not jnp.issubdtype(call.dtype, jnp.inexact):
        return f"it is computed by jax.linear_transpose, which cannot transpose {call.dtype}"
    if call.direction == "kernel_grad" and _counts_replicas(call):
        # kernel_grad explains this.
        reason = "XLA's sum of a partitioned convolution counts replicas over the other mesh axes more than once"
        if not call.partitioning.whole_images:
            return f"{reason}, and the batch has no slabs to sum over: its size is symbolic or its images are sharded"
        if call.platform not in ("cpu", "tpu"):
            return f"{reason}, and sums over slabs were tried on cpu and tpu only"
    return None


def operand_dtype(call: Call) -> Any:
    """float32 for narrow floats on CPU, where XLA would round at each step of their sum; else the call's dtype.

    float32 also for packed maps, whose taps are summed outside the convolution.
    """
    return widened(call.dtype) if call.platform == "cpu" or call.packed else call.dtype


def forward(x: Array, kernel: Array, call: Call) -> Array:
    """y, in the operands' common dtype."""
    convolution = call.convolution
    window, layout = convolution.window, convolution.layout
    if _spreads(call):
        x, kernel = _spread(x, call.multiplier), _one_per_channel(kernel)
    *size, channels, multiplier = kernel.shape
    batch = convolution.batch(x.shape)
    names = "DHW"[-window.rank :]
    operand = "".join(layout.arrange("N", names, "C"))
    known = all(isinstance(amount, int) for pair in window.padding for amount in pair)
    y = lax.conv_general_dilated(
        x.reshape(math.prod(batch), *x.shape[len(batch) :]),
        kernel.reshape(*size, 1, channels * multiplier),
        window_strides=window.strides,
        padding=window.padding if known else "SAME",  # lax takes no symbolic pairs
        rhs_dilation=window.dilation,
        dimension_numbers=(operand, names + "IO", operand),
        feature_group_count=channels,
        precision=convolution.precision,
    )
    return y.reshape(*batch, *y.shape[1:])


def input_grad(g: Array, kernel: Array, call: Call) -> Array:
    """dx, in the operands' common dtype.

    With several kernels per channel it is a sum of single-kernel transposes, because lax's own transpose is then not a
    depthwise convolution, and is partitioned with an all-gather. On one GPU it is one call of cuDNN without copies.
    """
    x = jax.ShapeDtypeStruct(call.convolution.input_grad_shape(g.shape, kernel.shape), g.dtype)
    if _spreads(call) or (call.platform == "cuda" and call.partitioning.devices == 1):
        return jax.linear_transpose(lambda x: forward(x, kernel, call), x)(g)[0]

    def transpose(m: int, single_g: Array) -> Array:
        single_kernel = lax.slice_in_dim(kernel, m, m + 1, axis=-1)
        return jax.linear_transpose(lambda x: forward(x, single_kernel, call), x)(single_g)[0]

    first, *others = map(transpose, itertools.count(), _single(g, kernel.shape[-2], call.convolution))
    return sum(others, start=first)


def kernel_grad(x: Array, g: Array, call: Call) -> Array:
    """dw, in the operands' common dtype, or float32 if it is summed over slabs.

    XLA's partitioner adds up a convolution's partial sums over all devices, even over devices that hold the same part:
    on a mesh of several axes, a gradient whose batch is sharded over one of them comes out multiplied by the size of
    the others. It does partition a sum over an array's axis rightly. So in that case each slab of the batch has its own
    gradient, and the gradients are summed.

    With several kernels per channel there is one gradient for each kernel: the TPU compiler does not recognise their
    joint gradient as depthwise. On a GPU the joint gradient is one call of cuDNN without copies.
    """
    convolution, devices = call.convolution, call.partitioning.devices
    size = convolution.window.size
    if _has_phases(call):
        return kernel_grad(*_in_phases(x, g, call)).reshape(convolution.kernel_grad_shape(x.shape, g.shape))
    if call.platform == "cuda" and call.multiplier > 1:
        kernel = jax.ShapeDtypeStruct(convolution.kernel_grad_shape(x.shape, g.shape), x.dtype)
        return jax.linear_transpose(lambda kernel: forward(x, kernel, call), kernel)(g)[0]
    if _spreads(call):
        single = dataclasses.replace(call, channels=call.channels * call.multiplier, multiplier=1)
        # Without the barriers XLA would fuse the operations before and after into a slower convolution. By
        # benchmarks/tpu_floor.py, in thousands of cycles for 2 kernels of 3x3 per channel: the first barrier takes
        # (32, 56, 56, 64) from 312 to 135, the second (32, 28, 28, 128) from 83 to 75.
        x = lax.optimization_barrier(_spread(x, call.multiplier))
        gradient = kernel_grad(x, g, single).reshape(*size, 1, single.channels)
        gradient = lax.optimization_barrier(gradient).reshape(*size, single.channels)
        return jnp.stack([gradient[..., m :: call.multiplier] for m in range(call.multiplier)], axis=-1)
    channels = convolution.channels(x.shape)
    if _counts_replicas(call):
        parts = [_summed_over_slabs(x, part, convolution, devices) for part in _single(g, channels, convolution)]
    else:
        kernel = jax.ShapeDtypeStruct((*size, channels, 1), x.dtype)
        transpose = jax.linear_transpose(lambda kernel: forward(x, kernel, call), kernel)
        parts = [transpose(part)[0].reshape(*size, 1, channels) for part in _single(g, channels, convolution)]
    if call.partitioning.several_axes:
        # XLA computes them as (*window, 1, C). If shardings are also stated, it would move the reshape past the
        # optimizer's arithmetic that follows, which would then run in two layouts.
        parts = lax.optimization_barrier(parts)
    return lax.concatenate([part.reshape(*size, channels, 1) for part in parts], len(size) + 1)


def _spreads(call: Call) -> bool:
    """Whether _spread first copies x to the outputs' channels."""
    return (
        call.platform == "tpu"
        and call.multiplier > 1
        and call.convolution.layout.channels == -1
        and jnp.issubdtype(call.dtype, jnp.floating)
        # With sharded channels, a product over all channels would gather x.
        and call.partitioning.whole_channels
        and (call.channels % _BLOCK == 0 or call.channels < _BLOCK)
    )


def _has_phases(call: Call) -> bool:
    """Whether the kernel gradient is computed in the phases of _in_phases."""
    window = call.convolution.window
    strides = [s for s, d in zip(window.strides, window.dilation, strict=True) if d > 1]
    return (
        call.platform == "cuda"
        and bool(strides)
        and max(strides) == 1
        and not call.symbolic
        and not call.partitioning.sharded_rows
    )


def _in_phases(x: Array, g: Array, call: Call) -> tuple[Array, Array, Call]:
    """Operands and call of the same kernel gradient without dilation.

    Along an axis of dilation d and stride 1, the outputs o with o % d = p read one phase of the input, in which the
    taps are adjacent. So the phases become d times as many images, 1/d as long. On GPU XLA turns a dilated kernel
    gradient into a convolution with a window as large as the image, and an undilated one into cuDNN's own gradient;
    both move x and g once. In one dimension the phases stay in place, as a spatial axis with a window of one, and
    nothing moves.
    """
    convolution = call.convolution
    window, layout, rank = convolution.window, convolution.layout, convolution.window.rank
    lead = len(convolution.batch(x.shape))
    shifts = [low % d for d, (low, _) in zip(window.dilation, window.padding, strict=True)]

    def split(array: Array, shifts: Sequence[int]) -> tuple[Array, list[int]]:
        """The array with each spatial axis as (size, dilation), after `shifts` zeros, and the sizes."""
        spatial = layout.spatial_shape(array.shape)
        sizes = [-(-(n + shift) // d) for n, shift, d in zip(spatial, shifts, window.dilation, strict=True)]
        pads = [
            (shift, size * d - n - shift, 0)
            for n, shift, size, d in zip(spatial, shifts, sizes, window.dilation, strict=True)
        ]
        array = lax.pad(array, jnp.zeros((), array.dtype), layout.arrange([(0, 0, 0)] * lead, pads, (0, 0, 0)))
        pairs = [n for pair in zip(sizes, window.dilation, strict=True) for n in pair]
        return array.reshape(layout.arrange(array.shape[:lead], pairs, array.shape[layout.channels])), sizes

    x, inputs = split(x, shifts)
    g, outputs = split(g, [0] * rank)
    padding = tuple(
        pair if d == 1 else (pair[0] // d, o + k - 1 - pair[0] // d - n)
        for pair, d, o, k, n in zip(window.padding, window.dilation, outputs, window.size, inputs, strict=True)
    )
    if rank == 1:
        layout = Layout(2, layout.data_format)
        undilated = Window((*window.size, 1), (1, 1), (*padding, (0, 0)), (1, 1))
        spatial = (*inputs, *window.dilation)
    else:
        first = lead + (layout.channels != -1)
        axes, to = range(first + 1, first + 2 * rank, 2), range(lead, lead + rank)
        x, g = jnp.moveaxis(x, axes, to), jnp.moveaxis(g, axes, to)
        undilated = dataclasses.replace(window, padding=padding, dilation=(1,) * rank)
        spatial = tuple(inputs)
    convolution = Convolution(undilated, layout, spatial, convolution.precision)
    return x, g, dataclasses.replace(call, convolution=convolution)


def _spread(x: Array, multiplier: int) -> Array:
    """x (*batch, *spatial, C) with M adjacent copies of each channel, (*batch, *spatial, C*M).

    On TPU channels are adjacent in registers, and copying a channel next to itself shuffles every register. A matrix
    product with zeros and ones does the same on the matrix units. It runs in blocks of channels, so its work grows with
    C, not with C*C, and a NaN or an infinity in x (0 * NaN) reaches only the block of its channel, at its own position.
    """
    channels = x.shape[-1]
    block = min(channels, _BLOCK)
    matrix = jnp.repeat(jnp.eye(block, dtype=x.dtype), multiplier, axis=1)
    # At the highest precision a product with one is exact.
    spread = lax.dot_general(
        x.reshape(*x.shape[:-1], channels // block, block),
        matrix,
        (((x.ndim,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=x.dtype,
    )
    return spread.reshape(*x.shape[:-1], channels * multiplier)


def _one_per_channel(kernel: Array) -> Array:
    """A kernel (*window, C, M) as a kernel of C*M channels, (*window, C*M, 1)."""
    *size, channels, multiplier = kernel.shape
    return kernel.reshape(*size, channels * multiplier, 1)


def _counts_replicas(call: Call) -> bool:
    """Whether XLA's own kernel gradient may come out multiplied; on one mesh axis sharded arrays have no replicas."""
    return call.partitioning.several_axes and call.partitioning.replicas


def _single(g: Array, channels: int, convolution: Convolution) -> list[Array]:
    """The part of g (*batch, *out, C*M) that belongs to each of a channel's kernels: M arrays (*batch, *out, C)."""
    layout, batch = convolution.layout, convolution.batch(g.shape)
    multiplier = convolution.channels(g.shape) // channels
    split = g.reshape(layout.arrange(batch, convolution.out, channels, multiplier))
    axis = split.ndim - 1 if layout.channels == -1 else len(batch) + 1
    return [lax.index_in_dim(split, m, axis=axis, keepdims=False) for m in range(multiplier)]


def _summed_over_slabs(x: Array, g: Array, convolution: Convolution, devices: int) -> Array:
    """The sum of the kernel gradients of slabs of the batch, (*window, 1, C), in float32 for narrower floats.

    They are one convolution in which the slabs are a spatial axis. Over S slabs it has a window of S in steps of S - 1,
    and S - 1 zeros between the input's neighbours, so slab i of x meets only slab i of g. XLA recognises this as a
    batch axis, computes only that, and partitions it without communication.

    Args:
        x: (*batch, *spatial, C), or channels first.
        g: (*batch, *out, C), or channels first.
        convolution: the convolution.
        devices: the number of devices over which the compiler partitions the program.
    """
    window, layout = convolution.window, convolution.layout
    channels, rank = convolution.channels(x.shape), window.rank
    x, g = (a.reshape(-1, *a.shape[a.ndim - rank - 1 :]) for a in (x, g))
    # XLA mistakes an axis of one or two slabs for another kind of axis, so there are at least three.
    missing = max(0, 3 - x.shape[0])
    x, g = (lax.pad(a, jnp.zeros((), a.dtype), [(0, missing, 0), *[(0, 0, 0)] * (a.ndim - 1)]) for a in (x, g))
    slabs = _slabs(x.shape[0], devices)
    x, g = (a.reshape(slabs, -1, *a.shape[1:]) for a in (x, g))
    padding = [
        (low, (k - 1) * d + (o - 1) * s + 1 - low - n)  # as much as gives k outputs
        for k, s, d, (low, _), n, o in zip(
            window.size,
            window.strides,
            window.dilation,
            window.padding,
            convolution.spatial,
            convolution.out,
            strict=True,
        )
    ]
    # The sum runs over the images of a slab, and the channels are the batch. The slabs are the last spatial axis, next
    # to the images as in memory, so the TPU compiler copies neither x nor g.
    image = (x.ndim + layout.channels, 1, *(x.ndim + axis for axis in layout.spatial), 0)
    gradients = lax.conv_general_dilated(
        x,
        g,
        window_strides=(*window.dilation, slabs - 1),
        padding=[*padding, (0, 0)],
        lhs_dilation=(*(1,) * rank, slabs),
        rhs_dilation=(*window.strides, 1),
        dimension_numbers=lax.ConvDimensionNumbers(image, image, (rank + 1, rank + 2, *range(rank + 1))),
        batch_group_count=channels,
        precision=convolution.precision,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else None,
    )
    return gradients.sum(rank)


def _slabs(batch: int, devices: int) -> int:
    """The fewest slabs, at least three, that no sharding of a batch over some of the devices cuts."""
    shards = math.gcd(batch, devices)
    return next(slabs for slabs in range(shards, batch + 1, shards) if slabs >= 3 and batch % slabs == 0)
