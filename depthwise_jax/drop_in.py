"""A drop-in for lax.conv_general_dilated: computes depthwise calls with this package, and passes all others to lax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from depthwise_jax._core.convolution import Convolution, hashable_precision
from depthwise_jax._core.layout import Layout
from depthwise_jax._core.window import Window, resolve
from depthwise_jax.functional import transposed_operands
from depthwise_jax.lowering import primitives


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Array:
    """`lax.conv_general_dilated`, with depthwise convolutions and transposed ones computed by this package.

    Pass it to a module that takes a convolution: `flax.linen.Conv(..., conv_general_dilated=conv_general_dilated)`.

    This package computes a call if there are several groups with one input channel each; if lhs and the result have the
    same layout, channels last or channels first; and if lhs, rhs and the result have the same floating or complex
    dtype. Calls with negative padding, "SAME_LOWER", an empty result, batch groups, an out_sharding, or a dilated lhs
    that does not come from a strided depthwise convolution are passed to lax unchanged.

    The arguments, results and errors are those of `lax.conv_general_dilated`.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((8, 28, 28, 32)), jnp.ones((3, 3, 1, 64))
        >>> numbers = ("NHWC", "HWIO", "NHWC")
        >>> y = conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=32)
        >>> y.shape
        (8, 14, 14, 64)
    """
    call = None
    if (
        feature_group_count > 1
        and batch_group_count == 1
        and out_sharding is None
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.inexact)
        and (preferred_element_type is None or jnp.dtype(preferred_element_type) == lhs.dtype)
    ):
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        geometry = (window_strides, padding, lhs_dilation, rhs_dilation)
        call = _recognise(lhs, rhs, *geometry, numbers, feature_group_count, precision)
    if call is None:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    primitive, x, kernel, convolution = call
    return primitives.bind(primitive, x, kernel, convolution=convolution, dtype=lhs.dtype, implementation=None)


def _recognise(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    numbers: lax.ConvDimensionNumbers,
    groups: int,
    precision: Any,
) -> tuple[Primitive, Array, Array, Convolution] | None:
    """A call as one of the primitives, with its operands and its convolution; None if it is not depthwise.

    The operands are x and a kernel (*window, C, M), for a transposed convolution as transposed_operands returns them.
    """
    rank = lhs.ndim - 2
    layouts = {
        (0, rank + 1, *range(1, rank + 1)): Layout(rank, "channels_last"),
        tuple(range(rank + 2)): Layout(rank, "channels_first"),
    }
    layout = layouts.get(tuple(numbers.lhs_spec)) if 1 <= rank <= 3 else None
    if layout is None or tuple(numbers.out_spec) != tuple(numbers.lhs_spec):
        return None
    features, inputs, *window_axes = numbers.rhs_spec
    channels, outputs = lhs.shape[layout.channels], rhs.shape[features]
    if channels != groups or rhs.shape[inputs] != 1 or outputs == 0 or outputs % groups:
        return None
    size, spatial = tuple(rhs.shape[axis] for axis in window_axes), layout.spatial_shape(lhs.shape)
    strides, dilation, spread = (tuple(s or (1,) * rank) for s in (window_strides, rhs_dilation, lhs_dilation))
    named = isinstance(padding, str)
    if named and padding.upper() not in ("SAME", "VALID"):
        return None
    if not named and any(amount < 0 for pair in padding for amount in pair):
        return None
    precision = hashable_precision(precision)

    def kernel() -> Array:  # a function, so calls that go to lax leave no trace of it
        arranged = jnp.transpose(rhs, (*window_axes, features, inputs))
        return arranged.reshape(*size, groups, outputs // groups)

    if all(step == 1 for step in spread):
        try:
            window, _ = resolve(spatial, size, strides, padding, dilation)
        except (TypeError, ValueError):
            return None  # an empty result, or an error that lax reports itself
        return primitives.conv_p, lhs, kernel(), Convolution(window, layout, spatial, precision)
    # The transpose in x of a convolution with strides `spread` convolves the dilated cotangent with the flipped kernel.
    if named or any(step != 1 for step in strides) or not all(isinstance(n, int) for n in spatial):
        return None
    extent = Window(size, spread, ((0, 0),) * rank, dilation).extent
    # Extra zeros at the end, fewer than a stride, are input positions that no window reaches.
    pads = tuple(
        (e - 1 - low, max(e - 1 - high, 0) if e - 1 - high > -step else -1)
        for e, step, (low, high) in zip(extent, spread, padding, strict=True)
    )
    out = tuple(
        (n - 1) * step + 1 + low + high - e + 1
        for n, step, (low, high), e in zip(spatial, spread, padding, extent, strict=True)
    )
    if any(n == 0 for n in spatial) or any(n < 1 for n in out) or any(amount < 0 for pair in pads for amount in pair):
        return None
    x, flipped = transposed_operands(lhs, lax.rev(kernel(), range(rank)), layout)
    convolution = Convolution(Window(size, spread, pads, dilation), layout, out, precision)
    return primitives.input_grad_p, x, flipped, convolution
