"""Second and third derivatives of f(x, w) = sum(sin(conv(x, w))) in x and w jointly, through all nestings of the modes.

y = conv is bilinear, so along directions u = (ux, uw) its derivatives are y_u = conv(ux, w) + conv(x, uw),
y_uv = conv(ux, vw) + conv(vx, uw), and none beyond. Hence the closed formulas, with the oracle for every convolution:

    D2 f[u, v]    = sum(-sin(y) y_u y_v + cos(y) y_uv)
    D3 f[u, v, s] = sum(-cos(y) y_u y_v y_s - sin(y) (y_uv y_s + y_us y_v + y_vs y_u))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet
from jax.test_util import check_grads

from depthwise_jax import separable_conv
from depthwise_jax.lowering import Implementation
from tests.support.assertions import assert_close
from tests.support.cases import CORE, Case
from tests.support.oracle import Array, Oracle

Point = tuple[Any, ...]  # x and kernel


def vdot(a: Any, b: Any) -> Any:
    return sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def forward(f: Callable[[Point], Any], u: Point) -> Callable[[Point], Any]:
    """z -> D f(z)[u] by forward mode."""
    return lambda z: jax.jvp(f, (z,), (u,))[1]


def reverse(f: Callable[[Point], Any], u: Point) -> Callable[[Point], Any]:
    """z -> D f(z)[u] by reverse mode, for a scalar f."""
    return lambda z: vdot(jax.grad(f)(z), u)


MODES = {"forward": forward, "reverse": reverse}


def sum_sin(case: Case, implementation: Implementation) -> Callable[[Point], Any]:
    f = case.conv(implementation)
    return lambda z: jnp.sin(f(*z)).sum()


def y1(oracle: Oracle, z: Point, u: Point) -> Array:
    return oracle.conv(u[0], z[1]) + oracle.conv(z[0], u[1])


def y2(oracle: Oracle, u: Point, v: Point) -> Array:
    return oracle.conv(u[0], v[1]) + oracle.conv(v[0], u[1])


def hessian_vector(oracle: Oracle, z: Point, u: Point) -> tuple[Array, Array]:
    """The gradient of D f[u] = sum(cos(y) y_u): it depends on z through y and through y_u."""
    y = oracle.conv(*z)
    through_y, through_yu = -np.sin(y) * y1(oracle, z, u), np.cos(y)
    return (
        oracle.input_grad(through_y, z[1]) + oracle.input_grad(through_yu, u[1]),
        oracle.kernel_grad(z[0], through_y) + oracle.kernel_grad(u[0], through_yu),
    )


@pytest.mark.parametrize("case", CORE, ids=str)
def test_hessian_vector_products(case: Case, implementation: Implementation, x64: None) -> None:
    z, u = (tuple(a.astype(np.float64) for a in case.operands(stream)[:2]) for stream in (0, 1))
    f = sum_sin(case, implementation)
    products = {
        "forward over reverse": lambda z, u: jax.jvp(jax.grad(f), (z,), (u,))[1],
        "reverse over reverse": lambda z, u: jax.grad(reverse(f, u))(z),
        "reverse over forward": lambda z, u: jax.grad(forward(f, u))(z),
    }
    actual = jax.jit(lambda z, u: {name: product(z, u) for name, product in products.items()})(z, u)
    expected = hessian_vector(case.oracle, z, u)
    for name, (by_x, by_w) in actual.items():
        assert_close(by_x, expected[0], 1e-12, f"{name}, x")
        assert_close(by_w, expected[1], 1e-12, f"{name}, kernel")


@pytest.mark.parametrize("case", [CORE[1], CORE[2]], ids=str)
def test_hessian_vector_products_in_float32(case: Case, implementation: Implementation) -> None:
    z, u = (case.operands(stream)[:2] for stream in (0, 1))
    f = sum_sin(case, implementation)
    actual = jax.jit(lambda z, u: jax.jvp(jax.grad(f), (z,), (u,))[1])(z, u)
    for a, e in zip(actual, hessian_vector(case.oracle, z, u), strict=True):
        assert_close(a, e, 1e-5)


THIRD = Case("third-order", (2, 4, 4, 2), (3, 2, 2, 2), {"strides": (2, 1), "padding": "same", "dilation_rate": (1, 2)})


def test_third_order(implementation: Implementation, x64: None) -> None:
    case, oracle = THIRD, THIRD.oracle
    z, u, v, s = (tuple(a.astype(np.float64) for a in case.operands(stream)[:2]) for stream in range(4))
    f = sum_sin(case, implementation)

    @jax.jit
    def through_every_nesting(z: Point, u: Point, v: Point, s: Point) -> dict[str, Any]:
        return {
            " over ".join((c, b, a)): MODES[c](MODES[b](MODES[a](f, u), v), s)(z)
            for a, b, c in itertools.product(MODES, repeat=3)
        }

    y, yu, yv, ys = oracle.conv(*z), *(y1(oracle, z, d) for d in (u, v, s))
    pairs = y2(oracle, u, v) * ys + y2(oracle, u, s) * yv + y2(oracle, v, s) * yu
    expected = np.sum(-np.cos(y) * yu * yv * ys - np.sin(y) * pairs)
    actual = through_every_nesting(z, u, v, s)
    assert len(actual) == 8
    for name, value in actual.items():
        assert_close(value, expected, 1e-11, name)


def test_hessian(implementation: Implementation, x64: None) -> None:
    case = Case("hessian", (1, 3, 3, 1), (2, 2, 1, 2))
    z = tuple(a.astype(np.float64) for a in case.operands()[:2])
    f = sum_sin(case, implementation)
    ((xx, xw), (wx, ww)) = jax.jit(jax.hessian(f))(z)
    nx, nw = z[0].size, z[1].size
    actual = np.block([[xx.reshape(nx, nx), xw.reshape(nx, nw)], [wx.reshape(nw, nx), ww.reshape(nw, nw)]])
    units = np.eye(nx + nw)
    columns = [hessian_vector(case.oracle, z, (e[:nx].reshape(z[0].shape), e[nx:].reshape(z[1].shape))) for e in units]
    assert_close(actual, np.stack([np.concatenate([a.ravel(), b.ravel()]) for a, b in columns], -1), 1e-12)


@pytest.mark.parametrize("activation", ["relu6", "tanh"])
def test_with_bias_and_activation(implementation: Implementation, activation: str | None, x64: None) -> None:
    # Numerical differences are the judge here, away from the kinks.
    case = Case("higher-order-bias", (1, 4, 3, 2), (2, 2, 2, 2), {"padding": "same"})
    x, w, _ = (a.astype(np.float64) for a in case.operands())
    b = case.draw((4,), 20).astype(np.float64)
    before = case.oracle.add_bias(case.oracle.conv(x, w), b)
    assert np.min(np.abs(before)) > 1e-3
    assert np.min(np.abs(before - 6)) > 1e-3
    check_grads(
        lambda *z: jnp.sin(case.conv(implementation, activation=activation)(*z)),
        (x, w, b),
        order=2,
        eps=1e-5,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_second_order_behind_an_activation(implementation: Implementation, activation: str, x64: None) -> None:
    # Where the activation is linear the formulas above hold with its mask in front; elsewhere all is zero.
    case = Case("higher-order-mask", (2, 5, 4, 3), (3, 3, 3, 2), {"strides": 2, "padding": "same"})
    oracle = case.oracle
    z, u = (tuple(a.astype(np.float64) for a in case.operands(stream)[:2]) for stream in (0, 1))
    conv = case.conv(implementation, activation=activation)
    actual = jax.jit(lambda z, u: jax.jvp(jax.grad(lambda z: jnp.sin(conv(*z)).sum()), (z,), (u,))[1])(z, u)
    y = oracle.conv(*z)
    mask = (y > 0) if activation == "relu" else (y > 0) & (y < 6)
    through_y, through_yu = -np.sin(y) * y1(oracle, z, u) * mask, np.cos(y) * mask
    assert_close(actual[0], oracle.input_grad(through_y, z[1]) + oracle.input_grad(through_yu, u[1]), 1e-12)
    assert_close(actual[1], oracle.kernel_grad(z[0], through_y) + oracle.kernel_grad(u[0], through_yu), 1e-12)


def test_separable(implementation: Implementation, x64: None) -> None:
    case = Case("higher-order-separable", (1, 4, 3, 2), (2, 2, 2, 2), {"padding": "same"})
    x, w, _ = (a.astype(np.float64) for a in case.operands())
    p = case.draw((1, 1, 4, 3), 20).astype(np.float64)
    f = lambda *z: jnp.sin(separable_conv(*z, **case.geometry, implementation=implementation))  # noqa: E731
    check_grads(f, (x, w, p), order=2, eps=1e-5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu6"])
def test_taylor_mode(implementation: Implementation, activation: str | None, x64: None) -> None:
    # jet's terms are the derivatives along the path x + t*u + t^2/2*v, here by nested forward mode.
    case = CORE[1]
    z, u, v = (tuple(a.astype(float) for a in case.operands(stream)[:2]) for stream in range(3))

    def path(f: Any) -> Any:
        return lambda t: f(*(a + t * b + t**2 / 2 * c for a, b, c in zip(z, u, v, strict=True)))

    conv = case.conv(implementation, activation=activation)
    gradients = jax.grad(lambda x, w: jnp.sin(conv(x, w)).sum(), (0, 1))
    for f in (conv, jax.jit(conv), gradients):
        value, terms = jet.jet(f, z, tuple([b, c] for b, c in zip(u, v, strict=True)))
        first = jax.jacfwd(path(f))
        at_zero, slope, curvature = jax.jit(lambda t, f=f, first=first: (path(f)(t), first(t), jax.jacfwd(first)(t)))(
            0.0
        )
        for actual, expected in (
            (value, at_zero),
            (jax.tree.map(lambda t: t[0], terms, is_leaf=lambda t: isinstance(t, list)), slope),
            (jax.tree.map(lambda t: t[1], terms, is_leaf=lambda t: isinstance(t, list)), curvature),
        ):
            for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
