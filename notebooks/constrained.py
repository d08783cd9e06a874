"""What notebook 03 trains: a classifier of handwritten digits by any training step, and EEGNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthwise_jax import DepthwiseConv2D
from depthwise_jax.optim import constraints_of, project, project_params
from workloads import eegnet
from workloads.digits import load

Params = Any
Step = Callable[..., tuple[Params, Any, Any]]  # (params, state, batch) -> (params, state, loss)
STEPS, BATCH = 300, 64
# EEGNet's steps; its training series of each activity; the noise in standard deviations of a channel.
EEGNET_STEPS, SERIES, NOISE = 150, 5, 1.0


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
    logits: Any = Classifier().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(step: Step, state: Any, params: Params, data: Any) -> tuple[Any, Params]:
    """Runs a step over the batches; returns the losses and the parameters after each step."""

    def body(carry: Any, batch: Any) -> Any:
        params, state, loss = step(*carry, batch)
        return (params, state), (loss, params)

    return jax.jit(lambda params: jax.lax.scan(body, (params, state), data)[1])(params)


def norms(params: Params) -> np.ndarray:
    """The norms of the filters after each step, (steps, filters)."""
    return np.linalg.norm(np.asarray(params["filters"]["kernel"], np.float64), axis=(1, 2))[:, 0]


def noisy_series(seed: int) -> dict[str, tuple[Any, Any]]:
    """The motion series with noise: SERIES of each activity to train on, and all of the test part."""
    rng, parts = np.random.default_rng(seed), eegnet.load()
    labels = parts["train"][1]
    chosen = np.concatenate([rng.choice(np.flatnonzero(labels == c), SERIES, False) for c in range(eegnet.CLASSES)])
    parts["train"] = parts["train"][0][chosen], labels[chosen]
    return {name: (x + NOISE * rng.standard_normal(x.shape).astype(np.float32), y) for name, (x, y) in parts.items()}


def eegnet_training(constraints: Any, *, at_start: bool, in_chain: bool) -> Callable[[Any, Any, Any], Any]:
    """Trains EEGNet.

    Args:
        constraints: the tree for `project`.
        at_start: whether the initial weights are projected.
        in_chain: whether `project` is in the chain.

    Returns:
        A function of a key, the training series and the test series. It returns the constrained kernels after each
        step, the test accuracy and the test loss.
    """
    network: Any = eegnet.EEGNet()
    optimizer = optax.chain(optax.adam(0.02), *([project(constraints)] if in_chain else []))

    @jax.jit
    def run(key: Any, train: Any, test: Any) -> Any:
        x, y = train
        variables: Any = network.init({"params": key, "dropout": key}, x, True)
        params = project_params(variables["params"], constraints) if at_start else variables["params"]

        def body(carry: Any, key: Any) -> Any:
            params, stats, state = carry

            def loss(params: Any) -> Any:
                logits, changed = network.apply(
                    {"params": params, "batch_stats": stats}, x, True, rngs={"dropout": key}, mutable="batch_stats"
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return losses.mean(), changed["batch_stats"]

            grads, stats = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            params: Any = optax.apply_updates(params, updates)
            return (params, stats, state), {name: params[name]["kernel"] for name in ("spatial", "head")}

        carry = params, variables["batch_stats"], optimizer.init(params)
        (params, stats, _), kernels = jax.lax.scan(
            body, carry, jax.random.split(jax.random.fold_in(key, 1), EEGNET_STEPS)
        )
        x, y = test
        logits = network.apply({"params": params, "batch_stats": stats}, x, False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return kernels, jnp.mean(logits.argmax(-1) == y), losses.mean()

    return run
