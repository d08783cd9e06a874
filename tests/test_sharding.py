"""Sharding by the compiler: automatic, counting the compiled program's collectives, and explicit, with its types."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv, separable_conv
from tests.cases import LOWERINGS, Case
from tests.oracle import assert_close, widest

CASES = [
    Case(f"sharded-{name}-m{m}{suffix}", x, (3, 3, 4, m), {"padding": "same", **options})
    for m in (1, 2)
    for name, x, options, suffix in (
        ("plain", (4, 8, 6, 4), {}, ""),
        ("strided", (4, 8, 6, 4), {"strides": 2}, ""),
        ("strided", (4, 4, 8, 6), {"strides": 2, "data_format": "channels_first"}, "-first"),
    )
]

NONE: dict[str, int] = {}
ONE_ALL_REDUCE = {"all-reduce": 1}
# What the compiled program of each map contains, by the sharded axes; rows exchange their halo in some permutes.
COLLECTIVES = {
    "batch": {"forward": NONE, "dx": NONE, "dw": ONE_ALL_REDUCE},
    "channels": {"forward": NONE, "dx": NONE, "dw": NONE},
    "batch+channels": {"forward": NONE, "dx": NONE, "dw": ONE_ALL_REDUCE},
    "rows": {
        "forward": {"collective-permute": ...},
        "dx": {"collective-permute": ...},
        "dw": {"collective-permute": ..., "all-reduce": 1},
    },
}
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|(?:ragged-)?all-to-all|reduce-scatter|collective-(?:permute|broadcast))(?:-start)?\("
)


# XLA adds up the partial kernel gradients of a partitioned convolution over every axis of the mesh, sharded or not:
# "conv" serves them on a mesh of one axis, and refuses others. All other lowerings get the mesh of two axes.
SERVED = [
    (name, sharded) for name in LOWERINGS for sharded in COLLECTIVES if (name, sharded) != ("conv", "batch+channels")
]
SERVED_EXPLICITLY = [(name, sharded) for name, sharded in SERVED if sharded != "rows"]


def make_mesh(axis_type: AxisType, lowering: str | None = None, sharded: str = "") -> jax.sharding.Mesh:
    """Four devices, in one axis where the lowering asks for it, else as two by two."""
    axes = {"b": 2, "c": 2} if lowering != "conv" else {"c": 4} if sharded == "channels" else {"b": 4}
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes), devices=jax.devices()[:4]
    )


@pytest.fixture(scope="module")
def automatic() -> jax.sharding.Mesh:
    return make_mesh(AxisType.Auto)


@pytest.fixture(scope="module")
def explicit() -> jax.sharding.Mesh:
    return make_mesh(AxisType.Explicit)


def specs(case: Case, sharded: str) -> tuple[P, P]:
    """For x and y, and for the kernel."""
    b = "b" if "batch" in sharded else None
    c = "c" if "channels" in sharded else None
    rows = "b" if sharded == "rows" else None
    return P(b, c, rows, None) if case.geometry.get("data_format") == "channels_first" else P(b, rows, None, c), P(
        None, None, c, None
    )


def maps(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The three maps of the case, functions of (x, kernel, g)."""
    return {
        "forward": lambda x, w, g: f(x, w),
        "dx": lambda x, w, g: jax.vjp(lambda x: f(x, w), x)[1](g)[0],
        "dw": lambda x, w, g: jax.vjp(lambda w: f(x, w), w)[1](g)[0],
    }


def truth(case: Case, x: Any, w: Any, g: Any) -> dict[str, np.ndarray]:
    return {"forward": case.oracle.conv(x, w), "dx": case.oracle.input_grad(g, w), "dw": case.oracle.kernel_grad(x, g)}


def collectives(compiled: Any) -> Counter[str]:
    return Counter(COLLECTIVE.findall(compiled.as_text()))


def allowed(found: Counter[str], expected: dict[str, Any]) -> bool:
    """Exactly the expected counts, where `...` stands for any."""
    return found.keys() <= expected.keys() and all(
        count is ... or found[name] == count for name, count in expected.items()
    )


