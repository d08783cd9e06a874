"""The shardings of the three maps' results in explicit sharding mode.

Batch and channels keep their sharding, spatial axes too (the compiler exchanges the halo), a window's axes and the
multiplier are never sharded. The channels of x, y and kernel must agree where more than one is sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from depthwise_jax.convolution import Convolution

# One entry of a PartitionSpec: None, a mesh axis, or a tuple of them.
Entry = Any
Spec = tuple[Entry, ...]


def forward_spec(convolution: Convolution, x: Spec, kernel: Spec) -> Spec:
    """The spec of y, and of x from g and kernel."""
    layout = convolution.layout
    channels = agree("channels", x[layout.channels], _kernel_channels(kernel))
    return layout.arrange(convolution.batch(x), layout.spatial_shape(x), channels)


def kernel_grad_spec(convolution: Convolution, x: Spec, g: Spec) -> Spec:
    """The spec of kernel from x and g: what is summed over is not sharded in the result."""
    axis = convolution.layout.channels
    return (*(None,) * convolution.window.rank, agree("channels", x[axis], g[axis]), None)


def agree(what: str, *entries: Entry) -> Entry:
    """The one sharding of an axis that the operands share.

    Raises:
        ValueError: they shard it differently.
    """
    given = {entry for entry in entries if entry is not None}
    if len(given) > 1:
        raise ValueError(
            f"the operands of a depthwise convolution shard the {what} differently, by "
            f"{' and '.join(map(repr, entries))}; "
            "expected one sharding, or one operand that does not shard them (jax.sharding.reshard changes a sharding)"
        )
    return given.pop() if given else None


def _kernel_channels(kernel: Sequence[Entry]) -> Entry:
    *window, channels, multiplier = kernel
    if any(entry is not None for entry in (*window, multiplier)):
        raise ValueError(
            f"the kernel of a depthwise convolution, (*window, channels, multiplier), is sharded as {tuple(kernel)}; "
            "expected a sharding of the channels alone"
        )
    return channels
