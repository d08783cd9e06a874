"""The cases: the geometries that the tests check, and the lowerings that they check them on.

CASES are small and between them meet every rank, data format, padding, stride, dilation and multiplier, alone and
together. `reduced` gives a layer of a known network at a size that a loop in NumPy can check.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from depthwise_jax.lowering import native
from tests.support.oracle import Oracle
from workloads.layers import NETWORKS
from workloads.workload import Workload

# Plain XLA, which serves every dtype, partitioned programs and exported ones.
PLAIN = ("conv", "taps")
# Every lowering runs the whole suite: a new one is one more name here. Where the compiled kernels are not there, the
# rest must do; test_native.py fails if they could be.
LOWERINGS = PLAIN if native.status().instruction_set is None else (*PLAIN, "native")


class Case(Workload):
    """A call whose true result is known."""

    @property
    def oracle(self) -> Oracle:
        """The true maps of this case."""
        return Oracle(self.x, self.kernel, **self.geometry)


def label(value: object) -> str:
    """A parameter's name in test ids, without the address that str gives of a function."""
    return getattr(value, "__name__", str(value))


_case = Case.of

# The cases on which derivatives of higher order, vmap, sharding and export are checked too: one of each kind.
CORE = (
    _case("2d", (2, 6, 5, 3), (3, 3, 3, 1)),
    _case("2d-same-m2", (2, 5, 6, 3), (3, 2, 3, 2), padding="same"),
    _case("2d-strided", (2, 8, 7, 3), (3, 3, 3, 1), strides=2, padding="same"),
    _case(
        "2d-strided-m2-first", (2, 3, 7, 8), (3, 3, 3, 2), strides=(2, 3), padding="valid", data_format="channels_first"
    ),
    _case("2d-dilated-strided", (2, 9, 8, 2), (3, 2, 2, 2), strides=(1, 2), padding="same", dilation_rate=(2, 3)),
    _case("1d-causal", (2, 9, 3), (4, 3, 1), padding="causal", dilation_rate=2),
    _case("3d", (1, 4, 3, 5, 2), (2, 3, 2, 2, 2), strides=(2, 1, 2), padding="same"),
    # More channels than a vector has, in every instruction set.
    _case("2d-vector", (1, 4, 5, 19), (3, 3, 19, 1), padding="same"),
)

