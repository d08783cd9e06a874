"""shard_map, with its type check on and off: over batch, channels and both; value, gradients, second derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from depthwise_jax import separable_conv
from depthwise_jax.lowering import Implementation
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import LOWERINGS, Case
from tests.support.meshes import SHARDED, make_mesh, specs
from tests.support.oracle import widest

LAST = Case("shard-map", (4, 5, 4, 4), (3, 3, 4, 2), {"strides": (2, 1), "padding": "same"})
FIRST = Case("shard-map-first", (4, 4, 6, 3), (3, 2, 4, 1), {"padding": "reflect", "data_format": "channels_first"})


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(b=2, c=2)


SHARDINGS = pytest.mark.parametrize("sharded", SHARDED[:3])
CHECKS = pytest.mark.parametrize("check_vma", [True, False])


@pytest.mark.parametrize(
    ("case", "sharded", "check_vma"),
    [
        (LAST, "batch", True),
        (LAST, "channels", True),
        (LAST, "batch+channels", True),
        (LAST, "batch+channels", False),
        (FIRST, "batch+channels", True),
    ],
    ids=str,
)
def test_derivatives_of_the_whole(
    case: Case, implementation: Implementation, mesh: Any, sharded: str, check_vma: bool
) -> None:
    x, w, g = case.operands(0)
    tx, tw, _ = case.operands(1)
    image, kernel, _ = specs(case, sharded)
    options: Any = {"mesh": mesh, "check_vma": check_vma}
    f = jax.shard_map(case.conv(implementation), in_specs=(image, kernel), out_specs=image, **options)

    @jax.jit
    def run(x: Any, w: Any, g: Any, tx: Any, tw: Any) -> Any:
        y, tangent = jax.jvp(f, (x, w), (tx, tw))
        gradient = jax.grad(lambda x, w: (f(x, w) ** 2).sum() / 2, (0, 1))
        return y, tangent, maps.gradients(f)(x, w, g), jax.jvp(gradient, (x, w), (tx, tw))[1]

    y, tangent, (dx, dw), (hx, hw) = run(x, w, g, tx, tw)
    oracle = case.oracle
    value, along = oracle.conv(x, w), oracle.conv(tx, w) + oracle.conv(x, tw)
    assert_close(y, value, 1e-5, "value")
    assert_close(tangent, along, 1e-5, "jvp")
    assert_close(dx, oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, oracle.kernel_grad(x, g), 1e-5, "dw")
    assert_close(hx, oracle.input_grad(along, w) + oracle.input_grad(value, tw), 1e-5, "hessian, x")
    assert_close(hw, oracle.kernel_grad(x, along) + oracle.kernel_grad(tx, value), 1e-5, "hessian, kernel")


@CHECKS
@SHARDINGS
def test_gradients_inside(implementation: Implementation, mesh: Any, sharded: str, check_vma: bool) -> None:
    case = LAST
    x, w, g = case.operands()
    image, kernel, _ = specs(case, sharded)

    def local(x: Any, w: Any, g: Any) -> Any:
        dx, dw = jax.grad(lambda x, w: (case.conv(implementation)(x, w) * g).sum(), (0, 1))(x, w)
        if not check_vma and "batch" in sharded:
            dw = lax.psum(
                dw, "b"
            )  # with the check on, the kernel is known not to vary over "b", and its gradient is summed
        return dx, dw

    f = jax.shard_map(local, mesh=mesh, in_specs=(image, kernel, image), out_specs=(image, kernel), check_vma=check_vma)
    dx, dw = jax.jit(f)(x, w, g)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5, "dw")


@CHECKS
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_bias_and_activation(
    implementation: Implementation, mesh: Any, check_vma: bool, activation: str | None
) -> None:
    case = LAST
    x, w, g = case.operands()
    b = case.draw((8,), 20)
    image, kernel, _ = specs(case, "batch+channels")
    f = jax.shard_map(
        case.conv(implementation, activation=activation),
        mesh=mesh,
        in_specs=(image, kernel, P("c")),
        out_specs=image,
        check_vma=check_vma,
    )
    y, dx, dw, db = jax.jit(maps.value_and_gradients(f))(x, w, b, g)
    oracle = case.oracle
    before = oracle.add_bias(oracle.conv(x, w), b)
    formula: Any = {
        None: lambda y: (y, np.ones_like(y)),
        "relu": lambda y: (np.maximum(y, 0), y > 0),
        "tanh": lambda y: (np.tanh(y), 1 - np.tanh(y) ** 2),
    }
    value, slope = formula[activation](before)
    assert_close(y, value, 1e-5)
    assert_close(dx, oracle.input_grad(slope * g, w), 1e-5)
    assert_close(dw, oracle.kernel_grad(x, slope * g), 1e-5)
    assert_close(db, (slope * g).sum((0, 1, 2)), 1e-5)


@CHECKS
def test_eager(implementation: Implementation, mesh: Any, check_vma: bool) -> None:
    x, w, _ = LAST.operands()
    image, kernel, _ = specs(LAST, "batch+channels")
    options: Any = {"mesh": mesh, "check_vma": check_vma}
    f = jax.shard_map(LAST.conv(implementation), in_specs=(image, kernel), out_specs=image, **options)
    assert_close(f(x, w), LAST.oracle.conv(x, w), 1e-5)


@CHECKS
def test_vmap_inside(implementation: Implementation, mesh: Any, check_vma: bool) -> None:
    # The kernel is the same on all devices of "b", its copies are not: one gradient per example.
    case = Case("shard-map-vmap", (1, 5, 4, 4), (3, 3, 4, 1), {"padding": "same"})
    x, g = case.draw((4, *case.x), 0), case.draw((4, *case.oracle.y_shape), 1)
    w = case.draw(case.kernel, 2)
    per_example = jax.vmap(jax.grad(lambda w, x, g: (case.conv(implementation)(x, w) * g).sum()), (None, 0, 0))
    f = jax.shard_map(
        lambda w, x, g: per_example(lax.pcast(w, "b", to="varying") if check_vma else w, x, g),
        mesh=mesh,
        in_specs=(P(), P("b"), P("b")),
        out_specs=P("b"),
        check_vma=check_vma,
    )
    expected = np.stack([case.oracle.kernel_grad(a, b) for a, b in zip(x, g, strict=True)])
    assert_close(jax.jit(f)(w, x, g), expected, 1e-5)


@CHECKS
def test_some_axes_left_to_the_compiler(mesh: Any, check_vma: bool) -> None:
    # Manual over "b" alone; "c" is partitioned automatically.
    case = LAST
    x, w, g = case.operands()
    sharding = lambda spec: jax.sharding.NamedSharding(mesh, spec)  # noqa: E731
    x, g = (jax.device_put(a, sharding(P("b", None, None, "c"))) for a in (x, g))
    w = jax.device_put(w, sharding(P(None, None, "c", None)))
    f = jax.shard_map(
        case.conv(),
        mesh=mesh,
        in_specs=(P("b"), P()),
        out_specs=P("b"),
        check_vma=check_vma,
        axis_names={"b"},
    )
    y, dx, dw = jax.jit(maps.value_and_gradients(f))(x, w, g)
    assert_close(y, case.oracle.conv(x, w), 1e-5)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)


@CHECKS
def test_separable(implementation: Implementation, mesh: Any, check_vma: bool) -> None:
    case = Case("shard-map-separable", (4, 5, 4, 3), (3, 3, 3, 2))
    x, w, _ = case.operands()
    p = case.draw((1, 1, 6, 4), 20)
    f = jax.shard_map(
        lambda x, w, p: separable_conv(x, w, p, implementation=implementation),
        mesh=mesh,
        in_specs=(P("b"), P(), P(None, None, None, "c")),
        out_specs=P("b", None, None, "c"),
        check_vma=check_vma,
    )
    y, dp = jax.jit(lambda x, w, p: (f(x, w, p), jax.grad(lambda p: f(x, w, p).sum())(p)))(x, w, p)
    middle = case.oracle.conv(x, w)
    assert_close(y, middle @ widest(p)[0, 0], 1e-5)
    assert_close(dp[0, 0], np.broadcast_to(middle.reshape(-1, 6).sum(0)[:, None], (6, 4)), 1e-5)


def test_varying_operands_give_a_varying_result(implementation: Implementation, mesh: Any) -> None:
    seen: list[Any] = []

    def local(x: Any, w: Any) -> Any:
        y = LAST.conv(implementation)(x, w)
        seen.append(jax.typeof(y).manual_axis_type.varying)
        return y

    image, kernel, _ = specs(LAST, "batch+channels")
    jax.eval_shape(
        jax.shard_map(local, mesh=mesh, in_specs=(image, kernel), out_specs=image),
        jax.ShapeDtypeStruct(LAST.x, jnp.float32),
        jax.ShapeDtypeStruct(LAST.kernel, jnp.float32),
    )
    assert seen[-1] == {"b", "c"}


@pytest.mark.skipif("native" not in LOWERINGS, reason="no compiled kernels")
def test_a_shard_that_the_compiler_partitions_further_is_no_single_device(mesh: Any) -> None:
    x, w, _ = LAST.operands()

    def f(implementation: Implementation | None, axes: set[str]) -> Any:
        return jax.jit(
            jax.shard_map(
                LAST.conv(implementation), mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"), axis_names=axes
            )
        )

    assert "depthwise_jax." in f(None, {"b", "c"}).lower(x, w).as_text()
    assert "depthwise_jax." not in f(None, {"b"}).lower(x, w).as_text()
    with pytest.raises(ValueError, match=r"'native' cannot compute this forward on cpu: .*partition"):
        f("native", {"b"}).lower(x, w)
