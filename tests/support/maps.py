"""The maps of a convolution as functions of its operands (x, kernel, ...) and g, and what they must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from depthwise_jax.lowering import DIRECTIONS
from tests.support.cases import Case
from tests.support.oracle import Array

Function = Callable[..., Any]


def dx(f: Function) -> Function:
    """(x, kernel, ..., g) -> the gradient of x."""
    return _alone(f, 0)


def dw(f: Function) -> Function:
    """(x, kernel, ..., g) -> the gradient of the kernel."""
    return _alone(f, 1)


def db(f: Function) -> Function:
    """(x, kernel, bias, g) -> the gradient of the bias."""
    return _alone(f, 2)


def _alone(f: Function, index: int) -> Function:
    """The gradient of one operand: a program of it holds no other."""

    def gradient(*arguments: Any) -> Any:
        *operands, g = arguments
        one = lambda operand: f(*operands[:index], operand, *operands[index + 1 :])  # noqa: E731
        return jax.vjp(one, operands[index])[1](g)[0]

    return gradient


def gradients(f: Function) -> Function:
    """(*operands, g) -> the gradients of all operands."""
    return lambda *arguments: jax.vjp(f, *arguments[:-1])[1](arguments[-1])


def value_and_gradients(f: Function) -> Function:
    """(*operands, g) -> (y, *the gradients of all operands)."""

    def both(*arguments: Any) -> Any:
        y, vjp = jax.vjp(f, *arguments[:-1])
        return y, *vjp(arguments[-1])

    return both


def maps(f: Function) -> dict[str, Function]:
    """Each map alone, a function of (x, kernel, g)."""
    return dict(zip(DIRECTIONS, (lambda x, w, g: f(x, w), dx(f), dw(f)), strict=True))


def truth(case: Case, x: Any, w: Any, g: Any) -> dict[str, Array]:
    """What the maps of a case must give."""
    oracle = case.oracle
    results = oracle.conv(x, w), oracle.input_grad(g, w), oracle.kernel_grad(x, g)
    return dict(zip(DIRECTIONS, results, strict=True))
