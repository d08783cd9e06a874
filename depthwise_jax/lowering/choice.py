"""Which lowering serves which call: the lowerings by name, one table, and the choice.

A lowering is a module with the functions of `Lowering`, an entry of LOWERINGS and a row of TABLE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from depthwise_jax.lowering import conv, native, taps
from depthwise_jax.lowering.call import Call


class Lowering(Protocol):
    """What a lowering must have."""

    def refusal(self, call: Call) -> str | None:
        """Why it cannot serve a call, or None."""
        ...

    def operand_dtype(self, call: Call) -> Any:
        """The dtype to which the operands of a call are brought; the results may be wider."""
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
    """What a lowering has that applies bias and activation at its store."""

    def fused(self, x: Array, kernel: Array, bias: Array | None = None, *, activation: str, call: Call) -> Array:
        """activation(y + bias)."""
        ...


@runtime_checkable
class KeepingLowering(Protocol):
    """What a lowering has whose values XLA would compute anew in a backward pass."""

    def keeps_value(self, call: Call) -> bool:
        """Whether a value must be kept."""
        ...


@runtime_checkable
class PackedLowering(Protocol):
    """What a lowering has that computes packed maps by itself, rather than as packed.py has them of its others."""

    def packed_forward(self, x: Array, kernel: Array, reach: Array, call: Call) -> Array:
        """y, each output of the taps that it reaches."""
        ...

    def packed_input_grad(self, g: Array, kernel: Array, reach: Array, call: Call) -> Array:
        """dx."""
        ...

    def packed_kernel_grad(self, x: Array, g: Array, reach: Array, call: Call) -> Array:
        """dw."""
        ...


LOWERINGS: dict[str, Lowering] = {"conv": conv, "taps": taps, "native": native}


@dataclass(frozen=True)
class Choice:
    """A lowering's name, and why it was chosen."""

    lowering: str
    reason: str

    def __str__(self) -> str:
        return f"{self.lowering}: {self.reason}"


def all_calls(call: Call) -> bool:
    """What a row serves that is for all calls on its platforms."""
    del call
    return True


@dataclass(frozen=True)
class Rule:
    """A row of the table: the lowering to take on some platforms, and why.

    Attributes:
        platforms: the platforms.
        lowering: the name of the lowering.
        reason: why.
        serves: which of the calls on those platforms the row is for.
    """

    platforms: tuple[str, ...]
    lowering: str
    reason: str
    serves: Callable[[Call], bool] = all_calls


# Up to these windows over sequences an elementwise sum takes fewer cycles on a TPU v5e than XLA's convolution, by the
# compiler's schedules (benchmarks/results/tpu_floor.md, "Windows", "Dilation" and "Images"): at any batch, and at fewer
# than 8 sequences or images a device, where the convolution copies its operands to bring the batch into sublanes.
# At (8, 2048, 2048), thousands of cycles: of a window of 9 the gradient of x alone would be faster by convolution, 407
# against 413, but a training step has both gradients, 697 as sums and 1,131 by convolution. Of a window of 16 the
# kernel's gradient alone takes 921 by convolution and 924 as a sum, both gradients 1,612 by convolution and 1,113 where
# only the kernel's is a sum. Of 8 images and more of 3x3 in float32 the two tie.
_SUMMED_TAPS = {"forward": 8, "input_grad": 9, "kernel_grad": 16}
# Of fewer sequences, and of four bytes a value: there the convolution moves each byte twice, and a sum of up to 9 taps
# once.
_SUMMED_TAPS_AT_MOST = 16
_FEW = 8
# Of one image the convolution takes as long for the kernel's gradient as of 8. At 28 x 28 and 256 channels, thousands
# of cycles by convolution and as a sum: 3x3 11.3 and 3.5, 5x5 28.1 and 7.9, 7x7 49.4 and 14.0; of two images of
# 56 x 56 and 128 channels 5x5 80.9 and 29.3; of one volume of 16 x 56 x 56 and 64 channels 3x3x3 1,091 and 358. More
# images have this for 3x3 alone. Of the other maps only 3x3 is faster as a sum: forward, 7x7 of one image of 28 x 28
# takes 12.2 by convolution and 23.1 as a sum, 3x3x3 of that volume 180 and 382.
_SUMMED_IMAGE_TAPS = 49
_FEWEST = 2
# The rows of a TPU's registers. XLA lays images there along their width, or, where that is no multiple of the rows, an
# even number of images side by side; then a sum uses as few rows as there are images. 3x3, by convolution and as a sum:
# at 28 x 28 and 256 channels the forward pass of two images takes 9.9 and 14.6, of four 25.1 and 14.6, the kernel's
# gradient of two 11.2 and 18.5; at 56 x 56 and 128 channels 13.4 and 12.1, 31.3 and 23.4, 30.3 and 13.3.
_ROWS = 8


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
    if batch is None or batch >= _FEW or call.symbolic:
        return False
    side_by_side = batch % 2 == 0 and convolution.spatial[-1] % _ROWS != 0
    if call.direction != "kernel_grad":
        return window.size == (3, 3) and not (side_by_side and batch == 2)
    # Of a window of many taps the halos of sharded images would be sent for each of its rows.
    larger = batch <= _FEWEST and window.taps <= _SUMMED_IMAGE_TAPS and call.partitioning.whole_images
    return (window.size == (3, 3) or larger) and not side_by_side


