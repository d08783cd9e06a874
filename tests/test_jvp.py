"""Forward mode: J(x, w) applied to (tx, tw) is conv(tx, w) + conv(x, tw)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import depthwise_conv, separable_conv
from depthwise_jax.lowering import Implementation
from tests.support.assertions import assert_close
from tests.support.cases import ACTIVATIONS, CASES, CORE, SMALL_NETWORKS, Case, label
from tests.support.oracle import widest

# A tangent is two values, which test_value.py checks on every case: here those that pad before they convolve, too.
COPYING = tuple(case for case in CASES if case.oracle.again)


@pytest.mark.parametrize("case", [*CORE, *COPYING, SMALL_NETWORKS[1]], ids=str)
def test_jvp(case: Case, implementation: Implementation) -> None:
    x, w, _ = case.operands(0)
    tx, tw, _ = case.operands(1)
    y, tangent = jax.jit(lambda x, w, tx, tw: jax.jvp(case.conv(implementation), (x, w), (tx, tw)))(x, w, tx, tw)
    assert_close(y, case.oracle.conv(x, w), 1e-5, "value")
    assert_close(tangent, case.oracle.conv(tx, w) + case.oracle.conv(x, tw), 1e-5, "tangent")


@pytest.mark.parametrize("case", CORE, ids=str)
def test_jvp_in_one_operand(case: Case, implementation: Implementation) -> None:
    x, w, _ = case.operands(0)
    tx, tw, _ = case.operands(1)
    f = case.conv(implementation)
    _, of_x = jax.jvp(lambda x: f(x, w), (x,), (tx,))
    _, of_w = jax.jvp(lambda w: f(x, w), (w,), (tw,))
    assert_close(of_x, case.oracle.conv(tx, w), 1e-5, "x")
    assert_close(of_w, case.oracle.conv(x, tw), 1e-5, "kernel")


@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_jvp_in_eager_mode(case: Case, implementation: Implementation) -> None:
    x, w, _ = case.operands(0)
    tx, tw, _ = case.operands(1)
    _, tangent = jax.jvp(case.conv(implementation), (x, w), (tx, tw))
    assert_close(tangent, case.oracle.conv(tx, w) + case.oracle.conv(x, tw), 1e-5)


@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_linearize(case: Case, implementation: Implementation) -> None:
    x, w, _ = case.operands(0)
    tx, tw, _ = case.operands(1)
    _, tangents = jax.linearize(case.conv(implementation), x, w)
    assert_close(tangents(tx, tw), case.oracle.conv(tx, w) + case.oracle.conv(x, tw), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_tangents_keep_the_dtype(implementation: Implementation, dtype: Any) -> None:
    case = CORE[1]
    x, w, _ = (jnp.asarray(a, dtype) for a in case.operands(0))
    tx, tw, _ = (jnp.asarray(a, dtype) for a in case.operands(1))
    y, tangent = jax.jvp(case.conv(implementation), (x, w), (tx, tw))
    assert y.dtype == tangent.dtype == dtype
    terms = case.oracle.conv(tx, w), case.oracle.conv(x, tw)
    eps = float(jnp.finfo(dtype).eps)
    # Each term is rounded, and their sum.
    assert np.all(np.abs(widest(tangent) - sum(terms)) <= eps * (abs(terms[0]) + abs(terms[1])) + 1e-5)


def test_an_integer_input_has_no_tangent(implementation: Implementation) -> None:
    x = jnp.arange(12).reshape(1, 6, 2)
    w, tw = jnp.ones((3, 2, 1)), jnp.full((3, 2, 1), 2.0)
    tx = np.zeros(x.shape, jax.dtypes.float0)
    _, tangent = jax.jvp(lambda x, w: depthwise_conv(x, w, implementation=implementation), (x, w), (tx, tw))
    np.testing.assert_array_equal(tangent, depthwise_conv(x, tw))


@pytest.mark.parametrize(("activation", "slope"), [(a, slope) for a, _, slope in ACTIVATIONS], ids=label)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_bias_and_activation(implementation: Implementation, data_format: str, activation: Any, slope: Any) -> None:
    shape = (2, 5, 4, 3) if data_format == "channels_last" else (2, 3, 5, 4)
    case = Case("jvp-bias", shape, (3, 3, 3, 2), {"strides": 2, "padding": "same", "data_format": data_format})
    oracle, f = case.oracle, case.conv(implementation, activation=activation)
    (x, w, _), (tx, tw, _) = case.operands(0), case.operands(1)
    b, tb = case.draw((6,), 20), case.draw((6,), 21)
    x = 2 * x  # reaches beyond 6
    before = oracle.add_bias(oracle.conv(x, w), b)

    @jax.jit
    def tangents(z: Any, tz: Any) -> Any:
        return jax.jvp(f, z, tz)[1], jax.jvp(lambda b: f(x, w, b), z[2:], tz[2:])[1]

    both, of_b = tangents((x, w, b), (tx, tw, tb))
    along = oracle.add_bias(oracle.conv(tx, w) + oracle.conv(x, tw), tb)
    assert_close(both, slope(before) * along, 1e-5)
    assert_close(of_b, slope(before) * oracle.add_bias(np.zeros(oracle.y_shape), tb), 1e-5)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_the_slope_at_a_kink_is_that_of_jax_nn(implementation: Implementation, activation: str) -> None:
    x = jnp.asarray([0.0, 6.0, -1.0, 7.0, 3.0]).reshape(1, 5, 1)
    one = jnp.ones((1, 1, 1))
    f = lambda x: depthwise_conv(x, one, jnp.zeros(1), activation=activation, implementation=implementation)  # noqa: E731
    _, tangent = jax.jvp(f, (x,), (jnp.ones_like(x),))
    _, expected = jax.jvp(getattr(jax.nn, activation), (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(tangent, expected)


def test_jacfwd_is_the_matrix_of_the_map(implementation: Implementation) -> None:
    case = Case("jacobian", (1, 4, 3, 2), (2, 2, 2, 2), {"strides": (2, 1), "padding": "same"})
    x, w, _ = case.operands()
    by_x, by_w = jax.jit(jax.jacfwd(case.conv(implementation), argnums=(0, 1)))(x, w)
    unit_x = np.eye(x.size).reshape((x.size, *x.shape))
    unit_w = np.eye(w.size).reshape((w.size, *w.shape))
    columns_x = np.stack([case.oracle.conv(e, w) for e in unit_x], -1).reshape(by_x.shape)
    columns_w = np.stack([case.oracle.conv(x, e) for e in unit_w], -1).reshape(by_w.shape)
    assert_close(by_x, columns_x, 1e-5)
    assert_close(by_w, columns_w, 1e-5)


def test_separable(implementation: Implementation) -> None:
    case = Case("jvp-separable", (2, 5, 4, 3), (3, 3, 3, 2), {"padding": "same"})
    (x, w, _), (tx, tw, _) = case.operands(0), case.operands(1)
    p, tp = case.draw((1, 1, 6, 4), 30), case.draw((1, 1, 6, 4), 31)
    f = lambda x, w, p: separable_conv(x, w, p, **case.geometry, implementation=implementation)  # noqa: E731
    _, tangent = jax.jit(lambda *z: jax.jvp(f, z[:3], z[3:]))(x, w, p, tx, tw, tp)
    depthwise = case.oracle.conv(tx, w) + case.oracle.conv(x, tw)
    assert_close(tangent, depthwise @ widest(p)[0, 0] + case.oracle.conv(x, w) @ widest(tp)[0, 0], 1e-5)
