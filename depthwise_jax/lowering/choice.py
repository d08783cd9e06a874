"""Chooses the lowering of a call: the lowerings by name, one table, and the choice.

A lowering is a module with the functions of `Lowering`, a name in `Implementation`, an entry of LOWERINGS and a row of
TABLE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from depthwise_jax.lowering import conv, native, taps
from depthwise_jax.lowering.call import Call


class Lowering(Protocol):
    """The functions that every lowering has."""

    def refusal(self, call: Call) -> str | None:
        """Why it cannot compute a call, or None."""
        ...

    def operand_dtype(self, call: Call) -> Any:
        """The dtype to which a call's operands are cast; the results may be wider."""
        ...

    def forward(self, x: Array, kernel: Array, call: Call) -> Array:
        """y."""
        ...

    def input_grad(self, g: Array, kernel: Array, call: Call) -> Array:
        """dx."""
        ...

    def kernel_grad(self, x: Array, g: Array, call: Call) -> Array:
        """dw."""
        ...


@runtime_checkable
class FusedLowering(Protocol):
    """A lowering that applies bias and activation as it stores the result."""

    def fused(self, x: Array, kernel: Array, bias: Array | None = None, *, activation: str, call: Call) -> Array:
        """activation(y + bias)."""
        ...


@runtime_checkable
class KeepingLowering(Protocol):
    """A lowering whose values XLA would recompute in a backward pass."""

    def keeps_value(self, call: Call) -> bool:
        """Whether a value must be kept."""
        ...


@runtime_checkable
class PackedLowering(Protocol):
    """A lowering that computes packed maps itself; for the others packed.py makes them from their plain maps."""

    def packed_forward(self, x: Array, kernel: Array, reach: Array, call: Call) -> Array:
        """y, each output of the taps that it reaches."""
        ...

    def packed_input_grad(self, g: Array, kernel: Array, reach: Array, call: Call) -> Array:
        """dx."""
        ...

    def packed_kernel_grad(self, x: Array, g: Array, reach: Array, call: Call) -> Array:
        """dw."""
        ...


Implementation = Literal["conv", "taps", "native"]  # the names in LOWERINGS, as the public functions take them
LOWERINGS: dict[str, Lowering] = {"conv": conv, "taps": taps, "native": native}


@dataclass(frozen=True)
class Choice:
    """A lowering's name, and why it was chosen."""

    lowering: str
    reason: str

    def __str__(self) -> str:
        return f"{self.lowering}: {self.reason}"


def all_calls(call: Call) -> bool:
    """The condition of a row for all calls on its platforms."""
    del call
    return True


@dataclass(frozen=True)
class Rule:
    """A row of the table: the lowering to choose on some platforms, and why.

    Attributes:
        platforms: the platforms.
        lowering: the name of the lowering.
        reason: why.
        serves: whether the row applies to a call on those platforms.
    """

    platforms: tuple[str, ...]
    lowering: str
    reason: str
    serves: Callable[[Call], bool] = all_calls


