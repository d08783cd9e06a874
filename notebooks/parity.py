"""Compares Keras' layers with ours, for notebook 02: numbers for the same arguments, and what a call returns or raises.

Set the environment variable KERAS_BACKEND to "jax" before this is imported.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

import depthwise_jax
from depthwise_jax import regularization_loss

X = np.random.default_rng(0).normal(size=(2, 9, 9, 2)).astype(np.float32)


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference relative to the largest number."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))


def compare(name: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences between Keras' layer and ours, both with a window of 3."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 9, 8, 6) if name.endswith("2D") else (4, 9, 6)), jnp.float32)
    # In a model: stateless_call of a bare Keras layer leaves the activity regularizer out.
    theirs: Any = keras.Sequential([keras.Input(x.shape[1:]), getattr(keras.layers, name)(kernel_size=3, **arguments)])
    ours = getattr(depthwise_jax, name)(kernel_size=3, **arguments)
    probe = jnp.asarray(rng.normal(size=theirs(x).shape), jnp.float32)
    # Small random numbers on top of the initial ones: a bias of zeros would hide a mistake.
    values = [v.value + jnp.asarray(rng.normal(scale=0.1, size=v.shape), jnp.float32) for v in theirs.variables]

    def keras_loss(x: Any, values: Any) -> Any:
        y, _, penalties = theirs.stateless_call(values, [], x, return_losses=True)
        return (y * probe).sum() + sum(penalties), (y, sum(penalties))

    def our_loss(x: Any, values: Any) -> Any:
        params = {v.name: value for v, value in zip(theirs.variables, values, strict=True)}
        y, sown = ours.apply({"params": params}, x, mutable="losses")
        penalty = sum(jax.tree.leaves(sown))
        return (y * probe).sum() + penalty, (y, penalty)

    (_, (y, penalty)), (dx, dvalues) = jax.jit(jax.value_and_grad(our_loss, (0, 1), has_aux=True))(x, values)
    (_, (ky, kpenalty)), (kdx, kdvalues) = jax.jit(jax.value_and_grad(keras_loss, (0, 1), has_aux=True))(x, values)
    row = {"output": relative(y, ky), "penalty": relative(penalty, kpenalty), "d input": relative(dx, kdx)}
    names = (v.name.removeprefix("depthwise_") for v in theirs.variables)
    return row | {f"d {name}": relative(d, kd) for name, d, kd in zip(names, dvalues, kdvalues, strict=True)}


def outcome(call: Any) -> str:
    """What a call returns, or the error's first line."""
    try:
        return str(call())
    except (TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def keras_layer(*args: Any, x: Any = X, **arguments: Any) -> Any:
    """Keras' DepthwiseConv2D, called once."""
    layer: Any = keras.layers.DepthwiseConv2D(*args, **arguments)
    layer(x)
    return layer


def our_layer(*args: Any, x: Any = X, **arguments: Any) -> Any:
    """Our DepthwiseConv2D, bound to initial parameters."""
    layer = depthwise_jax.DepthwiseConv2D(*args, **arguments)
    return layer.bind(layer.init(jax.random.key(0), x))


def our_penalty(**arguments: Any) -> float:
    """The weight penalty of our DepthwiseConv2D."""
    layer = our_layer(3, **arguments)
    return float(regularization_loss(layer.unbind()[0], layer.variables["params"], X))


def our_activity_penalty(x: Any, **arguments: Any) -> float:
    """The activity penalty of our DepthwiseConv2D."""
    layer: Any = depthwise_jax.DepthwiseConv2D(3, **arguments)
    _, sown = layer.apply(layer.init(jax.random.key(0), x), x, mutable="losses")
    return float(sown["losses"]["activity"])
