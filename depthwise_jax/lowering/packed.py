"""The packed maps on any lowering: the sum over taps of its maps of one tap each, masked by each output's reach.

    forward       y[o]  = sum over t with K-1-t <= reach[o] of x[o + t*d - low] * kernel[t]
    input_grad    dx[i] = sum over t with K-1-t <= reach[o] of g[o] * kernel[t], o = i + low - t*d
    kernel_grad   dw[t] = sum over o with K-1-t <= reach[o] of x[o + t*d - low] * g[o]

The mask applies to values, not weights: values out of reach may be NaN. On `taps`, whose maps of one tap are products,
each sum is elementwise, and XLA fuses it with the operations around it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax

from depthwise_jax._core.convolution import Convolution
from depthwise_jax._core.window import Window
from depthwise_jax.lowering.call import Call


class _Maps(Protocol):
    def forward(self, x: Array, kernel: Array, call: Call) -> Array: ...

    def input_grad(self, g: Array, kernel: Array, call: Call) -> Array: ...

    def kernel_grad(self, x: Array, g: Array, call: Call) -> Array: ...


def forward(lowering: _Maps, x: Array, kernel: Array, reach: Array, call: Call) -> Array:
    """y."""
    one = _one_tap(call, call.convolution.out)
    terms = (
        _where(reach, back, lowering.forward(_moved(x, by, call), kernel[t : t + 1], one), call)
        for t, back, by in _taps(call.convolution)
    )
    return functools.reduce(operator.add, terms)


def input_grad(lowering: _Maps, g: Array, kernel: Array, reach: Array, call: Call) -> Array:
    """dx."""
    one = _one_tap(call, call.convolution.spatial)

    def term(t: int, back: int, by: int) -> Array:
        met, reaching = _met(g, reach, by, call)
        return _where(reaching, back, lowering.input_grad(met, kernel[t : t + 1], one), call)

    return functools.reduce(operator.add, (term(*tap) for tap in _taps(call.convolution)))


def kernel_grad(lowering: _Maps, x: Array, g: Array, reach: Array, call: Call) -> Array:
    """dw.

    g moves and x stays, as in input_grad, so XLA computes both gradients of a training step in one loop that reads x
    and g once. Only for the last tap, which needs no mask, does x move: positions of x that no output reads may be NaN.
    """

    def gradient(back: int, by: int) -> Array:
        if back == 0:
            return lowering.kernel_grad(_moved(x, by, call), g, _one_tap(call, call.convolution.out))
        met, reaching = _met(g, reach, by, call)
        return lowering.kernel_grad(_where(reaching, back, x, call), met, _one_tap(call, call.convolution.spatial))

    gradients = [gradient(back, by) for _, back, by in _taps(call.convolution)]
    return jnp.concatenate(gradients[::-1])


def _taps(convolution: Convolution) -> Iterator[tuple[int, int, int]]:
    """Each tap, its distance in taps to the last one, and the position that output 0 reads through it.

    From the last to the first: by benchmarks/tpu_packed.py both gradients of (8, 2048, 2048) take 466 thousand cycles
    in this order, and 476 in the other.
    """
    (size,), (dilation,), ((low, _),) = convolution.window.size, convolution.window.dilation, convolution.window.padding
    for t in reversed(range(size)):
        yield t, size - 1 - t, t * dilation - low


def _one_tap(call: Call, spatial: tuple[int, ...]) -> Call:
    """The call of one tap's map, with as many positions in x as in y."""
    window = Window((1,), (1,), ((0, 0),), (1,))
    return dataclasses.replace(
        call, convolution=dataclasses.replace(call.convolution, window=window, spatial=spatial), packed=False
    )


def _ends(by: int, convolution: Convolution) -> int:
    """How far beyond x's last position the last output reads, if output 0 reads position `by`."""
    (size,), (dilation,), ((low, high),) = (
        convolution.window.size,
        convolution.window.dilation,
        convolution.window.padding,
    )
    return by + low + high - (size - 1) * dilation


def _moved(x: Array, by: int, call: Call) -> Array:
    """The value of x that each output reads through a tap; zero outside x."""
    return _padded(x, _axis(x, call), (-by, _ends(by, call.convolution)))


def _met(g: Array, reach: Array, by: int, call: Call) -> tuple[Array, Array]:
    """The values of g and reach that each position of x meets through a tap; zeros outside them."""
    ends = (by, -_ends(by, call.convolution))
    return _padded(g, _axis(g, call), ends), _padded(reach, reach.ndim - 1, ends)


def _axis(a: Array, call: Call) -> int:
    """The axis of positions of an x or g."""
    return a.ndim + call.convolution.layout.spatial[0]


def _padded(a: Array, axis: int, ends: tuple[int, int]) -> Array:
    """An array with zeros added at the ends of an axis, or positions removed."""
    padding = [(0, 0, 0)] * a.ndim
    padding[axis] = (*ends, 0)
    return lax.pad(a, jnp.zeros((), a.dtype), padding)


def _where(reach: Array, back: int, a: Array, call: Call) -> Array:
    """An array of values, zero where outputs do not reach that many taps back. All reach the last tap."""
    if back == 0:
        return a
    return jnp.where(jnp.expand_dims(reach >= back, call.convolution.layout.channels), a, jnp.zeros((), a.dtype))
