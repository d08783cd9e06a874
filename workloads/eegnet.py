"""EEGNet with its two constraints, and real multichannel series to train it on.

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
from sktime.datasets import load_basic_motions

from depthwise_jax.constraints import MaxNorm
from depthwise_jax.linen import DepthwiseConv2D, SeparableConv2D

CHANNELS, SAMPLES, CLASSES = 6, 100, 4
SPATIAL_LIMIT, HEAD_LIMIT = 1.0, 0.25


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
            depthwise_constraint=MaxNorm(SPATIAL_LIMIT),
            name="spatial",
        )(x)
        x = nn.avg_pool(nn.elu(normalise(x)), (1, 4), (1, 4))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = SeparableConv2D(self.filters * self.depth_multiplier, (1, 16), padding="same", use_bias=False)(x)
        x = nn.avg_pool(nn.elu(normalise(x)), (1, 8), (1, 8))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="head")(x.reshape(x.shape[0], -1))


def load() -> dict[str, tuple[jax.Array, np.ndarray]]:
    """The parts "train" and "test" of BasicMotions: series (40, CHANNELS, SAMPLES, 1) in float32, labels (40,).

    Accelerometer and gyroscope of a smart watch, from the UEA archive; the labels are badminton, running, standing and
    walking. Each channel is scaled to mean 0 and deviation 1 over the training part.
    """
    loader: Any = load_basic_motions  # it has no annotations
    split = {}
    for name in ("train", "test"):
        x, y = loader(split=name, return_type="numpy3d")
        split[name] = x, np.unique(y, return_inverse=True)[1]
    mean, std = (f(split["train"][0], axis=(0, 2), keepdims=True) for f in (np.mean, np.std))
    return {name: (jnp.asarray((x - mean) / std, jnp.float32)[..., None], y) for name, (x, y) in split.items()}