def check_collectives(
    mesh: Any, case: Case, sharded: str, implementation: str | None, names: tuple[str, ...] = ("forward", "dx", "dw")
) -> None:
    image, kernel = specs(case, sharded)
    out = {"forward": image, "dx": image, "dw": kernel}
    expected = truth(case, *case.operands())
    with jax.set_mesh(mesh):
        operands = [
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in zip(case.operands(), (image, kernel, image), strict=True)
        ]
        for name in names:
            f = maps(case.conv(implementation))[name]
            compiled = jax.jit(f, out_shardings=NamedSharding(mesh, out[name])).lower(*operands).compile()
            assert_close(compiled(*operands), expected[name], 1e-5, name)
            found = collectives(compiled)
            assert allowed(found, COLLECTIVES[sharded][name]), (
                f"{name}: {dict(found)}, expected {COLLECTIVES[sharded][name]}"
            )


@pytest.mark.parametrize(("lowering", "sharded"), SERVED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_collectives(case: Case, lowering: str, sharded: str) -> None:
    check_collectives(make_mesh(AxisType.Auto, lowering, sharded), case, sharded, lowering)


@pytest.mark.parametrize("sharded", COLLECTIVES)
@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_collectives_of_the_chosen_lowering(case: Case, sharded: str, automatic: Any) -> None:
    check_collectives(automatic, case, sharded, None)


@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_collectives_of_conv_over_two_axes(case: Case, automatic: Any) -> None:
    check_collectives(automatic, case, "batch+channels", "conv", ("forward", "dx"))


def test_conv_refuses_a_kernel_gradient_over_two_axes(automatic: Any, explicit: Any) -> None:
    case = CASES[0]
    for mesh in (automatic, explicit):
        with jax.set_mesh(mesh):
            x, w, g = (jax.device_put(a, NamedSharding(mesh, P())) for a in case.operands())
            with pytest.raises(ValueError, match="implementation='conv' cannot serve this kernel gradient"):
                jax.jit(maps(case.conv("conv"))["dw"]).lower(x, w, g)


@pytest.mark.parametrize("sharded", COLLECTIVES)
def test_a_mesh_that_only_the_arguments_know(sharded: str, automatic: Any) -> None:
    # No mesh is set: the program learns of it from its arguments, after tracing.
    case = CASES[4]
    image, kernel = specs(case, sharded)
    operands = [
        jax.device_put(a, NamedSharding(automatic, s))
        for a, s in zip(case.operands(), (image, kernel, image), strict=True)
    ]
    expected = truth(case, *case.operands())
    for name, f in maps(case.conv()).items():
        assert_close(jax.jit(f)(*operands), expected[name], 1e-5, name)


def test_collectives_of_a_replicated_product_are_counted(automatic: Any) -> None:
    # The counter counts: this gather cannot be avoided.
    x = jax.device_put(np.ones((4, 4), np.float32), NamedSharding(automatic, P("b", "c")))
    compiled = jax.jit(jnp.sin, out_shardings=NamedSharding(automatic, P())).lower(x).compile()
    assert collectives(compiled)["all-gather"] > 0


@pytest.mark.parametrize("sharded", ["batch", "channels", "batch+channels"])
def test_the_compiler_keeps_the_sharding(sharded: str, implementation: str, automatic: Any) -> None:
    # Nobody says how the results are sharded: propagation through the lowering must find it.
    for case in CASES[1::3]:
        image, kernel = specs(case, sharded)
        x, w = (
            jax.device_put(a, NamedSharding(automatic, s))
            for a, s in zip(case.operands(), (image, kernel), strict=False)
        )
        y = jax.jit(case.conv(implementation))(x, w)
        assert y.sharding.is_equivalent_to(NamedSharding(automatic, image), y.ndim), y.sharding
        assert_close(y, case.oracle.conv(*case.operands()[:2]), 1e-5)


def test_a_training_step_needs_one_all_reduce_per_parameter(automatic: Any) -> None:
    case = CASES[0]
    x, w, g = case.operands()
    b = case.draw((4,), 20)
    sharding = NamedSharding(automatic, P("b"))
    x, g = (jax.device_put(a, sharding) for a in (x, g))

    def step(w: Any, b: Any, x: Any, g: Any) -> Any:
        return jax.grad(lambda w, b: (case.conv(activation="relu")(x, w, b) * g).sum(), (0, 1))(w, b)

    compiled = jax.jit(step, out_shardings=NamedSharding(automatic, P())).lower(w, b, x, g).compile()
    assert set(collectives(compiled)) == {"all-reduce"}
    assert 1 <= collectives(compiled)["all-reduce"] <= 2
    dw, db = compiled(w, b, x, g)
    x, w, g = case.operands()
    g = g * (case.oracle.add_bias(case.oracle.conv(x, w), b) > 0)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)
    assert_close(db, g.sum((0, 1, 2)), 1e-5)


