"""`constraints_of` finds what the layers were given, wherever they stand, and knows the axes that lifting added."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthwise_jax.constraints import Lifted, MaxNorm, NonNeg, UnitNorm
from depthwise_jax.linen import DepthwiseConv1D, DepthwiseConv2D, SeparableConv2D
from depthwise_jax.optim import constraints_of, feasibility, project

X = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)
WINDOW = MaxNorm(0.3, axis="window")


def layer(**arguments: Any) -> DepthwiseConv2D:
    return DepthwiseConv2D(
        3, padding="same", **{"depthwise_constraint": WINDOW, "bias_constraint": "non_neg", **arguments}
    )


FOUND = {"kernel": WINDOW, "bias": NonNeg()}


class Setup(nn.Module):
    def setup(self) -> None:
        self.first = layer()
        self.head = nn.Dense(3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.first(x))

    def features(self, x: jax.Array) -> jax.Array:
        return self.first(x)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, scale: float = 1.0, dtype: Any = None) -> jax.Array:
        x = layer(name="dw")(x)
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(3, dtype=dtype)(x)) * scale


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dw = layer(name="dw")
        return dw(dw(x))


class Block(nn.Module):
    """A carry in, a carry out, for nn.scan."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        return layer(name="dw")(x), None


def scanned(axis: int) -> nn.Module:
    return nn.scan(Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=4)()


def vmapped(axis: int | None) -> nn.Module:
    return nn.vmap(DepthwiseConv2D, variable_axes={"params": axis}, split_rngs={"params": axis is not None}, in_axes=0)(
        3, depthwise_constraint=WINDOW, bias_constraint=NonNeg()
    )


