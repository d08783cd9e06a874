"""jit, eager calls, donation, rematerialisation and control flow: the same numbers, and what is kept and compiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import print_saved_residuals

from depthwise_jax import depthwise_conv
from depthwise_jax.lowering import Implementation
from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import CORE, Case

SQUARE = Case("square", (2, 5, 4, 3), (3, 3, 3, 1), {"padding": "same"})  # y has the shape of x


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that XLA compiles."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_jit_computes_what_eager_computes(case: Case, implementation: Implementation) -> None:
    x, w, g = case.operands()
    f = case.conv(implementation)
    eager = f(x, w), *maps.gradients(f)(x, w, g)
    jitted = jax.jit(f)(x, w), *jax.jit(maps.gradients(f))(x, w, g)
    for a, b in zip(eager, jitted, strict=True):
        assert_close(a, np.asarray(b, np.float64), 1e-6)


def test_an_eager_call_compiles_once(implementation: Implementation) -> None:
    # A shape of its own, which no other test has compiled.
    x, w = np.ones((1, 9, 7, 5), np.float32), np.ones((2, 3, 5, 1), np.float32)
    b, g = np.ones(5, np.float32), np.ones((1, 8, 5, 5), np.float32)
    pullback = maps.gradients(partial(depthwise_conv, implementation=implementation))
    with count_compilations() as first:
        depthwise_conv(x, w, b, activation="relu", implementation=implementation)
        pullback(x, w, g)
    with count_compilations() as second:
        depthwise_conv(2 * x, w, b, activation="relu", implementation=implementation)
        pullback(2 * x, w, g)
    assert first  # the counter counts
    assert not second


def test_jit_traces_once_for_equal_geometry(implementation: Implementation) -> None:
    traces = []

    @jax.jit
    def f(x: Any, w: Any) -> Any:
        traces.append(None)
        return depthwise_conv(x, w, strides=(1, 1), implementation=implementation)

    x, w, _ = CORE[0].operands()
    f(x, w)
    f(2 * x, w)
    assert len(traces) == 1


def test_numpy_jax_and_list_settings_are_the_same_call(implementation: Implementation) -> None:
    x, w, _ = CORE[2].operands()
    expected = depthwise_conv(x, w, strides=2, padding=((1, 2), (0, 1)), implementation=implementation)
    padding: Any = [[1, 2], (0, np.int32(1))]
    all_strides: list[Any] = [(2, 2), [2, 2], np.int64(2), np.array([2, 2])]
    for strides in all_strides:
        actual = depthwise_conv(jnp.asarray(x), w, strides=strides, padding=padding, implementation=implementation)
        np.testing.assert_array_equal(actual, expected)


def test_donation(implementation: Implementation) -> None:
    x, w, _ = SQUARE.operands()
    donated = jnp.asarray(x)
    y = jax.jit(SQUARE.conv(implementation), donate_argnums=0)(donated, w)
    assert donated.is_deleted()
    assert_close(y, SQUARE.oracle.conv(x, w), 1e-5)


def test_donation_of_what_a_training_step_replaces(implementation: Implementation) -> None:
    x, w, g = SQUARE.operands()

    @jax.jit(donate_argnums=0)
    def step(w: Any, x: Any) -> Any:
        return w - 0.5 * jax.grad(lambda w: (SQUARE.conv(implementation)(x, w) * g).sum())(w)

    donated = jnp.asarray(w)
    updated = step(donated, x)
    assert donated.is_deleted()
    assert_close(updated, w - 0.5 * SQUARE.oracle.kernel_grad(x, g), 1e-5)


POLICIES: dict[str, Any] = {
    "nothing": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "named": jax.checkpoint_policies.save_only_these_names("depthwise_conv"),
    "offloaded": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["depthwise_conv"],
        names_which_can_be_offloaded=[],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_remat(implementation: Implementation, policy: str) -> None:
    x, w, g = SQUARE.operands()
    f = jax.checkpoint(lambda x, w: jnp.sin(SQUARE.conv(implementation)(x, w)), policy=POLICIES[policy])
    dx, dw = jax.jit(maps.gradients(f))(x, w, g)
    g = np.cos(SQUARE.oracle.conv(x, w)) * g
    assert_close(dx, SQUARE.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, SQUARE.oracle.kernel_grad(x, g), 1e-5)


def forward_calls(policy: Any, conv: Callable[..., Any]) -> int:
    """How often the value of the convolution is computed in the gradient of sin(sin(conv)) under a policy."""
    x, w, _ = SQUARE.operands()
    f = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(conv(x, w))).sum(), policy=policy)
    jaxpr = str(jax.make_jaxpr(jax.grad(f, (0, 1)))(x, w))
    return len(re.findall(r"(?<![\w_])depthwise_conv\[", jaxpr))


def test_the_policy_by_name_saves_the_output(implementation: Implementation) -> None:
    # lax's convolution is saved under dots_saveable, which knows its primitive; ours is saved by its name.
    conv = SQUARE.conv(implementation)
    assert forward_calls(jax.checkpoint_policies.save_only_these_names("depthwise_conv"), conv) == 1
    assert forward_calls(jax.checkpoint_policies.everything_saveable, conv) == 1
    assert forward_calls(None, conv) == 2
    assert forward_calls(jax.checkpoint_policies.dots_saveable, conv) == 2


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_policy_by_name_knows_a_call_with_bias_and_activation(
    implementation: Implementation, activation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    x, w, _ = SQUARE.operands()
    b = SQUARE.draw((3,), 20)
    policy = jax.checkpoint_policies.save_only_these_names("depthwise_conv")
    f = jax.checkpoint(
        lambda x, w, b: jnp.sin(SQUARE.conv(implementation, activation=activation)(x, w, b)).sum(), policy=policy
    )
    print_saved_residuals(f, x, w, b)
    assert "named 'depthwise_conv'" in capsys.readouterr().out


def test_scan_over_layers(implementation: Implementation) -> None:
    # Five layers with their kernels stacked, value and gradients through the scan.
    x, _, g = SQUARE.operands()
    w = 0.5 * SQUARE.draw((5, *SQUARE.kernel), 20)
    f = SQUARE.conv(implementation)

    def network(x: Any, w: Any) -> Any:
        return lax.scan(lambda y, kernel: (f(y, kernel), None), x, w)[0]

    y, dx, dw = jax.jit(maps.value_and_gradients(network))(x, w, g)
    activations: list[Any] = [x]
    for kernel in w:
        activations.append(SQUARE.oracle.conv(activations[-1], kernel))
    cotangent: Any = g
    expected_dw = []
    for kernel, activation in zip(w[::-1], activations[-2::-1], strict=True):
        expected_dw.append(SQUARE.oracle.kernel_grad(activation, cotangent))
        cotangent = SQUARE.oracle.input_grad(cotangent, kernel)
    assert_close(y, activations[-1], 1e-5)
    assert_close(dx, cotangent, 1e-5)
    assert_close(dw, np.stack(expected_dw[::-1]), 1e-5)


def test_scan_with_remat_and_a_shared_kernel(implementation: Implementation) -> None:
    x, w, _ = SQUARE.operands()
    w = 0.5 * w
    f = SQUARE.conv(implementation)

    @jax.jit
    def run(w: Any, tw: Any) -> Any:
        steps = lambda w: lax.scan(jax.checkpoint(lambda y, _: (jnp.sin(f(y, w)), None)), x, length=3)[0]  # noqa: E731
        return jax.jvp(steps, (w,), (tw,))[1]

    y, ty, tw = x.astype(np.float64), np.zeros(x.shape), SQUARE.draw(w.shape, 20)
    for _ in range(3):
        before = SQUARE.oracle.conv(y, w)
        ty = np.cos(before) * (SQUARE.oracle.conv(ty, w) + SQUARE.oracle.conv(y, tw))
        y = np.sin(before)
    assert_close(run(w, tw), ty, 1e-5)


def test_loops_and_branches(implementation: Implementation) -> None:
    x, w, _ = SQUARE.operands()
    f = SQUARE.conv(implementation)

    @jax.jit
    def run(x: Any, w: Any, n: Any) -> Any:
        y = lax.fori_loop(0, n, lambda _, y: f(y, w), x)  # a while loop: n is not known
        return lax.cond(n > 1, lambda: f(y, w), lambda: y)

    once = SQUARE.oracle.conv(x, w)
    assert_close(run(x, w, 1), once, 1e-5)
    assert_close(run(x, w, 2), SQUARE.oracle.conv(SQUARE.oracle.conv(once, w), w), 1e-5)


def test_under_jaxs_strictest_settings(implementation: Implementation) -> None:
    x, w, g = SQUARE.operands()
    b = SQUARE.draw((3,), 20)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.checking_leaks(),
    ):
        f = jax.jit(maps.gradients(SQUARE.conv(implementation, activation="relu")))
        dx, dw, db = f(x, w, b, g)
    g = g * (SQUARE.oracle.add_bias(SQUARE.oracle.conv(x, w), b) > 0)
    assert_close(dx, SQUARE.oracle.input_grad(g, w), 1e-5)
    assert_close(dw, SQUARE.oracle.kernel_grad(x, g), 1e-5)
    assert_close(db, g.sum((0, 1, 2)), 1e-5)


def test_disable_jit(implementation: Implementation) -> None:
    x, w, _ = SQUARE.operands()
    with jax.disable_jit():
        assert_close(SQUARE.conv(implementation)(x, w), SQUARE.oracle.conv(x, w), 1e-5)


def test_shapes_without_data(implementation: Implementation) -> None:
    for case in CORE:
        x, w, _ = (jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in case.operands())
        y = jax.eval_shape(case.conv(implementation), x, w)
        assert (y.shape, y.dtype) == (case.oracle.y_shape, jnp.bfloat16)


def test_an_output_of_known_type_is_not_weak(implementation: Implementation) -> None:
    y = depthwise_conv(jnp.full((1, 3, 1), 2.0), jnp.ones((2, 1, 1)), implementation=implementation)
    assert not y.weak_type


def test_repeated_kernel_gradients_are_equal_to_the_bit(implementation: Implementation) -> None:
    x, w, g = Case("repeat", (8, 16, 16, 8), (3, 3, 8, 1), {"padding": "same"}).operands()
    f = jax.jit(maps.gradients(partial(depthwise_conv, padding="same", implementation=implementation)))
    first = np.asarray(f(x, w, g)[1])
    for _ in range(5):
        np.testing.assert_array_equal(f(x, w, g)[1], first)
