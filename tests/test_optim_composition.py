"""`project` among Optax's wrappers, in training loops, over devices, in checkpoints, and against Keras' optimiser."""

from __future__ import annotations

from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax.constraints import Box, Constraint, MaxNorm, MinMaxNorm, NonNeg, UnitNorm
from depthwise_jax.optim import feasibility, project, project_params
from workloads.hlo import collectives
from workloads.keras_reference import keras

RNG = np.random.default_rng(0)


def uniform(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.uniform(-1, 1, shape), dtype)


# --- Gradient accumulation --------------------------------------------------------------------------------------------


def accumulate(tx: Any, params: Any, steps: int) -> list[float]:
    """The only element of the parameters after every micro-step with a zero gradient."""
    state = tx.init(params)
    history = []
    for _ in range(steps):
        updates, state = tx.update(jnp.zeros_like(params), state, params)
        params = optax.apply_updates(params, updates)
        history.append(float(params[0]))
    return history


def test_multi_steps_projects_once_where_keras_projects_every_micro_step() -> None:
    """MinMaxNorm with rate=0.5 halves the distance to the norm 1 each time it is applied."""
    constraint = MinMaxNorm(0.0, 1.0, rate=0.5)
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), project(constraint)), 4)
    ours = accumulate(tx, jnp.array([4.0]), 8)
    np.testing.assert_allclose(ours, [4, 4, 4, 2.5, 2.5, 2.5, 2.5, 1.75], rtol=1e-6)

    variable = keras.Variable([4.0])
    variable.constraint = keras.constraints.MinMaxNorm(0.0, 1.0, rate=0.5)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    theirs = []
    for _ in range(4):
        optimizer.apply([np.zeros(1, np.float32)], [variable])
        theirs.append(float(variable.value[0]))
    np.testing.assert_allclose(theirs, [2.5, 1.75, 1.375, 1.1875], rtol=1e-6)


def test_project_around_multi_steps_leaves_feasible_parameters_between_steps() -> None:
    """Keras' formula would shrink them by 1e-7 / norm at each micro-step."""
    tx = optax.chain(optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(), project(MaxNorm(1.0)))
    assert accumulate(tx, jnp.array([0.001]), 8) == [float(np.float32(0.001))] * 8


# --- Rejected steps ---------------------------------------------------------------------------------------------------

FINITE_OR_NOT = {"keras": MaxNorm(0.5), "exact": MaxNorm(0.5, exact=True), "box": Box(-0.2, 0.3), "non_neg": NonNeg()}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_rejected_step_leaves_parameters_untouched(dtype: str, bad: float) -> None:
    params = {name: uniform(3, 4, dtype=dtype) for name in FINITE_OR_NOT}
    tx = optax.chain(optax.apply_if_finite(optax.sgd(0.5), 5), project(FINITE_OR_NOT))

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    good = jax.tree.map(lambda w: uniform(*w.shape, dtype=dtype), params)
    params, state = step(params, tx.init(params), good)
    params, state = step(params, state, good)
    after, state = step(params, state, good | {"box": good["box"].at[0, 0].set(bad)})
    assert state[0].total_notfinite == 1
    chex.assert_trees_all_equal(after, params)
    assert all(value <= 1e-6 for value in jax.tree.leaves(feasibility(after, FINITE_OR_NOT)))


def test_apply_if_finite_around_project() -> None:
    """It works for float32; for narrower parameters JAX refuses it, loudly."""
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.5), project(MaxNorm(0.5))), 5)
    params = uniform(3, 4)
    updates, _ = tx.update(jnp.full_like(params, jnp.nan), tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), params)
    narrow = params.astype(jnp.bfloat16)
    with pytest.raises(TypeError, match="cond branches must have equal"):
        tx.update(narrow, tx.init(narrow), narrow)


def test_nan_is_never_hidden() -> None:
    params = {"box": jnp.zeros(2), "ball": jnp.zeros(2)}
    constraints = {"box": Box(-1, 1), "ball": MaxNorm(1.0, exact=True)}
    tx = project(constraints)
    updates, _ = tx.update(jax.tree.map(lambda w: w.at[0].set(jnp.nan), params), tx.init(params), params)
    after: Any = optax.apply_updates(params, updates)
    assert all(np.isnan(value) for value in jax.tree.leaves(feasibility(after, constraints)))


