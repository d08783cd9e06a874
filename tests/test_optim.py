"""What `project` promises: feasible parameters after `optax.apply_updates`, in every dtype, with every optimiser.

Parameters are judged in float64 NumPy, from the definitions of the sets, never by the library's own `feasibility`.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.extend.core import Var

from depthwise_jax.constraints import Box, MaxNorm, MinMaxNorm, NonNeg, UnitNorm
from depthwise_jax.optim import apply_updates_projected, feasibility, project, project_params
from tests.support.compiling import CONTRACTING
from tests.support.draws import ALL

DTYPES = ("float32", "bfloat16", "float16")
BOUND = 0.7

# One tree of every kind of set; the distance of a parameter from its set, in float64.
CONSTRAINTS: dict[str, Any] = {
    "non_neg": NonNeg(),
    "box": Box(-0.1, 0.3),
    "keras": MaxNorm(BOUND, axis="window"),
    "exact": MaxNorm(BOUND, axis="window", exact=True),
    "both": NonNeg() & MaxNorm(BOUND),
}
SHAPES = {"non_neg": (5,), "box": (3, 2), "keras": (3, 3, 2, 2), "exact": (3, 3, 2, 2), "both": (4, 3)}


def rounded(value: float, dtype: str) -> float:
    return float(jnp.asarray(value, dtype))


def ulp(value: float, dtype: str) -> float:
    """The distance from `value` to the next number of the dtype."""
    return float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(value))


def distance(name: str, w: Any, dtype: str) -> float:
    """How far `w` lies outside its set, (..., *shape): over every leading axis the largest."""
    w = np.asarray(w, np.float64)
    assert np.isfinite(w).all()
    below = {"non_neg": 0.0, "both": 0.0, "box": rounded(-0.1, dtype)}.get(name, -np.inf) - w
    above = w - (rounded(0.3, dtype) if name == "box" else np.inf)
    axes = {"keras": (-4, -3), "exact": (-4, -3), "both": -2}.get(name)
    beyond = -np.inf if axes is None else np.max(np.sqrt(np.sum(w**2, axes))) - BOUND
    return max(0.0, np.max(below), np.max(above), beyond)


def allowed(name: str, dtype: str) -> float:
    """What the library promises: nothing for elementwise sets, 4 ulp at the bound for balls."""
    return 4 * ulp(BOUND, dtype) if "_" not in name and name != "box" else 0.0


def assert_feasible(params: Any) -> None:
    for dtype, leaves in params.items():
        for name, w in leaves.items():
            assert distance(name, w, dtype) <= allowed(name, dtype), (dtype, name, distance(name, w, dtype))
            if name == "both":
                assert np.min(np.asarray(w, np.float64)) >= 0


def assert_moved(history: Any) -> None:
    for dtype, leaves in history.items():
        for name in ("non_neg", "keras", "exact"):
            assert leaves[name].dtype == dtype
            assert np.ptp(np.asarray(leaves[name], np.float64), axis=0).max() > 0.01


def tree(seed: int, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        dtype: {name: jnp.asarray(scale * rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
        for dtype in DTYPES
    }


ALL_CONSTRAINTS = dict.fromkeys(DTYPES, CONSTRAINTS)


@functools.cache
def feasible_tree() -> Any:
    return jax.jit(lambda params: project_params(params, ALL_CONSTRAINTS))(tree(0))


STEPS = 1000
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 50, STEPS)

EPS = 1e-3  # Adam's default of 1e-8 is 0 in float16

OPTIMISERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(SCHEDULE, eps=EPS),
    "adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01, weight_decay=0.1, eps=EPS)),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=2),
    "muon": lambda: optax.contrib.muon(0.02),
}


def last(opt: Any) -> Any:
    return optax.chain(opt, project(ALL_CONSTRAINTS))


def masked(opt: Any) -> Any:
    """Two transforms that each see their own half of the tree."""
    names = {dtype: {name: name in ("box", "keras") for name in SHAPES} for dtype in DTYPES}
    others = jax.tree.map(lambda use: not use, names)
    return optax.chain(
        opt, optax.masked(project(ALL_CONSTRAINTS), names), optax.masked(project(ALL_CONSTRAINTS), others)
    )


def partitioned(opt: Any) -> Any:
    labels = {dtype: {name: "a" if name == "box" else "b" for name in SHAPES} for dtype in DTYPES}
    return optax.partition({"a": last(optax.sgd(0.1)), "b": last(opt)}, labels)


def injected(opt: Any) -> Any:
    """inject_hyperparams wants one narrow dtype in a tree, so it sees the float16 parameters as if they were frozen."""
    inject = optax.inject_hyperparams(project, static_args=("constraints", "select"))
    narrow = {dtype: dtype != "float16" for dtype in DTYPES}
    bfloat16 = optax.masked(optax.chain(opt, inject(constraints=ALL_CONSTRAINTS)), narrow)
    float16 = optax.masked(last(optax.sgd(0.05)), {dtype: not use for dtype, use in narrow.items()})
    return optax.chain(bfloat16, float16)


WRAPPERS = {
    "masked": lambda: masked(optax.adam(0.01, eps=EPS)),
    "partition": lambda: partitioned(optax.adam(0.01, eps=EPS)),
    "inject_hyperparams": lambda: injected(optax.inject_hyperparams(optax.sgd)(SCHEDULE)),
    "MultiSteps": lambda: optax.MultiSteps(last(optax.adam(0.02, eps=EPS)), 3).gradient_transformation(),
    "apply_if_finite": lambda: last(optax.apply_if_finite(optax.adam(0.02, eps=EPS), STEPS)),
}

# a * b + c with one rounding, which the projection must survive.
contracting = functools.partial(jax.jit, compiler_options=CONTRACTING)


def test_products_are_contracted_with_sums() -> None:
    # The square alone is rounded to 1 + 2**-11.
    assert contracting(lambda a: a * a - 1)(np.float32(1 + 2.0**-12)) == 2.0**-11 + 2.0**-24


def train(tx: Any, params: Any, steps: int = STEPS, nan_every: int = 0) -> Any:
    """The parameters after every step, gradients that pull outwards and change all the time."""
    target = jax.tree.map(lambda w: 3 * jnp.sign(w.astype(jnp.float32)) - 1, params)

    leaves, treedef = jax.tree.flatten(params)
    noise = np.random.default_rng(0).normal(0.5, 1, (steps, len(leaves))).astype(np.float32)

    def step(carry: Any, inputs: Any) -> Any:
        params, state = carry
        index, noise = inputs
        pull = jax.tree.map(lambda w, t, n: w - t * n, params, target, treedef.unflatten(list(noise)))
        grads = jax.tree.map(lambda w, g: g.astype(w.dtype), params, pull)
        if nan_every:
            grads = jax.tree.map(lambda g: jnp.where(index % nan_every == 0, jnp.nan, g), grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return contracting(lambda carry, inputs: jax.lax.scan(step, carry, inputs)[1])(
        (params, tx.init(params)), (jnp.arange(steps), noise)
    )


# These compile for seconds; the others follow the same rules for a step.
@pytest.mark.parametrize("name", OPTIMISERS if ALL else ["sgd", "adamw", "adafactor", "muon"])
def test_feasible_at_every_one_of_1000_steps(name: str) -> None:
    params = feasible_tree()
    history = train(last(OPTIMISERS[name]()), params)
    assert_feasible(history)
    assert_moved(history)
    norms = np.sqrt(np.sum(np.asarray(history["float32"]["exact"], np.float64) ** 2, (1, 2)))
    np.testing.assert_allclose(norms.max(), BOUND, rtol=1e-5)  # and reach the bound


@pytest.mark.parametrize("name", WRAPPERS)
def test_feasible_in_every_wrapper(name: str) -> None:
    params = feasible_tree()
    history = train(WRAPPERS[name](), params, nan_every=7 if name == "apply_if_finite" else 0)
    assert_feasible(history)
    assert_moved(history)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_infeasible_parameters_are_feasible_after_two_steps(scale: float) -> None:
    history = train(last(optax.sgd(0.05)), tree(2, scale), steps=3)
    assert_feasible(jax.tree.map(lambda w: w[1:], history))


def test_one_step_suffices_from_afar_where_a_single_update_leads_into_the_interval() -> None:
    # Float32 numbers near 1e8 are 8 apart: only an update of exactly 1e8 + 8 leads into the interval.
    w = jnp.full(3, -1e8)
    tx = project(Box(0.1, 8.0))
    updates, _ = tx.update(jnp.zeros(3), tx.init(w), w)
    np.testing.assert_array_equal(optax.apply_updates(w, updates), 8)


def test_feasibility_agrees_with_numpy() -> None:
    params = tree(3)
    report = jax.jit(lambda params: feasibility(params, ALL_CONSTRAINTS))
    reported = report(params)
    for dtype, leaves in params.items():
        for name, w in leaves.items():
            np.testing.assert_allclose(reported[dtype][name], distance(name, w, dtype), rtol=1e-6)
    assert max(jax.tree.leaves(report(feasible_tree()))) <= 1e-7


# --- Adversarial numbers ----------------------------------------------------------------------------------------------

# Each number with its own bounds, so that one compilation serves every example.
COUNT = 16


def elements(dtype: str) -> Any:
    # Where sums flush to zero, neither JAX nor the processor can tell a subnormal from it.
    limit = {"float32": 2.0**120, "bfloat16": 2.0**120, "float16": 2.0**14}[dtype]
    tiny = {"float32": 2.0**-80, "bfloat16": 2.0**-80, "float16": 2.0**-14}[dtype]
    width = 16 if dtype == "float16" else 32
    magnitudes = st.floats(tiny, limit, width=width, allow_subnormal=False)
    return st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x), st.floats(-2, 2, width=width))


@functools.cache
def element_step(dtype: str) -> Any:
    @contracting
    def step(p: Any, g: Any, rate: Any, low: Any, high: Any) -> Any:
        """The update is a product, which XLA would contract with the sum."""
        tx = optax.chain(optax.scale(-1.0), project({"box": Box(low, high), "non_neg": NonNeg()}))
        params = {"box": p, "non_neg": jnp.abs(p)}
        updates, _ = tx.update(jax.tree.map(lambda w: rate * g, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step


def numbers(dtype: str) -> Any:
    return hnp.arrays(np.float32, COUNT, elements=elements(dtype).map(float))


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(data=st.data())
def test_elementwise_sets_hold_exactly_for_any_numbers(dtype: str, data: Any) -> None:
    def draw() -> Any:
        return jnp.asarray(data.draw(numbers(dtype)), dtype)

    a, b, p = draw(), draw(), draw()
    gradient = data.draw(st.sampled_from([draw(), jnp.full(COUNT, jnp.inf, dtype), jnp.full(COUNT, -jnp.inf, dtype)]))
    rate = jnp.asarray(data.draw(st.floats(1e-3, 1e3)), dtype)
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    step = element_step(dtype)
    for start, steps in ((jnp.clip(p, low, high), 1), (p, 2)):
        after = {"box": start}
        for _ in range(steps):
            after = step(after["box"], gradient, rate, low, high)
        box = np.asarray(after["box"], np.float64)
        assert after["box"].dtype == dtype
        assert (box >= np.asarray(low, np.float64)).all()
        assert (box <= np.asarray(high, np.float64)).all()
        assert (np.asarray(after["non_neg"], np.float64) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(data=st.data())
def test_balls_hold_within_4_ulp_for_any_numbers(dtype: str, data: Any) -> None:
    step = ball_step(dtype)
    narrow = dtype == "float16"
    bound = data.draw(st.floats(2.0**-5, 2.0**5) if narrow else st.floats(2.0**-40, 2.0**40))
    bound = float(np.float32(bound))
    p, g = (jnp.asarray(data.draw(hnp.arrays(np.float32, (8, 4), elements=elements(dtype).map(float)))) for _ in "pg")
    p, g = p.astype(dtype), g.astype(dtype)
    for start, steps in ((MaxNorm(bound, exact=True)(p), 1), (p, 2)):
        params = {"keras": start, "exact": start}
        for _ in range(steps):
            params = step(params, g, bound)
        for w in params.values():
            norms = np.sqrt(np.sum(np.asarray(w, np.float64) ** 2, 0))
            assert (norms <= bound + 4 * ulp(bound, dtype)).all()


@functools.cache
def ball_step(dtype: str) -> Any:
    @contracting
    def step(params: Any, g: Any, bound: Any) -> Any:
        tx = optax.chain(optax.sgd(0.37), project({"keras": MaxNorm(bound), "exact": MaxNorm(bound, exact=True)}))
        updates, _ = tx.update(jax.tree.map(lambda w: g, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step


def test_many_numbers_of_every_magnitude() -> None:
    """More pairs than an example search can draw: parameter, update and bounds of 100,000 elements."""
    rng = np.random.default_rng(0)

    def draw() -> Any:
        return jnp.asarray(rng.standard_normal(100_000) * np.exp(rng.uniform(-12, 12, 100_000)), jnp.float32)

    a, b, p, g = draw(), draw(), draw(), draw()
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    step = element_step("float32")
    for start, steps in ((jnp.clip(p, low, high), 1), (p, 2)):
        after = {"box": start}
        for _ in range(steps):
            after = step(after["box"], g, jnp.float32(0.37), low, high)
        assert bool(((after["box"] >= low) & (after["box"] <= high) & (after["non_neg"] >= 0)).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_parameters_become_exactly_the_rounded_projection(dtype: str) -> None:
    rng = np.random.default_rng(4)
    constraints = CONSTRAINTS | {"unit": UnitNorm(axis="window"), "half": MinMaxNorm(0.2, 0.5, 0.5)}
    shapes = SHAPES | {"unit": (3, 3, 20, 20), "half": (4, 100)}
    params = {name: jnp.asarray(rng.uniform(0.05, 0.3, shape), dtype) for name, shape in shapes.items()}
    params = project_params(params, constraints)
    updates = {name: jnp.asarray(rng.normal(0, 0.3, shape), dtype) for name, shape in shapes.items()}
    tx = project(constraints)

    @contracting
    def step(params: Any, updates: Any) -> Any:
        projected, _ = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, projected)

    after = step(params, updates)
    for name, constraint in constraints.items():
        expected = jax.jit(constraint)(params[name] + updates[name])
        assert after[name].dtype == expected.dtype == dtype
        np.testing.assert_array_equal(after[name], expected)


@pytest.mark.parametrize("constraint", [UnitNorm(), MinMaxNorm(0.5, 1.0, 0.3), lambda w: 0.5 * jnp.tanh(w)])
def test_other_sets_give_their_own_output_to_rounding(constraint: Any) -> None:
    rng = np.random.default_rng(5)
    p, u = (jnp.asarray(rng.standard_normal((4, 50)), jnp.float32) for _ in "pu")
    tx = project(constraint)
    updates, _ = jax.jit(tx.update)(u, tx.init(p), p)
    after, expected = optax.apply_updates(p, updates), constraint(p + u)
    scale = np.maximum(np.abs(p), np.abs(expected))
    assert (np.abs(np.asarray(after) - np.asarray(expected)) <= 2 * np.spacing(scale)).all()


def test_apply_updates_projected_is_the_projections_own_output() -> None:
    params = feasible_tree()
    updates = tree(7)
    after = jax.jit(lambda p, u: apply_updates_projected(p, u, ALL_CONSTRAINTS))(params, updates)
    summed = optax.apply_updates(params, updates)
    expected = jax.jit(lambda w: jax.tree.map(lambda c, x: c(x), ALL_CONSTRAINTS, w))(summed)
    chex.assert_trees_all_equal(after, expected)
    # What that is worth: an idempotent constraint sees nothing left to do.
    again = jax.jit(lambda params: project_params(params, ALL_CONSTRAINTS))(after)
    for dtype in DTYPES:
        for name in ("non_neg", "box", "exact"):
            np.testing.assert_array_equal(again[dtype][name], after[dtype][name])


def test_inside_the_set_the_update_stays_as_it_is() -> None:
    params = {"exact": jnp.full((3, 2), 0.01), "box": jnp.zeros((3, 2))}
    updates = jax.tree.map(lambda w: jnp.asarray(np.random.default_rng(8).normal(0, 0.01, w.shape), w.dtype), params)
    tx = project({"exact": MaxNorm(1.0, exact=True), "box": Box(-0.1, 0.1)})
    projected, _ = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal(projected, updates)


@pytest.mark.usefixtures("x64")
def test_float64_parameters() -> None:
    rng = np.random.default_rng(9)
    constraints = {"ball": MaxNorm(BOUND, axis="window"), "box": Box(-0.1, 0.3)}
    params: Any = {name: jnp.asarray(rng.standard_normal((3, 3, 20, 2))) for name in constraints}
    tx = project(constraints)
    for _ in range(3):
        updates = {name: jnp.asarray(rng.standard_normal((3, 3, 20, 2))) for name in constraints}
        updates, _ = tx.update(updates, tx.init(params), params)
        params = optax.apply_updates(params, updates)
    assert params["ball"].dtype == jnp.float64
    assert (np.sqrt(np.sum(np.asarray(params["ball"]) ** 2, (0, 1))) <= BOUND + 4 * np.spacing(BOUND)).all()
    assert ((params["box"] >= -0.1) & (params["box"] <= 0.3)).all()


@pytest.mark.parametrize("empty", [{}, [], (), {"x": {}}, {"x": []}], ids=str)
def test_constraints_of_an_empty_subtree(empty: Any) -> None:
    params = {"a": jnp.ones(3), "e": empty}
    project({"a": None, "e": None}).init(params)
    project({"a": NonNeg(), "e": NonNeg()}).init(params)
    with pytest.raises(ValueError, match="params have no entry 'f'"):
        project({"a": None, "f": None}).init(params)


@pytest.mark.parametrize(("exact", "norm"), [(False, 8), (True, 16)])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_rounding_breaks_the_bound_without_a_margin(exact: bool, norm: float, count: int) -> None:
    # The longer the way into the ball, the coarser the step is rounded: of many slices some end outside.
    draw = np.random.default_rng(0).standard_normal((2, count, 50_000))
    params = norm * draw[0] / np.sqrt(np.sum(draw[0] ** 2, 0))
    norms = norms_after(MaxNorm(BOUND, axis=0, exact=exact), params, 0.01 * draw[1])
    assert BOUND * (1 - 1e-5) < norms.max() <= BOUND + 4 * ulp(BOUND, "float32")


def test_the_margin_covers_a_sum_that_loses_every_small_square() -> None:
    # Each of 31 squares is just below half an ulp of the sum: the norm comes out nearly 8 eps too small.
    draw = np.random.default_rng(0)
    params = 2.0**-12 * draw.uniform(0.98, 1, (32, 50_000))
    params[0] = draw.uniform(1, 1.01, 50_000)
    norms = norms_after(MaxNorm(BOUND, axis=0, exact=True), 16 * params, np.zeros_like(params))
    assert BOUND * (1 - 1e-5) < norms.max() <= BOUND + 4 * ulp(BOUND, "float32")


def norms_after(constraint: Any, params: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """The norms along axis 0 after an update in float32."""
    step, before = project(constraint), jnp.asarray(params, jnp.float32)
    projected, _ = step.update(jnp.asarray(updates, jnp.float32), step.init(before), before)
    return np.sqrt(np.sum(np.asarray(optax.apply_updates(before, projected), np.float64) ** 2, 0))


def test_the_sum_that_is_projected_is_the_one_that_is_applied() -> None:
    # In one rounding of product and sum, the parameter would become the next number, and its norm exceed the bound.
    rate, gradient = np.float32(0.35471994), np.float32(-0.0055061886)
    sums = np.stack([np.float32(0.5) - rate * gradient, np.float32(0.5 - float(rate) * float(gradient))])
    np.testing.assert_array_equal(sums.astype(jnp.bfloat16), [0.5, 0.50390625])
    params, gradients = np.full((9, 16), 0.5, jnp.bfloat16), np.full((9, 16), gradient)
    params[0], gradients[0] = 0.8984375, 0
    tx = optax.chain(optax.scale(-1.0), project(MaxNorm(1.6765)))

    @contracting
    def step(params: Any, gradients: Any, rate: Any) -> Any:
        updates, _ = tx.update(rate * gradients, tx.init(params), params)
        return optax.apply_updates(params, updates)

    np.testing.assert_array_equal(step(params, gradients, rate), params)


@pytest.mark.parametrize("constraint", [*CONSTRAINTS.values(), UnitNorm(), MinMaxNorm(0.2, 0.5, 0.5)], ids=str)
def test_no_rounding_is_left_to_the_compiler(constraint: Any) -> None:
    # XLA may drop a conversion to a narrow dtype and back. Where it does, a bound would be judged by other numbers.
    param, update = jnp.ones((3, 3, 2, 2), "bfloat16"), jnp.ones((3, 3, 2, 2))
    tx = project(constraint)
    program = jax.make_jaxpr(lambda w, u: optax.apply_updates(w, tx.update(u, tx.init(w), w)[0]))(param, update)
    assert dropped(program.jaxpr, [False, False])[0] == []


def test_a_rounding_left_to_the_compiler_is_found() -> None:
    program = jax.make_jaxpr(jax.jit(lambda x: jnp.abs(x.astype("bfloat16").astype("float32"))))(jnp.ones(3))
    assert len(dropped(program.jaxpr, [False])[0]) == 1


def dropped(jaxpr: Any, rounded: list[bool]) -> tuple[list[Any], list[bool]]:
    """The conversions that widen what was just narrowed; and which results were, as `rounded` says of the inputs."""
    just, found = dict(zip(jaxpr.invars, rounded, strict=True)), []
    for equation in jaxpr.eqns:
        operands = [isinstance(operand, Var) and just.get(operand, False) for operand in equation.invars]
        results = [False] * len(equation.outvars)
        if "jaxpr" in equation.params:
            inner, results = dropped(equation.params["jaxpr"].jaxpr, operands)
            found += inner
        elif equation.primitive.name == "convert_element_type":
            change = equation.outvars[0].aval.dtype.itemsize - equation.invars[0].aval.dtype.itemsize
            results = [change < 0]
            found += [equation] * (operands[0] and change > 0)
        just |= zip(equation.outvars, results, strict=True)
    return found, [isinstance(result, Var) and just.get(result, False) for result in jaxpr.outvars]