CASES = (
    *CORE,
    # Windows
    _case("2d-1x1", (2, 4, 3, 3), (1, 1, 3, 2)),
    _case("2d-1x1-strided", (2, 5, 4, 3), (1, 1, 3, 1), strides=(2, 3)),
    _case("2d-1x5", (2, 4, 7, 3), (1, 5, 3, 1), padding="same"),
    _case("2d-even", (2, 7, 6, 3), (4, 2, 3, 1), padding="same"),
    _case("2d-even-strided", (2, 7, 6, 3), (4, 2, 3, 1), strides=2, padding="same"),
    _case("2d-5x5-strided", (1, 11, 10, 2), (5, 5, 2, 1), strides=2, padding="same"),
    _case("2d-whole-input", (2, 4, 3, 3), (4, 3, 3, 2)),
    _case("2d-larger-than-input", (2, 2, 3, 3), (5, 5, 3, 1), padding="same"),
    # Strides
    _case("2d-stride-above-window", (2, 9, 10, 3), (2, 2, 3, 1), strides=(3, 4)),
    _case(
        "2d-stride-above-window-first",
        (2, 2, 9, 8),
        (2, 1, 2, 2),
        strides=3,
        padding="same",
        data_format="channels_first",
    ),
    _case("2d-stride-leaves-a-rest", (2, 8, 9, 3), (3, 3, 3, 1), strides=(3, 2)),
    _case("2d-mixed-strides", (2, 7, 9, 2), (3, 3, 2, 2), strides=(1, 3), padding="same"),
    # Dilation
    _case("2d-dilated", (2, 8, 9, 3), (3, 3, 3, 1), padding="same", dilation_rate=2),
    _case("2d-dilated-valid-m3", (2, 7, 8, 2), (2, 3, 2, 3), dilation_rate=(3, 2)),
    _case("2d-dilation-divides-stride", (2, 9, 9, 2), (3, 3, 2, 1), strides=2, padding="same", dilation_rate=2),
    _case(
        "2d-dilation-and-stride-apart", (2, 11, 12, 2), (3, 2, 2, 1), strides=(3, 2), padding=2, dilation_rate=(2, 4)
    ),
    _case("2d-dilated-beyond-input", (1, 4, 5, 3), (3, 3, 3, 1), padding="same", dilation_rate=(5, 4)),
    _case("2d-dilation-and-stride-on-other-axes", (2, 8, 9, 3), (3, 2, 3, 2), strides=(2, 1), dilation_rate=(1, 3)),
    _case("1d-dilated-first", (2, 2, 10), (2, 2, 2), padding="same", dilation_rate=3, data_format="channels_first"),
    # Paddings
    _case("2d-pad-int", (2, 5, 4, 3), (3, 3, 3, 1), padding=2),
    _case("2d-pad-pairs", (2, 5, 4, 3), (3, 2, 3, 2), strides=(2, 1), padding=((0, 2), (3, 1))),
    _case("2d-pad-beyond-window", (1, 3, 4, 2), (2, 2, 2, 1), strides=(2, 1), padding=((4, 3), (0, 5))),
    _case(
        "2d-pad-pairs-first",
        (2, 2, 5, 4),
        (3, 2, 2, 2),
        strides=(2, 1),
        padding=((0, 2), (3, 1)),
        data_format="channels_first",
    ),
    _case("2d-reflect", (2, 5, 6, 3), (3, 4, 3, 1), padding="reflect"),
    _case(
        "2d-reflect-dilated-strided-first",
        (1, 2, 7, 8),
        (3, 2, 2, 2),
        strides=(2, 1),
        padding="reflect",
        dilation_rate=2,
        data_format="channels_first",
    ),
    _case("2d-circular", (2, 5, 4, 3), (4, 3, 3, 2), padding="circular"),
    _case("2d-edge", (2, 4, 5, 3), (4, 3, 3, 2), strides=(1, 2), padding="edge", dilation_rate=(1, 2)),
    _case("2d-circular-wraps-twice", (1, 2, 3, 2), (5, 3, 2, 1), padding="circular", dilation_rate=(1, 3)),
    # Ranks, batch axes and data formats
    _case("1d", (2, 7, 3), (3, 3, 2)),
    _case("1d-same-strided-first", (2, 3, 10), (4, 3, 2), strides=3, padding="same", data_format="channels_first"),
    _case("1d-causal-strided-m2", (2, 8, 2), (3, 2, 2), strides=2, padding="causal"),
    _case("1d-causal-first", (1, 3, 6), (3, 3, 1), padding="causal", data_format="channels_first"),
    _case("1d-circular", (2, 5, 3), (3, 3, 1), padding="circular"),
    _case("1d-edge-first", (2, 3, 5), (4, 3, 1), padding="edge", data_format="channels_first"),
    _case("3d-valid-first", (2, 2, 3, 4, 5), (2, 2, 3, 2, 1), data_format="channels_first"),
    _case("3d-dilated", (1, 4, 5, 4, 2), (2, 3, 2, 2, 1), padding="same", dilation_rate=(1, 2, 3)),
    _case("2d-no-batch", (6, 5, 3), (3, 3, 3, 2), padding="same"),
    _case("2d-no-batch-first", (3, 6, 5), (3, 3, 3, 2), strides=2, data_format="channels_first"),
    _case("2d-three-batch-axes", (2, 1, 2, 5, 4, 3), (3, 3, 3, 1), strides=2, padding="same"),
    _case("1d-two-batch-axes-first", (2, 3, 2, 7), (3, 2, 2), padding="same", data_format="channels_first"),
    _case("3d-no-batch", (3, 4, 3, 2), (2, 2, 2, 2, 2)),
    _case("2d-empty-batch", (0, 5, 4, 3), (3, 3, 3, 2), padding="same"),
    _case("2d-batch-12", (12, 4, 3, 2), (3, 2, 2, 2), padding="same"),
    _case("2d-batch-9-first", (9, 2, 6, 3), (3, 3, 2, 1), strides=2, padding="same", data_format="channels_first"),
    _case("2d-first", (2, 3, 6, 5), (3, 3, 3, 1), padding="same", data_format="channels_first"),
    # Channels
    _case("2d-one-channel", (2, 5, 6, 1), (3, 3, 1, 1), padding="same"),
    _case("2d-one-channel-m4", (2, 5, 6, 1), (3, 3, 1, 4), strides=2),
    _case("2d-17-channels", (2, 4, 5, 17), (3, 3, 17, 1), padding="same"),
    _case("2d-m4-first", (2, 2, 5, 6), (3, 3, 2, 4), padding="same", data_format="channels_first"),
    _case("2d-one-pixel", (2, 1, 1, 3), (1, 1, 3, 1)),
    _case("2d-one-pixel-same", (2, 1, 1, 3), (3, 3, 3, 2), strides=2, padding="same"),
)

# Activations, what they compute, and their derivatives.
ACTIVATIONS = (
    (None, np.positive, np.ones_like),
    ("relu", lambda y: np.maximum(y, 0), lambda y: (y > 0) * 1.0),
    ("relu6", lambda y: np.clip(y, 0, 6), lambda y: ((y > 0) & (y < 6)) * 1.0),
    ("tanh", np.tanh, lambda y: 1 - np.tanh(y) ** 2),
    (jnp.sin, np.sin, np.cos),
)

# For programs over several devices.
SHARDED_CASES = [
    Case(f"sharded-{name}-m{m}{suffix}", x, (3, 3, 4, m), {"padding": "same", **options})
    for m in (1, 2)
    for name, x, options, suffix in (
        ("plain", (4, 8, 6, 4), {}, ""),
        ("strided", (4, 8, 6, 4), {"strides": 2}, ""),
        ("strided", (4, 4, 8, 6), {"strides": 2, "data_format": "channels_first"}, "-first"),
    )
]


def reduced(layer: Workload) -> Case:
    """The same window, strides, padding and dilation on a small input of few channels, for the oracle's loops."""
    *window, _, multiplier = layer.kernel
    least = window if layer.geometry.get("padding", "valid") == "valid" else (1,) * len(window)
    spatial = tuple(min(n, max(8, k)) for n, k in zip(layer.x[1:-1], least, strict=True))
    return Case(f"reduced-{layer.name}", (2, *spatial, 3), (*window, 3, multiplier), layer.geometry)


# Each geometry of the networks once, but for windows of more than 64 taps, which take the oracle's loops long.
SMALL_NETWORKS = tuple(
    {
        (case.kernel, str(case.geometry)): case
        for case in map(reduced, NETWORKS)
        if math.prod(case.oracle.window) <= 64
    }.values()
)