class NestedLift(nn.Module):
    """A scan over layers inside a vmap over models."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        inner = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=4)
        outer = nn.vmap(inner, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, axis_size=5)
        return outer(name="lifted")(x, None)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (layer(), FOUND),
        (layer(use_bias=False), {"kernel": WINDOW}),
        (Setup(), {"first": FOUND, "head": {"kernel": None, "bias": None}}),
        (Compact(), {"dw": FOUND, "Dense_0": {"kernel": None, "bias": None}}),
        (Shared(), {"dw": FOUND}),
        (nn.Sequential([layer(), nn.relu, layer()]), {"layers_0": FOUND, "layers_2": FOUND}),
        (nn.remat(DepthwiseConv2D)(3, depthwise_constraint=WINDOW), {"kernel": WINDOW, "bias": None}),
        (
            SeparableConv2D(4, 3, depthwise_constraint="max_norm", pointwise_constraint="unit_norm"),
            {"depthwise_kernel": MaxNorm(), "pointwise_kernel": UnitNorm(), "bias": None},
        ),
    ],
)
def test_finds_the_layers_constraints(model: nn.Module, expected: Any) -> None:
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    constraints = constraints_of(model, X, rngs=rngs)
    params = model.init(rngs, jnp.ones(X.shape))["params"]
    assert constraints == expected
    feasibility(params, constraints)  # it matches the parameters, which are plain arrays
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("model", "batch", "axes"),
    [
        (scanned(0), (), (0,)),
        (scanned(1), (), (1,)),
        (vmapped(0), (4,), (0,)),
        (vmapped(1), (4,), (1,)),
        (NestedLift(), (5,), (0, 2)),
    ],
)
def test_lifted_parameters_are_projected_per_instance(model: nn.Module, batch: tuple[int, ...], axes: Any) -> None:
    x = jnp.ones((*batch, *X.shape))
    constraints = constraints_of(model, x)
    params = jax.tree.map(lambda w: 10 * w - 1, model.init(jax.random.key(0), x)["params"])
    (kernel,) = (w for w in jax.tree.leaves(params) if w.ndim == 4 + len(axes))
    (found,) = (
        c for c in jax.tree.leaves(constraints, is_leaf=lambda c: isinstance(c, Lifted)) if c.constraint == WINDOW
    )
    assert found.axes == axes
    tx = project(constraints)
    after, update = params, jax.jit(tx.update)
    for _ in range(2):  # the parameters were far outside
        updates, _ = update(jax.tree.map(jnp.zeros_like, params), tx.init(params), after)
        after = optax.apply_updates(after, updates)
    (projected,) = (w for w in jax.tree.leaves(after) if w.ndim == kernel.ndim)
    # Each instance on its own, by the formula.
    instances = np.moveaxis(np.asarray(kernel, np.float64), axes, range(len(axes)))
    norms = np.sqrt(np.sum(instances**2, (-4, -3), keepdims=True))
    assert (norms > 0.3).all()
    # The first sum parameter + update can be no nearer than an ulp of the parameter.
    ulp = np.spacing(np.float32(np.abs(instances).max()))
    result = np.moveaxis(np.asarray(projected), axes, range(len(axes)))
    np.testing.assert_allclose(result, instances * 0.3 / norms, rtol=3e-6, atol=float(ulp))
    assert (np.sqrt(np.sum(result.astype(np.float64) ** 2, (-4, -3))) <= 0.3 + 4 * np.spacing(np.float32(0.3))).all()
    assert max(jax.tree.leaves(feasibility(after, constraints))) <= 4 * np.spacing(np.float32(0.3))


def test_shared_parameters_under_vmap_have_no_lifted_axis() -> None:
    constraints = constraints_of(vmapped(None), jnp.ones((4, *X.shape)))
    assert constraints == {"kernel": WINDOW, "bias": NonNeg()}


class Stages(nn.Module):
    """A scan, and a layer that another method calls."""

    def setup(self) -> None:
        self.first = scanned(1)
        self.second = layer()

    def body(self, x: jax.Array) -> jax.Array:
        return self.first(x, None)[0]

    def head(self, x: jax.Array) -> jax.Array:
        return self.second(x)


class LiftedTwice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lifting: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "methods": ["body", "head"]}
        stages = nn.vmap(Stages, **lifting)(name="stages")
        return stages.head(stages.body(x))


def test_an_axis_stays_where_a_lifted_module_is_called_again() -> None:
    # The second call lifts the parameters of the first again, and does not touch those of its scan.
    found = constraints_of(LiftedTwice(), jnp.ones((5, *X.shape)))["stages"]
    assert found["first"]["dw"]["kernel"] == Lifted(WINDOW, (0, 2))
    assert found["second"]["kernel"] == Lifted(WINDOW, (0,))


def test_method_and_arguments() -> None:
    assert constraints_of(Setup(), X, method="features") == {"first": FOUND}
    assert constraints_of(Setup(), X, method=Setup.features) == {"first": FOUND}
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    assert constraints_of(Compact(), X, rngs=rngs, scale=2.0)["dw"] == FOUND
    for dtype in (jnp.bfloat16, np.float32, np.dtype("float32"), "bfloat16"):  # not arrays, though most have a dtype
        assert constraints_of(Compact(), X, rngs=rngs, dtype=dtype)["dw"] == FOUND


def test_a_plain_function_and_no_constraint() -> None:
    def clip(w: jax.Array) -> jax.Array:
        return jnp.clip(w, -1, 1)

    assert constraints_of(layer(depthwise_constraint=clip), X)["kernel"] is clip
    assert constraints_of(nn.Dense(2), X) == {"kernel": None, "bias": None}
    lifted = constraints_of(
        nn.vmap(DepthwiseConv1D, variable_axes={"params": 0}, split_rngs={"params": True})(
            3, depthwise_constraint=clip
        ),
        jnp.ones((4, 1, 6, 2)),
    )["kernel"]
    np.testing.assert_array_equal(lifted(jnp.full((4, 3, 2, 1), 2.0)), np.ones((4, 3, 2, 1)))


def test_boxed_parameters() -> None:
    """nn.with_partitioning boxes a parameter; the tree of constraints is a prefix of that."""
    init = nn.with_partitioning(nn.initializers.ones, (None, None, "channels", None))
    model = layer(depthwise_initializer=init)
    constraints = constraints_of(model, X)
    params = model.init(jax.random.key(0), jnp.ones(X.shape))["params"]
    assert constraints == FOUND
    assert isinstance(params["kernel"], nn.Partitioned)
    tx = project(constraints)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    after: Any = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["kernel"].value, np.full((3, 3, 2, 1), 0.1), rtol=3e-6)
