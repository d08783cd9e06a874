"""The table of cases: the geometries that the tests check and the benchmarks time.

CASES are small and between them meet every rank, data format, padding, stride, dilation and multiplier, alone and
together. NETWORKS are depthwise layers out of known networks at their real sizes, for the benchmarks; `reduced` gives
the same geometry at a size that a loop in NumPy can check, and the tests take those too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from depthwise_jax import depthwise_conv
from depthwise_jax.lowering import native
from tests.oracle import Oracle

# Plain XLA, which serves every dtype, partitioned programs and exported ones.
PLAIN = ("conv", "taps")
# Every lowering runs the whole suite: a new one is one more name here. Where the compiled kernels are not there, the
# rest must do; test_native.py fails if they could be.
LOWERINGS = PLAIN if native.status().instruction_set is None else (*PLAIN, "native")


@dataclass(frozen=True)
class Case:
    """One call of depthwise_conv: the operands' shapes and the geometry as keyword arguments."""

    name: str
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    geometry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def oracle(self) -> Oracle:
        """The true maps of this case."""
        return Oracle(self.x, self.kernel, **self.geometry)

    def draw(self, shape: Sequence[int], stream: int = 0) -> np.ndarray:
        """Standard normal numbers in float32, the same at every run and for every dtype that they are cast to."""
        seed = zlib.crc32(f"{self.name}/{stream}".encode())
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def operands(self, stream: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, the kernel and a cotangent (or tangent) in the output's shape."""
        return (
            self.draw(self.x, 3 * stream),
            self.draw(self.kernel, 3 * stream + 1),
            self.draw(self.oracle.y_shape, 3 * stream + 2),
        )

    def conv(self, implementation: str | None = None, **options: Any) -> Callable[..., Any]:
        """depthwise_conv with this case's geometry, a function of the operands alone."""
        return partial(depthwise_conv, **self.geometry, implementation=implementation, **options)

    def __str__(self) -> str:
        return self.name


def label(value: object) -> str:
    """A parameter's name in test ids, without the address that str gives of a function."""
    return getattr(value, "__name__", str(value))


def _case(name: str, x: Sequence[int], kernel: Sequence[int], **geometry: Any) -> Case:
    return Case(name, tuple(x), tuple(kernel), geometry)


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
    _case("2d-circular-wraps-twice", (1, 2, 3, 2), (5, 3, 2, 1), padding="circular", dilation_rate=(1, 3)),
    # Ranks, batch axes and data formats
    _case("1d", (2, 7, 3), (3, 3, 2)),
    _case("1d-same-strided-first", (2, 3, 10), (4, 3, 2), strides=3, padding="same", data_format="channels_first"),
    _case("1d-causal-strided-m2", (2, 8, 2), (3, 2, 2), strides=2, padding="causal"),
    _case("1d-causal-first", (1, 3, 6), (3, 3, 1), padding="causal", data_format="channels_first"),
    _case("1d-circular", (2, 5, 3), (3, 3, 1), padding="circular"),
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

# Depthwise layers of known networks, channels last, each shape once, for images of 224 x 224 or the named lengths. The
# batch sizes make a call take between about 0.03 and 10 ms on two cores. Strided layers are padded alike on both sides,
# as all peers can, so that none of them needs a pass of its own for the padding.
_NETWORKS_2D = (
    # network, (N, H, W, C), window, stride
    ("mobilenet-v1", (8, 112, 112, 32), 3, 1),
    ("mobilenet-v1", (8, 112, 112, 64), 3, 2),
    ("mobilenet-v1", (8, 56, 56, 128), 3, 1),
    ("mobilenet-v1", (8, 56, 56, 128), 3, 2),
    ("mobilenet-v1", (8, 28, 28, 256), 3, 1),
    ("mobilenet-v1", (8, 14, 14, 512), 3, 1),
    ("mobilenet-v1", (64, 14, 14, 512), 3, 2),
    ("mobilenet-v1", (32, 112, 112, 32), 3, 1),  # 51 MB: fresh pages on every call
    ("mobilenet-v2", (8, 112, 112, 96), 3, 2),
    ("mobilenet-v2", (8, 56, 56, 144), 3, 1),
    ("mobilenet-v2", (24, 56, 56, 144), 3, 1),  # 43 MB: likewise
    ("mobilenet-v2", (8, 28, 28, 192), 3, 1),
    ("mobilenet-v2", (8, 14, 14, 576), 3, 2),
    ("mobilenet-v2", (8, 7, 7, 960), 3, 1),
    ("mobilenet-v3", (8, 112, 112, 16), 3, 1),
    ("mobilenet-v3", (8, 56, 56, 72), 3, 1),
    ("mobilenet-v3", (8, 56, 56, 72), 5, 2),
    ("mobilenet-v3", (8, 28, 28, 88), 3, 1),
    ("mobilenet-v3", (8, 28, 28, 120), 5, 1),
    ("mobilenet-v3", (8, 28, 28, 96), 5, 2),
    ("mobilenet-v3", (16, 14, 14, 184), 3, 1),
    ("mobilenet-v3", (8, 7, 7, 960), 5, 1),
    ("efficientnet-b0", (8, 56, 56, 144), 5, 2),
    ("efficientnet-b0", (8, 28, 28, 240), 5, 1),
    ("efficientnet-b0", (8, 28, 28, 240), 3, 2),
    ("efficientnet-b0", (8, 14, 14, 480), 5, 1),
    ("efficientnet-b0", (8, 14, 14, 672), 5, 2),
    ("efficientnet-b0", (8, 7, 7, 1152), 5, 1),
    ("efficientnet-lite0", (1, 112, 112, 32), 3, 1),
    ("efficientnet-lite0", (1, 28, 28, 240), 5, 1),
    ("efficientnet-lite0", (1, 14, 14, 672), 5, 1),
    ("convnext-t", (8, 56, 56, 96), 7, 1),
    ("convnext-t", (8, 28, 28, 192), 7, 1),
    ("convnext-t", (8, 14, 14, 384), 7, 1),
    ("convnext-t", (8, 7, 7, 768), 7, 1),
    ("replknet-31b", (4, 7, 7, 1024), 13, 1),
    ("replknet-31b", (2, 14, 14, 512), 27, 1),
    ("replknet-31b", (2, 28, 28, 256), 29, 1),
    ("replknet-31b", (1, 56, 56, 128), 31, 1),
)

NETWORKS = (
    # 22 electrodes and 1,125 steps in; then 281 steps and a separable layer's window of 16.
    _case("eegnet-16x22x1125x8-k22x1-m2", (16, 22, 1125, 8), (22, 1, 8, 2)),
    _case("eegnet-64x1x281x16-k1x16", (64, 1, 281, 16), (1, 16, 16, 1), padding="same"),
    _case("mamba-1x2048x1536-k4", (1, 2048, 1536), (4, 1536, 1), padding="causal"),
    _case("conformer-8x400x256-k31", (8, 400, 256), (31, 256, 1), padding="same"),
    *(
        _case(
            f"{network}-{'x'.join(map(str, x))}-k{k}" + ("-s2" if stride == 2 else ""),
            x,
            (k, k, x[-1], 1),
            strides=stride,
            padding=k // 2,
        )
        for network, x, k, stride in _NETWORKS_2D
    ),
)


def reduced(case: Case) -> Case:
    """The same window, strides, padding and dilation on a small input of few channels, for the oracle's loops."""
    *window, _, multiplier = case.kernel
    least = window if case.geometry.get("padding", "valid") == "valid" else (1,) * len(window)
    spatial = tuple(min(n, max(8, k)) for n, k in zip(case.x[1:-1], least, strict=True))
    return replace(case, name=f"reduced-{case.name}", x=(2, *spatial, 3), kernel=(*window, 3, multiplier))


# Each of their geometries once, but for windows of more than 64 taps, which take the oracle's loops long.
SMALL_NETWORKS = tuple(
    {
        (case.kernel, str(case.geometry)): case
        for case in map(reduced, NETWORKS)
        if math.prod(case.oracle.window) <= 64
    }.values()
)
