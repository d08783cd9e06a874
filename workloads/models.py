"""Models of other libraries with depthwise convolutions, as functions of (params, x), for tests and benchmarks."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Model = tuple[Callable[[Any, jax.Array], jax.Array], Any, jax.Array]


def images(*shape: int) -> jax.Array:
    """Random images."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def keras_mobilenet(batch: int, size: int, alpha: float = 0.35) -> Model:
    """Keras' own MobileNetV2 on its JAX backend with random weights: 17 depthwise convolutions."""
    from workloads.keras_reference import keras

    rng = np.random.default_rng(0)

    def uniform(key: Any, shape: Any, dtype: Any, minval: float, maxval: float) -> jax.Array:
        return jnp.asarray(rng.uniform(minval, maxval, shape), dtype)

    # The initializers draw from NumPy: JAX would compile each shape's draw, which takes longer than everything else.
    with mock.patch("jax.random.uniform", uniform):
        model = keras.applications.MobileNetV2(
            input_shape=(size, size, 3), alpha=alpha, weights=None, classes=5, classifier_activation=None
        )
    rest = [v.value for v in model.non_trainable_variables]

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return model.stateless_call(params, rest, x, training=False)[0]

    return forward, [v.value for v in model.trainable_variables], images(batch, size, size, 3)


class Equinoctial(eqx.Module):
    """Pointwise and depthwise convolutions, channels first, for one image."""

    layers: list[Any]

    def __init__(self, key: jax.Array, width: int):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(3, width, 1, key=keys[0]),
            eqx.nn.Conv2d(width, width, 3, padding=1, groups=width, key=keys[1]),
            jax.nn.gelu,
            eqx.nn.Conv2d(width, 2 * width, 3, stride=2, groups=width, key=keys[2]),
            eqx.nn.Conv2d(2 * width, 4, 1, key=keys[3]),
        ]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def equinox_network(batch: int, size: int, width: int = 6) -> Model:
    """Equinox's convolutions under vmap: 2 depthwise ones."""
    params, static = eqx.partition(Equinoctial(jax.random.key(0), width), eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, images(batch, 3, size, size)


class MBConv(nn.Module):
    """EfficientNet's block: expansion, depthwise convolution, squeeze and excitation, projection."""

    features: int
    window: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = 2 * x.shape[-1]
        y = nn.swish(nn.GroupNorm(1)(nn.Conv(channels, (1, 1), use_bias=False)(x)))
        size, strides = (self.window,) * 2, (self.stride,) * 2
        y = nn.Conv(channels, size, strides, feature_group_count=channels, use_bias=False)(y)
        y = nn.swish(nn.GroupNorm(1)(y))
        squeezed = nn.swish(nn.Dense(4)(y.mean((-3, -2), keepdims=True)))
        y = nn.Conv(self.features, (1, 1))(y * nn.sigmoid(nn.Dense(channels)(squeezed)))
        return x + y if y.shape == x.shape else y


class Efficient(nn.Module):
    """A few of those blocks: plain, rematerialised and scanned."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), (2, 2))(x)
        x = MBConv(self.width, 3, 2)(x)
        x = nn.remat(MBConv)(self.width, 5)(x)
        stack = nn.scan(
            lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(MBConv(self.width, 3, name="stacked"), x, None)
        return nn.Dense(3)(x.mean((-3, -2)))


def linen_efficientnet(batch: int, size: int, width: int = 6) -> Model:
    """Flax's convolutions in plain, rematerialised and scanned blocks: 3 depthwise ones in the jaxpr."""
    model: Any = Efficient(width)
    x = images(batch, size, size, 3)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)
    return lambda params, x: model.apply({"params": params}, x), params, x


MODELS: dict[str, Callable[..., Model]] = {
    "keras": keras_mobilenet,
    "equinox": equinox_network,
    "linen": linen_efficientnet,
}
