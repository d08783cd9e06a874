"""Which lowering serves which call, as one table, and the call of the chosen one.

Each lowering is a module with the same four functions: forward(x, kernel, call), input_grad(g, kernel, call) and
kernel_grad(x, g, call), which take operands of one dtype; and refusal(call), which tells why it cannot
serve a call, or None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from depthwise_jax.convolution import Convolution
from depthwise_jax.layout import Layout
from depthwise_jax.lowering import conv, native, taps
from depthwise_jax.lowering.call import MAPS, PLATFORMS, Call

__all__ = ["LOWERINGS", "MAPS", "PLATFORMS", "TABLE", "Call", "Choice", "Rule", "choose", "run", "run_fused"]

LOWERINGS = {"conv": conv, "taps": taps, "native": native}


@dataclass(frozen=True)
class Choice:
    """A lowering, and why it was chosen."""

    lowering: str
    reason: str

    def __str__(self) -> str:
        return f"{self.lowering}: {self.reason}"


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
    serves: Callable[[Call], bool] = lambda call: True


# Up to these windows over sequences an elementwise sum takes fewer cycles on a TPU v5e than XLA's convolution, by the
# compiler's schedules (benchmarks/results/tpu_floor.md, "Windows" and "Dilation"): at any batch, and at fewer than 8
# sequences a device, where the convolution copies its operands to bring the batch into sublanes.
_SUMMED_TAPS = {"forward": 8, "input_grad": 8, "kernel_grad": 9}
_SUMMED_TAPS_OF_FEW = 16
_FEW = 8
# Channels that lie side by side in a register.
_LANES = 128


def is_summed_on_tpu(call: Call) -> bool:
    """Whether an elementwise sum over the taps is the faster formulation on TPU."""
    convolution, few = call.convolution, call.batch is not None and call.batch < _FEW
    window = convolution.window
    if call.multiplier > 1 or max(window.strides) > 1 or convolution.layout.channels != -1:
        return False
    if window.rank == 1:
        return window.size[0] <= (_SUMMED_TAPS_OF_FEW if few else _SUMMED_TAPS[call.direction])
    return window.size == (3, 3) and few and (call.direction != "kernel_grad" or call.channels <= _LANES)


# Of the rows for a platform the first whose lowering does not refuse the call decides; benchmarks/peers.py measures
# what they say.
TABLE = (
    Rule(("cpu",), "native", "the compiled kernels are the fastest on CPU"),
    Rule(("cpu",), "taps", "XLA's grouped convolution is many times slower on CPU"),
    Rule(("cpu",), "conv", "XLA's grouped convolution serves every call"),
    Rule(("tpu",), "taps", "a sum of few taps is at the memory's limit, by the compiler's schedule", is_summed_on_tpu),
    Rule(("tpu",), "conv", "XLA's grouped convolution takes no more cycles than taps, by the compiler's schedule"),
    Rule(("cuda", "rocm"), "conv", "no measurement on a GPU says otherwise"),
    Rule(("tpu", "cuda", "rocm"), "taps", "shifted products serve every platform"),
)


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


def run(*operands: Array, call: Call, stacked: int, dtype: Any, implementation: str | None) -> Array:
    """One map, on the chosen lowering.

    Args:
        *operands: the map's two operands, with `stacked` leading axes in common, each index of which is a convolution
            of its own.
        call: the call.
        stacked: the number of those axes.
        dtype: the result's dtype.
        implementation: as in choose.
    """
    choice = choose(call, implementation)
    result = _run(choice, *operands, call=call, stacked=stacked).astype(dtype)
    return lax.optimization_barrier(result) if _kept(choice, call) else result


def _run(choice: Choice, *operands: Array, call: Call, stacked: int) -> Array:
    """One map on a lowering, in the dtype in which that gives it."""
    function = functools.partial(getattr(LOWERINGS[choice.lowering], call.direction), call=call)
    for _ in range(stacked):
        function = jax.vmap(function)
    if choice.lowering != "taps":  # which widens what it reads
        operands = tuple(operand.astype(computation_dtype(call, choice)) for operand in operands)
    return function(*operands)


def _kept(choice: Choice, call: Call) -> bool:
    """Whether a value must be kept for the backward pass.

    XLA's TPU compiler would compute an elementwise sum once more there, within a matrix product that is no faster for
    it: a training step around a window of 4 takes 1.2 times as long.
    """
    return call.differentiated and call.platform == "tpu" and choice.lowering == "taps"


def run_fused(
    x: Array,
    kernel: Array,
    *bias: Array,
    activation: str,
    call: Call,
    stacked: int,
    dtype: Any,
    implementation: str | None,
) -> Array:
    """activation(y + bias), in one pass over memory where the chosen lowering can.

    Args:
        x, kernel: as in run.
        *bias: (*stacked, C*M), or none.
        activation: one of native.ACTIVATIONS.
        call, stacked, dtype, implementation: as in run.
    """
    choice = choose(call, implementation)
    if choice.lowering == "native":
        function = functools.partial(native.fused, activation=activation, call=call)
        for _ in range(stacked):
            function = jax.vmap(function)
        computation = computation_dtype(call, choice)
        return function(*(operand.astype(computation) for operand in (x, kernel, *bias))).astype(dtype)
    y = _run(choice, x, kernel, call=call, stacked=stacked).astype(dtype)
    for b in bias:
        y = y + align_bias(b.astype(dtype), call.convolution.layout, y.ndim)
    if activation != "linear":
        y = jnp.maximum(y, 0)
    if activation == "relu6":
        y = jnp.minimum(y, 6)
    return lax.optimization_barrier(y) if _kept(choice, call) else y


def align_bias(bias: Array, layout: Layout, ndim: int) -> Array:
    """A bias (*stacked, C*M), shaped to be added to a y of `ndim` axes."""
    *stacked, channels = bias.shape
    batch = (1,) * (ndim - len(stacked) - layout.rank - 1)
    return bias.reshape(*stacked, *layout.arrange(batch, (1,) * layout.rank, channels))


def computation_dtype(call: Call, choice: Choice) -> Any:
    """The dtype to which the operands of a lowering are brought.

    On CPU XLA's convolution sums narrow floats in steps that round, so there they are widened to float32; the compiled
    kernels and the other platforms' convolutions sum them in float32 as they are.
    """
    return call.sum_dtype if choice.lowering == "conv" and call.platform == "cpu" else call.dtype


def has_slabs(shape: Sequence[int], convolution: Convolution) -> bool:
    """Whether the batch of an x or y of this shape is known, so that it can be cut into slabs."""
    return all(isinstance(n, int) for n in convolution.batch(shape))


def is_small(batch: Sequence[int], devices: int) -> bool:
    """Whether a batch of this shape is known, and cannot be cut into as many equal parts as there are devices."""
    return all(isinstance(n, int) for n in batch) and math.prod(batch) % devices != 0
