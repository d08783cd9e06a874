"""Meshes over the host's devices, and what is sharded over them."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from workloads.workload import Workload

# The ways to shard a convolution's data, as `specs` takes them.
SHARDED = ("batch", "channels", "batch+channels", "rows")


def make_mesh(axis_type: AxisType = AxisType.Auto, /, **axes: int) -> Mesh:
    """A mesh of the first devices, with axes of these sizes."""
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes), devices=devices)


def specs(case: Workload, sharded: str) -> tuple[P, P, P]:
    """For x and y, the kernel, and the bias: the batch or rows over the mesh axis "b", the channels over "c"."""
    rank = len(case.kernel) - 2
    b, c = ("b" if "batch" in sharded else None), ("c" if "channels" in sharded else None)
    spatial = ("b" if sharded == "rows" else None, *(None,) * (rank - 1))
    image = P(b, c, *spatial) if case.resolved.channel_axis != -1 else P(b, *spatial, c)
    return image, P(*(None,) * rank, c, None), P(c)
