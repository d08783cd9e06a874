"""ConvNeXt blocks: from this package's layers, from plain Flax, and in PyTorch."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from depthwise_jax import DepthwiseConv2D

Stages = tuple[tuple[int, int], ...]
# Channels and blocks of ConvNeXt-T's stages; and of its first two, with fewer blocks.
TINY: Stages = ((96, 3), (192, 3), (384, 9), (768, 3))
STAGES: Stages = ((96, 2), (192, 2))


class ConvNeXt(nn.Module):
    """Blocks of Liu et al., "A ConvNet for the 2020s" (2022).

    Attributes:
        classes: outputs.
        plain: whether the depthwise convolutions are flax.linen.Conv.
        dtype: of the computation; parameters are float32.
        stages: channels and blocks of each.
    """

    classes: int = 1000
    plain: bool = False
    dtype: Any = jnp.float32
    stages: Stages = STAGES

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, 3)."""
        del train  # there is no batch norm
        dtype = self.dtype
        x = jnp.asarray(x, dtype)
        for stage, (channels, blocks) in enumerate(self.stages):
            if stage:
                x = nn.LayerNorm(dtype=dtype, name=f"norm{stage}")(x)
            size = (2, 2) if stage else (4, 4)
            x = nn.Conv(channels, size, size, dtype=dtype, name=f"down{stage}")(x)
            for block in range(blocks):
                name = f"block{stage}_{block}"
                if self.plain:
                    y = nn.Conv(channels, (7, 7), feature_group_count=channels, dtype=dtype, name=f"{name}_depthwise")(
                        x
                    )
                else:
                    y = DepthwiseConv2D(7, padding="same", dtype=dtype, name=f"{name}_depthwise")(x)
                y = nn.LayerNorm(dtype=dtype, name=f"{name}_norm")(y)
                y = nn.gelu(nn.Dense(4 * channels, dtype=dtype, name=f"{name}_expand")(y))
                y = nn.Dense(channels, dtype=dtype, name=f"{name}_project")(y)
                scale = self.param(f"{name}_scale", nn.initializers.constant(1e-6), (channels,))
                x = x + y * jnp.asarray(scale, dtype)
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


def torch_convnext(torch: Any, classes: int = 1000, stages: Stages = STAGES) -> Any:
    """ConvNeXt in PyTorch, a sequence of modules; modules that work on channels see them last, which moves no data."""
    layers = torch.nn

    class Block(layers.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.depthwise = layers.Conv2d(channels, channels, 7, padding=3, groups=channels)
            self.inner = layers.Sequential(
                layers.LayerNorm(channels, eps=1e-6),
                layers.Linear(channels, 4 * channels),
                layers.GELU(approximate="tanh"),
                layers.Linear(4 * channels, channels),
            )
            self.scale = layers.Parameter(1e-6 * torch.ones(channels))

        def forward(self, x: Any) -> Any:
            y = self.inner(self.depthwise(x).permute(0, 2, 3, 1)) * self.scale
            return x + y.permute(0, 3, 1, 2)

    class Norm(layers.LayerNorm):
        def forward(self, input: Any) -> Any:
            return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    modules: list[Any] = []
    previous = 3
    for stage, (channels, blocks) in enumerate(stages):
        size = 2 if stage else 4
        modules += [Norm(previous, eps=1e-6)] if stage else []
        modules += [layers.Conv2d(previous, channels, size, size), *(Block(channels) for _ in range(blocks))]
        previous = channels
    return layers.Sequential(*modules, layers.AdaptiveAvgPool2d(1), layers.Flatten(), layers.Linear(previous, classes))
