"""Linen's partitioning annotations on the layers' parameters, from the initializer to a sharded training step."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen.spmd import logical_to_mesh_sharding
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import DepthwiseConv2D, SeparableConv2D, initializers, regularization_loss
from depthwise_jax.constraints import MaxNorm
from depthwise_jax.optim import constraints_of, feasibility, project, project_params

# A name of the mesh stands for itself, as nn.with_partitioning has it.
RULES = (("channels", "model"), ("filters", None), ("model", "model"))
LIMIT = 0.2


def annotated(*names: str | None) -> Any:
    """Keras' default initializer, its result's axes named."""
    return nn.with_logical_partitioning(initializers.GlorotUniform(), names)


class Network(nn.Module):
    """Both kinds of layers, each parameter's axes named."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        depthwise = {
            "padding": "same",
            "depthwise_initializer": annotated(None, None, "channels", None),
            "depthwise_regularizer": "l2",
            "depthwise_constraint": MaxNorm(LIMIT, axis="window"),
        }
        zeros = initializers.Zeros()
        x = DepthwiseConv2D(
            3,
            depth_multiplier=2,
            activation="relu",
            bias_initializer=nn.with_partitioning(zeros, ("model",)),
            name="depthwise",
            **depthwise,
        )(x)
        return SeparableConv2D(
            4,
            3,
            strides=2,
            pointwise_initializer=annotated(None, None, "channels", "filters"),
            bias_initializer=nn.with_logical_partitioning(zeros, ("filters",)),
            name="separable",
            **depthwise,
        )(x)


MODEL = Network()
X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6, 5, 4)), jnp.float32)
CONSTRAINTS = constraints_of(MODEL, X)
OPTIMIZER = optax.chain(optax.adam(0.05), project(CONSTRAINTS))


def initial(key: jax.Array) -> Any:
    params = MODEL.init(key, X)["params"]
    return params, OPTIMIZER.init(params)


def step(params: Any, state: Any, x: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        y: Any = MODEL.apply({"params": params}, x)
        return ((y - 3) ** 2).mean() + regularization_loss(MODEL, params, x)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


@pytest.fixture(scope="module")
def on_one_device() -> Any:
    """Parameters and loss after three steps."""
    params, state = nn.meta.unbox(jax.jit(initial)(jax.random.key(0)))
    loss = None
    for _ in range(3):
        params, state, loss = jax.jit(step)(params, state, X)
    return params, loss


@pytest.mark.parametrize("boxed", [False, True], ids=["unboxed", "boxed"])
def test_a_training_step_sharded_as_annotated(boxed: bool, on_one_device: Any) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    key = jax.random.key(0)
    abstract = jax.eval_shape(initial, key)
    shardings: Any = logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
    over_channels = {"depthwise_kernel": P(None, None, "model", None), "pointwise_kernel": P(None, None, "model", None)}
    expected = {
        "depthwise": {"kernel": P(None, None, "model", None), "bias": P("model")},
        "separable": {**over_channels, "bias": P(None)},
    }
    assert jax.tree.map(lambda sharding: sharding.spec, shardings[0]) == expected
    adam = shardings[1][0][0]
    assert jax.tree.map(lambda sharding: sharding.spec, adam.mu) == expected, "the optimiser keeps what is annotated"

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        state = jax.jit(initial, out_shardings=shardings)(key)
        if not boxed:
            state = nn.meta.unbox(state)
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        out = (*shardings, NamedSharding(mesh, P()))
        value: Any = None
        program = jax.jit(step, in_shardings=(*shardings, x.sharding), out_shardings=out).lower(*state, x).compile()
        for _ in range(3):
            *state, value = program(*state, x)
    params = nn.meta.unbox(state[0])
    for w, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings[0]), strict=True):
        assert w.sharding.is_equivalent_to(sharding, w.ndim)
    assert params["depthwise"]["kernel"].addressable_shards[0].data.shape == (3, 3, 2, 2)

    exact, alone = on_one_device
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    jax.tree.map(lambda w, single: np.testing.assert_allclose(w, single, atol=1e-5), params, exact)
    norms = np.sqrt((np.asarray(params["depthwise"]["kernel"], np.float64) ** 2).sum((0, 1)))
    assert (norms > LIMIT * (1 - 1e-5)).sum() >= 4, "the constraint binds"
    assert max(float(v) for v in jax.tree.leaves(feasibility(params, CONSTRAINTS))) <= 1e-7


def test_boxes_are_kept_and_seen_through() -> None:
    boxed, _ = jax.jit(initial)(jax.random.key(0))
    plain: Any = nn.meta.unbox(boxed)
    np.testing.assert_allclose(
        regularization_loss(MODEL, boxed, X),
        0.01 * sum((plain[a][b] ** 2).sum() for a, b in (("depthwise", "kernel"), ("separable", "depthwise_kernel"))),
        rtol=1e-6,
    )
    projected: Any = project_params(boxed, CONSTRAINTS)
    assert isinstance(projected["depthwise"]["kernel"], nn.LogicallyPartitioned)
    norms = np.sqrt((np.asarray(projected["depthwise"]["kernel"].value) ** 2).sum((0, 1)))
    assert (np.sqrt((np.asarray(plain["depthwise"]["kernel"]) ** 2).sum((0, 1))) > LIMIT).any()
    assert norms.max() <= LIMIT * (1 + 1e-6)
    assert float(feasibility(projected, CONSTRAINTS)["depthwise"]["kernel"].value) <= 1e-7
