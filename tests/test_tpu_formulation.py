"""The formulations that only TPU programs get, computed here: the same values, and what is not finite stays bounded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax._core.convolution import Convolution
from depthwise_jax._core.layout import Layout
from depthwise_jax._core.sharding import Partitioning
from depthwise_jax._core.window import Window
from depthwise_jax.lowering import Call, conv, taps


def call_of(direction: str, rank: int, k: int, dilation: int, channels: int, multiplier: int) -> Call:
    low = (k - 1) * dilation
    window = Window((k,) * rank, (1,) * rank, ((low, 0),) * rank, (dilation,) * rank)
    convolution = Convolution(window, Layout(rank, "channels_last"), (9,) * rank)
    known = Partitioning(batch=2)
    return Call(direction, convolution, "tpu", jnp.dtype("float32"), known, channels=channels, multiplier=multiplier)


def loops(x: np.ndarray, kernel: np.ndarray, dilation: int) -> np.ndarray:
    """The causal convolution in float64."""
    *size, channels, multiplier = kernel.shape
    y = np.zeros((*x.shape[:-1], channels * multiplier))
    for t in np.ndindex(*size):
        shift = [(k - 1 - i) * dilation for k, i in zip(size, t, strict=True)]
        if any(s >= n for s, n in zip(shift, x.shape[1:-1], strict=True)):
            continue
        to = (slice(None), *(slice(s, None) for s in shift))
        of = (slice(None), *(slice(0, n - s) for s, n in zip(shift, x.shape[1:-1], strict=True)))
        y[to] += (x[of][..., None] * kernel[t]).reshape(*x[of].shape[:-1], -1)
    return y


@pytest.mark.parametrize(
    ("lowering", "rank", "k", "dilation", "channels", "multiplier"),
    [
        (taps, 1, 4, 1, 5, 1),
        (taps, 1, 4, 2, 5, 1),
        (taps, 2, 3, 1, 5, 1),
        (conv, 2, 3, 1, 5, 2),
        (conv, 1, 3, 1, 256, 3),
    ],
)
def test_values(lowering: object, rank: int, k: int, dilation: int, channels: int, multiplier: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *(9,) * rank, channels))
    kernel = rng.normal(size=(*(k,) * rank, channels, multiplier))
    y = loops(x, kernel, dilation)
    g = rng.normal(size=y.shape)
    single = [jnp.asarray(a, "float32") for a in (x, kernel, g)]

    def run(direction: str, *operands: jax.Array) -> np.ndarray:
        call = call_of(direction, rank, k, dilation, channels, multiplier)
        return np.asarray(getattr(lowering, direction)(*operands, call))

    np.testing.assert_allclose(run("forward", *single[:2]), y, rtol=1e-4, atol=1e-4)
    # The transposes by their definition: <g, conv(a, b)> is linear in a and in b.
    for direction, operands, which in (
        ("input_grad", (single[2], single[1]), lambda e: loops(e, kernel, dilation)),
        ("kernel_grad", (single[0], single[2]), lambda e: loops(x, e, dilation)),
    ):
        result = run(direction, *operands)
        probe = rng.normal(size=result.shape)
        np.testing.assert_allclose((result * probe).sum(), (g * which(probe)).sum(), rtol=1e-3)


@pytest.mark.parametrize("direction", ["forward", "input_grad", "kernel_grad"])
def test_a_few_narrow_images_are_widened_once(direction: str) -> None:
    rng = np.random.default_rng(0)
    x, g = rng.integers(-4, 5, size=(2, 3, 9, 9, 5)).astype(float)
    kernel = rng.integers(-4, 5, size=(3, 3, 5, 1)).astype(float)
    call = call_of(direction, 2, 3, 1, 5, 1)
    call = dataclasses.replace(call, dtype=jnp.dtype("bfloat16"), partitioning=Partitioning(batch=3))
    assert taps.is_widened_once(call)
    assert not taps.is_widened_once(dataclasses.replace(call, dtype=jnp.dtype("float32")))
    operands = {"forward": (x, kernel), "input_grad": (g, kernel), "kernel_grad": (x, g)}[direction]
    result = getattr(taps, direction)(*(jnp.asarray(a, "bfloat16") for a in operands), call)
    # Sums of small integers are exact. The gradients are the transposes: <g, conv(a, b)> is linear in a and in b.
    if direction == "forward":
        np.testing.assert_array_equal(result, loops(x, kernel, 1))
        return
    probe = rng.integers(-4, 5, size=result.shape).astype(float)
    y = loops(probe, kernel, 1) if direction == "input_grad" else loops(x, probe, 1)
    assert (np.asarray(result, float) * probe).sum() == (g * y).sum()


def test_what_is_not_finite_stays_in_its_block_of_channels_and_at_its_positions() -> None:
    call = call_of("forward", 2, 3, 1, 256, 2)
    x = jnp.ones((2, 9, 9, 256)).at[0, 4, 4, 3].set(jnp.inf)
    y = conv.forward(x, jnp.ones((3, 3, 256, 2)), call)
    finite = np.isfinite(y)
    assert finite[..., 256:].all()
    assert finite[1].all()
    assert finite[0].all(-1).sum() == 81 - 9
    assert not finite[0, 4:7, 4:7, :256].any()


def test_a_kernel_that_is_not_finite_reaches_the_padding() -> None:
    call = call_of("forward", 1, 4, 1, 2, 1)
    y = taps.forward(jnp.ones((2, 9, 2)), jnp.ones((4, 2, 1)).at[0, 1].set(jnp.inf), call)
    assert np.isfinite(y[..., 0]).all()
    assert np.isnan(y[:, :3, 1]).all()
    assert np.isposinf(y[:, 3:, 1]).all()


def test_the_sum_of_a_slab_is_not_rounded() -> None:
    # In bfloat16 512 + 2 would be 512. Nine images are three slabs.
    g = jnp.asarray([512, 1, 1, -512, 1, 1, 0, 0, 0], "bfloat16").reshape(9, 1, 1)
    convolution = Convolution(Window((1,), (1,), ((0, 0),), (1,)), Layout(1, "channels_last"), (1,))
    call = Call("kernel_grad", convolution, "tpu", g.dtype, Partitioning(devices=2, several_axes=True, replicas=True))
    assert conv.kernel_grad(jnp.ones_like(g), g, call).item() == 4