# --- Scheduled bounds, select, training loops -------------------------------------------------------------------------


def test_a_scheduled_bound_through_inject_hyperparams() -> None:
    schedule = optax.linear_schedule(1.0, 0.25, 3)
    projected = optax.inject_hyperparams(lambda bound: project(MaxNorm(bound, exact=True)))(bound=schedule)
    tx = optax.chain(optax.sgd(1.0), projected)
    params: Any = jnp.zeros((3, 2))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(5):
        updates, state = update(jnp.full_like(params, -10.0), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(np.linalg.norm(params, axis=0), max(1 - 0.25 * step, 0.25), rtol=2e-6)


def test_select_sees_paths_and_parameters() -> None:
    params = {"dw": {"kernel": jnp.full((3, 2), 5.0), "bias": jnp.full(2, 5.0)}, "list": [jnp.full((3, 2), 5.0)]}
    seen = {}

    def select(path: tuple[str, ...], parameter: Any) -> Any:
        seen[path] = parameter.shape
        return MaxNorm(1.0) if parameter.ndim == 2 and path[0] == "dw" else "non_neg" if path[0] == "list" else None

    tx = project(select=select)
    updates, _ = tx.update(jax.tree.map(lambda w: -2 * w, params), tx.init(params), params)
    after: Any = optax.apply_updates(params, updates)
    assert seen == {("dw", "kernel"): (3, 2), ("dw", "bias"): (2,), ("list", "0"): (3, 2)}
    np.testing.assert_allclose(np.linalg.norm(after["dw"]["kernel"], axis=0), 1, rtol=2e-6)
    np.testing.assert_array_equal(after["dw"]["bias"], [-5, -5])
    np.testing.assert_array_equal(after["list"][0], np.zeros((3, 2)))


def test_a_prefix_holds_for_the_subtree() -> None:
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": -jnp.ones(2)}, "b": -jnp.ones(3)}
    projected = project_params(params, {"a": NonNeg(), "b": None})
    np.testing.assert_array_equal(projected["a"]["bias"], [0, 0])
    np.testing.assert_array_equal(projected["b"], params["b"])
    np.testing.assert_array_equal(project_params(params, NonNeg())["b"], [0, 0, 0])
    assert feasibility(params, {"a": None, "b": lambda w: w}) == {"a": {"kernel": None, "bias": None}, "b": None}


def test_train_state() -> None:
    params = {"kernel": jnp.zeros((3, 3, 2, 1)), "bias": jnp.zeros(2)}
    tx = optax.chain(optax.adam(0.5), project({"kernel": MaxNorm(0.5, axis="window"), "bias": None}))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    for _ in range(3):
        state = state.apply_gradients(grads=jax.tree.map(lambda w: -jnp.ones_like(w), params))
    after: Any = state.params
    np.testing.assert_allclose(np.sqrt(np.sum(after["kernel"] ** 2, (0, 1))), 0.5, rtol=2e-6)
    np.testing.assert_allclose(after["bias"], 1.5, rtol=1e-5)


def test_nnx_optimizer() -> None:
    model = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.5), project({"kernel": MaxNorm(0.5), "bias": NonNeg()}))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    by_select = project(select=lambda path, leaf: {"kernel": MaxNorm(0.5), "bias": NonNeg()}["/".join(path)])
    by_select.init(nnx.state(model, nnx.Param))
    for _ in range(2):
        grads = nnx.grad(lambda model: model(jnp.ones((2, 4))).sum())(model)
        optimizer.update(model, grads)
    assert model.kernel[...].dtype == jnp.bfloat16
    assert (np.linalg.norm(np.asarray(model.kernel[...], np.float64), axis=0) <= 0.5).all()
    assert model.bias is not None
    np.testing.assert_array_equal(model.bias[...], [0, 0, 0])


def test_differentiating_through_a_step() -> None:
    """The learning rate's derivative through two projected steps, against a difference quotient."""
    params, grads = uniform(3, 2), uniform(3, 2)

    def loss(rate: Any) -> Any:
        w: Any
        tx, w = optax.chain(optax.sgd(rate), project(MaxNorm(0.4, exact=True))), params
        for _ in range(2):
            updates, _ = tx.update(grads, tx.init(w), w)
            w = optax.apply_updates(w, updates)
        return jnp.sum(w**3)

    with jax.enable_x64(True):
        params, grads = params.astype(jnp.float64), grads.astype(jnp.float64)
        value = jax.jit(loss)
        numeric = (value(0.3 + 1e-6) - value(0.3 - 1e-6)) / 2e-6
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.3), numeric, rtol=1e-6)


