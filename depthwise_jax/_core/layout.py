"""Axis positions: the two data formats, with the channels and the spatial axes counted from the end.

Counted from the end, the positions hold for any number of leading batch axes:

    channels_last    x (*batch, *spatial, C)    y (*batch, *out, C*M)
    channels_first   x (*batch, C, *spatial)    y (*batch, C*M, *out)

The kernel is (*window, C, M) in both. Output channel c*M + m is input channel c under its m-th kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from jax import Array

DataFormat = Literal["channels_last", "channels_first"]
DATA_FORMATS: tuple[DataFormat, ...] = get_args(DataFormat)

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """The axes of an array with `rank` spatial axes in a data format.

    Attributes:
        rank: number of spatial axes.
        data_format: "channels_last" or "channels_first".
    """

    rank: int
    data_format: DataFormat

    def __post_init__(self) -> None:
        if self.data_format not in DATA_FORMATS:
            raise ValueError(f"data_format must be one of {DATA_FORMATS}; got {self.data_format!r}")

    @property
    def channels(self) -> int:
        """Position of the channel axis, negative."""
        return -1 if self.data_format == "channels_last" else -self.rank - 1

    @property
    def spatial(self) -> tuple[int, ...]:
        """Positions of the spatial axes, negative."""
        last = 0 if self.channels == -1 - self.rank else -1
        return tuple(range(last - self.rank, last))

    def spatial_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of an array of this shape."""
        return tuple(shape[axis] for axis in self.spatial)

    def arrange(self, leading: Sequence[T], spatial: Sequence[T], *channels: T) -> tuple[T, ...]:
        """One tuple out of per-axis values, in this format's order; `channels` may be several axes side by side."""
        if self.data_format == "channels_last":
            return (*leading, *spatial, *channels)
        return (*leading, *channels, *spatial)

    # With a kernel (*window, C, M), channels are two axes: (*batch, *spatial, C, M), (*batch, C, M, *spatial).

    def split(self, array: Array, *channels: int) -> Array:
        """An array whose channel axis is replaced by axes of these sizes."""
        lead = array.shape[: array.ndim - self.rank - 1]
        return array.reshape(self.arrange(lead, self.spatial_shape(array.shape), *channels))

    def merge(self, array: Array, axes: int) -> Array:
        """The inverse of a split into so many axes."""
        lead = array.shape[: array.ndim - self.rank - axes]
        spatial = [array.shape[axis] for axis in self.split_spatial(array.ndim, axes)]
        channels = math.prod(array.shape[axis] for axis in self.split_channels(array.ndim, axes))
        return array.reshape(self.arrange(lead, spatial, channels))

    def split_spatial(self, ndim: int, axes: int) -> tuple[int, ...]:
        """The spatial axes of an array of `ndim` axes, so many of them channels."""
        first = ndim - self.rank - (axes if self.channels == -1 else 0)
        return tuple(range(first, first + self.rank))

    def split_channels(self, ndim: int, axes: int) -> tuple[int, ...]:
        """The channel axes of such an array."""
        first = ndim - axes - (0 if self.channels == -1 else self.rank)
        return tuple(range(first, first + axes))
