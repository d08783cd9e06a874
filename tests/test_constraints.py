"""The constraints against Keras, against their formulas in float64 NumPy, and against their own promises."""

from __future__ import annotations

import functools
import json
import pickle
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from depthwise_jax import constraints, initializers
from depthwise_jax._core.layout import Layout
from depthwise_jax._core.window import Window
from depthwise_jax.constraints import Box, Constraint, MaxNorm, MinMaxNorm, NonNeg, PerSlice, UnitNorm, compose
from depthwise_jax.optim import project
from depthwise_jax.regularizers import L1, L1L2, L2, OrthogonalRegularizer, Regularizer
from tests.support.assertions import assert_close
from workloads.keras_reference import keras

NARROW = (jnp.bfloat16, jnp.float16)
RNG = np.random.default_rng(0)

# Ours and the arguments that both classes take.
KERAS_CASES = [
    ("MaxNorm", {}),
    ("MaxNorm", {"max_value": 0.7, "axis": (0, 1)}),
    ("MaxNorm", {"max_value": 1.0, "axis": -1}),
    ("MaxNorm", {"max_value": 0.0, "axis": (0, 1, 2)}),
    ("MinMaxNorm", {}),
    ("MinMaxNorm", {"min_value": 0.5, "max_value": 0.8, "axis": (0, 1)}),
    ("MinMaxNorm", {"min_value": 0.5, "max_value": 0.8, "rate": 0.3}),
    ("UnitNorm", {}),
    ("UnitNorm", {"axis": (0, 1)}),
    ("NonNeg", {}),
]


def kernel(shape: tuple[int, ...] = (3, 3, 4, 2), spread: float = 3.0, seed: int = 0) -> Any:
    """Slices of very different norms, one of them zero."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * np.exp(rng.uniform(-spread, spread, (1, 1, *shape[2:])))
    w[..., -1, -1] = 0
    return w.astype(np.float32)


def formula(name: str, w: np.ndarray, **arguments: Any) -> np.ndarray:
    """Keras' documented formulas in float64."""
    w = w.astype(np.float64)
    if name == "NonNeg":
        return np.maximum(w, 0)
    n = np.sqrt(np.sum(w**2, axis=arguments.pop("axis", 0), keepdims=True))
    bounds: Any = {"MaxNorm": {"min_value": 0, "max_value": 2}, "MinMaxNorm": {"min_value": 0, "max_value": 1}}
    bounds = bounds.get(name, {"min_value": 1, "max_value": 1}) | arguments
    rate = bounds.pop("rate", 1)
    return w * (rate * np.clip(n, *bounds.values()) + (1 - rate) * n) / (1e-7 + n)


def norm(w: Any, axis: Any) -> np.ndarray:
    return np.sqrt(np.sum(np.asarray(w, np.float64) ** 2, axis=axis, keepdims=True))


@functools.cache
def jitted(constraint: Constraint) -> Any:
    return jax.jit(constraint)


# --- Keras ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments"), KERAS_CASES)
def test_equals_keras_value_by_value(name: str, arguments: dict[str, Any]) -> None:
    theirs = getattr(keras.constraints, name)(
        **{key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    )
    ours = getattr(constraints, name)(**arguments)
    for w in (kernel(), kernel((5, 1, 6, 1), seed=1), np.zeros((2, 2, 2, 2), np.float32), -kernel(seed=2) * 1e-6):
        np.testing.assert_array_equal(ours(w), np.asarray(theirs(w)))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("name", "arguments"), KERAS_CASES)
def test_narrow_dtypes_follow_the_formula(name: str, arguments: dict[str, Any], dtype: Any) -> None:
    """One rounding of the exact value: Keras, computing in float16, makes 0 or inf of slices as small as these."""
    w = jnp.asarray(kernel(), dtype)
    got = getattr(constraints, name)(**arguments)(w)
    expected = formula(name, np.asarray(w, np.float64), **arguments)
    info = jnp.finfo(dtype)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=float(info.eps), atol=float(info.smallest_subnormal)
    )


