"""What the compiler adds to communicate: the collectives of compiled programs, against a table, on eight devices.

Each program holds the forward map and both transposes, of operands of their own, so that none shares a halo with
another; its totals are the sums of the table's. The kernel gradient cannot do without its all-reduce, so the other maps
have none.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from depthwise_jax import depthwise_conv, separable_conv
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import PLAIN, Case, label
from tests.support.meshes import make_mesh, specs
from tests.support.oracle import widest
from workloads.hlo import collectives

CASES = [
    Case(
        f"{rank}d-m{multiplier}-stride{stride}",
        (4, *(16, 4, 3)[:rank], 4),
        (*(3, 2, 1)[:rank], 4, multiplier),
        {"padding": "same", "strides": stride},
    )
    for rank, multiplier, stride in itertools.product((1, 2, 3), (1, 2), (1, 2))
]
FIRST = Case("2d-first", (4, 4, 16, 4), (3, 2, 4, 2), {"padding": "same", "data_format": "channels_first"})

# For each way to shard the data over a mesh: all-reduces, where a sum runs over what several devices hold.
ALL_REDUCES = {
    "batch": {"forward": 0, "dx": 0, "dw": 1, "db": 1, "separable": 0},
    "channels": {"forward": 0, "dx": 0, "dw": 0, "db": 0, "separable": 1},  # separable_conv contracts the channels
    "batch+channels": {"forward": 0, "dx": 0, "dw": 1, "db": 1, "separable": 1},
    "rows": {"forward": 0, "dx": 0, "dw": 1, "db": 1, "separable": 0},
}
# For sharded rows also messages between neighbours, by stride, for a window of three: the halo takes one each way, and
# one in all at stride 2. In dx and dw conv sends as many for each kernel of a channel.
PERMUTES = {1: {"forward": 2, "dx": 2, "dw": 2}, 2: {"forward": 1, "dx": 1, "dw": 1}}


def mesh_for(axis_type: AxisType, sharded: str, axes: int = 2) -> jax.sharding.Mesh:
    """Eight devices, all along the rows or four by two; or four in one axis."""
    sizes = {"b": 8} if sharded == "rows" else {"b": 4, "c": 2} if axes == 2 else {sharded[0]: 4}
    return make_mesh(axis_type, **sizes)


def compiled(mesh: Any, f: Any, operands: Any, out: Any) -> tuple[Any, Counter[str]]:
    """What f gives of (array, spec) pairs in the shardings `out`, and its collectives."""
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in operands]
        out_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out)
        program = jax.jit(f, out_shardings=out_shardings).lower(*arrays).compile()
        return program(*arrays), collectives(str(program.as_text()))


@pytest.mark.parametrize("sharded", ALL_REDUCES)
@pytest.mark.parametrize(
    ("case", "lowering"),
    # All of two axes; of one and three that whose multiplier and stride differ from 1.
    [*itertools.product([CASES[3], *CASES[4:8], CASES[11], FIRST], PLAIN), (CASES[5], None)],
    ids=str,
)
def test_depthwise(case: Case, lowering: str | None, sharded: str) -> None:
    check_depthwise(case, lowering, sharded, mesh_for(AxisType.Auto, sharded))


@pytest.mark.parametrize("sharded", ALL_REDUCES)
@pytest.mark.parametrize(
    ("case", "lowering"),
    # The types of an explicit mesh say what XLA would find out: both orders of the axes, and what each stride reads.
    [*itertools.product([CASES[5], CASES[6], FIRST], PLAIN), (CASES[5], None)],
    ids=str,
)
def test_depthwise_on_an_explicit_mesh(case: Case, lowering: str | None, sharded: str) -> None:
    check_depthwise(case, lowering, sharded, mesh_for(AxisType.Explicit, sharded))


@pytest.mark.parametrize("sharded", ["batch", "channels"])
@pytest.mark.parametrize("case", [*CASES[4:8], FIRST], ids=str)
def test_conv_over_one_axis(case: Case, sharded: str) -> None:
    # Its kernel gradient is a convolution there, and on a mesh of several axes another one.
    check_depthwise(case, "conv", sharded, mesh_for(AxisType.Auto, sharded, axes=1))


@pytest.mark.parametrize("sharded", ALL_REDUCES)
@pytest.mark.parametrize("case", [*CASES[4:8], FIRST], ids=str)
def test_in_sharding(case: Case, sharded: str) -> None:
    told = case.conv(in_sharding=specs(case, sharded)[0])
    check_depthwise(case, None, sharded, mesh_for(AxisType.Auto, sharded), told)


@pytest.mark.parametrize("sharded", ["batch", "channels", "batch+channels"])
@pytest.mark.parametrize("case", [*CASES[4:8], FIRST], ids=str)
def test_shard_map(case: Case, sharded: str) -> None:
    mesh = mesh_for(AxisType.Auto, sharded)
    image, kernel, _ = specs(case, sharded)
    f = jax.shard_map(case.conv(), mesh=mesh, in_specs=(image, kernel), out_specs=image)
    check_depthwise(case, None, sharded, mesh, f)


@pytest.mark.parametrize("case", CASES[4:8], ids=str)
def test_shard_map_over_rows(case: Case) -> None:
    # The halo is the caller's: one row from either neighbour at stride 1, one from the next at stride 2.
    mesh = mesh_for(AxisType.Auto, "rows")
    image, kernel, _ = specs(case, "rows")
    downwards, upwards = [(i, i + 1) for i in range(7)], [(i + 1, i) for i in range(7)]
    stride = case.oracle.strides[0]

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        above = [jax.lax.ppermute(x[:, -1:], "b", downwards)] if stride == 1 else []
        rows = jnp.concatenate([*above, x, jax.lax.ppermute(x[:, :1], "b", upwards)], 1)
        return depthwise_conv(rows, w, strides=stride, padding=((0, 0), (0, 2 - stride)))

    f = jax.shard_map(local, mesh=mesh, in_specs=(image, kernel), out_specs=image)
    check_depthwise(case, None, "rows", mesh, f)


def check_depthwise(case: Case, lowering: str | None, sharded: str, mesh: jax.sharding.Mesh, f: Any = None) -> None:
    image, kernel, _ = specs(case, sharded)
    f, oracle = f or case.conv(lowering), case.oracle
    (x, w, _), (_, w2, g2), (x3, _, g3) = (case.operands(stream) for stream in range(3))

    def three(x: Any, w: Any, g2: Any, w2: Any, x3: Any, g3: Any) -> tuple[Any, ...]:
        dx = jax.linear_transpose(lambda x: f(x, w2), x)(g2)[0]
        dw = jax.linear_transpose(lambda w: f(x3, w), w)(g3)[0]
        return f(x, w), dx, dw

    operands = [(x, image), (w, kernel), (g2, image), (w2, kernel), (x3, image), (g3, image)]
    (y, dx, dw), found = compiled(mesh, three, operands, (image, image, kernel))
    assert_close(y, oracle.conv(x, w), 1e-5, "forward")
    assert_close(dx, oracle.input_grad(g2, w2), 1e-5, "dx")
    assert_close(dw, oracle.kernel_grad(x3, g3), 1e-5, "dw")
    sums, messages = ALL_REDUCES[sharded], PERMUTES[oracle.strides[0]]
    expected = Counter({"all-reduce": sums["forward"] + sums["dx"] + sums["dw"]})
    if sharded == "rows":
        times = oracle.multiplier if lowering == "conv" else 1
        expected["collective-permute"] = messages["forward"] + times * (messages["dx"] + messages["dw"])
    assert found == +expected


@pytest.mark.parametrize("sharded", ALL_REDUCES)
@pytest.mark.parametrize(
    ("case", "axis_type"),
    [*((case, AxisType.Auto) for case in (*CASES[1::4], FIRST)), (CASES[5], AxisType.Explicit)],
    ids=label,
)
def test_bias_gradient(case: Case, sharded: str, axis_type: AxisType) -> None:
    image, kernel, bias = specs(case, sharded)
    x, w, g = case.operands()
    b = case.draw((case.oracle.channels * case.oracle.multiplier,), 20)
    operands = [(x, image), (w, kernel), (b, bias), (g, image)]
    db, found = compiled(mesh_for(axis_type, sharded), maps.db(case.conv()), operands, bias)
    assert_close(db, np.moveaxis(g, case.oracle.channel_axis, -1).reshape(-1, b.size).sum(0), 1e-5)
    assert found == +Counter({"all-reduce": ALL_REDUCES[sharded]["db"]})


@pytest.mark.parametrize("sharded", ALL_REDUCES)
@pytest.mark.parametrize(
    ("case", "axis_type"),
    [
        *((case, AxisType.Auto) for case in (*CASES[2::4], CASES[7], FIRST)),
        *((case, AxisType.Explicit) for case in (CASES[7], FIRST)),
    ],
    ids=label,
)
def test_separable(case: Case, sharded: str, axis_type: AxisType) -> None:
    image, kernel, _ = specs(case, sharded)
    axis = case.oracle.channel_axis
    entries = list(image)
    entries[axis] = None
    out = P(*entries)  # the contracted channels leave no sharding behind
    x, w, _ = case.operands()
    channels = case.oracle.channels * case.oracle.multiplier
    p = case.draw((*(1,) * (len(case.kernel) - 2), channels, 6), 20)
    told: dict[str, Any] = {"out_sharding": out} if axis_type == AxisType.Explicit else {}
    f = lambda x, w, p: separable_conv(x, w, p, **case.geometry, **told)  # noqa: E731
    operands = [(x, image), (w, kernel), (p, P(*kernel[:-2], kernel[-2], None))]
    y, found = compiled(mesh_for(axis_type, sharded), f, operands, out)
    contracted = np.moveaxis(case.oracle.conv(x, w), axis, -1) @ widest(p).reshape(channels, 6)
    assert_close(y, np.moveaxis(contracted, -1, axis), 1e-5)
    messages = PERMUTES[case.oracle.strides[0]]["forward"] if sharded == "rows" else 0
    assert found == +Counter({"all-reduce": ALL_REDUCES[sharded]["separable"], "collective-permute": messages})


def test_a_training_step_needs_one_all_reduce_per_parameter() -> None:
    case = CASES[4]
    x, w, g = case.operands()
    b = case.draw((4,), 20)

    def step(w: Any, b: Any, x: Any, g: Any) -> Any:
        return jax.grad(lambda w, b: (case.conv(activation="relu")(x, w, b) * g).sum(), (0, 1))(w, b)

    operands = [(w, P()), (b, P()), (x, P("b")), (g, P("b"))]
    (dw, db), found = compiled(mesh_for(AxisType.Auto, "batch"), step, operands, (P(), P()))
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"] <= 2  # the compiler may combine them
    g = g * (case.oracle.add_bias(case.oracle.conv(x, w), b) > 0)
    assert_close(dw, case.oracle.kernel_grad(x, g), 1e-5)
    assert_close(db, g.sum((0, 1, 2)), 1e-5)


def test_the_counter_counts() -> None:
    # This gather cannot be avoided.
    mesh = mesh_for(AxisType.Auto, "batch")
    _, found = compiled(mesh, jnp.sin, [(np.ones((4, 4), np.float32), P("b", "c"))], P())
    assert found["all-gather"] > 0