def is_product(call: Call) -> bool:
    """Whether y is an elementwise product of x and several kernels, which XLA computes in one pass over memory.

    On CPU, to (8, 28, 28, 64) of 32 channels, it takes 0.06 ms, the compiled kernels 0.40: they interleave the kernels'
    results.
    """
    window = call.convolution.window
    inside = window.taps == max(window.strides) == 1 and not any(map(any, window.padding))
    return call.direction == "forward" and call.multiplier > 1 and inside


# Products for each element of dx up to which a strided dx in float32 is an elementwise sum on a GPU. By what XLA
# compiles for an H100 (benchmarks/results/gpu_compiler.md) the sum moves each byte once, where the convolution writes g
# with zeros between its elements and reads that: 2.7 times the bytes at 3x3 and stride 2, 4.1 ps an element at 3.35
# TB/s. The sum's 2.25 products are about 50 instructions, 1.7 ps at one a cycle and lane. At 5x5 (6.25 products), and
# at 3x3 in bfloat16, the instructions take as long as the convolution's bytes: without a measurement those stay.
_SUMMED_PRODUCTS = 3


def is_summed_on_gpu(call: Call) -> bool:
    """Whether an elementwise sum over the taps does less of everything on a GPU."""
    window = call.convolution.window
    return (
        call.direction == "input_grad"
        and max(window.strides) > 1
        and call.multiplier * window.taps <= _SUMMED_PRODUCTS * math.prod(window.strides)
        and jnp.dtype(call.dtype) == jnp.float32
        and not call.partitioning.sharded_rows
    )


_COMPILED = "as compiled for an H100; no time was measured on a GPU"

# Of the rows for a platform the first whose lowering does not refuse the call decides; benchmarks/peers.py measures
# what they say.
TABLE = [
    Rule(("cpu",), "taps", "several kernels of one tap: a product, in one pass over memory", is_product),
    Rule(("cuda", "rocm"), "taps", "several kernels of one tap: a product; no time was measured on a GPU", is_product),
    Rule(("cpu",), "native", "the compiled kernels are the fastest on CPU"),
    Rule(("cpu",), "taps", "XLA's grouped convolution is many times slower on CPU"),
    Rule(("cpu",), "conv", "XLA's grouped convolution serves every call"),
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
    Rule(("cuda",), "conv", f"XLA's grouped convolution runs no more than flax.linen.Conv does, {_COMPILED}"),
    Rule(("rocm",), "conv", "XLA's grouped convolution serves every call; nothing was measured or compiled for it"),
    Rule(("tpu", "cuda", "rocm"), "taps", "shifted products serve every platform"),
]


def choose(call: Call, implementation: str | None) -> Choice:
    """The lowering for a call.

    Args:
        call: the call.
        implementation: a lowering that the caller insists on, or None.

    Raises:
        ValueError: the lowering cannot serve the call; without one, no lowering can.
    """
    where = f"this {call.direction} on {call.platform}"
    if implementation is not None:
        refusal = LOWERINGS[implementation].refusal(call)
        if refusal is not None:
            raise ValueError(f"implementation={implementation!r} cannot serve {where}: {refusal}")
        return Choice(implementation, "asked for by implementation=")
    refusals: list[str] = []
    for rule in TABLE:
        if call.platform in rule.platforms and rule.serves(call):
            refusal = LOWERINGS[rule.lowering].refusal(call)
            if refusal is None:
                return Choice(rule.lowering, "; ".join([rule.reason, *refusals]))
            refusals.append(f"not {rule.lowering}: {refusal}")
    raise ValueError(f"no lowering can serve {where}: {'; '.join(refusals)}")


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or the name of a lowering."""
    if implementation is not None and not (isinstance(implementation, str) and implementation in LOWERINGS):
        raise ValueError(f"implementation must be None or one of {tuple(LOWERINGS)}; got {implementation!r}")