# Up to these windows over sequences an elementwise sum takes fewer cycles on a TPU v5e than XLA's convolution, by the
# compiler's schedules (benchmarks/results/tpu_floor.md, "Windows", "Dilation" and "Images"): at any batch, and at fewer
# than 8 sequences or images a device, where the convolution copies its operands to bring the batch into sublanes.
# At (8, 2048, 2048), in thousands of cycles: for a window of 9 the gradient of x on its own would be faster by
# convolution, 407 against 413, but a training step has both gradients, 697 as sums and 1,131 by convolution. For a
# window of 16 the kernel's gradient on its own takes 921 by convolution and 924 as a sum; both gradients take 1,612 by
# convolution, and 1,113 if only the kernel's is a sum. For 8 or more images and 3x3 in float32 the two tie.
_SUMMED_TAPS = {"forward": 8, "input_grad": 9, "kernel_grad": 16}
# For fewer sequences, and for values of four bytes: there the convolution moves each byte twice, and a sum of up to 9
# taps moves it once.
_SUMMED_TAPS_AT_MOST = 16
_FEW = 8
# Strided maps are convolutions: no simple rule held. y of a window of 4 at stride 2, in the same thousands, of
# (4, 2048, 2048) takes 442 by convolution and 342 as a sum, of (7, 1000, 768) at least 68 and at least 140.
# Of fewer than _FEW images, by the schedules, in thousands of cycles by convolution and as a sum:
# y and dx of 3x3 are a sum, unless images lie side by side (taps.is_side_by_side) with up to this many positions in a
# row of all of them: (2, 20, 20, 256) 4.1 and 4.7, (4, 7, 7, 1024) 1.9 and 3.4; (6, 7, 7, 1024) 5.1 and 4.0,
# (2, 28, 28, 256) 9.9 and 9.2, (4, 56, 56, 128) 31.3 and 18.7.
_CONVOLVED_SIDE_BY_SIDE = 40
# y and dx of larger windows are a sum for an odd number of images up to these, if they are widened once and up to 32
# wide: 5x5 of (5, 14, 14, 512) 21.1 and 15.7, of (1, 32, 32, 256) 8.2 and 7.6; of (7, 14, 14, 512) 22.3 and 23.0, of
# (1, 56, 56, 128) 10.6 and 10.8; 7x7 of (1, 28, 28, 256) 12.2 and 12.1, both gradients in one program 36.2 if only dw
# is a sum, and 25.0; of (1, 56, 56, 128) 16.8 and 21.1. 3x3x3 gains nothing: one volume of 16 x 56 x 56 and 64 channels
# takes 180 and 181.
_SUMMED_LARGER: dict[tuple[int, ...], int] = {(5, 5): 5, (7, 7): 1}
_SUMMED_WIDTH = 32
# dw of windows of up to 49 taps is a sum for one or three images: 7x7 of (3, 14, 14, 512) 26.2 and 20.4, of
# (1, 28, 28, 256) 49.4 and 12.7. It is one for up to 5 images, by rank, if a register's rows divide their width: 3x3 of
# (4, 56, 56, 128) 42.9 and 19.1, of (5, 16, 16, 512) 9.1 and 8.3, of (6, 16, 16, 512) 8.6 and 9.7; 3x3x3 of two volumes
# of 16 x 56 x 56 and 64 channels 1,334 and 717, of four 1,205 and 1,435.
_SUMMED_IMAGE_TAPS = 49
_SUMMED_IN_ROWS = {2: 5, 3: 2}
# The windows and sizes for which XLA's own dw of 5 to 7 images of up to 256 channels is slow: 3x3 of (6, 28, 28, 256)
# 26.2 and 16.7, of (7, 56, 56, 128) 53.1 and 35.0, 5x5 of (7, 56, 56, 128) 92.8 and 77.4. 3x3 beside them is not:
# (6, 28, 28, 512) 29.3 and 35.4, (6, 26, 26, 256) 11.8 and 15.6, (7, 48, 48, 128) 19.4 and 23.8, (7, 64, 64, 128) 35.1
# and 44.0. Of 8 images dw on its own would gain at 56 x 56, 59.7 and 39.8, but both gradients take 57.8 in one program
# by convolution, and 85.4 if only dw is a sum.
_SLOW = {((3, 3), (28, 28)), ((3, 3), (56, 56)), ((5, 5), (56, 56))}
_SLOW_CHANNELS = 256


def is_packed(call: Call) -> bool:
    """Whether each output has its own reach."""
    return call.packed


def is_summed_on_tpu(call: Call) -> bool:
    """Whether an elementwise sum over the taps is the faster formulation on TPU."""
    if call.packed:
        return True
    convolution, batch = call.convolution, call.partitioning.batch
    window = convolution.window
    if call.multiplier > 1 or max(window.strides) > 1 or convolution.layout.channels != -1:
        return False
    if window.rank == 1:
        most = (batch is not None and batch < _FEW) or jnp.dtype(call.dtype).itemsize > 2
        return window.size[0] <= (_SUMMED_TAPS_AT_MOST if most else _SUMMED_TAPS[call.direction])
    if batch is None or call.symbolic:
        return False
    return _is_summed_kernel_grad(call, batch) if call.direction == "kernel_grad" else _is_summed_map(call, batch)


def _is_summed_map(call: Call, batch: int) -> bool:
    """Whether y or dx of images or volumes is the faster as a sum on TPU."""
    size, width = call.convolution.window.size, call.convolution.spatial[-1]
    if size == (3, 3):
        return batch < _FEW and (not taps.is_side_by_side(call) or batch * width > _CONVOLVED_SIDE_BY_SIDE)
    few = batch % 2 == 1 and batch <= _SUMMED_LARGER.get(size, 0)
    return few and width <= _SUMMED_WIDTH and taps.is_widened_once(call)


def _is_summed_kernel_grad(call: Call, batch: int) -> bool:
    """Whether dw of images or volumes is the faster as a sum on TPU."""
    window, spatial = call.convolution.window, tuple(call.convolution.spatial)
    # Of a window of many taps the halos of sharded images would be sent for each of its rows.
    if window.taps > _SUMMED_IMAGE_TAPS or (window.size != (3, 3) and not call.partitioning.whole_images):
        return False
    if batch in (1, 3) or (batch <= _SUMMED_IN_ROWS[window.rank] and spatial[-1] % taps.ROWS == 0):
        return True
    slow = (window.size, spatial) in _SLOW and call.channels <= _SLOW_CHANNELS
    return 4 < batch < _FEW and slow and taps.is_widened_once(call)


