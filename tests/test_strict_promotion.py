"""jax_numpy_dtype_promotion="strict": what lax and Optax can do there works, and what they refuse is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import depthwise_jax.nnx
from depthwise_jax import depthwise_conv, regularization_loss, separable_conv
from depthwise_jax.constraints import Box, MaxNorm, MinMaxNorm, NonNeg, PerSlice, UnitNorm
from depthwise_jax.lowering import Implementation
from depthwise_jax.optim import apply_updates_projected, constraints_of, feasibility, project, project_params
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import CORE, Case
from tests.support.layers import DepthwiseConv2D, SeparableConv2D

FLOATS = ("float16", "bfloat16", "float32", "float64")
TOLERANCES = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-5, "float64": 1e-12}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CORE[1:3], ids=str)
def test_the_maps(case: Case, dtype: str, implementation: Implementation) -> None:
    x, k, g = (jnp.asarray(a, dtype) for a in case.operands())
    oracle, tolerance = case.oracle, TOLERANCES[dtype]
    conv = case.conv(implementation)
    second = lambda x, k: jax.jvp(jax.grad(lambda k: conv(x, k).sum()), (k,), (k,))[1]  # noqa: E731
    (y, dx, dk), bent = jax.jit(lambda x, k, g: (maps.value_and_gradients(conv)(x, k, g), second(x, k)))(x, k, g)
    assert {a.dtype for a in (y, dx, dk)} == {jnp.dtype(dtype)}
    exact = oracle.conv(x, k), oracle.input_grad(g, k), oracle.kernel_grad(x, g)
    for actual, expected in zip((y, dx, dk), exact, strict=True):
        assert_close(actual, expected, tolerance)
    assert jnp.isfinite(bent).all()


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [(a, b) for a in FLOATS for b in FLOATS if a == b or jnp.dtype(a).itemsize < jnp.dtype(b).itemsize],
)
def test_preferred_element_type(dtype: str, preferred: str, implementation: Implementation) -> None:
    x, k, b = jnp.ones((1, 6, 3), dtype), jnp.ones((2, 3, 1), dtype), jnp.ones(3, dtype)
    options: dict[str, Any] = {"preferred_element_type": preferred, "implementation": implementation}

    @jax.jit
    def results(*z: Any) -> Any:
        g = jnp.ones((1, 5, 3), preferred)
        convs = {a: functools.partial(depthwise_conv, activation=a, **options) for a in ("linear", "relu6", "tanh")}
        return {activation: maps.value_and_gradients(conv)(*z, g) for activation, conv in convs.items()}

    for activation, (y, *gradients) in results(x, k, b).items():
        assert y.dtype == preferred
        np.testing.assert_allclose(np.asarray(y, float), np.tanh(3) if activation == "tanh" else 3, rtol=1e-2)
        assert {a.dtype for a in gradients} == {jnp.dtype(dtype)}


def test_integers_and_complex_numbers() -> None:
    for dtype, preferred in ((jnp.int8, jnp.int32), (jnp.complex64, jnp.complex128)):
        y = depthwise_conv(jnp.ones((1, 6, 3), dtype), jnp.ones((2, 3, 1), dtype), preferred_element_type=preferred)
        assert y.dtype == preferred
        assert (y == 2).all()


def test_operands_of_two_dtypes_are_refused_as_by_lax() -> None:
    x, k = jnp.ones((1, 6, 3), jnp.bfloat16), jnp.ones((2, 3, 1), jnp.float32)
    with pytest.raises(ValueError, match="no available implicit dtype promotion path"):
        depthwise_conv(x, k)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_separable_conv(dtype: str, implementation: Implementation) -> None:
    x, d, p, b = (jnp.ones(shape, dtype) for shape in ((2, 6, 6, 3), (3, 3, 3, 2), (1, 1, 6, 4), (4,)))
    conv = lambda *a: separable_conv(*a, activation="relu", implementation=implementation)  # noqa: E731
    y, transpose = jax.vjp(conv, x, d, p, b)
    assert y.dtype == dtype
    assert (y == 55).all()
    assert all(jnp.isfinite(g).all() for g in transpose(y))


ARGUMENTS: dict[str, Any] = {
    "activation": "relu",
    "activity_regularizer": "l2",
    "depthwise_regularizer": "l1_l2",
    "depthwise_constraint": "max_norm",
    "bias_constraint": "non_neg",
}


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), (None, "float64")])
@pytest.mark.parametrize("separable", [False, True])
def test_layers_train(dtypes: tuple[Any, Any], separable: bool) -> None:
    options = {**ARGUMENTS, "dtype": dtypes[0], "param_dtype": dtypes[1]}
    layer = SeparableConv2D(4, 3, **options) if separable else DepthwiseConv2D(3, **options)
    x = jnp.ones((2, 6, 6, 8), dtypes[0] or dtypes[1])
    params = layer.init(jax.random.key(0), x)["params"]
    constraints = constraints_of(layer, x)

    def loss(params: Any) -> Any:
        y, state = layer.apply({"params": params}, x, mutable=["losses"])
        return y.astype(jnp.float32).sum() + sum(v.astype(jnp.float32) for v in jax.tree.leaves(state))

    optimizer = optax.chain(optax.sgd(0.1), project(constraints))

    @jax.jit
    def step(params: Any) -> Any:
        updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    new = step(params)
    assert jax.tree.map(lambda a: a.dtype, new) == jax.tree.map(lambda a: a.dtype, params)
    assert all(v is None or v <= 0.05 for v in jax.tree.leaves(feasibility(new, constraints)))
    assert jnp.isfinite(regularization_loss(layer, params, x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_nnx_layers(dtype: str) -> None:
    layer = depthwise_jax.nnx.DepthwiseConv2D(
        8, 3, **ARGUMENTS, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)
    )
    x = jnp.ones((2, 3, 3, 8), dtype)  # sums of few numbers, right to 1e-6 in any order
    grads = nnx.grad(lambda layer: layer(x).sum())(layer)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    kernel = np.asarray(layer.kernel[...], np.float64)
    expected = 0.01 * (np.abs(kernel).sum() + np.square(kernel).sum())
    assert_close(depthwise_jax.nnx.regularization_loss(layer), expected, 1e-6)
    y, losses = nnx.capture(layer, depthwise_jax.nnx.Loss)(x)
    assert_close(losses["activity"][...], 0.01 * np.square(np.asarray(y, np.float64)).sum() / 2, 1e-6)


CONSTRAINTS: dict[str, Callable[[], Any]] = {
    "MaxNorm": lambda: MaxNorm(1.0, axis="window"),
    "MaxNorm, exact": lambda: MaxNorm(1.0, axis="window", exact=True),
    "MaxNorm, bound of float32": lambda: MaxNorm(jnp.float32(1.0), axis="window"),
    "MaxNorm, exact, bound of float32": lambda: MaxNorm(jnp.float32(1.0), axis="window", exact=True),
    "MinMaxNorm": lambda: MinMaxNorm(0.5, 1.0, axis=None),
    "MinMaxNorm, exact, bound of float32": lambda: MinMaxNorm(jnp.float32(0.5), 1.0, axis=None, exact=True),
    "MinMaxNorm, rate": lambda: MinMaxNorm(0.5, 1.0, rate=0.5),
    "UnitNorm": lambda: UnitNorm(),
    "UnitNorm, exact": lambda: UnitNorm(axis="window", exact=True),
    "NonNeg": lambda: NonNeg(),
    "Box": lambda: Box(-0.3, 0.3),
    "Box of float32": lambda: Box(jnp.float32(-0.3), jnp.float32(0.3)),
    "PerSlice": lambda: PerSlice(lambda w: w / 2, axis="window"),
    "both": lambda: NonNeg() & MaxNorm(1.0, axis="window"),
    "a function": lambda: jnp.abs,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    # Of float32 parameters and Python numbers nothing promotes.
    [(name, "bfloat16") for name in CONSTRAINTS] + [(name, "float32") for name in CONSTRAINTS if "float32" in name],
)
def test_constraints_as_without_strict_promotion(name: str, dtype: str) -> None:
    constraint = CONSTRAINTS[name]()
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 2)), dtype), "bias": jnp.ones(4)}
    constraints = {"kernel": constraint, "bias": None}

    def all_of_them(params: Any) -> Any:
        tx = optax.chain(optax.sgd(0.1), project(constraints))
        feasible = project_params(params, constraints)
        updates, _ = tx.update(params, tx.init(params), feasible)
        return (
            feasible,
            feasibility(params, constraints),
            apply_updates_projected(params, params, constraints),
            optax.apply_updates(feasible, updates),
        )

    strict = jax.jit(all_of_them)(params)
    with jax.numpy_dtype_promotion("standard"):
        standard = jax.jit(all_of_them)(params)
    for actual, expected in zip(jax.tree.leaves(strict[:3]), jax.tree.leaves(standard[:3]), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    step, expected = strict[3]["kernel"], standard[3]["kernel"]
    assert step.dtype == expected.dtype == dtype
    # Of a narrow parameter the update has its dtype, so that the sum is rounded once more.
    actual, expected = (np.asarray(a, float) for a in (step, expected))
    np.testing.assert_allclose(actual, expected, atol=2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_step_stays_feasible(dtype: str, jit: bool) -> None:
    rng = np.random.default_rng(1)
    for bound, constraint in ((0.0, NonNeg()), (0.3, Box(-0.3, 0.3)), (1.0, MaxNorm(1.0, axis="window"))):
        tx = project({"w": constraint})
        params = project_params({"w": jnp.asarray(rng.normal(size=(3, 3, 16, 4)), dtype)}, {"w": constraint})

        def step(params: Any, updates: Any, tx: Any = tx) -> Any:
            return optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])

        step = jax.jit(step) if jit else step
        for scale in (1e-3, 0.1, 1.0, 100.0):
            params = step(params, {"w": jnp.asarray(rng.normal(size=(3, 3, 16, 4)) * scale, dtype)})
            limit = 0.0 if isinstance(constraint, Box) else 4 * float(jnp.finfo(dtype).epsneg) * bound
            violation = constraint.violation(params["w"])
            assert violation is not None
            assert float(violation) <= limit, (constraint, scale)


def test_a_scheduled_bound() -> None:
    params: Any = {"kernel": jnp.ones((3, 3, 4, 2), jnp.bfloat16)}
    scheduled = optax.inject_hyperparams(lambda bound: project(MaxNorm(bound, axis="window")))
    tx = scheduled(bound=lambda count: 1.0 / (1 + count.astype(jnp.float32)))
    updates, _ = tx.update(params, tx.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    assert new["kernel"].dtype == jnp.bfloat16
