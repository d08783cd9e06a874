"""One depthwise convolution without its data: what the three maps share, and the shapes that they take and give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax import lax

from depthwise_jax.layout import Layout
from depthwise_jax.window import Window

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """A window over inputs of a known spatial shape, in a layout, at a precision.

    Attributes:
        window: the window.
        layout: the positions of channels and spatial axes.
        spatial: the spatial shape of x. Several give the same output under a stride, so the transpose in x must know.
        precision: as lax.conv_general_dilated takes it.
    """

    window: Window
    layout: Layout
    spatial: Shape
    precision: lax.PrecisionLike = None

    @property
    def out(self) -> Shape:
        """The spatial shape of y."""
        return self.window.output_shape(self.spatial)

    def batch(self, shape: Sequence[int]) -> Shape:
        """The leading axes of an x or y of this shape."""
        return tuple(shape[: len(shape) - self.window.rank - 1])

    def channels(self, shape: Sequence[int]) -> int:
        """The number of channels of an x or y of this shape."""
        return shape[self.layout.channels]

    def forward_shape(self, x: Sequence[int], kernel: Sequence[int]) -> Shape:
        """The shape of y."""
        *_, channels, multiplier = kernel
        return self.layout.arrange(self.batch(x), self.out, channels * multiplier)

    def input_grad_shape(self, g: Sequence[int], kernel: Sequence[int]) -> Shape:
        """The shape of x."""
        return self.layout.arrange(self.batch(g), self.spatial, kernel[-2])

    def kernel_grad_shape(self, x: Sequence[int], g: Sequence[int]) -> Shape:
        """The shape of kernel."""
        return (*self.window.size, self.channels(x), self.channels(g) // self.channels(x))