def is_product(call: Call) -> bool:
    """Whether y is an elementwise product of x and several kernels, which XLA computes in one pass over memory.

    On CPU, from 32 channels to (8, 28, 28, 64), it takes 0.06 ms and the compiled kernels 0.40 ms, because they
    interleave the kernels' results.
    """
    window = call.convolution.window
    inside = window.taps == max(window.strides) == 1 and not any(map(any, window.padding))
    return call.direction == "forward" and call.multiplier > 1 and inside


# On a GPU a strided dx in float32 is an elementwise sum up to this many products for each element of dx. By what XLA
# compiles for an H100 (benchmarks/results/gpu_compiler.md), the sum moves each byte once. The convolution writes g with
# zeros between its elements and reads that again: 2.7 times the bytes at 3x3 and stride 2, 4.1 ps an element at 3.35
# TB/s. The sum's 2.25 products are about 50 instructions, 1.7 ps at one a cycle and lane. At 5x5 (6.25 products), and
# at 3x3 in bfloat16, the instructions take as long as the convolution's bytes, so without a measurement those stay.
_SUMMED_PRODUCTS = 3


def is_summed_on_gpu(call: Call) -> bool:
    """Whether an elementwise sum over the taps moves fewer bytes on a GPU without taking longer to compute."""
    window = call.convolution.window
    return (
        call.direction == "input_grad"
        and max(window.strides) > 1
        and call.multiplier * window.taps <= _SUMMED_PRODUCTS * math.prod(window.strides)
        and jnp.dtype(call.dtype) == jnp.float32
        and not call.partitioning.sharded_rows
    )


_COMPILED = "as compiled for an H100; no time was measured on a GPU"

# The first row for a platform that applies and whose lowering does not refuse the call decides; benchmarks/peers.py
# measures the rows' claims.
TABLE = [
    Rule(("cpu",), "taps", "several kernels of one tap: a product, in one pass over memory", is_product),
    Rule(("cuda", "rocm"), "taps", "several kernels of one tap: a product; no time was measured on a GPU", is_product),
    Rule(("cpu",), "native", "the compiled kernels are the fastest on CPU"),
    Rule(("cpu",), "taps", "XLA's grouped convolution is many times slower on CPU"),
    Rule(("cpu",), "conv", "XLA's grouped convolution computes every call"),
    Rule(
        ("tpu",),
        "taps",
        "a sum of few taps takes the fewest cycles, by the compiler's schedules, not on a chip",
        is_summed_on_tpu,
    ),
    Rule(
        ("tpu",),
        "conv",
        "XLA's grouped convolution takes the fewest cycles, by the compiler's schedules, not on a chip",
    ),
    Rule(("cuda", "rocm"), "taps", "a packed sum is one loop; by convolutions it is one for each tap", is_packed),
    Rule(("cuda",), "taps", f"a sum of few taps moves each byte once, {_COMPILED}", is_summed_on_gpu),
    Rule(("cuda",), "conv", f"XLA's grouped convolution runs no more kernels than flax.linen.Conv, {_COMPILED}"),
    Rule(("rocm",), "conv", "XLA's grouped convolution computes every call; nothing was measured or compiled for it"),
    Rule(("tpu", "cuda", "rocm"), "taps", "shifted products work on every platform"),
]


def choose(call: Call, implementation: Implementation | None) -> Choice:
    """The lowering for a call.

    Args:
        call: the call.
        implementation: a lowering that the caller requires, or None.

    Raises:
        ValueError: that lowering cannot compute the call; or without one, no lowering can.
    """
    where = f"this {call.direction} on {call.platform}"
    if implementation is not None:
        refusal = LOWERINGS[implementation].refusal(call)
        if refusal is not None:
            raise ValueError(f"implementation={implementation!r} cannot compute {where}: {refusal}")
        return Choice(implementation, "required by implementation=")
    refusals: list[str] = []
    for rule in TABLE:
        if call.platform in rule.platforms and rule.serves(call):
            refusal = LOWERINGS[rule.lowering].refusal(call)
            if refusal is None:
                return Choice(rule.lowering, "; ".join([rule.reason, *refusals]))
            refusals.append(f"not {rule.lowering}: {refusal}")
    raise ValueError(f"no lowering can compute {where}: {'; '.join(refusals)}")


def check_implementation(implementation: Implementation | None) -> None:
    """Raises ValueError unless `implementation` is None or the name of a lowering."""
    if implementation is not None and not (isinstance(implementation, str) and implementation in LOWERINGS):
        raise ValueError(f"implementation must be None or one of {tuple(LOWERINGS)}; got {implementation!r}")
