"""vmap: all combinations of batched operands of the three maps, in any place, against a loop over the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import depthwise_conv, separable_conv
from depthwise_jax.lowering import Implementation
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import CORE, Case
from tests.support.oracle import widest

SAMPLES = 3


def stacked(case: Case, batched: Sequence[bool]) -> tuple[np.ndarray, ...]:
    """x, kernel and cotangent, those that are batched with a leading axis of samples."""
    samples = [case.operands(stream) for stream in range(SAMPLES)]
    return tuple(
        np.stack(parts) if b else parts[0] for parts, b in zip(zip(*samples, strict=True), batched, strict=True)
    )


def loop(f: Callable[..., np.ndarray], operands: Sequence[np.ndarray], batched: Sequence[bool]) -> np.ndarray:
    """f sample by sample, stacked in front."""
    return np.stack([f(*(a[i] if b else a for a, b in zip(operands, batched, strict=True))) for i in range(SAMPLES)])


@pytest.mark.parametrize(
    ("case", "batched"),
    [(case, (True, True)) for case in CORE]
    + [(case, batched) for case in (CORE[1], CORE[3], CORE[5]) for batched in ((True, False), (False, True))],
    ids=str,
)
def test_value_and_vjp(case: Case, implementation: Implementation, batched: tuple[bool, bool]) -> None:
    operands = stacked(case, (*batched, True))
    in_axes = tuple(0 if b else None for b in (*batched, True))
    f, oracle = case.conv(implementation), case.oracle

    @jax.jit
    def run(x: Any, w: Any, g: Any) -> Any:
        return jax.vmap(f, in_axes[:2])(x, w), *jax.vmap(maps.gradients(f), in_axes)(x, w, g)

    y, dx, dw = run(*operands)
    assert_close(y, loop(oracle.conv, operands[:2], batched), 1e-5, "value")
    assert_close(dx, loop(lambda x, w, g: oracle.input_grad(g, w), operands, (*batched, True)), 1e-5, "dx")
    assert_close(dw, loop(lambda x, w, g: oracle.kernel_grad(x, g), operands, (*batched, True)), 1e-5, "dw")


@pytest.mark.parametrize(
    "batched", [(True, False, False), (False, True, False), (True, True, False)], ids=["x", "kernel", "both"]
)
@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_vjp_with_one_cotangent_for_all(
    case: Case, implementation: Implementation, batched: tuple[bool, bool, bool]
) -> None:
    operands = stacked(case, batched)
    f, oracle = case.conv(implementation), case.oracle
    in_axes = tuple(0 if b else None for b in batched)
    dx, dw = jax.jit(jax.vmap(maps.gradients(f), in_axes))(*operands)
    assert_close(dx, loop(lambda x, w, g: oracle.input_grad(g, w), operands, batched), 1e-5, "dx")
    assert_close(dw, loop(lambda x, w, g: oracle.kernel_grad(x, g), operands, batched), 1e-5, "dw")


@pytest.mark.parametrize("batched", [(True, False), (False, True), (True, True)], ids=["x", "kernel", "both"])
@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_jvp(case: Case, implementation: Implementation, batched: tuple[bool, bool]) -> None:
    z = stacked(case, (*batched, True))[:2]
    t = tuple(a[::-1] if b else 2 * a for a, b in zip(z, batched, strict=True))
    f, oracle = case.conv(implementation), case.oracle
    axes = tuple(0 if b else None for b in batched)
    tangent = jax.jit(jax.vmap(lambda x, w, tx, tw: jax.jvp(f, (x, w), (tx, tw))[1], axes * 2))(*z, *t)
    assert_close(
        tangent, loop(lambda x, w, tx, tw: oracle.conv(tx, w) + oracle.conv(x, tw), (*z, *t), batched * 2), 1e-5
    )


@pytest.mark.parametrize(
    ("case", "x_axis", "w_axis", "out_axis"),
    [
        (CORE[1], 2, None, -1),
        (CORE[1], -1, None, 0),
        (CORE[1], None, 1, 1),
        (CORE[1], None, -1, -2),
        (CORE[1], 3, 2, -1),
        (CORE[1], -1, -1, -1),
        (CORE[3], 1, None, 2),
        (CORE[3], None, 2, 3),
        (CORE[3], -2, 0, 4),
    ],
    ids=str,
)
def test_axes_in_odd_places(
    case: Case, implementation: Implementation, x_axis: int | None, w_axis: int | None, out_axis: int
) -> None:
    batched = (x_axis is not None, w_axis is not None)
    x, w, g = stacked(case, (*batched, True))
    oracle = case.oracle
    moved = tuple(a if axis is None else np.moveaxis(a, 0, axis) for a, axis in ((x, x_axis), (w, w_axis), (g, 1)))
    f = case.conv(implementation)

    @jax.jit
    def run(x: Any, w: Any, g: Any) -> Any:
        gradients = jax.vmap(maps.gradients(f), (x_axis, w_axis, 1), (-1, 1))
        return jax.vmap(f, (x_axis, w_axis), out_axis)(x, w), *gradients(x, w, g)

    y, dx, dw = run(*moved)
    assert_close(np.moveaxis(y, out_axis, 0), loop(oracle.conv, (x, w), batched), 1e-5, "value")
    assert_close(
        np.moveaxis(dx, -1, 0), loop(lambda x, w, g: oracle.input_grad(g, w), (x, w, g), (*batched, True)), 1e-5, "dx"
    )
    assert_close(
        np.moveaxis(dw, 1, 0), loop(lambda x, w, g: oracle.kernel_grad(x, g), (x, w, g), (*batched, True)), 1e-5, "dw"
    )


def test_in_axes_that_cover_a_tree(implementation: Implementation) -> None:
    case = CORE[1]
    x, w, _ = stacked(case, (True, True, True))
    params = {"kernel": w, "bias": case.draw((6,), 20)}
    f = lambda params, x: case.conv(implementation)(x, params["kernel"], params["bias"])  # noqa: E731
    y = jax.vmap(f, in_axes=({"kernel": 0, "bias": None}, 0))(params, x)
    expected = loop(lambda x, w: case.oracle.add_bias(case.oracle.conv(x, w), params["bias"]), (x, w), (True, True))
    assert_close(y, expected, 1e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "batched", [(True, False, False), (False, False, True), (False, True, True), (True, True, True)], ids=str
)
def test_bias_and_activation(implementation: Implementation, data_format: str, batched: tuple[bool, ...]) -> None:
    shape = (2, 4, 3, 2) if data_format == "channels_last" else (2, 2, 4, 3)
    case = Case("vmap-bias", shape, (3, 2, 2, 2), {"padding": "same", "data_format": data_format})
    x, w, _ = stacked(case, (*batched[:2], False))
    b = np.stack([case.draw((4,), 20 + i) for i in range(SAMPLES)]) if batched[2] else case.draw((4,), 20)
    in_axes = tuple(0 if b else None for b in batched)
    fs = [jax.vmap(case.conv(implementation, activation=a), in_axes) for a in ("relu", "tanh")]
    before = loop(lambda x, w, b: case.oracle.add_bias(case.oracle.conv(3 * x, w), b), (x, w, b), batched)
    relu, tanh = jax.jit(lambda *z: [f(*z) for f in fs])(3 * x, w, b)
    assert_close(relu, np.maximum(before, 0), 1e-5)
    assert_close(tanh, np.tanh(before), 1e-5)


@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_nested(case: Case, implementation: Implementation) -> None:
    # An outer product of samples: every x with every kernel.
    x, w, _ = stacked(case, (True, True, True))
    f = jax.vmap(jax.vmap(case.conv(implementation), (None, 0)), (0, None))
    expected = np.stack([np.stack([case.oracle.conv(a, b) for b in w]) for a in x])
    assert_close(jax.jit(f)(x, w), expected, 1e-5)


@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_grad_of_vmap(case: Case, implementation: Implementation) -> None:
    x, w, g = stacked(case, (True, False, True))
    oracle = case.oracle
    loss = lambda x, w: (jax.vmap(case.conv(implementation), (0, None))(x, w) * g).sum()  # noqa: E731
    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    assert_close(dx, loop(lambda x, w, g: oracle.input_grad(g, w), (x, w, g), (True, False, True)), 1e-5)
    assert_close(dw, sum(oracle.kernel_grad(a, b) for a, b in zip(x, g, strict=True)), 1e-5)


def test_gradients_per_example(implementation: Implementation) -> None:
    # The use that asks most of dw: one kernel gradient per example of a batch.
    case = Case("per-example", (1, 5, 4, 3), (3, 3, 3, 1), {"padding": "same"})
    x, w, g = stacked(case, (True, False, True))
    grads = jax.jit(jax.vmap(jax.grad(lambda w, x, g: (case.conv(implementation)(x, w) * g).sum()), (None, 0, 0)))(
        w, x, g
    )
    assert_close(grads, loop(case.oracle.kernel_grad, (x, g), (True, True)), 1e-5)


def test_hessian_vector_products(implementation: Implementation) -> None:
    case = CORE[1]
    x, w, _ = stacked(case, (True, True, True))
    f = lambda w, x: (case.conv(implementation)(x, w) ** 2).sum() / 2  # noqa: E731
    products = jax.jit(jax.vmap(lambda w, x, u: jax.jvp(lambda w: jax.grad(f)(w, x), (w,), (u,))[1]))(w, x, w[::-1])
    expected = [case.oracle.kernel_grad(a, case.oracle.conv(a, u)) for a, u in zip(x, w[::-1], strict=True)]
    assert_close(products, np.stack(expected), 1e-5)


@pytest.mark.parametrize("samples", [0, 1])
def test_few_samples(implementation: Implementation, samples: int) -> None:
    case = CORE[1]
    x, w, _ = (a[:samples] for a in stacked(case, (True, True, True)))
    for axes in ((0, None), (None, 0), (0, 0)):
        y = jax.vmap(case.conv(implementation), axes)(
            *(a if axis == 0 else np.ones(a.shape[1:], a.dtype) for a, axis in zip((x, w), axes, strict=True))
        )
        assert y.shape == (samples, *case.oracle.y_shape)


def test_paddings_that_read_the_input_again(implementation: Implementation) -> None:
    for padding in ("reflect", "circular", "edge"):
        case = Case(f"vmap-{padding}", (2, 4, 5, 2), (3, 3, 2, 1), {"padding": padding})
        x, w, _ = stacked(case, (True, True, True))
        assert_close(
            jax.vmap(case.conv(implementation), (2, 1))(np.moveaxis(x, 0, 2), np.moveaxis(w, 0, 1)),
            loop(case.oracle.conv, (x, w), (True, True)),
            1e-5,
        )


def test_no_batch_axis_inside(implementation: Implementation) -> None:
    case = Case("vmap-no-batch", (5, 4, 3), (3, 3, 3, 1))
    x, w, _ = stacked(case, (True, True, True))
    y = jax.vmap(lambda x, w: depthwise_conv(x, w, implementation=implementation))(x, w)
    assert_close(y, loop(case.oracle.conv, (x, w), (True, True)), 1e-5)


def test_half_precision(implementation: Implementation) -> None:
    case = CORE[1]
    x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in stacked(case, (True, True, True)))
    y = jax.vmap(case.conv(implementation))(x, w)
    exact = loop(case.oracle.conv, (widest(x), widest(w)), (True, True))
    assert y.dtype == jnp.bfloat16
    assert np.all(np.abs(widest(y) - exact) <= 2.0**-8 * np.abs(exact) + 1e-6 * np.max(np.abs(exact)))


def test_separable(implementation: Implementation) -> None:
    case = Case("vmap-separable", (2, 5, 4, 3), (3, 3, 3, 2))
    x, w, _ = stacked(case, (True, True, True))
    p = np.stack([case.draw((1, 1, 6, 4), 20 + i) for i in range(SAMPLES)])
    y = jax.jit(jax.vmap(lambda x, w, p: separable_conv(x, w, p, implementation=implementation), (0, 0, 2)))(
        x, w, np.moveaxis(p, 0, 2)
    )
    assert_close(y, loop(lambda x, w, p: case.oracle.conv(x, w) @ widest(p)[0, 0], (x, w, p), (True, True, True)), 1e-5)
