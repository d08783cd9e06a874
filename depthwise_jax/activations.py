"""Activations: Keras' names as functions of one array."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from depthwise_jax._core.registry import Registry

__all__ = ["gelu", "get", "hard_shrink", "leaky_relu", "linear", "serialize", "soft_shrink", "sparsemax", "tanh_shrink"]

Activation = Callable[[Array], Array]


def linear(x: Array) -> Array:
    """`x`."""
    return x


def leaky_relu(x: Array) -> Array:
    """`x` where `x >= 0`, else `0.2*x`: Keras' slope; that of jax.nn is 0.01."""
    return jax.nn.leaky_relu(x, negative_slope=0.2)


def gelu(x: Array) -> Array:
    """`x*Phi(x)`, with the exact normal distribution function."""
    return jax.nn.gelu(x, approximate=False)


def soft_shrink(x: Array) -> Array:
    """`sign(x)*max(|x| - 0.5, 0)`."""
    return jnp.where(x > 0.5, x - 0.5, jnp.where(x < -0.5, x + 0.5, 0))


def hard_shrink(x: Array) -> Array:
    """`x` where `|x| > 0.5`, else 0."""
    return jnp.where(jnp.abs(x) > 0.5, x, 0)


def tanh_shrink(x: Array) -> Array:
    """`x - tanh(x)`."""
    return x - jnp.tanh(x)


def sparsemax(x: Array, axis: int = -1) -> Array:
    """The Euclidean projection onto the probability simplex along `axis` (Martins and Astudillo, 2016).

    Args:
        x: a floating-point array of any shape.
        axis: the axis along which the result sums to 1.
    """
    from optax.projections import projection_simplex  # here, because importing optax takes longer than everything else

    along_last = jnp.vectorize(projection_simplex, signature="(n)->(n)")
    return jnp.moveaxis(along_last(jnp.moveaxis(x, axis, -1)), -1, axis)


# Keras' "threshold" is left out: it takes two more arguments, so a layer cannot call it.
_REGISTRY = Registry(
    "activation",
    "keras.activations",
    {
        jax.nn.relu: ("relu",),
        leaky_relu: ("leaky_relu",),
        jax.nn.relu6: ("relu6",),
        jax.nn.softmax: ("softmax",),
        jax.nn.celu: ("celu",),
        jax.nn.elu: ("elu",),
        jax.nn.selu: ("selu",),
        jax.nn.softplus: ("softplus",),
        jax.nn.soft_sign: ("softsign",),
        jax.nn.squareplus: ("squareplus",),
        soft_shrink: ("soft_shrink",),
        jax.nn.sparse_plus: ("sparse_plus",),
        jax.nn.silu: ("silu", "swish"),
        gelu: ("gelu",),
        jax.nn.glu: ("glu",),
        jax.nn.tanh: ("tanh",),
        tanh_shrink: ("tanh_shrink",),
        jax.nn.sigmoid: ("sigmoid",),
        jax.nn.sparse_sigmoid: ("sparse_sigmoid",),
        jnp.exp: ("exponential",),
        jax.nn.hard_sigmoid: ("hard_sigmoid",),
        jax.nn.hard_silu: ("hard_silu", "hard_swish"),
        jax.nn.hard_tanh: ("hard_tanh",),
        hard_shrink: ("hard_shrink",),
        linear: ("linear",),
        jax.nn.mish: ("mish",),
        jax.nn.log_softmax: ("log_softmax",),
        jax.nn.log_sigmoid: ("log_sigmoid",),
        sparsemax: ("sparsemax",),
    },
)
_ALONG_CHANNELS = (jax.nn.softmax, jax.nn.log_softmax, jax.nn.glu, sparsemax)


def get(identifier: Any, argument: str = "activation", channel_axis: int = -1) -> Activation | None:
    """Resolves an activation.

    Args:
        identifier: None, one of Keras' names, Keras' configuration of a function, or any callable.
        argument: the argument's name in messages.
        channel_axis: the axis along which softmax, log_softmax, glu and sparsemax act if given by name; a callable
            uses its own axis.

    Returns:
        A function of one array; a callable is returned unchanged. None for None and "linear". "relu" is `jax.nn.relu`
        and "relu6" is `jax.nn.relu6`.

    Raises:
        ValueError: an unknown name or configuration.
        TypeError: the identifier is none of these, or a class.
    """
    if isinstance(identifier, type):
        raise TypeError(f"{argument} must be a function or a callable object; got the class {identifier.__name__}")
    function = _REGISTRY.get(identifier, argument)
    if function is None or function is linear:
        return None
    if function is not identifier and function in _ALONG_CHANNELS:
        return partial(function, axis=channel_axis)
    return function


def serialize(identifier: Any, argument: str = "activation") -> str:
    """Keras' name of an activation, "linear" for None.

    Args:
        identifier: what `get` takes.
        argument: the argument's name in messages.

    Raises:
        ValueError: Keras has no name for it, or `identifier` is unknown.
    """
    return _REGISTRY.serialize(_REGISTRY.get("linear" if identifier is None else identifier, argument), argument)
