"""The activations that a lowering can apply with the bias as it stores the result: a short closed list.

The order of the names is that of csrc/depthwise.h: a name's position is its number in the compiled kernels' calls.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from depthwise_jax._core.layout import Layout

ACTIVATIONS = ("linear", "relu", "relu6")
# The functions behind the names, as depthwise_jax.activations returns them.
_FUNCTIONS = {None: "linear", jax.nn.relu: "relu", jax.nn.relu6: "relu6"}


def name_of(activation: object) -> str | None:
    """The name of an activation of the list, or None for any other function."""
    return next((name for function, name in _FUNCTIONS.items() if function is activation), None)


def apply(activation: str, y: Array) -> Array:
    """An activation's value."""
    if activation != "linear":
        y = jnp.maximum(y, 0)
    return jnp.minimum(y, 6) if activation == "relu6" else y


def mask(activation: str, value: Array, tangent: Array) -> Array:
    """The tangent of an activation's value. The value shows whether its argument is past a bound: there it is zero."""
    if activation == "linear":
        return tangent
    inside = (value > 0) & (value < 6) if activation == "relu6" else value > 0
    return jnp.where(inside, tangent, jnp.zeros_like(tangent))


def align_bias(bias: Array, layout: Layout, ndim: int) -> Array:
    """A bias (*stacked, C*M), shaped to be added to a y of `ndim` axes."""
    *stacked, channels = bias.shape
    batch = (1,) * (ndim - len(stacked) - layout.rank - 1)
    return bias.reshape(*stacked, *layout.arrange(batch, (1,) * layout.rank, channels))
