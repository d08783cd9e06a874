"""A call of one map: what the choice of a lowering depends on, and what the lowerings are given beside the operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from depthwise_jax.convolution import Convolution

MAPS = ("forward", "input_grad", "kernel_grad")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclass(frozen=True)
class Call:
    """One map of a convolution, in a program for one platform.

    Attributes:
        direction: one of MAPS.
        convolution: the convolution.
        platform: one of PLATFORMS.
        dtype: one that holds the operands and the result.
        partitioned: the sizes of the mesh axes, of more than one device each, over which the compiler partitions the
            program (under automatic or explicit sharding; not in shard_map); (devices, 1) if those are unknown.
        copies: whether several devices may hold the same part of an operand; not where the types shard both over all of
            those axes.
        rows: whether the first spatial axis is sharded: as the operands' types say or, where they do not, if the
            devices cannot share the batch equally.
        slabs: whether the batch can be cut into slabs without cutting an image: its size is known, and no spatial axis
            is known to be sharded.
        exported: whether the program is exported, to run where this package may not be installed.
        batch: the product of the leading axes on one device, stacked ones included; None if it is unknown.
        channels: the number of input channels, over all devices.
        multiplier: the number of kernels per channel.
        whole_channels: whether each device is known to hold all channels.
        differentiated: whether the result is that of a function which is being differentiated.
    """

    direction: str
    convolution: Convolution
    platform: str
    dtype: Any
    partitioned: tuple[int, ...] = ()
    copies: bool = True
    rows: bool = False
    slabs: bool = True
    exported: bool = False
    batch: int | None = None
    channels: int = 1
    multiplier: int = 1
    whole_channels: bool = True
    differentiated: bool = False

    @property
    def symbolic(self) -> bool:
        """Whether a spatial size is symbolic."""
        return not all(isinstance(n, int) for n in self.convolution.spatial)

    @property
    def sum_dtype(self) -> Any:
        """The dtype in which sums are taken: float32 for narrower floats."""
        narrow = jnp.issubdtype(self.dtype, jnp.floating) and jnp.finfo(self.dtype).bits < 32
        return jnp.dtype(jnp.float32) if narrow else self.dtype
