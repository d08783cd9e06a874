"""Sharding by the compiler, automatic, and explicit with its types; test_collectives.py counts what it communicates."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv, separable_conv
from depthwise_jax._core.layout import DataFormat
from depthwise_jax.lowering import Implementation
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import PLAIN, SHARDED_CASES, Case
from tests.support.meshes import SHARDED, make_mesh, specs
from tests.support.oracle import widest

# The lowerings, what is sharded, and over how many mesh axes: "conv" has another kernel gradient on several.
SERVED = [
    (name, sharded, axes)
    for name in PLAIN
    for sharded in SHARDED[:3]
    for axes in ((1, 2) if name == "conv" else (2,))
    if (sharded, axes) != ("batch+channels", 1)
]


def mesh_for(axis_type: AxisType, sharded: str, axes: int) -> jax.sharding.Mesh:
    """Four devices, as two by two or in one axis."""
    return make_mesh(axis_type, **({"b": 2, "c": 2} if axes == 2 else {"c": 4} if sharded == "channels" else {"b": 4}))


@pytest.fixture(scope="module")
def automatic() -> jax.sharding.Mesh:
    return make_mesh(b=2, c=2)


@pytest.fixture(scope="module")
def explicit() -> jax.sharding.Mesh:
    return make_mesh(AxisType.Explicit, b=2, c=2)


# Batches that the shards divide and that they do not, and those of fewer than three images.
@pytest.mark.parametrize("batch", [1, 2, 3, 6, 8])
@pytest.mark.parametrize(
    "spec", [P("a"), P("b"), P(("a", "b")), P("b", None, None, "a"), P(None, "a"), P("a", "b")], ids=str
)
def test_kernel_gradient_of_conv_over_two_axes(batch: int, spec: P) -> None:
    # The plain convolution's would come out multiplied by the size of an axis that shards nothing.
    case = Case(f"slabs-{batch}", (batch, 8, 6, 4), (3, 3, 4, 2), {"strides": (2, 1), "padding": "same"})
    x, w, g = case.operands()
    mesh = make_mesh(a=4, b=2)
    constrained = lambda a: jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))  # noqa: E731

    @jax.jit
    def dw(x: Any, w: Any, g: Any) -> Any:
        # Through a cosine: what the padding of uneven shards holds must not show in the sums.
        return maps.dw(case.conv("conv"))(jnp.cos(constrained(x)), w, jnp.cos(constrained(g)))

    with jax.set_mesh(mesh):
        result = dw(x, w, g)
    assert_close(result, case.oracle.kernel_grad(np.cos(widest(x)), np.cos(widest(g))), 1e-5)


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        (P(("a", "b")), True),
        (P("b", None, None, "a"), True),
        (P("a", "b"), True),
        (P(None, ("a", "b")), True),
        (P("a"), False),
        (P("b", None, None, None), False),
    ],
    ids=str,
)
def test_kernel_gradient_of_conv_by_the_types_of_its_operands(spec: P, plain: bool) -> None:
    # Where they leave no mesh axis over, nothing is counted twice, and the gradient is that of one device.
    case = Case("typed", (8, 8, 6, 4), (3, 3, 4, 2), {"strides": (1, 2), "padding": "same"})
    x, w, g = case.operands()
    mesh = make_mesh(AxisType.Explicit, a=4, b=2)
    with jax.set_mesh(mesh):
        dw = jax.jit(maps.dw(case.conv("conv"))).lower(typed(mesh, x, spec), w, typed(mesh, g, spec))
        assert (re.search(r"lhs_dilate = \[[^]]*[2-9]", dw.as_text()) is None) == plain
        result = dw.compile()(typed(mesh, x, spec), w, typed(mesh, g, spec))
    assert_close(result, case.oracle.kernel_grad(x, g), 1e-5)


@pytest.mark.parametrize("spec", [P("a", "b"), P(None, ("a", "b")), P(("a", "b"))], ids=str)
def test_kernel_gradient_of_conv_with_two_batch_axes(spec: P) -> None:
    # Merged, the axes are sharded as no single one can be, and the compiler may hold copies again.
    case = Case("two-batch-axes", (8, 6, 5, 4), (3, 3, 4, 1))
    x, w, g = case.operands()
    shape = lambda a: a.reshape(4, 2, *a.shape[1:])  # noqa: E731
    mesh = make_mesh(AxisType.Explicit, a=4, b=2)
    if spec == P(None, ("a", "b")):
        shape = lambda a: a.reshape(1, 8, *a.shape[1:])  # noqa: E731
    elif spec == P(("a", "b")):
        shape = lambda a: a.reshape(8, 1, *a.shape[1:])  # noqa: E731
    with jax.set_mesh(mesh):
        xs, gs = (typed(mesh, shape(a), spec) for a in (x, g))
        lowered = jax.jit(maps.dw(case.conv("conv"))).lower(xs, w, gs)
        dw = lowered.compile()(xs, w, gs)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)
    # No types tell that nothing is held twice, so it is a sum over slabs, but for one axis that is sharded over both.
    slabs = re.search(r"lhs_dilate = \[[^]]*[2-9]", lowered.as_text()) is not None
    assert slabs == (spec != P(("a", "b")))


def test_conv_refuses_what_has_no_slabs_over_two_axes(explicit: Any) -> None:
    case = SHARDED_CASES[0]
    with jax.set_mesh(explicit):
        x, w, g = (typed(explicit, a, P(None, s)) for a, s in zip(case.operands(), ("b", None, "b"), strict=True))
        with pytest.raises(ValueError, match="implementation='conv' cannot compute this kernel"):
            jax.jit(maps.dw(case.conv("conv"))).lower(x, w, g)


@pytest.mark.parametrize("sharded", SHARDED)
def test_a_mesh_that_only_the_arguments_know(sharded: str, automatic: Any) -> None:
    # No mesh is set: the program learns of it from its arguments, after tracing.
    case = SHARDED_CASES[4]
    image, kernel, _ = specs(case, sharded)
    operands = [
        jax.device_put(a, NamedSharding(automatic, s))
        for a, s in zip(case.operands(), (image, kernel, image), strict=True)
    ]
    expected = maps.truth(case, *case.operands())
    for name, f in maps.maps(case.conv()).items():
        assert_close(jax.jit(f)(*operands), expected[name], 1e-5, name)


@pytest.mark.parametrize("sharded", ["batch", "channels", "batch+channels"])
def test_the_compiler_keeps_the_sharding(sharded: str, plain: str, automatic: Any) -> None:
    # Nobody says how the results are sharded: propagation through the lowering must find it.
    for case in SHARDED_CASES[1::3]:
        image, kernel, _ = specs(case, sharded)
        x, w = (
            jax.device_put(a, NamedSharding(automatic, s))
            for a, s in zip(case.operands(), (image, kernel), strict=False)
        )
        y = jax.jit(case.conv(plain))(x, w)
        assert y.sharding.is_equivalent_to(NamedSharding(automatic, image), y.ndim), y.sharding
        assert_close(y, case.oracle.conv(*case.operands()[:2]), 1e-5)


# Explicit sharding: the shardings are part of the types.


def typed(mesh: Any, a: Any, spec: P) -> Any:
    return jax.device_put(jnp.asarray(a), NamedSharding(mesh, spec))


def spec_of(a: Any) -> tuple[Any, ...]:
    spec = tuple(jax.typeof(a).sharding.spec)
    return (*spec, *(None,) * (a.ndim - len(spec)))


@pytest.mark.parametrize(("lowering", "sharded", "axes"), SERVED)
@pytest.mark.parametrize("case", SHARDED_CASES[5:], ids=str)
def test_explicit(case: Case, lowering: str, sharded: str, axes: int) -> None:
    image, kernel, _ = specs(case, sharded)
    mesh = mesh_for(AxisType.Explicit, sharded, axes)
    with jax.set_mesh(mesh):
        x, w, g = (typed(mesh, a, s) for a, s in zip(case.operands(), (image, kernel, image), strict=True))
        tx, tw, _ = (typed(mesh, a, s) for a, s in zip(case.operands(1), (image, kernel, image), strict=True))
        f = case.conv(lowering)
        types: dict[str, Any] = {}

        @jax.jit
        def run(x: Any, w: Any, g: Any, tx: Any, tw: Any) -> Any:
            y = f(x, w)
            dx, dw = maps.gradients(f)(x, w, g)
            gradient = jax.grad(lambda x, w: (f(x, w) ** 2).sum() / 2, (0, 1))
            hx, hw = jax.jvp(gradient, (x, w), (tx, tw))[1]
            types.update(y=spec_of(y), dx=spec_of(dx), dw=spec_of(dw), hx=spec_of(hx), hw=spec_of(hw))
            return y, dx, dw, hx, hw

        y, dx, dw, hx, hw = run(x, w, g, tx, tw)
    assert types == {
        "y": tuple(image),
        "dx": tuple(image),
        "dw": tuple(kernel),
        "hx": tuple(image),
        "hw": tuple(kernel),
    }
    x, w, g = case.operands()
    tx, tw, _ = case.operands(1)
    oracle = case.oracle
    along = oracle.conv(tx, w) + oracle.conv(x, tw)
    assert_close(y, oracle.conv(x, w), 1e-5)
    assert_close(dx, oracle.input_grad(g, w), 1e-5)
    assert_close(dw, oracle.kernel_grad(x, g), 1e-5)
    assert_close(hx, oracle.input_grad(along, w) + oracle.input_grad(oracle.conv(x, w), tw), 1e-5)
    assert_close(hw, oracle.kernel_grad(x, along) + oracle.kernel_grad(tx, oracle.conv(x, w)), 1e-5)


@pytest.mark.parametrize("padding", ["valid", "same", "reflect", "circular", "edge", 1])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_explicit_with_bias_activation_and_paddings(explicit: Any, data_format: str, padding: Any) -> None:
    first = data_format == "channels_first"
    case = Case(
        "explicit-bias",
        (4, 4, 6, 5) if first else (4, 6, 5, 4),
        (3, 3, 4, 2),
        {"padding": padding, "data_format": data_format},
    )
    image, kernel, _ = specs(case, "batch+channels")
    x, w, g = case.operands()
    b = case.draw((8,), 20)
    with jax.set_mesh(explicit):
        sharded = [typed(explicit, a, s) for a, s in ((x, image), (w, kernel), (b, P("c")), (g, image))]
        f = case.conv(activation="relu")
        y = jax.jit(f)(*sharded[:3])
        dx, dw, db = jax.jit(maps.gradients(f))(*sharded)
    assert (spec_of(y), spec_of(dx), spec_of(dw), spec_of(db)) == (tuple(image), tuple(image), tuple(kernel), ("c",))
    before = case.oracle.add_bias(case.oracle.conv(x, w), b)
    g = g * (before > 0)
    assert_close(y, np.maximum(before, 0), 1e-5)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)
    assert_close(db, np.moveaxis(g, case.oracle.channel_axis, -1).reshape(-1, 8).sum(0), 1e-5)


@pytest.mark.parametrize("typed_operands", [True, False])
@pytest.mark.parametrize("activation", ["relu", None])
def test_explicit_with_the_bias_alone_sharded(activation: Any, typed_operands: bool, explicit: Any) -> None:
    case = Case("explicit-bias-alone", (4, 6, 5, 4), (3, 3, 4, 2), {})
    (x, w, _), b = case.operands(), case.draw((8,), 20)
    with jax.set_mesh(explicit):
        operands = [typed(explicit, a, P()) if typed_operands else a for a in (x, w)]
        y = jax.jit(case.conv(activation=activation))(*operands, typed(explicit, b, P("c")))
    assert spec_of(y) == (None, None, None, "c")
    before = case.oracle.add_bias(case.oracle.conv(x, w), b)
    assert_close(y, np.maximum(before, 0) if activation else before, 1e-5)


@pytest.mark.parametrize(
    ("x_spec", "w_spec"),
    [
        (P("b", None, None, "c"), P()),
        (P(), P(None, None, "c", None)),
        (P(("b", "c")), P()),
        (P(None, None, None, ("b", "c")), P()),
    ],
    ids=str,
)
def test_explicit_with_one_operand_sharded(x_spec: P, w_spec: P, explicit: Any) -> None:
    case = SHARDED_CASES[3]
    x, w, g = case.operands()
    with jax.set_mesh(explicit):
        xs, ws = typed(explicit, x, x_spec), typed(explicit, w, w_spec)
        f = case.conv()
        y = jax.jit(f)(xs, ws)
        dx, dw = jax.jit(lambda x, w: jax.grad(lambda x, w: (f(x, w) * g).sum(), (0, 1))(x, w))(xs, ws)
    full = lambda spec, n: (*spec, *(None,) * (n - len(spec)))  # noqa: E731
    assert spec_of(y) == (*full(x_spec, 4)[:3], full(x_spec, 4)[3] or full(w_spec, 4)[2])
    assert (spec_of(dx), spec_of(dw)) == (full(x_spec, 4), full(w_spec, 4))
    assert_close(y, case.oracle.conv(x, w), 1e-5)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)


def test_explicit_in_eager_mode(explicit: Any) -> None:
    case = SHARDED_CASES[3]
    x, w, g = case.operands()
    image, kernel, _ = specs(case, "batch+channels")
    with jax.set_mesh(explicit):
        xs, ws, gs = (typed(explicit, a, s) for a, s in ((x, image), (w, kernel), (g, image)))
        y, dx, dw = maps.value_and_gradients(case.conv())(xs, ws, gs)
    assert (spec_of(y), spec_of(dx), spec_of(dw)) == (tuple(image), tuple(image), tuple(kernel))
    assert_close(y, case.oracle.conv(x, w), 1e-5)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)


def test_explicit_vmap(plain: str, explicit: Any) -> None:
    case = Case("explicit-vmap", (2, 5, 4, 2), (3, 3, 2, 2), {"padding": "same"})
    x, w = case.draw((4, *case.x), 0), case.draw((4, *case.kernel), 1)
    with jax.set_mesh(explicit):
        y = jax.jit(jax.vmap(case.conv(plain)))(typed(explicit, x, P("b")), typed(explicit, w, P("b")))
        z = jax.jit(jax.vmap(case.conv(plain), (0, None)))(typed(explicit, x, P("b")), typed(explicit, w[0], P()))
    assert spec_of(y)[0] == spec_of(z)[0] == "b"
    assert_close(y, np.stack([case.oracle.conv(a, b) for a, b in zip(x, w, strict=True)]), 1e-5)
    assert_close(z, np.stack([case.oracle.conv(a, w[0]) for a in x]), 1e-5)


def test_explicit_scan(plain: str, explicit: Any) -> None:
    case = SHARDED_CASES[0]
    x, _, _ = case.operands()
    w = 0.5 * case.draw((3, *case.kernel), 20)
    image, _, _ = specs(case, "batch+channels")
    with jax.set_mesh(explicit):
        f = jax.jit(lambda x, w: jax.lax.scan(lambda y, k: (case.conv(plain)(y, k), None), x, w)[0])
        y = f(typed(explicit, x, image), typed(explicit, w, P(None, None, None, "c", None)))
    for kernel in w:
        x = case.oracle.conv(x, kernel)
    assert spec_of(y) == tuple(image)
    assert_close(y, x, 1e-5)


def test_explicit_conflict_names_both_shardings(explicit: Any) -> None:
    case = SHARDED_CASES[0]
    x, w, _ = case.operands()
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=r"'b'.*'c'|'c'.*'b'"):
        case.conv()(typed(explicit, x, P(None, None, None, "b")), typed(explicit, w, P(None, None, "c", None)))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_explicit_separable(plain: Implementation, explicit: Any, data_format: DataFormat) -> None:
    first = data_format == "channels_first"
    case = Case(
        "explicit-separable", (4, 4, 6, 5) if first else (4, 6, 5, 4), (3, 3, 4, 2), {"data_format": data_format}
    )
    x, w, _ = case.operands()
    p = case.draw((1, 1, 8, 6), 20)
    axis = case.oracle.channel_axis
    exact = np.moveaxis(np.moveaxis(case.oracle.conv(x, w), axis, -1) @ widest(p)[0, 0], -1, axis)
    f = lambda *z, **kw: separable_conv(*z, data_format=data_format, implementation=plain, **kw)  # noqa: E731
    out = P("b", "c", None, None) if first else P("b", None, None, "c")
    with jax.set_mesh(explicit):
        # Batch and filters sharded: known without help.
        y = jax.jit(f)(
            typed(explicit, x, P("b")), typed(explicit, w, P()), typed(explicit, p, P(None, None, None, "c"))
        )
        assert spec_of(y) == tuple(out)
        assert_close(y, exact, 1e-5)
        # The channels that are summed over are sharded: the caller says what becomes of the sum.
        image, kernel, _ = specs(case, "batch+channels")
        operands = typed(explicit, x, image), typed(explicit, w, kernel), typed(explicit, p, P(None, None, "c", None))
        result = P("b", None, None, None)
        y = jax.jit(lambda *z: f(*z, out_sharding=result))(*operands)
        assert spec_of(y) == tuple(result)
        assert_close(y, exact, 1e-5)


def test_sizes_that_do_not_divide(automatic: Any) -> None:
    # The compiler pads uneven shards: what the padding holds must not show in the sums.
    x, w = np.ones((3, 5, 5, 3), np.float32), np.ones((3, 3, 3, 1), np.float32)
    constrain = lambda a: jax.lax.with_sharding_constraint(a, NamedSharding(automatic, P("b", None, None, "c")))  # noqa: E731

    def loss(x: Any, w: Any) -> Any:
        return constrain(depthwise_conv(constrain(jnp.cos(x)), w)).sum()

    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    case = Case("uneven", x.shape, w.shape)
    g = np.ones(case.oracle.y_shape)
    assert_close(dx, case.oracle.input_grad(g, w) * -np.sin(1.0), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(np.cos(x), g), 1e-5)


def test_a_nan_in_the_kernel_does_not_reach_through_the_padding_of_sharded_rows(automatic: Any) -> None:
    w = np.ones((3, 1, 1, 1), np.float32)
    w[0] = np.nan
    rows = NamedSharding(automatic, P(None, "b"))
    f = jax.jit(lambda x: depthwise_conv(x, w, padding="same", implementation="taps"), in_shardings=rows)
    np.testing.assert_array_equal(f(np.ones((1, 4, 1, 1), np.float32))[0, :, 0, 0], [2, np.nan, np.nan, np.nan])


# What does not fit: right results or a clear error.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_an_axis_that_the_mesh_does_not_divide_is_refused(axis_type: AxisType) -> None:
    mesh = make_mesh(axis_type, b=2, c=2)
    with pytest.raises(ValueError, match=r"axis 3 is partitioned 2 times, but .*dimension size"):
        typed(mesh, np.ones((4, 5, 5, 3), np.float32), P(None, None, None, "c"))
    inputs = NamedSharding(mesh, P(None, None, None, "c"))
    with pytest.raises(ValueError, match=r"partitioned 2 times|divisible by 2"):
        jax.jit(lambda x: depthwise_conv(x, np.ones((3, 3, 3, 1))), in_shardings=inputs)(np.ones((4, 5, 5, 3)))


# x, the kernel, and what explicit axes say to them; None where they give results.
UNFIT = {
    "window beyond the next row shard": (P(None, "b"), P(), None),
    "channels over other axes": (P(None, None, None, "b"), P(None, None, "c", None), "shard the channels differently"),
    "channels over more axes": (P(None, None, None, "c"), P(None, None, ("b", "c"), None), "shard the channels diff"),
    "window sharded": (P("b"), P("c"), "must be sharded only along its channels"),
    "multiplier sharded": (P("b"), P(None, None, None, "c"), "must be sharded only along its channels"),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("lowering", [None, "conv"])
@pytest.mark.parametrize("what", UNFIT)
def test_shardings_that_do_not_fit(what: str, lowering: str | None, axis_type: AxisType) -> None:
    case = Case("unfit", (2, 4, 5, 4), (6, 3, 4, 2), {"padding": "same"})
    *specs, error = UNFIT[what]
    x, w, g = case.operands()
    rows = what.startswith("window beyond")
    mesh = make_mesh(axis_type, b=4) if rows else make_mesh(axis_type, b=2, c=2)
    with jax.set_mesh(mesh):
        xs, ws, gs = (typed(mesh, a, spec) for a, spec in zip((x, w, g), (*specs, specs[0]), strict=True))
        if error and axis_type == AxisType.Explicit:
            with pytest.raises(ValueError, match=error):
                case.conv(lowering)(xs, ws)
            return
        y, dx, dw = jax.jit(maps.value_and_gradients(case.conv(lowering)))(xs, ws, gs)
    expected = maps.truth(case, x, w, g)
    assert_close(y, expected["forward"], 1e-5)
    assert_close(dx, expected["dx"], 1e-5)
    assert_close(dw, expected["dw"], 1e-5)
    # Under automatic axes and without a word on y, XLA takes what conv gathers for a reason to leave y whole.
    if rows and (lowering is None or axis_type == AxisType.Explicit):
        assert {shard.data.shape[1] for shard in y.addressable_shards} == {1}, "y is not replicated"


@pytest.mark.parametrize("lowering", PLAIN)
def test_gradients_are_sharded_as_their_operands_are(lowering: str, explicit: Any) -> None:
    # The kernel's channels are sharded and those of x are not, or the other way round: y's are.
    case = SHARDED_CASES[0]
    x, w, g = case.operands()
    for x_spec, w_spec in ((P("b"), P(None, None, "c", None)), (P("b", None, None, "c"), P())):
        with jax.set_mesh(explicit):
            xs, ws = typed(explicit, x, x_spec), typed(explicit, w, w_spec)
            gs = typed(explicit, g, P("b", None, None, "c"))
            dx, dw = jax.jit(maps.gradients(case.conv(lowering)))(xs, ws, gs)
            assert jax.typeof(dx).sharding == jax.typeof(xs).sharding
            assert jax.typeof(dw).sharding == jax.typeof(ws).sharding
        assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
        assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)
