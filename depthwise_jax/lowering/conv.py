"""The three maps on lax.conv_general_dilated with feature_group_count and its linear transposes, on any platform.

For finite data this is what the maps mean.
"""

from __future__ import annotations

import math

import jax
from jax import Array, lax

from depthwise_jax.convolution import Convolution


def forward(x: Array, kernel: Array, convolution: Convolution, *, partitioned: int = 0) -> Array:
    """y, in the operands' common dtype."""
    del partitioned  # lax's convolution partitions itself
    window, layout = convolution.window, convolution.layout
    *size, channels, multiplier = kernel.shape
    batch = convolution.batch(x.shape)
    names = "DHW"[-window.rank :]
    operand = "".join(layout.arrange("N", names, "C"))
    y = lax.conv_general_dilated(
        x.reshape(math.prod(batch), *x.shape[len(batch) :]),
        kernel.reshape(*size, 1, channels * multiplier),
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=(operand, names + "IO", operand),
        feature_group_count=channels,
        precision=convolution.precision,
    )
    return y.reshape(*batch, *y.shape[1:])


def input_grad(g: Array, kernel: Array, convolution: Convolution, *, partitioned: int = 0) -> Array:
    """dx, in the operands' common dtype.

    With several kernels per channel it is a sum of single-kernel transposes: lax's own transpose is no depthwise
    convolution then, and partitions with an all-gather.
    """
    del partitioned
    layout = convolution.layout
    *_, channels, multiplier = kernel.shape
    x = jax.ShapeDtypeStruct(convolution.input_grad_shape(g.shape, kernel.shape), g.dtype)
    batch = convolution.batch(g.shape)
    split = g.reshape(layout.arrange(batch, convolution.out, channels, multiplier))
    axis = split.ndim - 1 if layout.channels == -1 else len(batch) + 1

    def transpose(m: int) -> Array:
        single_kernel = lax.slice_in_dim(kernel, m, m + 1, axis=-1)
        single_g = lax.index_in_dim(split, m, axis=axis, keepdims=False)
        return jax.linear_transpose(lambda x: forward(x, single_kernel, convolution), x)(single_g)[0]

    return sum((transpose(m) for m in range(1, multiplier)), start=transpose(0))


def kernel_grad(x: Array, g: Array, convolution: Convolution, *, partitioned: int = 0) -> Array:
    """dw, in the operands' common dtype."""
    del partitioned
    kernel = jax.ShapeDtypeStruct(convolution.kernel_grad_shape(x.shape, g.shape), x.dtype)
    return jax.linear_transpose(lambda kernel: forward(x, kernel, convolution), kernel)(g)[0]
