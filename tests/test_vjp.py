"""Reverse mode: the two transposes, against scatter loops."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import depthwise_conv, separable_conv
from depthwise_jax.lowering import Implementation
from tests.support import maps
from tests.support.assertions import assert_close, assert_within_roundings
from tests.support.cases import ACTIVATIONS, CASES, CORE, LOWERINGS, SMALL_NETWORKS, Case, label, reduced
from tests.support.oracle import widest
from workloads.layers import NETWORKS


@pytest.mark.parametrize("case", CASES + SMALL_NETWORKS, ids=str)
def test_vjp(case: Case, implementation: Implementation) -> None:
    x, w, g = case.operands()
    oracle = case.oracle
    y, dx, dw = jax.jit(maps.value_and_gradients(case.conv(implementation)))(x, w, g)
    assert dx.dtype == dw.dtype == jnp.float32
    assert_close(y, oracle.conv(x, w), 1e-5, "value")
    assert_close(dx, oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, oracle.kernel_grad(x, g), 1e-5, "dw")


@pytest.mark.parametrize("case", [*CORE[:2], reduced(NETWORKS[-1])], ids=str)
def test_vjp_of_the_chosen_implementation(case: Case) -> None:
    x, w, g = case.operands()
    dx, dw = jax.jit(maps.gradients(case.conv()))(x, w, g)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5, "dw")


@pytest.mark.parametrize("case", CORE, ids=str)
def test_vjp_in_eager_mode(case: Case, implementation: Implementation) -> None:
    x, w, g = case.operands()
    dx, dw = maps.gradients(case.conv(implementation))(x, w, g)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5, "dw")


@pytest.mark.parametrize("case", CORE, ids=str)
def test_float64(case: Case, implementation: Implementation, x64: None) -> None:
    x, w, g = (a.astype(np.float64) for a in case.operands())
    y, dx, dw = jax.jit(maps.value_and_gradients(case.conv(implementation)))(x, w, g)
    assert y.dtype == dx.dtype == dw.dtype == jnp.float64
    assert_close(y, case.oracle.conv(x, w), 1e-14, "value")
    assert_close(dx, case.oracle.input_grad(g, w), 1e-13, "dx")
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-13, "dw")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", CORE, ids=str)
def test_half_precision_is_accumulated_in_float32_and_rounded_once(
    case: Case, implementation: Implementation, dtype: Any
) -> None:
    x, w, g = (a.astype(dtype) for a in case.operands())
    results = jax.jit(maps.value_and_gradients(case.conv(implementation)))(x, w, g)
    for actual, exact in zip(results, maps.truth(case, x, w, g).values(), strict=True):
        assert actual.dtype == dtype
        assert_within_roundings(actual, exact, exact)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_accumulator_would_lose_the_ones(implementation: Implementation, dtype: Any) -> None:
    large = 2 / float(jnp.finfo(dtype).eps)  # large + 1 rounds to large, large + 8 is a number
    pullback = jax.jit(maps.gradients(partial(depthwise_conv, implementation=implementation)))
    for place in (0, 4, 8):
        nine = np.ones(9)
        nine[place] = large
        for summed in ((9, 1, 1), (1, 9, 1), (1, 1, 9), (1, 3, 3), (3, 3, 1)):  # dw sums over batch, rows and columns
            g = jnp.asarray(nine.reshape((*summed, 1)), dtype)
            _, dw = pullback(jnp.ones_like(g), jnp.ones((1, 1, 1, 1), dtype), g)
            assert float(dw[0, 0, 0, 0]) == large + 8, (place, summed)
        for rows, columns, multiplier in ((3, 3, 1), (3, 1, 3), (1, 1, 9)):  # dx over taps and multipliers
            w = jnp.asarray(nine.reshape(rows, columns, 1, multiplier), dtype)
            x = jnp.ones((1, 2 * rows - 1, 2 * columns - 1, 1), dtype)
            dx, _ = pullback(x, w, jnp.ones((1, rows, columns, multiplier), dtype))
            assert float(dx[0, rows - 1, columns - 1, 0]) == large + 8, (place, rows, columns, multiplier)


def test_each_gradient_has_its_operands_dtype(implementation: Implementation) -> None:
    case = CORE[1]
    x, w, g = case.operands()
    x16 = jnp.asarray(x, jnp.bfloat16)
    y, dx, dw = maps.value_and_gradients(case.conv(implementation))(x16, w, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact = case.oracle.input_grad(g, w)
    assert np.all(np.abs(widest(dx) - exact) <= 2.0**-8 * np.abs(exact) + 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x16, g), 1e-5)


def test_preferred_element_type_does_not_change_the_gradients_dtypes(implementation: Implementation) -> None:
    case = CORE[1]
    x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in case.operands())
    g = case.operands()[2]
    f = case.conv(implementation, preferred_element_type=jnp.float32)
    y, dx, dw = maps.value_and_gradients(f)(x, w, jnp.asarray(g))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    for actual, exact in ((dx, case.oracle.input_grad(g, w)), (dw, case.oracle.kernel_grad(x, g))):
        assert np.all(np.abs(widest(actual) - exact) <= 2.0**-6 * np.abs(exact) + 2.0**-6)


@pytest.mark.parametrize("case", CORE[:3], ids=str)
def test_complex_has_no_conjugate(case: Case, plain: str) -> None:
    # JAX's convention: the transpose of the linear map, as for lax's own convolution.
    x, w, g = ((a + 1j * b).astype(np.complex64) for a, b in zip(case.operands(0), case.operands(1), strict=True))
    dx, dw = jax.jit(maps.gradients(case.conv(plain)))(x, w, g)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5, "dw")


@pytest.mark.parametrize("case", [CORE[2], CORE[3]], ids=str)
def test_linear_transpose(case: Case, implementation: Implementation) -> None:
    x, w, g = case.operands()
    f = case.conv(implementation)
    (dx,) = jax.linear_transpose(lambda x: f(x, w), x)(g)
    (dw,) = jax.linear_transpose(lambda w: f(x, w), w)(g)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5, "dw")


@pytest.mark.parametrize("case", [CORE[2], CORE[3]], ids=str)
def test_the_transposes_transposed(case: Case, implementation: Implementation) -> None:
    # dx is linear in g and in w, dw in x and in g: four transposes that all lead back into the three maps.
    x, w, g = case.operands()
    f, oracle = case.conv(implementation), case.oracle

    @jax.jit
    def pullbacks(x: Any, w: Any, g: Any) -> Any:
        input_grad, kernel_grad = (lambda g, w: maps.dx(f)(x, w, g)), (lambda x, g: maps.dw(f)(x, w, g))
        return *maps.gradients(input_grad)(g, w, x), *maps.gradients(kernel_grad)(x, g, w)

    of_dx_g, of_dx_w, of_dw_x, of_dw_g = pullbacks(x, w, g)
    assert_close(of_dx_g, oracle.conv(x, w), 1e-5, "dx by g")
    assert_close(of_dx_w, oracle.kernel_grad(x, g), 1e-5, "dx by kernel")
    assert_close(of_dw_x, oracle.input_grad(g, w), 1e-5, "dw by x")
    assert_close(of_dw_g, oracle.conv(x, w), 1e-5, "dw by g")


@pytest.mark.parametrize(("activation", "formula", "slope"), ACTIVATIONS, ids=label)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_bias_and_activation(
    implementation: Implementation, data_format: str, activation: Any, formula: Any, slope: Any
) -> None:
    shape = (2, 5, 4, 3) if data_format == "channels_last" else (2, 3, 5, 4)
    case = Case("vjp-bias", shape, (3, 3, 3, 2), {"strides": 2, "padding": "same", "data_format": data_format})
    oracle = case.oracle
    x, w, g = case.operands()
    x, b = 2 * x, case.draw((6,), 20)
    y, dx, dw, db = jax.jit(maps.value_and_gradients(case.conv(implementation, activation=activation)))(x, w, b, g)
    before = oracle.add_bias(oracle.conv(x, w), b)
    assert_close(y, formula(before), 1e-5, "value")
    g = slope(before) * g
    assert_close(dx, oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, oracle.kernel_grad(x, g), 1e-5, "dw")
    assert_close(db, np.moveaxis(g, oracle.channel_axis, -1).reshape(-1, 6).sum(0), 1e-5, "db")


def test_an_integer_input_beside_a_float_kernel(implementation: Implementation) -> None:
    case = CORE[0]
    _, w, g = case.operands()
    x = np.arange(np.prod(case.x)).reshape(case.x) % 5
    dx, dw = maps.gradients(case.conv(implementation))(x, w, g)
    assert dx.dtype == jax.dtypes.float0
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)


@pytest.mark.parametrize(
    "lowering", [name for name in LOWERINGS if name != "conv"]
)  # lax multiplies it by the zeros of a dilated g
@pytest.mark.parametrize("case", [CORE[0], CORE[2], CORE[4], CORE[5]], ids=str)
def test_a_nan_stays_where_it_is_read(case: Case, lowering: str) -> None:
    x, w, g = case.operands()
    x[0, 2, ..., 1] = np.nan
    g[-1, -1, ..., 0] = np.nan
    dx, dw = jax.jit(maps.gradients(case.conv(lowering)))(x, w, g)
    np.testing.assert_array_equal(np.isnan(dx), np.isnan(case.oracle.input_grad(g, w)))
    np.testing.assert_array_equal(np.isnan(dw), np.isnan(case.oracle.kernel_grad(x, g)))


def test_jacrev_is_the_matrix_of_the_map(implementation: Implementation) -> None:
    case = Case("jacobian", (1, 4, 3, 2), (2, 2, 2, 2), {"strides": (2, 1), "padding": "same"})
    x, w, _ = case.operands()
    by_x, by_w = jax.jit(jax.jacrev(case.conv(implementation), argnums=(0, 1)))(x, w)
    unit_y = np.eye(int(np.prod(case.oracle.y_shape))).reshape((-1, *case.oracle.y_shape))
    assert_close(by_x, np.stack([case.oracle.input_grad(e, w) for e in unit_y]).reshape(by_x.shape), 1e-5)
    assert_close(by_w, np.stack([case.oracle.kernel_grad(x, e) for e in unit_y]).reshape(by_w.shape), 1e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_separable(implementation: Implementation, data_format: str) -> None:
    shape = (2, 5, 4, 3) if data_format == "channels_last" else (2, 3, 5, 4)
    case = Case("vjp-separable", shape, (3, 3, 3, 2), {"padding": "same", "data_format": data_format})
    oracle, axis = case.oracle, case.oracle.channel_axis
    x, w, _ = case.operands()
    p, b = case.draw((1, 1, 6, 4), 30), case.draw((4,), 31)
    f = lambda *z: separable_conv(*z, **case.geometry, implementation=implementation)  # noqa: E731
    g = case.draw(jax.eval_shape(f, x, w, p, b).shape, 32)
    dx, dw, dp, db = jax.jit(maps.gradients(f))(x, w, p, b, g)
    middle = np.moveaxis(oracle.conv(x, w), axis, -1).reshape(-1, 6)
    last = np.moveaxis(widest(g), axis, -1)
    back = np.moveaxis(last @ widest(p)[0, 0].T, -1, axis)
    assert_close(dx, oracle.input_grad(back, w), 1e-5, "dx")
    assert_close(dw, oracle.kernel_grad(x, back), 1e-5, "dw")
    assert_close(dp[0, 0], middle.T @ last.reshape(-1, 4), 1e-5, "dp")
    assert_close(db, last.reshape(-1, 4).sum(0), 1e-5, "db")
