"""Shows the error in the kernel gradient of lax's depthwise convolution on a mesh of two axes that shards the batch.

Run as `python -m benchmarks.repeated_sum`. The batch is sharded over one axis. The command prints the gradient's ratio
to that on a single device, which should be 1 and is the size of the other axis. Because of this error
depthwise_jax.lowering.conv computes the kernel gradient differently there.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from collections.abc import Callable

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from depthwise_jax import depthwise_conv

CHANNELS = 4


def lax_conv(x: Array, kernel: Array) -> Array:
    """The same convolution by lax."""
    return lax.conv_general_dilated(
        x,
        kernel.reshape(3, 3, 1, CHANNELS),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=CHANNELS,
    )


def ratio(conv: Callable[[Array, Array], Array], mesh_shape: tuple[int, int]) -> float:
    """The median ratio of the kernel gradient with the batch sharded over the mesh's first axis to the one without."""
    x = jax.random.normal(jax.random.key(0), (8, 6, 6, CHANNELS))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, CHANNELS, 1))
    gradient = jax.jit(jax.grad(lambda kernel, x: (conv(x, kernel) ** 2).sum()))
    mesh = jax.make_mesh(mesh_shape, ("batch", "other"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    return float(np.median(np.asarray(gradient(kernel, sharded)) / np.asarray(gradient(kernel, x))))


def main() -> None:
    """Prints the ratios."""
    print(f"jax {jax.__version__}; kernel gradient, batch sharded over the first mesh axis, relative to one device")
    for mesh_shape in ((8, 1), (4, 2), (2, 4)):
        print(f"mesh {mesh_shape}: lax {ratio(lax_conv, mesh_shape):.3f}, ours {ratio(depthwise_conv, mesh_shape):.3f}")


if __name__ == "__main__":
    main()
