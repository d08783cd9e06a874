"""The truth of the tests: depthwise convolution as loops over output positions and taps, in NumPy, without JAX.

Three maps, each written out from the definition. For output position o, tap t and the input position
p = o*stride + t*dilation - low,

    y[b, o, c, m] = sum over t of x[b, p, c] * w[t, c, m]
    dx[b, p, c]   = sum over o, t, m of g[b, o, c, m] * w[t, c, m]
    dw[t, c, m]   = sum over b, o of x[b, p, c] * g[b, o, c, m]

where a p outside the input contributes nothing, or, under "reflect", "circular" and "edge", is read inside it. All is
computed in the widest dtype of its kind (float64, complex128, int64); NumPy runs over batch and channels alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from workloads.workload import Geometry

Array = np.ndarray[Any, np.dtype[Any]]


class Oracle(Geometry):
    """The three maps of one geometry, for x (*batch, *spatial, C) or (*batch, C, *spatial), kernel (*window, C, M)."""

    def _reads(self) -> Iterator[tuple[tuple[Any, ...], tuple[int, ...], tuple[Any, ...]]]:
        """Every (output position, tap, input position) inside the input, as indices behind one batch axis."""
        for position in itertools.product(*map(range, self.out)):
            for tap in itertools.product(*map(range, self.window)):
                read = [
                    o * s + t * d - p
                    for o, s, t, d, p in zip(position, self.strides, tap, self.dilation, self.low, strict=True)
                ]
                read = [self._inside(p, n) for p, n in zip(read, self.spatial, strict=True)]
                if None not in read:
                    yield (slice(None), *position), tap, (slice(None), *read)

    def _inside(self, p: int, n: int) -> int | None:
        if self.again == "circular":
            return p % n
        if self.again == "edge":
            return min(max(p, 0), n - 1)
        if self.again == "reflect":  # 0 1 2 1 0 1 2 ... for n = 3
            turn = p % max(2 * n - 2, 1)
            return min(turn, 2 * n - 2 - turn)
        return p if 0 <= p < n else None

    def _in(self, x: Any) -> Array:
        """(*batch, *spatial, C) with one batch axis, in the widest dtype of its kind."""
        assert np.shape(x) == self.x_shape, (np.shape(x), self.x_shape)
        return np.moveaxis(widest(x), self.channel_axis, -1).reshape(
            (-1 if np.size(x) else int(np.prod(self.batch)), *self.spatial, self.channels)
        )

    def _in_y(self, y: Any) -> Array:
        """(*batch, *out, C, M) with one batch axis."""
        assert np.shape(y) == self.y_shape, (np.shape(y), self.y_shape)
        return np.moveaxis(widest(y), self.channel_axis, -1).reshape(
            (int(np.prod(self.batch)), *self.out, self.channels, self.multiplier)
        )

    def conv(self, x: Any, w: Any) -> Array:
        """y, in y_shape."""
        x, w = self._in(x), widest(w)
        y = np.zeros((len(x), *self.out, self.channels, self.multiplier), np.result_type(x, w))
        for o, t, p in self._reads():
            y[o] += x[p][..., None] * w[t]
        return np.moveaxis(
            y.reshape((*self.batch, *self.out, -1 if y.size else self.channels * self.multiplier)),
            -1,
            self.channel_axis,
        )

    def input_grad(self, g: Any, w: Any) -> Array:
        """dx for the cotangent g of y, in x_shape."""
        g, w = self._in_y(g), widest(w)
        dx = np.zeros((len(g), *self.spatial, self.channels), np.result_type(g, w))
        for o, t, p in self._reads():
            dx[p] += (g[o] * w[t]).sum(-1)
        return np.moveaxis(dx.reshape((*self.batch, *self.spatial, self.channels)), -1, self.channel_axis)

    def kernel_grad(self, x: Any, g: Any) -> Array:
        """dw for the cotangent g of y, (*window, C, M)."""
        x, g = self._in(x), self._in_y(g)
        dw = np.zeros((*self.window, self.channels, self.multiplier), np.result_type(x, g))
        for o, t, p in self._reads():
            dw[t] += (x[p][..., None] * g[o]).sum(0)
        return dw

    def add_bias(self, y: Array, bias: Any) -> Array:
        """y with one number per output channel added."""
        return y + widest(bias).reshape((-1,) + (1,) * (-1 - self.channel_axis))


def widest(a: Any) -> Array:
    """The array as complex128, float64 or int64."""
    a = np.asarray(a)
    if np.issubdtype(a.dtype, np.complexfloating):
        return a.astype(np.complex128)
    if np.issubdtype(a.dtype, np.integer) or a.dtype == np.bool_:
        return a.astype(np.int64)
    return a.astype(np.float64)


class CausalOracle:
    """The causal convolution over a row of documents: z = [state, x], and a loop over its outputs and taps.

    y[t] = sum over j of z[S + t - j*d] * w[K-1-j], for j = 0 and for j*d <= position[t]; x (*batch, L, C).
    """

    def __init__(self, kernel_size: int, dilation_rate: int = 1) -> None:
        self.size, self.dilation = kernel_size, dilation_rate
        self.span = (kernel_size - 1) * dilation_rate

    def _reads(self, positions: Array) -> Iterator[tuple[tuple[int, ...], int, tuple[int, ...]]]:
        """Every output, the tap, and what of z it reads there."""
        for *row, t in np.ndindex(*positions.shape):
            for j in range(self.size):
                if j == 0 or j * self.dilation <= positions[(*row, t)]:
                    yield (*row, t), self.size - 1 - j, (*row, self.span + t - j * self.dilation)

    def forward(self, z: Any, w: Any, positions: Any) -> Array:
        """y, (*batch, L, C*M)."""
        z, w, positions = widest(z), widest(w), np.asarray(positions)
        y = np.zeros((*positions.shape, *w.shape[1:]))
        for o, t, i in self._reads(positions):
            y[o] += z[i][:, None] * w[t]
        return y.reshape(*positions.shape, -1)

    def gradients(self, z: Any, w: Any, positions: Any, g: Any) -> tuple[Array, Array]:
        """The gradients of z and w for the cotangent g of y."""
        z, w, positions = widest(z), widest(w), np.asarray(positions)
        g = widest(g).reshape(*positions.shape, *w.shape[1:])
        dz, dw = np.zeros(z.shape), np.zeros(w.shape)
        for o, t, i in self._reads(positions):
            dz[i] += (g[o] * w[t]).sum(-1)
            dw[t] += z[i][:, None] * g[o]
        return dz, dw
