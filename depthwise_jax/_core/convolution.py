"""Describes one depthwise convolution without its data: the geometry that the three maps share, and their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from depthwise_jax._core.layout import Layout
from depthwise_jax._core.window import Window

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """A window over inputs of a known spatial shape, in a layout, at a precision.

    Attributes:
        window: the window.
        layout: the positions of channels and spatial axes.
        spatial: the spatial shape of x. Under a stride several sizes give the same output, so the transpose in x needs
            it.
        precision: as for lax.conv_general_dilated.
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


def hashable_precision(precision: Any) -> Any:
    """A precision in a form that a jaxpr can hold, checked at once; lax also takes lists, and checks only at lowering.

    Raises:
        ValueError: it is not a precision.
    """
    pair = isinstance(precision, list | tuple)
    values = tuple(precision) if pair else (precision,)
    names = {"default", "high", "highest", "bfloat16", "tensorfloat32", "float32", "fastest"}
    valid = (v in names if isinstance(v, str) else isinstance(v, lax.Precision | None) for v in values)
    if (pair and len(values) != 2) or not all(valid):
        raise ValueError(
            "precision must be None, a jax.lax.Precision, its name, or a pair of them for x and kernel; "
            f"got {precision!r}"
        )
    return values if pair else precision
