"""A call of one map: what the choice of a lowering depends on, and what the lowerings are given beside the operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    @property
    def symbolic(self) -> bool:
        """Whether a spatial size is symbolic."""
        return not all(isinstance(n, int) for n in self.convolution.spatial)
