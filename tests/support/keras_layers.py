"""The four layers that Keras has: random configurations of them, and Keras' own layers with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from workloads.keras_reference import keras

LAYERS = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")


def chance(rng, values):
    """One of `values`, or None half of the time."""
    return values[rng.integers(len(values))] if rng.random() < 0.5 else None


def per_axis(rng, rank, high):
    """An integer for all axes, or one per axis."""
    values = tuple(int(n) for n in rng.integers(1, high + 1, size=rank))
    return values if rng.random() < 0.7 else values[0]


def draw(name: str, seed: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A random valid configuration of a layer, as Keras' own arguments, and an input shape for it."""
    rng = np.random.default_rng([LAYERS.index(name), seed])
    rank = int(name[-2])
    separable = name.startswith("Separable")
    config: dict[str, Any] = {
        "kernel_size": per_axis(rng, rank, 3),
        "padding": str(rng.choice(["valid", "same", "SAME", "Valid"])),
        "data_format": str(rng.choice(["channels_last", "channels_first"])),
        "depth_multiplier": int(rng.integers(1, 4)),
        "use_bias": bool(rng.random() < 0.8),
    }
    if separable:
        config["filters"] = int(rng.integers(1, 5))
    steps = (["strides"], ["dilation_rate"], ["strides", "dilation_rate"])[rng.integers(3)]
    config |= {name: per_axis(rng, rank, 3) for name in steps}
    # Those that act along the channels differ on purpose with channels_first, see test_keras_traps.
    names = ["relu", "relu6", "gelu", "silu", "elu", "tanh", "sigmoid", "softplus", "leaky_relu", "hard_silu", "mish"]
    if config["data_format"] == "channels_last":
        names += ["log_softmax"]  # at softmax Keras warns where there is one channel
    config["activation"] = chance(rng, names)
    l1, l2 = (round(float(value), 3) for value in rng.uniform(0.01, 0.5, size=2))
    regularizers = [
        {"class_name": "L1", "config": {"l1": l1}},
        {"class_name": "L2", "config": {"l2": l2}},
        {"class_name": "L1L2", "config": {"l1": l1, "l2": l2}},
        "l2",
    ]
    axis = [0, -1, list(range(rank)), list(range(rank + 1))][rng.integers(4)]
    norms = [
        {"class_name": "MaxNorm", "config": {"max_value": 0.5, "axis": axis}},
        {"class_name": "MinMaxNorm", "config": {"min_value": 0.4, "max_value": 0.6, "rate": 0.7, "axis": axis}},
        {"class_name": "UnitNorm", "config": {"axis": axis}},
    ]
    initializers = ["he_normal", "lecun_uniform", "ones", {"class_name": "GlorotUniform", "config": {"seed": 5}}]
    for prefix in ("depthwise", "pointwise", "bias") if separable else ("depthwise", "bias"):
        config[f"{prefix}_initializer"] = (
            chance(rng, initializers[-2:] if prefix == "bias" else initializers) or "zeros"
        )
        config[f"{prefix}_regularizer"] = chance(rng, regularizers)
        config[f"{prefix}_constraint"] = chance(
            rng, ["non_neg", "max_norm"] if prefix == "bias" else [*norms, "NonNeg"]
        )
    config["activity_regularizer"] = chance(rng, regularizers)
    spatial = [int(n) for n in rng.integers(7, 9, size=rank)]  # not below the span of 3 taps with dilation 3
    channels, batch = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    last = config["data_format"] == "channels_last"
    return config, (batch, *spatial, channels) if last else (batch, channels, *spatial)


def keras_layer(name: str, config: dict[str, Any], **more: Any) -> Any:
    return getattr(keras.layers, name)(**{**config, **more})


def build(name: str, config: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """Keras' layer with its variables, for an input of this shape."""
    # The values are replaced; zeros spare a compilation of each shape's draw.
    zeros = {key: "zeros" for key in config if key.endswith("_initializer")}
    zeros |= {"depthwise_initializer": "zeros"} | ({"pointwise_initializer": "zeros"} if "filters" in config else {})
    layer = keras_layer(name, config, **zeros)
    layer.build(shape)
    return layer


def weights_for(layer: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """Random values of Keras' variables, in Keras' order."""
    return [rng.normal(scale=0.5, size=v.shape).astype(np.float32) for v in layer.trainable_variables]
