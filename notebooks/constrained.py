"""What notebook 03 trains: a classifier of handwritten digits by any training step, and EEGNet over several seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthwise_jax import DepthwiseConv2D
from depthwise_jax.optim import constraints_of
from workloads.digits import load

Params = Any
Step = Callable[..., tuple[Params, Any, Any]]  # (params, state, batch) -> (params, state, loss)
STEPS, BATCH = 300, 64


class Classifier(nn.Module):
    """Logits (batch, 10) of images (batch, 28, 28, 1), by eight filters that may be constrained."""

    constraint: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        filters = DepthwiseConv2D(
            5, strides=2, depth_multiplier=8, activation="relu", depthwise_constraint=self.constraint, name="filters"
        )
        return nn.Dense(10)(filters(x).reshape(len(x), -1))


def batches() -> tuple[Any, Any]:
    """The images and labels of all steps, (STEPS, BATCH, ...)."""
    (images, labels), _ = load()
    order = np.random.default_rng(0).integers(len(images), size=(STEPS, BATCH))
    return jnp.asarray(images)[order], jnp.asarray(labels)[order]


def initial(images: Any) -> Params:
    """The classifier's initial parameters."""
    return Classifier().init(jax.random.key(0), images)["params"]


def constrained_by(constraint: Any, images: Any) -> Any:
    """The tree for `project` of a classifier with this constraint on its filters."""
    return constraints_of(Classifier(constraint), images)


def loss_of(params: Params, batch: Any) -> Any:
    """The classifier's mean loss over a batch."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(Classifier().apply({"params": params}, x), y).mean()


def train(step: Step, state: Any, params: Params, data: Any) -> tuple[Any, Params]:
    """Runs a step over the batches; returns the losses and the parameters after each step."""

    def body(carry: Any, batch: Any) -> Any:
        params, state, loss = step(*carry, batch)
        return (params, state), (loss, params)

    return jax.jit(lambda params: jax.lax.scan(body, (params, state), data)[1])(params)


def norms(params: Params) -> np.ndarray:
    """The norms of the filters after each step, (steps, filters)."""
    return np.linalg.norm(np.asarray(params["filters"]["kernel"], np.float64), axis=(1, 2))[:, 0]
