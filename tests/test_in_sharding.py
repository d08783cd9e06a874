"""in_sharding: on a mesh of automatic axes the caller says how x is sharded, and the gradients know it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import depthwise_jax.nnx
from depthwise_jax import DepthwiseConv2D, DepthwiseConv2DTranspose, SeparableConv2D, depthwise_conv, separable_conv
from depthwise_jax.optim import constraints_of
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import PLAIN, SHARDED_CASES, Case, label
from tests.support.meshes import SHARDED, make_mesh, specs
from tests.support.oracle import widest

BOTH = P("b", None, None, "c")


@pytest.fixture(scope="module")
def automatic() -> jax.sharding.Mesh:
    return make_mesh(b=2, c=2)


@pytest.mark.parametrize(
    ("case", "axis_type"),
    # On an explicit mesh, whose types say the same, one of each layout and multiplier.
    [*((case, AxisType.Auto) for case in SHARDED_CASES), *((case, AxisType.Explicit) for case in SHARDED_CASES[2::2])],
    ids=label,
)
# "conv" has no kernel gradient where rows are sharded.
@pytest.mark.parametrize(
    ("lowering", "sharded"), [(n, s) for n in PLAIN for s in SHARDED if (n, s) != ("conv", "rows")]
)
def test_values_and_shardings(case: Case, lowering: str, sharded: str, axis_type: AxisType) -> None:
    mesh = make_mesh(axis_type, b=2, c=2)
    image, _, _ = specs(case, sharded)
    operands, expected = case.operands(), maps.truth(case, *case.operands())
    with jax.set_mesh(mesh):
        functions = maps.maps(case.conv(lowering, in_sharding=image))
        results = jax.jit(lambda *operands: {name: f(*operands) for name, f in functions.items()})(*operands)
        for name, result in results.items():
            assert_close(result, expected[name], 1e-5, name)
        assert results["forward"].sharding.is_equivalent_to(NamedSharding(mesh, image), 4)
        if axis_type == AxisType.Auto:
            y = case.conv(lowering, in_sharding=image)(*operands[:2])
            assert y.sharding.is_equivalent_to(NamedSharding(mesh, image), 4)
            assert_close(y, expected["forward"], 1e-5, "eager")


@pytest.mark.parametrize("m", [1, 2])
def test_the_kernel_gradient_needs_no_slabs(m: int, automatic: Any) -> None:
    case = Case("slabless", (8, 8, 6, 4), (3, 3, 4, m), {"padding": "same"})
    x, w, g = case.operands()

    def text(**options: Any) -> str:
        with jax.set_mesh(automatic):
            return jax.jit(maps.dw(case.conv("conv", **options))).lower(x, w, g).as_text()

    slabs = re.compile(r"lhs_dilate = \[[^]]*[2-9]")
    assert slabs.search(text())
    assert not slabs.search(text(in_sharding=BOTH))
    assert slabs.search(text(in_sharding=P("b")))  # an axis is left over


@pytest.mark.parametrize("padding", ["valid", "reflect", 1])
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_with_bias_activation_and_paddings(padding: Any, activation: Any, automatic: Any) -> None:
    case = Case("told-bias", (4, 6, 5, 4), (3, 3, 4, 2), {"padding": padding})
    x, w, g = case.operands()
    b = case.draw((8,), 20)

    def gradients(**options: Any) -> Any:
        f = case.conv(activation=activation, **options)
        return jax.jit(maps.value_and_gradients(f))(x, w, b, g)

    expected = gradients()
    with jax.set_mesh(automatic):
        results = gradients(in_sharding=BOTH)
    before = case.oracle.add_bias(case.oracle.conv(x, w), b)
    if activation != "gelu":
        assert_close(results[0], np.maximum(before, 0) if activation else before, 1e-5)
    for result, one_device in zip(results, expected, strict=True):
        assert_close(result, np.asarray(one_device, np.float64), 1e-5)


def test_under_vmap_scan_and_second_derivatives(automatic: Any) -> None:
    case = Case("told-vmap", (4, 5, 4, 4), (3, 3, 4, 1), {"padding": "same"})
    xs = np.stack([case.draw((4, 5, 4, 4), seed) for seed in range(3)])
    w = case.operands()[1]
    f = case.conv(in_sharding=BOTH)
    expected = np.stack([case.oracle.conv(x, w) for x in xs])
    with jax.set_mesh(automatic):
        assert_close(jax.jit(jax.vmap(f, (0, None)))(xs, w), expected, 1e-5)
        assert_close(jax.jit(lambda xs, w: jax.lax.scan(lambda w, x: (w, f(x, w)), w, xs)[1])(xs, w), expected, 1e-5)
        # (y**2).sum()/2 has the gradient A^T A w in w, linear in w: its derivative along w is itself.
        gradient = jax.grad(lambda w: (f(xs[0], w) ** 2).sum() / 2)
        first, second = jax.jit(lambda w: jax.jvp(gradient, (w,), (w,)))(w)
    assert_close(first, case.oracle.kernel_grad(xs[0], case.oracle.conv(xs[0], w)), 1e-5)
    assert_close(second, np.asarray(first, np.float64), 1e-5)


def test_separable(automatic: Any) -> None:
    case = Case("told-separable", (4, 6, 5, 4), (3, 3, 4, 2))
    x, w, _ = case.operands()
    p = case.draw((1, 1, 8, 6), 20)
    with jax.set_mesh(automatic):
        y = jax.jit(lambda *z: separable_conv(*z, in_sharding=BOTH))(x, w, p)
    assert_close(y, case.oracle.conv(x, w) @ widest(p)[0, 0], 1e-5)


def test_without_a_mesh_it_says_nothing() -> None:
    case = SHARDED_CASES[0]
    x, w, _ = case.operands()
    assert_close(jax.jit(case.conv(in_sharding=BOTH))(x, w), case.oracle.conv(x, w), 1e-5)


LAYERS: dict[str, Callable[..., Any]] = {
    "depthwise": lambda **options: DepthwiseConv2D(3, padding="same", **options),
    "transposed": lambda **options: DepthwiseConv2DTranspose(3, padding="same", depth_multiplier=2, **options),
    "separable": lambda **options: SeparableConv2D(6, 3, padding="same", **options),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_linen(make: Callable[..., Any], automatic: Any) -> None:
    layer, x = make(in_sharding=BOTH, depthwise_constraint="max_norm"), SHARDED_CASES[0].draw((4, 8, 6, 4), 1)
    plain = make()
    with jax.set_mesh(automatic):
        # One example, which no mesh axis divides, is enough for parameters and shapes.
        params = jax.jit(layer.init)(jax.random.key(0), x[:1])["params"]
        assert len(jax.tree.leaves(constraints_of(layer, x[:1]))) == 1
        assert layer.compute_output_shape((None, 8, 6, 4))[1:3] == (8, 6)

        def loss(params: Any, layer: Any) -> Any:
            return (layer.apply({"params": params}, x) ** 2).sum()

        results = jax.jit(jax.value_and_grad(lambda params: loss(params, layer)))(params)
    expected = jax.value_and_grad(lambda params: loss(params, plain))(jax.device_get(params))
    for result, one_device in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert_close(result, np.asarray(one_device, np.float64), 1e-5)


def test_nnx(automatic: Any) -> None:
    x = SHARDED_CASES[0].draw((4, 8, 6, 4), 1)
    layer = depthwise_jax.nnx.DepthwiseConv2D(4, 3, padding="same", in_sharding=BOTH, rngs=nnx.Rngs(0))
    expected = layer(x)
    with jax.set_mesh(automatic):
        y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert y.sharding.is_equivalent_to(NamedSharding(automatic, BOTH), 4)
    assert_close(y, np.asarray(expected, np.float64), 1e-6)


@pytest.mark.parametrize(
    ("in_sharding", "error", "message"),
    [
        ("b", TypeError, "in_sharding must be None or a jax.sharding.PartitionSpec; got 'b'"),
        (
            P(*(None,) * 5),
            ValueError,
            r"in_sharding must have at most one entry for each of the 4 axes of x; got P",
        ),
        (
            P("rows"),
            ValueError,
            r"in_sharding must name .*; got .*'rows'.* on a mesh with the axes \('b', 'c'\)",
        ),
    ],
    ids=str,
)
def test_what_is_no_sharding_of_x(in_sharding: Any, error: Any, message: str, automatic: Any) -> None:
    x, w, _ = SHARDED_CASES[0].operands()
    with jax.set_mesh(automatic), pytest.raises(error, match=message):
        depthwise_conv(x, w, in_sharding=in_sharding)


def test_a_shard_is_sharded_no_further(automatic: Any) -> None:
    x, w, _ = SHARDED_CASES[0].operands()
    f = jax.shard_map(
        lambda x, w: depthwise_conv(x, w, in_sharding=P("b")), mesh=automatic, in_specs=(P("b"), P()), out_specs=P("b")
    )
    with pytest.raises(ValueError, match=r"in_sharding .* \('b', 'c'\) are manual \(inside shard_map"):
        f(jnp.asarray(x), jnp.asarray(w))


def test_a_batch_that_the_mesh_does_not_divide_is_refused(automatic: Any) -> None:
    with jax.set_mesh(automatic), pytest.raises(ValueError, match="3"):
        depthwise_conv(jnp.ones((3, 5, 5, 4)), jnp.ones((3, 3, 4, 1)), in_sharding=BOTH)


@pytest.mark.parametrize("told", [P(None, None, None, "c"), P("c"), P()], ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_inside_shard_map_over_another_axis(plain: str, axis_type: AxisType, told: P) -> None:
    # Manual over "b": x is a shard there, and "c" is left to name.
    case, mesh = SHARDED_CASES[0], make_mesh(axis_type, b=2, c=2)
    x, w, g = case.operands()

    def local(x: Any, w: Any) -> Any:
        y = case.conv(plain, in_sharding=told)(x, w)
        assert jax.typeof(y).sharding.mesh.axis_names == ("b", "c")
        return y

    f = jax.shard_map(local, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"), axis_names={"b"})
    expected = maps.truth(case, x, w, g)
    with jax.set_mesh(mesh):
        # A cotangent has the type of the result: its batch over "b", and over "c" what was told.
        spec = P("b", *told[1:]) if told != P("c") else P(("b", "c"))
        xs, gs = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, P("b")), (g, spec)))
        for name, map_ in maps.maps(f).items():
            assert_close(jax.jit(map_)(xs, w, gs), expected[name], 1e-5, name)
