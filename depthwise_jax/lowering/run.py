"""Calls the chosen lowering: the functions to which the primitives are lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax

from depthwise_jax._core import fused
from depthwise_jax.lowering import packed
from depthwise_jax.lowering.call import Call
from depthwise_jax.lowering.choice import (
    LOWERINGS,
    FusedLowering,
    Implementation,
    KeepingLowering,
    Lowering,
    PackedLowering,
    choose,
)


def run(*operands: Array, call: Call, stacked: int, dtype: Any, implementation: Implementation | None) -> Array:
    """One map, on the chosen lowering.

    Args:
        *operands: the map's two operands, and for a packed map the reach.
        call: the call.
        stacked: the number of leading axes that both operands share; each index is a separate convolution.
        dtype: the result's dtype.
        implementation: as in choose.
    """
    lowering = LOWERINGS[choose(call, implementation).lowering]
    if not call.packed:
        function = getattr(lowering, call.direction)
    elif isinstance(lowering, PackedLowering):
        function = getattr(lowering, f"packed_{call.direction}")
    else:
        function = functools.partial(getattr(packed, call.direction), lowering)
    result = _mapped(function, operands, lowering, call, stacked, dtype)
    return _kept(result, lowering, call)


def run_fused(
    x: Array,
    kernel: Array,
    *bias: Array,
    activation: str,
    call: Call,
    stacked: int,
    dtype: Any,
    implementation: Implementation | None,
) -> Array:
    """activation(y + bias), in one pass over memory if the chosen lowering supports it.

    Args:
        x, kernel: as in run.
        *bias: (*stacked, C*M), or absent.
        activation: one of fused.ACTIVATIONS.
        call, stacked, dtype, implementation: as in run.
    """
    lowering = LOWERINGS[choose(call, implementation).lowering]
    if isinstance(lowering, FusedLowering):
        at_the_store = functools.partial(lowering.fused, activation=activation)
        return _mapped(at_the_store, (x, kernel, *bias), lowering, call, stacked, dtype)
    y = _mapped(lowering.forward, (x, kernel), lowering, call, stacked, dtype)
    for b in bias:
        y = y + fused.align_bias(b.astype(dtype), call.convolution.layout, y.ndim)
    return _kept(fused.apply(activation, y), lowering, call)


def _mapped(
    function: Callable[..., Array],
    operands: Sequence[Array],
    lowering: Lowering,
    call: Call,
    stacked: int,
    dtype: Any,
) -> Array:
    """Maps a lowering's function over the leading axes of operands in its dtype; the result has the result's dtype."""
    function = functools.partial(function, call=call)
    for _ in range(stacked):
        function = jax.vmap(function)
    operand_dtype = lowering.operand_dtype(call)
    numbers, reach = (operands[:2], operands[2:]) if call.packed else (operands, ())
    return function(*(operand.astype(operand_dtype) for operand in numbers), *reach).astype(dtype)


def _kept(result: Array, lowering: Lowering, call: Call) -> Array:
    """A result, kept for the backward pass if the lowering asks for it."""
    keeps = isinstance(lowering, KeepingLowering) and lowering.keeps_value(call)
    return lax.optimization_barrier(result) if keeps else result