@pytest.mark.parametrize(("name", "arguments"), KERAS_CASES)
def test_configuration_round_trips_through_keras(name: str, arguments: dict[str, Any]) -> None:
    ours = getattr(constraints, name)(**arguments)
    config = json.loads(json.dumps(constraints.serialize(ours)))
    theirs = keras.constraints.deserialize(config)
    assert type(theirs).__name__ == name
    assert json.loads(json.dumps(keras.constraints.serialize(theirs))) == config
    assert constraints.get(config) == ours
    assert constraints.get({"class_name": name, "config": config["config"]}) == ours  # Keras 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("MaxNorm", "max_norm"), MaxNorm(max_value=2, axis=0)),
        (("MinMaxNorm", "min_max_norm"), MinMaxNorm(min_value=0.0, max_value=1.0, rate=1.0, axis=0)),
        (("UnitNorm", "unit_norm"), UnitNorm(axis=0)),
        (("NonNeg", "non_neg"), NonNeg()),
    ],
)
def test_names_and_defaults(names: tuple[str, ...], expected: Constraint) -> None:
    for name in names:
        assert constraints.get(name) == expected


def test_window_serialises_as_the_axes_of_the_window() -> None:
    assert constraints.serialize(MaxNorm(axis="window"), window_axes=(0, 1))["config"]["axis"] == [0, 1]
    assert constraints.serialize(UnitNorm(axis="window"), window_axes=(0,))["config"]["axis"] == [0]


@pytest.mark.parametrize("constraint", [MaxNorm(exact=True), Box(0, 1), NonNeg() & MaxNorm(), lambda w: w])
def test_what_keras_has_no_word_for_raises(constraint: Any) -> None:
    with pytest.raises(ValueError, match="no Keras configuration"):
        constraints.serialize(constraint)


def test_any_callable_comes_back_as_it_is() -> None:
    def clip(w: jax.Array) -> jax.Array:
        return jnp.clip(w, -1, 1)

    assert constraints.get(clip) is clip
    assert constraints.get(None) is None


def test_the_base_class_is_the_identity() -> None:
    w = kernel()
    identity = constraints.get("constraint")
    assert identity is not None
    np.testing.assert_array_equal(identity(w), w)


# --- Axes -------------------------------------------------------------------------------------------------------------