# --- Averages ---------------------------------------------------------------------------------------------------------

AVERAGED = {"ball": MaxNorm(0.5, exact=True), "box": Box(-0.3, 0.2), "unit": UnitNorm()}


def run(tx: Any, params: Any, visit: Any = lambda state, params: None, steps: int = 12) -> tuple[Any, Any]:
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        # Whatever else the parameters' tree holds (lookahead's slow copy), gradients are like the parameters.
        grads = {name: uniform(3, 2) - 0.5 for name in AVERAGED}
        params, state = step(params, state, grads)
        visit(state, params)
    return params, state


def violations(params: Any) -> dict[str, float]:
    """By the definition of the sets, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    return {
        "ball": max(0.0, np.linalg.norm(w["ball"], axis=0).max() - 0.5),
        "box": max(0.0, float(np.float32(-0.3)) - w["box"].min(), w["box"].max() - float(np.float32(0.2))),
        "unit": np.abs(np.linalg.norm(w["unit"], axis=0) - 1).max(),
    }


def initial() -> Any:
    return project_params({name: uniform(3, 2) for name in AVERAGED}, AVERAGED)


def assert_projected(average: Any) -> None:
    after = violations(project_params(average, AVERAGED))
    assert after["ball"] == after["box"] == 0
    assert after["unit"] < 1e-6


def test_exponential_average_of_the_parameters() -> None:
    averages = [initial()]
    run(
        optax.chain(optax.sgd(0.5), project(AVERAGED)),
        averages[0],
        lambda state, params: averages.append(optax.incremental_update(params, averages[-1], 0.1)),
    )
    raw = violations(averages[-1])
    assert raw["ball"] < 1e-6  # convex: feasible to rounding
    assert raw["box"] < 1e-6
    assert raw["unit"] > 1e-2  # an average of unit vectors is none
    assert_projected(averages[-1])


def test_optax_ema_of_the_parameters() -> None:
    ema = optax.ema(0.9, debias=True)
    params = initial()
    state, average = ema.init(params), params

    def visit(_: Any, params: Any) -> None:
        nonlocal state, average
        average, state = ema.update(params, state)

    run(optax.chain(optax.sgd(0.5), project(AVERAGED)), params, visit)
    assert violations(average)["unit"] > 1e-2
    assert_projected(average)


def test_lookahead() -> None:
    params = optax.LookaheadParams.init_synced(initial())
    tx = optax.lookahead(optax.chain(optax.sgd(0.5), project(AVERAGED)), sync_period=4, slow_step_size=0.5)
    fast_violations = []
    params, _ = run(tx, params, lambda state, params: fast_violations.append(violations(params.fast)), steps=11)
    assert max(v["ball"] for v in fast_violations) < 1e-6
    assert max(v["box"] for v in fast_violations) < 1e-6
    assert violations(params.slow)["unit"] > 1e-2
    assert_projected(params.slow)


def test_schedule_free() -> None:
    tx = optax.chain(optax.contrib.schedule_free(optax.sgd(0.5), 0.5, b1=0.5), project(AVERAGED))
    params, state = run(tx, initial())
    assert violations(params)["ball"] == violations(params)["box"] == 0
    average = optax.contrib.schedule_free_eval_params(state[0], params)
    assert violations(average)["box"] > 1e-2  # the averaged iterates know of no constraint
    assert_projected(average)


# --- Devices ----------------------------------------------------------------------------------------------------------

PER_FILTER = {"kernel": MaxNorm(0.5, axis="window"), "exact": MaxNorm(0.5, axis="window", exact=True), "bias": NonNeg()}
SPECS = {"kernel": P(None, None, "d"), "exact": P(None, None, "d"), "bias": P("d")}
TX = optax.chain(optax.adam(0.3), project(PER_FILTER))


def assert_same(after: Any, expected: Any) -> None:
    """To rounding: a small number that is left of two of size 1 is right to an ulp of 1."""
    np.testing.assert_allclose(after, expected, rtol=1e-6, atol=float(np.spacing(np.float32(1))))


def kernels() -> tuple[Any, Any]:
    """Parameters and a batch of gradients."""
    params = {"kernel": uniform(3, 3, 8, 2), "exact": uniform(3, 3, 8, 2), "bias": uniform(8)}
    return params, jax.tree.map(lambda w: uniform(4, *w.shape), params)


def training_step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.fixture(scope="module")
def on_one_device() -> Any:
    """Parameters, gradients, and the parameters after two steps on the mean gradient."""
    params, grads = kernels()
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    after, state = params, TX.init(params)
    for _ in range(2):
        after, state = jax.jit(training_step)(after, state, mean)
    return params, grads, after


def test_channels_sharded_without_collectives(on_one_device: Any) -> None:
    params, grads, expected = on_one_device
    mesh = Mesh(np.array(jax.devices()[:4]), "d")
    shard = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params = jax.device_put(params, shard)
    grads = jax.device_put(jax.tree.map(lambda g: g.mean(0), grads), shard)
    state = jax.jit(TX.init)(params)
    step = jax.jit(training_step).lower(params, state, grads).compile()
    assert not collectives(str(step.as_text()))
    for _ in range(2):
        params, state = step(params, state, grads)
    for name, w in params.items():
        assert w.sharding.is_equivalent_to(shard[name], w.ndim)
        assert_same(w, expected[name])


@pytest.mark.parametrize("mapped", ["shard_map", "pmap"])
def test_data_parallel(mapped: str, on_one_device: Any) -> None:
    params, grads, expected = on_one_device
    state = TX.init(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        mean = jax.lax.pmean(jax.tree.map(lambda g: g[0], grads), "d")
        return training_step(params, state, mean)

    if mapped == "shard_map":
        mesh = Mesh(np.array(jax.devices()[:4]), "d")
        step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P()))
    else:
        step = jax.pmap(step, axis_name="d", in_axes=(None, None, 0), out_axes=None, devices=jax.devices()[:4])
        grads = jax.tree.map(lambda g: g[:, None], grads)
    after = params
    for _ in range(2):
        after, state = step(after, state, grads)
    for name, w in after.items():
        assert_same(w, expected[name])


def test_scan_over_steps_and_vmap_over_models(on_one_device: Any) -> None:
    params, grads, expected = on_one_device
    mean = jax.tree.map(lambda g: g.mean(0), grads)

    @jax.jit
    @jax.vmap
    def train(params: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (training_step(*carry, mean), None), (params, TX.init(params)), length=2)[
            0
        ]

    stacked = jax.tree.map(lambda w: jnp.stack([w, w[::-1]]), params)
    after, _ = train(stacked)
    for name, w in after.items():
        assert_same(w[0], expected[name])


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_flax_serialization_round_trip() -> None:
    params, grads = kernels()
    state = TX.init(params)
    updates, state = TX.update(jax.tree.map(lambda g: g[0], grads), state, params)
    params = optax.apply_updates(params, updates)
    fresh, _ = kernels()
    restored = flax.serialization.from_bytes((fresh, TX.init(fresh)), flax.serialization.to_bytes((params, state)))
    assert jax.tree.structure(restored) == jax.tree.structure((params, state))
    chex.assert_trees_all_equal(restored, (params, state))


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_orbax_round_trip(tmp_path: Any) -> None:
    params, _ = kernels()
    saved = {"params": params, "state": TX.init(params)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.tree.map(jnp.zeros_like, saved))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    chex.assert_trees_all_equal(restored, saved)


def test_the_transform_adds_no_state() -> None:
    params, _ = kernels()
    assert project(PER_FILTER).init(params) == optax.EmptyState()


# --- Bad input --------------------------------------------------------------------------------------------------------

PARAMS = {"dw": {"kernel": jnp.ones((3, 3, 2, 1)), "bias": jnp.zeros(2)}}


class NanAtNegative(Constraint):
    def __call__(self, w: jax.Array) -> jax.Array:
        return jnp.sqrt(w)


@pytest.mark.parametrize(
    ("constraint", "error", "message"),
    [
        (lambda w: w[..., 0], ValueError, r"'dw/kernel' must keep shape and dtype: it made float32\[3, 3, 2\] of"),
        (lambda w: w.astype(jnp.bfloat16), ValueError, r"'dw/kernel' must keep shape and dtype: it made bfloat16"),
        (lambda w: jnp.log(w), ValueError, "'dw/kernel' must not return NaN for finite numbers; .* does"),
        (NanAtNegative(), ValueError, "'dw/kernel' must not return NaN for finite numbers; .* does"),
        (NonNeg() & jnp.arccosh, ValueError, "must not return NaN for finite numbers"),
        (lambda w: (w - w) / (w - w), ValueError, "must not return NaN for finite numbers"),
        (MaxNorm(axis=4), ValueError, "constraint of 'dw/kernel': MaxNorm: axis=4 must name different axes"),
        (1.0, TypeError, "constraint of 'dw/kernel' must be None, a name, a configuration or a callable; got 1.0"),
        ("max_nrom", ValueError, "constraint of 'dw/kernel': unknown constraint 'max_nrom'; closest valid names"),
    ],
)
def test_bad_constraint(constraint: Any, error: type[Exception], message: str) -> None:
    by_tree = project({"dw": {"kernel": constraint, "bias": None}})
    by_select = project(select=lambda path, leaf: constraint if path == ("dw", "kernel") else None)
    for tx in (by_tree, by_select):
        with pytest.raises(error, match=message):
            tx.init(PARAMS)
        with pytest.raises(error, match=message):
            jax.jit(tx.init)(PARAMS)


@pytest.mark.parametrize("constraint", [lambda w: w[..., 0], lambda w: w.astype(jnp.bfloat16)])
def test_a_changed_shape_is_an_error_when_the_step_is_traced(constraint: Any) -> None:
    constraints = {"dw": {"kernel": constraint, "bias": None}}
    with pytest.raises(ValueError, match="'dw/kernel' must keep shape and dtype"):
        jax.eval_shape(lambda p: project(constraints).update(p, optax.EmptyState(), p), PARAMS)
    with pytest.raises(ValueError, match="'dw/kernel' must keep shape and dtype"):
        project_params(PARAMS, constraints)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"dw": {"kernel": NonNeg()}}, "no entry for 'dw/bias'; if it has no constraint, give None"),
        ({"dw": {"kernel": NonNeg(), "bias": None, "scale": None}}, "params have no entry 'dw/scale'"),
        ({"dw": {"kernel": {"value": NonNeg(), "box": None}, "bias": None}}, "params have no entry 'dw/kernel/box'"),
        ({"conv": NonNeg()}, "params have no entry 'conv'"),
        ([NonNeg()], "params have no entry '0'"),
    ],
)
def test_constraints_that_do_not_match(constraints: Any, message: str) -> None:
    for function in (project(constraints).init, lambda p: feasibility(p, constraints)):
        with pytest.raises(ValueError, match=f"constraints do not match the parameters: {message}"):
            function(PARAMS)


def test_update_without_parameters() -> None:
    with pytest.raises(ValueError, match=r"project needs the parameters: call update\(updates, state, params\)"):
        project(NonNeg()).update(PARAMS, optax.EmptyState())


def test_exactly_one_argument() -> None:
    with pytest.raises(TypeError, match="either constraints or select"):
        project()
    with pytest.raises(TypeError, match="either constraints or select"):
        project(NonNeg(), select=lambda path, leaf: None)


def test_masked_at_a_subtree_above_the_constraints() -> None:
    # optax.masked leaves one node for the whole subtree; the constraints beneath it belong to nobody.
    params = {"a": {"w": jnp.array([-1.0, 2.0]), "b": jnp.array([-3.0])}, "c": jnp.array([-1.0])}
    constraints = {"a": {"w": NonNeg(), "b": None}, "c": NonNeg()}
    step = optax.masked(project(constraints), {"a": False, "c": True})
    updates, _ = step.update(jax.tree.map(jnp.zeros_like, params), step.init(params), params)
    new = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(new, {**params, "c": jnp.array([0.0])})


def test_an_error_that_a_constraint_meets_names_its_parameter() -> None:
    # JAX's own errors are made of a tracer, Python's of a decoder of five parts: neither takes a message.
    def branches(w: jax.Array) -> jax.Array:
        return w if w.sum() > 0 else -w

    def decodes(w: jax.Array) -> jax.Array:
        b"\xff".decode()
        return w

    params = {"kernel": jnp.ones((3, 3, 4, 1))}
    for constraint, kind, words in ((branches, TypeError, "boolean conversion"), (decodes, ValueError, "can't decode")):
        with pytest.raises(kind, match=f"constraint of 'kernel': .*{words}"):
            project({"kernel": constraint}).init(params)
