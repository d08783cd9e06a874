"""Norms along axes of an array, exact to a few ulp, and rounding that does not undo a bound."""

import math
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Axis = int | tuple[int, ...] | Literal["window"] | None


def checked_axis(axis: Any, name: str) -> Axis:
    """An `axis` argument, with a list as a tuple.

    Raises:
        TypeError: it is not an int, several ints, "window" or None; the message names `name`.
    """
    if axis is None or (isinstance(axis, str) and axis == "window"):
        return axis
    try:
        if isinstance(axis, list | tuple):
            return tuple(_index(entry) for entry in axis)
        return _index(axis)
    except TypeError:
        raise TypeError(f"{name}: axis must be an int, a tuple of ints, 'window' or None; got {axis!r}") from None


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def axes_of(axis: Axis, ndim: int, name: str) -> tuple[int, ...]:
    """The axes that `axis` names in an array of rank `ndim`, as non-negative numbers.

    Raises:
        ValueError: the array lacks an axis, or an axis is named twice; the message names `name`.
    """
    if axis == "window":
        if ndim < 3:
            raise ValueError(f"{name}: axis='window' needs a kernel (*window, C, M) of rank 3 or more; got rank {ndim}")
        return tuple(range(ndim - 2))
    axes = tuple(range(ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)  # type: ignore[arg-type]
    positive = tuple(entry + ndim if entry < 0 else entry for entry in axes)
    if len(set(positive)) < len(axes) or not all(0 <= entry < ndim for entry in positive):
        raise ValueError(f"{name}: axis={axis!r} must name different axes of an array of rank {ndim}")
    return positive


def plain_norms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Each slice's norm as Keras computes it; its squares can overflow or underflow too."""
    return _sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))


def slice_norms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Each slice's norm, right to a few eps; for short slices computed cheaply, which overflows where Keras' does."""
    return plain_norms(x, axes) if _is_short(x, axes) else polar(x, axes)[2]


def sum_error(x: jax.Array, axes: tuple[int, ...]) -> float:
    """The error in eps of the sum of squares in `slice_norms`: half an eps for each number of a plain sum."""
    return _count(x, axes) / 2 if _is_short(x, axes) else 0


def polar(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each slice as direction / length, and its norm, for any magnitude and number of elements.

    Returns:
        The direction, x over a power of two near its largest element; the direction's length, with 1 for 0; and the
        norm of x. Length and norm are right to 3 eps / 2 plus the small error of the last sum.
    """
    info = jnp.finfo(x.dtype)
    x, unit = _without_subnormal_slices(x, axes)
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    power = lax.reduce_precision(largest, exponent_bits=info.nexp, mantissa_bits=0)
    power = lax.stop_gradient(jnp.clip(power, info.tiny, 1 / info.tiny))  # 1 / power is a normal number too
    direction = x * (1 / power)
    # The squares, at most 16, are cut at a grid coarse enough for the sum of the heads to be exact in any order; the
    # tails are tiny, and so is the error of their sum. A plain sum would lose many small elements next to a large one.
    squares = jnp.square(direction)
    grid = 2.0 ** (info.nmant - 3 - math.ceil(math.log2(_count(x, axes))))
    heads = (squares * grid).astype(jnp.int32 if info.bits == 32 else jnp.int64)
    tails = squares - heads.astype(x.dtype) * (1 / grid)
    total = jnp.sum(heads, axes, keepdims=True, dtype=heads.dtype).astype(x.dtype) * (1 / grid)
    length = _sqrt(total + jnp.sum(tails, axes, keepdims=True))
    return direction, jnp.where(length == 0, 1, length), power * length * unit


def rounded(x: jax.Array, dtype: Any, down: jax.Array, up: jax.Array) -> jax.Array:
    """`x` in a narrower dtype: toward zero where `down`, away from it where `up`, else to nearest."""
    # XLA may keep more precision than requested; the barrier prevents that.
    nearest = lax.optimization_barrier(x.astype(dtype))
    change = jnp.abs(nearest.astype(x.dtype)) - jnp.abs(x)
    inward = jnp.nextafter(nearest, jnp.zeros_like(nearest))
    outward = jnp.nextafter(nearest, jnp.copysign(jnp.asarray(jnp.inf, dtype), nearest))
    return jnp.where(down & (change > 0), inward, jnp.where(up & (change < 0), outward, nearest))


def _without_subnormal_slices(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """x, where slices of only subnormal numbers become multiples of the least one, and each slice's unit.

    Arithmetic may treat a subnormal number as zero, as XLA does on CPU; its bits are an integer multiple of the least.
    """
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, jnp.int32 if info.bits == 32 else jnp.int64)
    magnitude = bits & jnp.iinfo(bits.dtype).max
    subnormal = jnp.max(magnitude, axes, keepdims=True, initial=0) < 1 << info.nmant
    multiple = jnp.where(bits < 0, -magnitude, magnitude).astype(x.dtype)
    unit = jnp.where(subnormal, info.smallest_subnormal, jnp.ones((), x.dtype))
    return jnp.where(subnormal, multiple, x), unit


def _sqrt(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), x)


def _count(x: jax.Array, axes: tuple[int, ...]) -> int:
    """The number of elements in a slice."""
    return max(1, math.prod(x.shape[axis] for axis in axes))


def _is_short(x: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether a plain sum over a slice is right to a few eps for any numbers: windows up to 5 x 5."""
    return _count(x, axes) <= 32
