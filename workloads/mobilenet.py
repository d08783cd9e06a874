"""MobileNetV2: from this package's layers, from plain Flax, and in PyTorch."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from depthwise_jax import DepthwiseConv2D

# Expansion, output channels, number of blocks, and stride of the first block.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# A few blocks of each kind, for programs that take long to compile.
FEW_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2))


class MobileNetV2(nn.Module):
    """Sandler et al., 2018: 17 depthwise convolutions between pointwise ones, batch-normalised.

    Attributes:
        classes: outputs.
        plain: whether the depthwise convolutions are flax.linen.Conv, as in the network for comparison.
        constraint: the constraint of the depthwise kernels, without `plain`.
        dtype: of the computation; parameters are float32.
        stages: STAGES, or fewer.
        in_sharding: how the depthwise convolutions' inputs are sharded, without `plain`.
    """

    classes: int = 1000
    plain: bool = False
    constraint: Any = None
    dtype: Any = jnp.bfloat16
    stages: tuple[tuple[int, int, int, int], ...] = STAGES
    in_sharding: P | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, classes) in float32 of images (batch, height, width, 3)."""

        def norm(name: str, x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"{name}_norm")(x)

        def conv(name: str, features: int, x: jax.Array, window: int = 1, stride: int = 1) -> jax.Array:
            layer = nn.Conv(features, (window, window), (stride, stride), use_bias=False, dtype=self.dtype, name=name)
            return norm(name, layer(x))

        def depthwise(name: str, stride: int, x: jax.Array) -> jax.Array:
            channels = x.shape[-1]
            options: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "name": name}
            if self.plain:
                layer = nn.Conv(channels, (3, 3), (stride, stride), feature_group_count=channels, **options)
            else:
                options |= {"depthwise_constraint": self.constraint, "in_sharding": self.in_sharding}
                layer = DepthwiseConv2D(3, stride, "same", **options)
            return norm(name, layer(x))

        x = nn.relu6(conv("stem", 32, jnp.asarray(x, self.dtype), 3, 2))
        block = 0
        for expansion, features, blocks, first_stride in self.stages:
            for i in range(blocks):
                y = x
                if expansion > 1:
                    y = nn.relu6(conv(f"block{block}_expand", expansion * x.shape[-1], y))
                y = nn.relu6(depthwise(f"block{block}_depthwise", first_stride if i == 0 else 1, y))
                y = conv(f"block{block}_project", features, y)
                x = x + y if x.shape == y.shape else y
                block += 1
        x = nn.relu6(conv("head", 1280, x))
        return nn.Dense(self.classes, dtype=jnp.float32, name="classifier")(x.mean((1, 2)))


def torch_mobilenet(torch: Any, classes: int = 1000, stages: Any = STAGES) -> Any:
    """The same network in PyTorch, a sequence of modules."""
    layers = torch.nn

    def conv(channels: int, features: int, window: int, stride: int, groups: int, activation: bool) -> list[Any]:
        return [
            layers.Conv2d(channels, features, window, stride, window // 2, groups=groups, bias=False),
            layers.BatchNorm2d(features, momentum=0.01),
            *([layers.ReLU6(inplace=True)] if activation else []),
        ]

    class Residual(layers.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return x + self.inner(x)

    modules = conv(3, 32, 3, 2, 1, True)
    channels = 32
    for expansion, features, blocks, first_stride in stages:
        for i in range(blocks):
            hidden, stride = expansion * channels, first_stride if i == 0 else 1
            expand = conv(channels, hidden, 1, 1, 1, True) if expansion > 1 else []
            block = layers.Sequential(
                *expand, *conv(hidden, hidden, 3, stride, hidden, True), *conv(hidden, features, 1, 1, 1, False)
            )
            modules.append(Residual(block) if stride == 1 and features == channels else block)
            channels = features
    modules += conv(channels, 1280, 1, 1, 1, True)
    modules += [layers.AdaptiveAvgPool2d(1), layers.Flatten(), layers.Linear(1280, classes)]
    return layers.Sequential(*modules)


def is_depthwise(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a parameter is a depthwise kernel of the network, ours or plain."""
    return leaf.ndim == 4 and path[-2].key.endswith("depthwise")


def channel_spec(path: tuple[Any, ...], value: Any, axis: str | None) -> P:
    """The sharding of a variable of the network with the wide channels, those of the depthwise steps, over a mesh axis.

    The narrow channels between the blocks are not sharded: each block's only sum over channels is in its projection.

    Args:
        path: the variable's path in the tree, as in jax.tree_util.tree_map_with_path.
        value: the variable, anything with a shape.
        axis: the mesh axis; None shards nothing.
    """
    layer, name = (entry.key for entry in path[-2:])
    if axis is None or layer.endswith("project_norm") or (layer == "classifier" and name == "bias"):
        return P()
    if layer.endswith("project") or layer == "classifier":
        return P(*(None,) * (value.ndim - 2), axis, None)
    if layer.endswith("depthwise") and value.shape[-1] == 1:
        return P(None, None, axis, None)
    return P(*(None,) * (value.ndim - 1), axis)
