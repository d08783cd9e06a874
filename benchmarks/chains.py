"""Makes the programs to time: a call of a map, and a chain of CHAIN calls that depend on each other, as in a network.

Each call adds 1e-30 times an element of its result to the next call's second operand, which changes no digit. For dw,
where that would cost a pass over memory, a chain is CHAIN calls on pairs of a few x and g.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.timing import finished

CHAIN = 8
TINY = 1e-30
COPIES = 3
PAIRS = list(itertools.product(range(COPIES), repeat=2))[:CHAIN]

Function = Callable[..., Any]


def single(function: Function, *arguments: Any) -> Callable[[], Any]:
    """One call, compiled."""
    return finished(jax.jit(function), *arguments)


def chain(function: Function, direction: str, *arguments: Any, looped: bool = False) -> Callable[[], Any]:
    """CHAIN calls of one direction in a compiled program, which returns the last result, or for dw the first.

    Args:
        function: of the operands.
        direction: one of work.TIMED.
        *arguments: the operands.
        looped: whether the calls are a loop. Outside a loop XLA would compute only the one element of `taps` that the
            next call needs. But in a loop it computes its own convolutions differently, so those and the compiled
            kernels follow each other without a loop, as in a model.
    """
    if direction == "dw":
        xs, gs = zip(*(map(jnp.array, arguments) for _ in range(COPIES)), strict=True)
        pairs = finished(jax.jit(lambda xs, gs: [function(xs[i], gs[j]) for i, j in PAIRS]), xs, gs)
        return lambda: pairs()[0]
    return finished((_loop if looped else unrolled)(function), *arguments)


def unrolled(function: Function, length: int = CHAIN) -> Function:
    """`length` calls in a row."""

    def calls(first: Any, second: Any, *rest: Any) -> Any:
        operand, result = second, None
        for _ in range(length):
            result = function(first, operand, *rest)
            # tanh is expensive enough for XLA to compute it once, separately from the sum. If XLA fused the sum with
            # the element, it would treat it as a pass over the whole result and wake its threads.
            operand = second + (TINY * jnp.tanh(_first(result))).astype(second.dtype)
        return result

    return jax.jit(calls)


def _loop(function: Function) -> Function:
    """The chain as a loop that carries its whole result."""

    def calls(first: Any, second: Any, *rest: Any) -> Any:
        shape = jax.eval_shape(function, first, second, *rest)

        def step(_: Any, carry: Any) -> Any:
            result = function(first, second + carry[1], *rest)
            return result, (TINY * _first(result)).astype(second.dtype)

        start = (jnp.zeros(shape.shape, shape.dtype), jnp.zeros((), second.dtype))
        return lax.fori_loop(0, CHAIN, step, start)[0]

    return jax.jit(calls)


def _first(array: Any) -> Any:
    return lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(())
