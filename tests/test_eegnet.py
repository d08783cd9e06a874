"""EEGNet with its two constraints, on real multichannel series: 6 channels of a smart watch's motion sensors.

The architecture of Lawhern et al., "EEGNet: a compact convolutional neural network for EEG-based brain-computer
interfaces" (2018): a filter bank in time, a depthwise convolution over all channels whose filters have norm <= 1, a
separable convolution in time, and a dense head whose columns have norm <= 0.25.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sktime.datasets import load_basic_motions

from depthwise_jax.constraints import MaxNorm
from depthwise_jax.linen import DepthwiseConv2D, SeparableConv2D
from depthwise_jax.optim import constraints_of, project, project_params

CHANNELS, SAMPLES, CLASSES = 6, 100, 4
STEPS = 150


class EEGNet(nn.Module):
    """(batch, channels, samples, 1) -> (batch, classes)."""

    filters: int = 4
    depth_multiplier: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def normalise(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = normalise(nn.Conv(self.filters, (1, 16), use_bias=False, name="temporal")(x))
        x = DepthwiseConv2D(
            (CHANNELS, 1),
            depth_multiplier=self.depth_multiplier,
            use_bias=False,
            depthwise_constraint=MaxNorm(1.0),
            name="spatial",
        )(x)
        x = nn.avg_pool(nn.elu(normalise(x)), (1, 4), (1, 4))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = SeparableConv2D(self.filters * self.depth_multiplier, (1, 16), padding="same", use_bias=False)(x)
        x = nn.avg_pool(nn.elu(normalise(x)), (1, 8), (1, 8))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def series() -> Any:
    """BasicMotions (UEA archive): standing, walking, running, badminton; 40 series to train on and 40 to test."""
    load: Any = load_basic_motions  # without annotations of its own
    split = {}
    for name in ("train", "test"):
        x, y = load(split=name, return_type="numpy3d")
        split[name] = x, np.unique(y, return_inverse=True)[1]
    mean, std = (f(split["train"][0], axis=(0, 2), keepdims=True) for f in (np.mean, np.std))
    return {name: (jnp.asarray((x - mean) / std, jnp.float32)[..., None], y) for name, (x, y) in split.items()}


def test_both_constraints_hold_at_every_step(series: Any) -> None:
    model = EEGNet()
    x, y = series["train"]
    assert x.shape == (40, CHANNELS, SAMPLES, 1)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(rngs, x, True)
    constraints = constraints_of(model, x, True, rngs=rngs)
    constraints["head"]["kernel"] = MaxNorm(0.25)
    tx = optax.chain(optax.adam(0.02), project(constraints))
    params = project_params(variables["params"], constraints)

    def step(carry: Any, key: jax.Array) -> Any:
        params, stats, state = carry

        def loss(params: Any) -> Any:
            logits, changed = model.apply(
                {"params": params, "batch_stats": stats}, x, True, rngs={"dropout": key}, mutable="batch_stats"
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        params: Any = optax.apply_updates(params, updates)
        return (params, stats, state), (value, params["spatial"]["kernel"], params["head"]["kernel"])

    carry = params, variables["batch_stats"], tx.init(params)
    keys = jax.random.split(jax.random.key(2), STEPS)
    (params, stats, _), (losses, spatial, head) = jax.jit(lambda c: jax.lax.scan(step, c, keys))(carry)

    for kernels, shape, bound in (
        (spatial, (STEPS, CHANNELS, 1, 4, 2), 1.0),
        (head, (STEPS, 3 * 8, CLASSES), 0.25),
    ):
        assert kernels.shape == shape
        norms = np.linalg.norm(np.asarray(kernels, np.float64), axis=1)
        assert norms.max() <= bound + 4 * np.spacing(np.float32(bound))
        assert norms.max() > 0.999 * bound  # the constraint was at work

    assert losses[-1] < losses[0]
    logits: Any = model.apply({"params": params, "batch_stats": stats}, series["test"][0], False)
    assert np.mean(np.argmax(logits, -1) == series["test"][1]) > 0.9
