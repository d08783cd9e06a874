"""Describes a call of one map, on which the choice of a lowering and its computation depend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from depthwise_jax._core.convolution import Convolution
from depthwise_jax._core.dtypes import widened
from depthwise_jax._core.sharding import Partitioning

# The three maps by their short names in reports and results.
DIRECTIONS = {"forward": "forward", "dx": "input_grad", "dw": "kernel_grad"}
MAPS = tuple(DIRECTIONS.values())
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclass(frozen=True)
class Call:
    """One map of a convolution, in a program for one platform.

    Attributes:
        direction: one of MAPS.
        convolution: the convolution.
        platform: one of PLATFORMS.
        dtype: a dtype that holds the operands and the result.
        partitioning: how the compiler spreads the program over devices.
        exported: whether the program is exported, to run where this package may not be installed.
        channels: the number of input channels, over all devices.
        multiplier: the number of kernels per channel.
        differentiated: whether the result is the value of a function that is being differentiated.
        packed: whether each output sums only the taps within its own reach.
    """

    direction: str
    convolution: Convolution
    platform: str
    dtype: Any
    partitioning: Partitioning = field(default_factory=Partitioning)
    exported: bool = False
    channels: int = 1
    multiplier: int = 1
    differentiated: bool = False
    packed: bool = False

    @property
    def symbolic(self) -> bool:
        """Whether a spatial size is symbolic."""
        return not all(isinstance(n, int) for n in self.convolution.spatial)

    @property
    def sum_dtype(self) -> Any:
        """The dtype in which sums are taken: float32 for narrower floats."""
        return widened(self.dtype)
