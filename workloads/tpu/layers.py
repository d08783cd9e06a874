"""Single depthwise layers with bias and activation, by this package and by lax, as programs for the TPU compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv
from workloads.tpu.compiler import Figures, compile_for_tpu, sharded

# Of each map, what its sum over the batch needs.
EXPECTED = {"forward": {}, "dx": {}, "dw": {"all-reduce": 1}}


@dataclass(frozen=True)
class Layer:
    """A square window over square images, "same"-padded, in bfloat16."""

    images: int
    size: int
    channels: int
    window: int
    stride: int = 1
    multiplier: int = 1

    def __str__(self) -> str:
        suffix = f" m{self.multiplier}" if self.multiplier > 1 else ""
        stride = " s2" if self.stride == 2 else ""
        return f"{self.images}x{self.size}x{self.size}x{self.channels} k{self.window}{stride}{suffix}"

    @property
    def shapes(self) -> tuple[Any, ...]:
        """x, kernel, bias and g."""
        out, outputs = -(-self.size // self.stride), self.channels * self.multiplier
        shapes = (
            (self.images, self.size, self.size, self.channels),
            (self.window, self.window, self.channels, self.multiplier),
            (outputs,),
            (self.images, out, out, outputs),
        )
        return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)


# Of MobileNetV2, EfficientNet and ConvNeXt; the first is the one of which the costs of the lowerings were first known.
LAYERS = (
    Layer(32, 56, 128, 3),
    Layer(32, 112, 96, 3, stride=2),
    Layer(32, 28, 192, 3),
    Layer(32, 14, 384, 5),
    Layer(32, 14, 384, 7),
    Layer(32, 56, 128, 3, multiplier=2),
)


def plain(x: Array, kernel: Array, stride: int) -> Array:
    """The convolution as lax has it."""
    *window, channels, multiplier = kernel.shape
    return lax.conv_general_dilated(
        x,
        kernel.reshape(*window, 1, channels * multiplier),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def ours(x: Array, kernel: Array, stride: int, **options: Any) -> Array:
    """The convolution as this package has it."""
    return depthwise_conv(x, kernel, strides=stride, padding="same", **options)


def told(x: Array, kernel: Array, stride: int) -> Array:
    """The same with batch and channels sharded, which it is told."""
    return ours(x, kernel, stride, in_sharding=P("batch", None, None, "channels"))


def compile_layer(
    layer: Layer,
    direction: str,
    convolve: Callable[[Array, Array, int], Array],
    mesh: Mesh,
    channels: str | None = None,
) -> tuple[str, Figures]:
    """The lowered text and the figures of one map of a layer, followed by its bias and relu6 in the forward pass.

    The compiler chooses the layouts of x, y and their gradients, as it does within a network.

    Args:
        layer: the layer.
        direction: one of DIRECTIONS.
        convolve: plain, ours, or ours of an implementation.
        mesh: its axis "batch" shards the batch.
        channels: the mesh axis that shards the channels, if any.
    """
    specs = P("batch", None, None, channels), P(None, None, channels, None), P(channels)
    x, w, b, g = (sharded(a, spec, mesh) for a, spec in zip(layer.shapes, (*specs, specs[0]), strict=True))
    image, kernel, bias = (NamedSharding(mesh, spec) for spec in specs)
    image = Format(Layout.AUTO, image)

    def conv(x: Array, w: Array) -> Array:
        return convolve(x, w, layer.stride)

    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], Any]] = {
        "forward": (lambda x, w, b: jax.nn.relu6(conv(x, w) + b), (x, w, b), (image, kernel, bias), image),
        "dx": (lambda w, g: jax.linear_transpose(lambda x: conv(x, w), x)(g)[0], (w, g), (kernel, image), image),
        "dw": (lambda x, g: jax.linear_transpose(lambda w: conv(x, w), w)(g)[0], (x, g), (image, image), kernel),
    }
    program, arguments, given, result = programs[direction]
    with jax.set_mesh(mesh):
        text, _, figures = compile_for_tpu(program, *arguments, in_shardings=given, out_shardings=result)
    return text, figures
