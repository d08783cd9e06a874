"""Describes one call of depthwise_conv: the operands' shapes, its geometry, and numbers for the operands."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np

from depthwise_jax import depthwise_conv

Padding = str | int | Sequence[tuple[int, int]]


class EmptyOutputError(ValueError):
    """The window fits nowhere."""


class Geometry:
    """The shapes that a convolution's arguments imply, computed from the definitions without the package.

    For output position o and tap t, the input position is p = o*stride + t*dilation - low.

    Attributes:
        rank: the number of spatial axes.
        x_shape, y_shape: the operands' shapes, (*batch, *spatial, C) or (*batch, C, *spatial).
        batch, spatial, out: the sizes of x's batch axes, of its spatial axes and of those of y.
        window, channels, multiplier: the kernel's shape, (*window, C, M).
        strides, dilation, low: for each spatial axis; low is the padding before the input.
        channel_axis: counted from the end.
        again: "reflect", "circular" or "edge" if positions outside the input repeat those inside, else None.

    Raises:
        EmptyOutputError: the window does not fit into the padded input.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        kernel_shape: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "valid",
        data_format: str = "channels_last",
        dilation_rate: int | Sequence[int] = 1,
    ) -> None:
        self.rank = rank = len(kernel_shape) - 2
        self.x_shape = tuple(x_shape)
        self.window = tuple(kernel_shape[:rank])
        self.channels, self.multiplier = kernel_shape[rank:]
        self.strides = (strides,) * rank if isinstance(strides, int) else tuple(strides)
        self.dilation = (dilation_rate,) * rank if isinstance(dilation_rate, int) else tuple(dilation_rate)
        self.channel_axis = -1 if data_format == "channels_last" else -1 - rank
        sizes = list(x_shape)
        sizes.pop(self.channel_axis)
        self.batch, self.spatial = tuple(sizes[: len(sizes) - rank]), tuple(sizes[len(sizes) - rank :])
        pads: Sequence[tuple[int, int]]
        spans = [(k - 1) * d + 1 for k, d in zip(self.window, self.dilation, strict=True)]
        self.again = padding if padding in ("reflect", "circular", "edge") else None
        if padding == "valid":
            pads = [(0, 0)] * rank
        elif padding == "same":
            totals = [
                max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in zip(self.spatial, self.strides, spans, strict=True)
            ]
            pads = [(total // 2, total - total // 2) for total in totals]
        elif padding == "causal":
            pads = [(e - 1, 0) for e in spans]
        elif self.again:
            pads = [((e - 1) // 2, e // 2) for e in spans]
        elif isinstance(padding, int):
            pads = [(padding, padding)] * rank
        else:
            pads = padding  # pyright: ignore[reportAssignmentType]
        self.low = [low for low, _ in pads]
        room = [n + low + high - e for n, (low, high), e in zip(self.spatial, pads, spans, strict=True)]
        no_output = padding == "same" and 0 in self.spatial  # ceil(0 / s) is 0
        if min(room) < 0 or no_output or (self.again and 0 in self.spatial):
            raise EmptyOutputError(f"{self.spatial=} {self.window=} {pads=}")
        self.out = tuple(r // s + 1 for r, s in zip(room, self.strides, strict=True))
        output = [*self.batch, *self.out]
        output.insert(len(output) + 1 + self.channel_axis, self.channels * self.multiplier)
        self.y_shape = tuple(output)


@dataclass(frozen=True)
class Workload:
    """One call of depthwise_conv: the operands' shapes and the geometry as keyword arguments."""

    name: str
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    geometry: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, x: Sequence[int], kernel: Sequence[int], **geometry: Any) -> Self:
        """A workload with depthwise_conv's keyword arguments."""
        return cls(name, tuple(x), tuple(kernel), geometry)

    @property
    def resolved(self) -> Geometry:
        """The geometry for these shapes."""
        return Geometry(self.x, self.kernel, **self.geometry)

    def draw(self, shape: Sequence[int], stream: int = 0) -> np.ndarray:
        """Standard normal numbers in float32, the same at every run and for every dtype that they are cast to."""
        seed = zlib.crc32(f"{self.name}/{stream}".encode())
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def operands(self, stream: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, the kernel and a cotangent (or tangent) in the output's shape."""
        return (
            self.draw(self.x, 3 * stream),
            self.draw(self.kernel, 3 * stream + 1),
            self.draw(self.resolved.y_shape, 3 * stream + 2),
        )

    def conv(self, implementation: str | None = None, **options: Any) -> Callable[..., Any]:
        """depthwise_conv with this geometry, as a function of the operands."""
        return partial(depthwise_conv, **self.geometry, implementation=implementation, **options)

    def __str__(self) -> str:
        return self.name
