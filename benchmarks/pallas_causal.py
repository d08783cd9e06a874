"""A causal depthwise convolution over sequences as two Pallas kernels, forward and backward, to compare with on TPU.

It stands in for the kernels of other JAX projects, whose backward passes the TPU compiler takes in part only. Each
kernel has whole sequences of some channels in VMEM and reads them once: sums in float32, over rolled rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Channels that a kernel has in VMEM together, two registers wide.
_CHANNELS = 256


def _shifted(array: Array, by: int) -> Array:
    """Rows moved down (up if negative), zeros where none come from."""
    if by == 0:
        return array
    length = array.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, array.shape, 0)
    inside = row >= by if by > 0 else row < length + by
    return jnp.where(inside, pltpu.roll(array, by % length, 0), 0.0)


def _forward(x: Any, kernel: Any, y: Any) -> None:
    wide, taps = x[0].astype(jnp.float32), kernel.shape[0]
    total = jnp.zeros_like(wide)
    for t in range(taps):
        total += _shifted(wide, taps - 1 - t) * kernel[t].astype(jnp.float32)
    y[0] = total.astype(y.dtype)


def _backward(x: Any, kernel: Any, g: Any, dx: Any, dw: Any) -> None:
    wide, wide_g, taps = x[0].astype(jnp.float32), g[0].astype(jnp.float32), kernel.shape[0]
    total = jnp.zeros_like(wide)
    for t in range(taps):
        view = _shifted(wide_g, t + 1 - taps)
        total += view * kernel[t].astype(jnp.float32)
        dw[0, t] = (view * wide).sum(0)
    dx[0] = total.astype(dx.dtype)


def _specs(x: Array, kernel: Array) -> tuple[tuple[int, int], Any, Any]:
    batch, length, channels = x.shape
    width = min(_CHANNELS, channels)
    block = pl.BlockSpec((1, length, width), lambda b, c: (b, 0, c))
    return (batch, channels // width), block, pl.BlockSpec((kernel.shape[0], width), lambda b, c: (0, c))


@jax.custom_vjp
def causal(x: Array, kernel: Array) -> Array:
    """y (batch, length, channels) of x of that shape and a kernel (window, channels)."""
    grid, block, weights = _specs(x, kernel)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(_forward, shape, grid=grid, in_specs=[block, weights], out_specs=block)(x, kernel)


def _causal_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return causal(x, kernel), (x, kernel)


def _causal_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    grid, block, weights = _specs(x, kernel)
    parts = pl.BlockSpec((1, *weights.block_shape), lambda b, c: (b, 0, c))
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((x.shape[0], *kernel.shape), jnp.float32))
    call = pl.pallas_call(_backward, shapes, grid=grid, in_specs=[block, weights, block], out_specs=(block, parts))
    dx, dw = call(x, kernel, g)
    return dx, dw.sum(0).astype(kernel.dtype)


causal.defvjp(_causal_forward, _causal_backward)