@pytest.mark.parametrize(("sharded", "expected"), [("batch", NONE), ("channels", {"all-reduce": 1})])
def test_collectives_of_separable(sharded: str, expected: dict[str, int], automatic: Any) -> None:
    case = CASES[3]
    image, kernel = specs(case, sharded)
    x, w, _ = case.operands()
    p = case.draw((1, 1, 8, 6), 20)
    at = lambda a, spec: jax.device_put(a, NamedSharding(automatic, spec))  # noqa: E731
    operands = at(x, image), at(w, kernel), at(p, P(None, None, kernel[2], None))
    f = lambda x, w, p: separable_conv(x, w, p, padding="same")  # noqa: E731
    compiled = jax.jit(f, out_shardings=NamedSharding(automatic, P(image[0]))).lower(*operands).compile()
    assert allowed(collectives(compiled), expected), collectives(compiled)
    assert_close(compiled(*operands), case.oracle.conv(x, w) @ widest(p)[0, 0], 1e-5)


# Explicit sharding: the shardings are part of the types.


def typed(mesh: Any, a: Any, spec: P) -> Any:
    return jax.device_put(jnp.asarray(a), NamedSharding(mesh, spec))


def spec_of(a: Any) -> tuple[Any, ...]:
    spec = tuple(jax.typeof(a).sharding.spec)
    return (*spec, *(None,) * (a.ndim - len(spec)))


@pytest.mark.parametrize(("lowering", "sharded"), SERVED_EXPLICITLY)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5]], ids=str)
def test_explicit(case: Case, lowering: str, sharded: str) -> None:
    image, kernel = specs(case, sharded)
    mesh = make_mesh(AxisType.Explicit, lowering, sharded)
    with jax.set_mesh(mesh):
        x, w, g = (typed(mesh, a, s) for a, s in zip(case.operands(), (image, kernel, image), strict=True))
        tx, tw, _ = (typed(mesh, a, s) for a, s in zip(case.operands(1), (image, kernel, image), strict=True))
        f = case.conv(lowering)
        types: dict[str, Any] = {}

        @jax.jit
        def run(x: Any, w: Any, g: Any, tx: Any, tw: Any) -> Any:
            y = f(x, w)
            dx, dw = jax.vjp(f, x, w)[1](g)
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


@pytest.mark.parametrize("padding", ["valid", "same", "reflect", "circular", 1])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_explicit_with_bias_activation_and_paddings(explicit: Any, data_format: str, padding: Any) -> None:
    first = data_format == "channels_first"
    case = Case(
        "explicit-bias",
        (4, 4, 6, 5) if first else (4, 6, 5, 4),
        (3, 3, 4, 2),
        {"padding": padding, "data_format": data_format},
    )
    image, kernel = specs(case, "batch+channels")
    x, w, g = case.operands()
    b = case.draw((8,), 20)
    with jax.set_mesh(explicit):
        sharded = [typed(explicit, a, s) for a, s in ((x, image), (w, kernel), (b, P("c")), (g, image))]
        f = case.conv(activation="relu")
        y = jax.jit(f)(*sharded[:3])
        dx, dw, db = jax.jit(lambda x, w, b, g: jax.vjp(f, x, w, b)[1](g))(*sharded)
    assert (spec_of(y), spec_of(dx), spec_of(dw), spec_of(db)) == (tuple(image), tuple(image), tuple(kernel), ("c",))
    before = case.oracle.add_bias(case.oracle.conv(x, w), b)
    g = g * (before > 0)
    assert_close(y, np.maximum(before, 0), 1e-5)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)
    assert_close(db, np.moveaxis(g, case.oracle.channel_axis, -1).reshape(-1, 8).sum(0), 1e-5)


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
    case = CASES[3]
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
    case = CASES[3]
    x, w, g = case.operands()
    image, kernel = specs(case, "batch+channels")
    with jax.set_mesh(explicit):
        xs, ws, gs = (typed(explicit, a, s) for a, s in ((x, image), (w, kernel), (g, image)))
        y, vjp = jax.vjp(case.conv(), xs, ws)
        dx, dw = vjp(gs)
    assert (spec_of(y), spec_of(dx), spec_of(dw)) == (tuple(image), tuple(image), tuple(kernel))
    assert_close(y, case.oracle.conv(x, w), 1e-5)
    assert_close(dx, case.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)