def test_axis_0_bounds_columns_and_window_bounds_filters() -> None:
    """The table of the module's docstring, on a (3, 3, C, M) kernel."""
    w: Any = np.full((3, 3, 2, 2), 10.0, np.float32)
    columns, filters, together = (jitted(MaxNorm(1.0, axis=axis, exact=True))(w) for axis in (0, "window", (0, 1, 2)))
    np.testing.assert_allclose(norm(columns, (0, 1)), np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(norm(filters, (0, 1)), 1, rtol=1e-6)
    np.testing.assert_allclose(norm(together, (0, 1)), np.sqrt(1 / 2), rtol=1e-6)
    np.testing.assert_array_equal(jitted(MaxNorm(1.0, axis=(0, 1), exact=True))(w), filters)
    from_a_file: Any = [-3, -4]  # JSON has lists
    np.testing.assert_array_equal(jitted(MaxNorm(1.0, axis=from_a_file, exact=True))(w), filters)


@pytest.mark.parametrize("shape", [(5, 3, 2), (3, 5, 3, 2), (2, 3, 2, 3, 2)])
def test_window_is_every_axis_but_the_last_two(shape: tuple[int, ...]) -> None:
    w: Any = RNG.standard_normal(shape).astype(np.float32)
    axes = tuple(range(len(shape) - 2))
    np.testing.assert_allclose(norm(UnitNorm(axis="window")(w), axes), 1, rtol=1e-5)


def test_axis_none_is_the_whole_array() -> None:
    np.testing.assert_allclose(norm(UnitNorm(axis=None)(kernel()), None), 1, rtol=1e-6)


# --- The exact option -------------------------------------------------------------------------------------------------

EXACT = [
    (MaxNorm(0.9, axis="window", exact=True), (0, 0.9)),
    (MinMaxNorm(0.4, 0.9, axis="window", exact=True), (0.4, 0.9)),
    (MinMaxNorm(0.0, 0.9, axis="window", exact=True), (0.0, 0.9)),
    (UnitNorm(axis="window", exact=True), (1, 1)),
]
MAGNITUDES = {jnp.float32: 60.0, jnp.bfloat16: 60.0, jnp.float16: 4.0}


@pytest.mark.parametrize("dtype", MAGNITUDES)
@pytest.mark.parametrize(("constraint", "shell"), EXACT)
def test_exact_is_idempotent_feasible_and_the_identity_inside(
    constraint: Any, shell: tuple[float, float], dtype: Any
) -> None:
    w = jnp.asarray(kernel((3, 3, 100, 4), spread=MAGNITUDES[dtype]), dtype)
    before = norm(w, (0, 1))
    # Narrow numbers cannot keep a norm to better than their own rounding.
    slack = 4 * float(jnp.finfo(dtype).eps) if shell[0] else 0
    for apply in (constraint, jitted(constraint)):
        once = apply(w)
        after = norm(once, (0, 1))
        assert once.dtype == dtype
        np.testing.assert_array_equal(apply(once), once)
        assert (after <= shell[1] * (1 + slack)).all()
        assert ((after >= shell[0] * (1 - slack)) | (before == 0)).all()
        inside = np.broadcast_to((before >= shell[0] * (1 + slack)) & (before <= shell[1]), w.shape)
        np.testing.assert_array_equal(np.asarray(once)[inside], np.asarray(w)[inside])


@pytest.mark.parametrize(("constraint", "shell"), EXACT)
def test_exact_is_the_projection(constraint: Any, shell: tuple[float, float]) -> None:
    """The nearest point of the shell lies along w: w * clip(n) / n."""
    w = kernel((3, 3, 50, 4), spread=60.0)
    n = norm(w, (0, 1))
    expected = w * np.divide(np.clip(n, *shell), n, where=n > 0, out=np.ones_like(n))
    np.testing.assert_allclose(constraint(w), expected, rtol=1e-6, atol=1e-37)


def test_exact_counts_many_small_numbers_beside_a_large_one() -> None:
    """A plain float32 sum of these squares loses every one but the first."""
    w = np.full((5000, 2), 2.3e-4, np.float32)
    w[0] = 1
    projected = jitted(MaxNorm(1.0, exact=True))(w)
    after = norm(projected, 0)
    assert (after <= 1).all()
    np.testing.assert_allclose(after, 1, rtol=1e-6)
    np.testing.assert_allclose(MaxNorm(1.0).excess(jnp.asarray(w)), norm(w, 0) - 1, rtol=1e-3)


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@hypothesis.given(hnp.arrays(np.float32, (4, 2), elements=FLOATS), st.floats(2.0**-40, 2.0**40, width=32))
def test_exact_max_norm_of_any_numbers(w: np.ndarray, bound: float) -> None:
    project = _traced_bound()
    once = project(w, bound)
    assert (norm(once, 0) <= bound).all()
    np.testing.assert_array_equal(project(once, bound), once)
    inside = np.broadcast_to(norm(w, 0) <= bound * (1 - 1e-6), w.shape)
    np.testing.assert_array_equal(np.asarray(once)[inside], w[inside])


@functools.cache
def _traced_bound() -> Any:
    return jax.jit(lambda w, bound: MaxNorm(bound, exact=True)(w))


def test_a_slice_of_zeros_stays() -> None:
    zeros: Any = np.zeros((3, 2), np.float32)
    for constraint in (UnitNorm(), UnitNorm(exact=True), MinMaxNorm(0.5, exact=True), MaxNorm(exact=True)):
        with jax.debug_nans(True):  # nor is it divided by its norm
            np.testing.assert_array_equal(constraint(zeros), zeros)


# --- Boxes, compositions, slices --------------------------------------------------------------------------------------


def test_box() -> None:
    w = kernel()
    np.testing.assert_array_equal(Box(-0.25, 0.5)(w), np.clip(w, np.float32(-0.25), np.float32(0.5)))
    np.testing.assert_array_equal(Box(upper=0.5)(w), np.minimum(w, np.float32(0.5)))
    np.testing.assert_array_equal(Box(lower=0.5)(w), np.maximum(w, np.float32(0.5)))


def test_and_applies_the_first_then_the_second() -> None:
    w = kernel()
    first, second = Box(-0.5, 1.0), MaxNorm(0.4, axis="window")
    np.testing.assert_array_equal((first & second)(w), second(first(w)))
    np.testing.assert_array_equal(compose(first, second)(w), second(first(w)))
    np.testing.assert_array_equal((jnp.abs & second)(w), second(jnp.abs(w)))  # a plain function on either side
    np.testing.assert_array_equal((second & jnp.abs)(w), jnp.abs(second(w)))
    assert (first & second) & NonNeg() == first & (second & NonNeg())


def test_intervals_with_nothing_in_common_raise() -> None:
    with pytest.raises(ValueError, match="no number satisfies"):
        compose(Box(upper=-1.0), NonNeg())


@pytest.mark.parametrize("axis", [0, (0, 1), "window", (2,)])
def test_an_optax_projection_per_slice(axis: Any) -> None:
    w = kernel()
    constraint = PerSlice(functools.partial(optax.projections.projection_l1_ball, scale=1.5), axis=axis)
    axes = (0, 1) if axis == "window" else (axis,) if isinstance(axis, int) else axis
    # The l1 ball by its definition: soft thresholding at the theta that makes the norm 1.5, found by bisection.
    low, high = np.zeros_like(norm(w, axes)), np.max(np.abs(w), axes, keepdims=True).astype(np.float64)
    for _ in range(200):
        theta = (low + high) / 2
        over = np.sum(np.maximum(np.abs(w) - theta, 0), axes, keepdims=True) > 1.5
        low, high = np.where(over, theta, low), np.where(over, high, theta)
    outside = np.sum(np.abs(w), axes, keepdims=True) > 1.5
    expected = np.where(outside, np.sign(w) * np.maximum(np.abs(w) - high, 0), w)
    np.testing.assert_allclose(jitted(constraint)(w), expected, rtol=1e-4, atol=1e-5)
    assert jitted(constraint)(w.astype(jnp.bfloat16)).dtype == jnp.bfloat16


# --- Violations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "distance"),
    [
        (MaxNorm(0.5, axis="window"), lambda w: norm(w, (0, 1)) - 0.5),
        (MinMaxNorm(0.5, 0.8), lambda w: np.maximum(norm(w, 0) - 0.8, 0.5 - norm(w, 0))),
        # All norms lie below the lower bound: the largest distance is one to it.
        (MinMaxNorm(50.0, 80.0), lambda w: 50 - norm(w, 0)),
        (UnitNorm(axis=(0, 1)), lambda w: np.abs(norm(w, (0, 1)) - 1)),
        (NonNeg(), lambda w: -w),
        (Box(-1, 0.25), lambda w: np.maximum(-1 - w, w - 0.25)),
        (NonNeg() & MaxNorm(0.5), lambda w: np.maximum(np.max(-w, 0, keepdims=True), norm(w, 0) - 0.5)),
    ],
)
def test_violation_is_the_largest_distance(constraint: Any, distance: Any) -> None:
    w = kernel()
    np.testing.assert_allclose(constraint.violation(jnp.asarray(w)), np.max(distance(w)), rtol=1e-6)
    assert np.isnan(constraint.violation(jnp.asarray(w).at[0, 0, 0, 0].set(jnp.nan)))
    assert constraint.violation(jnp.zeros((0, 0, 0, 0))) == 0


