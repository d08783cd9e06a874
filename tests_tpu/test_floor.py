"""The comparison of formulations: what counts as the same program, and the stand-in that it compares with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import pallas_causal
from benchmarks.tpu_floor import Case, digest
from benchmarks.tpu_schedule import lower

IMAGE = Case((8, 28, 28, 128), (5, 5))


def digest_of(case: Case, direction: str, by: str) -> str:
    function, shapes = case.task(direction, "bfloat16", by)
    return digest(lower(function, *shapes))


@pytest.mark.parametrize("direction", ["forward", "dx", "dw", "dx+dw"])
def test_a_convolution_is_the_program_of_flax_and_a_sum_is_not(direction: str) -> None:
    conv, flax, taps = (digest_of(IMAGE, direction, by) for by in ("conv", "flax", "taps"))
    assert conv == flax != taps


def test_what_a_digest_tells_apart() -> None:
    square, column = jax.ShapeDtypeStruct((8, 8), "float32"), jax.ShapeDtypeStruct((8, 1, 8), "float32")
    plain = digest(lower(lambda a: a - a * 2, square))
    assert plain == digest(lower(lambda a: a.reshape(8, 1, 8).transpose(1, 0, 2)[0] - a * 2, square))
    for other in (lambda a: a * 2 - a, lambda a: a - a.T * 2, lambda a: a - a * 3, lambda a: a[:7] - a[:7] * 2):
        assert plain != digest(lower(other, square))
    moved = digest(lower(lambda a: jnp.exp(a.transpose(1, 0, 2)), column))
    assert moved != digest(lower(lambda a: jnp.exp(a.transpose(2, 1, 0)), column))


def test_the_stand_in_is_a_causal_convolution() -> None:
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 2, 24, 256))
    kernel = rng.normal(size=(4, 256))
    y, dx, dw = np.zeros_like(x), np.zeros_like(x), np.zeros_like(kernel)
    for t, i in np.ndindex(4, 24):
        if i + t >= 3:
            y[:, i] += x[:, i + t - 3] * kernel[t]
            dx[:, i + t - 3] += g[:, i] * kernel[t]
            dw[t] += (x[:, i + t - 3] * g[:, i]).sum(0)
    with pltpu.force_tpu_interpret_mode():
        single = (jnp.asarray(x, "float32"), jnp.asarray(kernel, "float32"))
        value, vjp = jax.vjp(pallas_causal.causal, *single)
        gradients = vjp(jnp.asarray(g, "float32"))
    for found, expected in zip((value, *gradients), (y, dx, dw), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