def test_explicit_vmap(implementation: str, explicit: Any) -> None:
    case = Case("explicit-vmap", (2, 5, 4, 2), (3, 3, 2, 2), {"padding": "same"})
    x, w = case.draw((4, *case.x), 0), case.draw((4, *case.kernel), 1)
    with jax.set_mesh(explicit):
        y = jax.jit(jax.vmap(case.conv(implementation)))(typed(explicit, x, P("b")), typed(explicit, w, P("b")))
        z = jax.jit(jax.vmap(case.conv(implementation), (0, None)))(
            typed(explicit, x, P("b")), typed(explicit, w[0], P())
        )
    assert spec_of(y)[0] == spec_of(z)[0] == "b"
    assert_close(y, np.stack([case.oracle.conv(a, b) for a, b in zip(x, w, strict=True)]), 1e-5)
    assert_close(z, np.stack([case.oracle.conv(a, w[0]) for a in x]), 1e-5)


def test_explicit_scan(implementation: str, explicit: Any) -> None:
    case = CASES[0]
    x, _, _ = case.operands()
    w = 0.5 * case.draw((3, *case.kernel), 20)
    image, _ = specs(case, "batch+channels")
    with jax.set_mesh(explicit):
        f = jax.jit(lambda x, w: jax.lax.scan(lambda y, k: (case.conv(implementation)(y, k), None), x, w)[0])
        y = f(typed(explicit, x, image), typed(explicit, w, P(None, None, None, "c", None)))
    for kernel in w:
        x = case.oracle.conv(x, kernel)
    assert spec_of(y) == tuple(image)
    assert_close(y, x, 1e-5)


def test_explicit_conflict_names_both_shardings(explicit: Any) -> None:
    case = CASES[0]
    x, w, _ = case.operands()
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=r"'b'.*'c'|'c'.*'b'"):
        case.conv()(typed(explicit, x, P(None, None, None, "b")), typed(explicit, w, P(None, None, "c", None)))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_explicit_separable(implementation: str, explicit: Any, data_format: str) -> None:
    first = data_format == "channels_first"
    case = Case(
        "explicit-separable", (4, 4, 6, 5) if first else (4, 6, 5, 4), (3, 3, 4, 2), {"data_format": data_format}
    )
    x, w, _ = case.operands()
    p = case.draw((1, 1, 8, 6), 20)
    axis = case.oracle.channel_axis
    exact = np.moveaxis(np.moveaxis(case.oracle.conv(x, w), axis, -1) @ widest(p)[0, 0], -1, axis)
    f = lambda *z, **kw: separable_conv(*z, data_format=data_format, implementation=implementation, **kw)  # noqa: E731
    out = P("b", "c", None, None) if first else P("b", None, None, "c")
    with jax.set_mesh(explicit):
        # Batch and filters sharded: known without help.
        y = jax.jit(f)(
            typed(explicit, x, P("b")), typed(explicit, w, P()), typed(explicit, p, P(None, None, None, "c"))
        )
        assert spec_of(y) == tuple(out)
        assert_close(y, exact, 1e-5)
        # The channels that are summed over are sharded: the caller says what becomes of the sum.
        image, kernel = specs(case, "batch+channels")
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