def test_no_violation_where_the_set_is_unknown() -> None:
    assert compose(jnp.abs).violation(jnp.ones(3)) is None
    assert (jnp.abs & MaxNorm()).violation(jnp.ones(3)) is None
    assert PerSlice(jnp.abs).violation(jnp.ones(3)) is None


# --- Transformations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constraint",
    [MaxNorm(0.8), MaxNorm(0.8, exact=True), MinMaxNorm(2.0, 3.0, 0.3), UnitNorm(exact=True), NonNeg() & MaxNorm(0.8)],
)
@pytest.mark.usefixtures("x64")
def test_derivatives(constraint: Any) -> None:
    w = jnp.asarray(RNG.standard_normal((3, 2)))
    check_grads(jax.jit(constraint), (w,), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("constraint", [MaxNorm(), MaxNorm(exact=True), MinMaxNorm(), UnitNorm(exact=True)])
def test_derivative_at_zero_is_finite(constraint: Any) -> None:
    assert np.isfinite(jax.jit(jax.jacobian(constraint))(jnp.zeros(3))).all()


@pytest.mark.parametrize(
    "constraint", [MaxNorm(0.8), MaxNorm(0.8, exact=True), NonNeg() & UnitNorm(), PerSlice(jnp.abs)]
)
def test_vmap(constraint: Any) -> None:
    w = kernel((3, 4, 5, 2))
    apply = jax.jit(constraint)
    expected = np.stack([apply(part) for part in w.transpose(2, 0, 1, 3)], 2)
    np.testing.assert_allclose(jax.jit(jax.vmap(constraint, in_axes=2, out_axes=2))(w), expected, rtol=1e-6)


# --- Values as arguments ----------------------------------------------------------------------------------------------


def test_frozen_and_hashable() -> None:
    assert hash(MaxNorm(1.0, axis=[0, 1])) == hash(MaxNorm(1.0, axis=(0, 1)))  # type: ignore[arg-type]
    every = [MaxNorm(), MaxNorm(exact=True), MinMaxNorm(), UnitNorm(), NonNeg(), Box(0, 1), PerSlice(jnp.abs)]
    assert len({*every, NonNeg() & MaxNorm()}) == 8
    with pytest.raises(AttributeError):
        MaxNorm().max_value = 3  # type: ignore[misc]


NEARLY_WINDOW: Any = "windows"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxNorm(-1.0), "MaxNorm: max_value must be finite and not negative; got -1.0"),
        (lambda: MaxNorm(float("nan")), "max_value must be finite and not negative; got nan"),
        (lambda: MinMaxNorm(2.0, 1.0), "min_value must not exceed max_value; got 2.0 and 1.0"),
        (lambda: MinMaxNorm(rate=1.5), r"rate must lie in \[0, 1\]; got 1.5"),
        (lambda: MinMaxNorm(rate=0.5, exact=True), "exact=True needs rate=1"),
        (lambda: MaxNorm(axis="kernel"), "axis must be an int, a tuple of ints, 'window' or None; got 'kernel'"),  # type: ignore[arg-type]
        (lambda: MaxNorm(axis=NEARLY_WINDOW), "axis must be an int, .*; got 'windows'"),
        (lambda: MaxNorm(axis=True), "axis must be an int"),
        (lambda: MaxNorm(axis=(0, 1.5)), "axis must be an int"),  # type: ignore[arg-type]
        (lambda: Box(1.0, 0.0), "lower must not exceed upper; got lower=1.0, upper=0.0"),
        (lambda: PerSlice(3), "projection must be callable; got 3"),  # type: ignore[arg-type]
        (lambda: compose(NonNeg(), 3), "must be callable"),  # type: ignore[arg-type]
        (lambda: MaxNorm(axis=2)(jnp.ones((2, 2))), "axis=2 must name different axes of an array of rank 2"),
        (lambda: MaxNorm(axis=(0, -2))(jnp.ones((2, 2))), "must name different axes"),
        (lambda: MaxNorm(axis="window")(jnp.ones((2, 2))), r"needs a kernel \(\*window, C, M\) of rank 3 or more"),
        (lambda: NonNeg()(jnp.ones(2, int)), "expects a real floating-point array; got int32"),
        (lambda: MaxNorm()(jnp.ones(2, complex)), "expects a real floating-point array; got complex64"),
        (
            lambda: constraints.get("maxnorm"),
            "unknown constraint 'maxnorm'; closest valid names: 'MaxNorm', 'max_norm'",
        ),
        (lambda: constraints.get(3), "must be None, a name, a configuration or a callable; got 3"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("smallest", [1e-38, 1e-42, 1.5e-45])
@pytest.mark.parametrize("constraint", [UnitNorm(axis="window", exact=True), MinMaxNorm(0.5, 2, axis=None, exact=True)])
def test_exact_projects_subnormal_slices(constraint: Any, smallest: float) -> None:
    w = np.full((3, 3, 1, 1), -smallest, np.float32)
    expected = {"UnitNorm": -1 / 3, "MinMaxNorm": -1 / 6}[type(constraint).__name__]
    np.testing.assert_allclose(constraint(jnp.asarray(w)), expected, rtol=1e-6)
    np.testing.assert_array_equal(constraint(jnp.zeros_like(w)), 0)


@pytest.mark.parametrize(
    "thing",
    [
        *(Constraint(), Regularizer(), MaxNorm(1.5, exact=True), MinMaxNorm(axis="window"), UnitNorm(), NonNeg()),
        *(Box(-1, 1), PerSlice(abs), NonNeg() & MaxNorm(), L1(), L2(0.1), L1L2(), OrthogonalRegularizer()),
        *(Window((3,), (1,), ((0, 0),), (1,)), Layout(2, "channels_first"), initializers.get("glorot_uniform")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_pickled_objects_are_equal(thing: Any) -> None:
    again = pickle.loads(pickle.dumps(thing))
    assert again == thing
    assert hash(again) == hash(thing)
    assert again != object()


# --- Bounds that are arrays -------------------------------------------------------------------------------------------

BOUNDED = {
    "MaxNorm": lambda number: MaxNorm(number(0.7), axis="window"),
    "MaxNorm, exact": lambda number: MaxNorm(number(0.7), axis="window", exact=True),
    "MinMaxNorm": lambda number: MinMaxNorm(number(0.5), number(0.9), axis="window"),
    "MinMaxNorm, from zero": lambda number: MinMaxNorm(number(0.0), number(0.9), axis="window"),
    "MinMaxNorm, exact": lambda number: MinMaxNorm(
        number(0.5), number(0.9), rate=number(1.0), axis="window", exact=True
    ),
    "Box": lambda number: Box(number(-0.3), number(0.4)),
    "Box & Box": lambda number: Box(number(-0.3), number(0.4)) & Box(number(-0.2), number(0.5)),
    "NonNeg & MaxNorm": lambda number: NonNeg() & MaxNorm(number(0.7), axis="window"),
}


@pytest.mark.parametrize("made", ["outside", "inside"])
@pytest.mark.parametrize("number", [jnp.float32, np.float32, np.float64], ids=lambda number: number.__name__)
@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_may_be_an_array_wherever_the_constraint_is_made(name: str, number: Any, made: str) -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 2)), jnp.float32)
    arrays = {value: number(value) for value in (-0.3, -0.2, 0.0, 0.4, 0.5, 0.7, 0.9, 1.0)}
    outside = BOUNDED[name](arrays.get)

    def step(w: jax.Array) -> tuple[jax.Array, ...]:
        constraint = outside if made == "outside" else BOUNDED[name](arrays.get)
        params: Any = {"kernel": w}
        tx = project({"kernel": constraint})
        updates: Any = tx.update(params, tx.init(params), params)[0]
        return constraint(w), constraint.project_with_margin(w), w + updates["kernel"]

    with jax.numpy_dtype_promotion("standard"):
        actual, expected = jax.jit(step)(w), BOUNDED[name](float)
    assert_close(actual[0], expected(w), 1e-6)
    for projected in actual:
        assert_close(projected, expected(projected), 1e-6)


def test_a_box_of_arrays_out_of_order_is_refused_inside_jit() -> None:
    zero, one, two = map(jnp.float32, range(3))
    with pytest.raises(ValueError, match="lower must not exceed upper"):
        jax.jit(lambda w: Box(one, zero)(w))(jnp.ones(3))
    with pytest.raises(ValueError, match="no number satisfies all"):
        jax.jit(lambda w: (Box(zero, one) & Box(two, 3.0))(w))(jnp.ones(3))
