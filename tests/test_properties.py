"""Random calls: the oracle's numbers for value, dx and dw, or the oracle's refusal."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given, settings

from tests.support import maps
from tests.support.assertions import assert_close
from tests.support.cases import LOWERINGS, PLAIN, Case
from tests.support.draws import draws
from tests.support.strategies import cases
from workloads.workload import EmptyOutputError

# float32's sums, and half a unit in the last place of the narrow dtypes.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
DTYPES = st.sampled_from(["float32", "float32", "bfloat16", "float16"])

# Lax's convolution takes seconds for the gradients of larger inputs with large strides.
CONV_ELEMENTS = 300_000


def check(case: Case, dtype: str, implementation: str) -> None:
    """The oracle's value and gradients, or a refusal where it has one."""
    f = case.conv(implementation)
    try:
        oracle = case.oracle
    except EmptyOutputError:
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (case.x, case.kernel)]
        with pytest.raises(ValueError, match="empty"):
            jax.eval_shape(f, *shapes)
        return
    if oracle.again:  # their gradient adds up copies, each rounded to a narrow dtype
        dtype = "float32"
    x, w, g = (jnp.asarray(a, dtype) for a in case.operands())
    y, dx, dw = jax.jit(maps.value_and_gradients(f))(x, w, g)
    assert_close(y, oracle.conv(x, w), TOLERANCE[dtype], "value")
    assert_close(dx, oracle.input_grad(g, w), TOLERANCE[dtype], "dx")
    assert_close(dw, oracle.kernel_grad(x, g), TOLERANCE[dtype], "dw")


@pytest.mark.parametrize("implementation", LOWERINGS)
@pytest.mark.parametrize(
    "case",
    [
        Case("size-0 axis, padded", (1, 0, 3, 1), (2, 2, 1, 1), {"padding": ((1, 2), (0, 0))}),
        Case("size-0 axis, same", (1, 0, 3, 1), (2, 2, 1, 1), {"padding": "same"}),
        Case("size-1 axis, reflect", (1, 1, 3, 1), (3, 2, 1, 1), {"padding": "reflect"}),
        Case("size-1 axis, circular", (1, 1, 3, 1), (4, 2, 1, 1), {"padding": "circular"}),
        Case("size-1 axis, edge", (1, 1, 3, 1), (4, 2, 1, 1), {"padding": "edge"}),
        Case("stride beyond the input", (1, 3, 3, 1), (2, 2, 1, 1), {"strides": 9}),
        Case("every tap but one outside", (1, 2, 1), (4, 1, 1), {"padding": 6, "dilation_rate": 4, "strides": 3}),
        Case("a tap that never meets the input", (1, 2, 1), (3, 1, 1), {"padding": ((3, 0),), "strides": 5}),
        Case("all taps outside", (1, 1, 1), (2, 1, 1), {"padding": 1, "dilation_rate": 2, "strides": 4}),
        # A stride that took another window's compiled kernel, with 28 other pairs of taps and stride.
        Case("4 taps, stride 11", (1, 70, 16), (4, 16, 1), {"strides": 11}),
    ],
    ids=str,
)
def test_corners(case: Case, implementation: str) -> None:
    check(case, "float32", implementation)


@pytest.mark.parametrize("implementation", PLAIN)
@settings(max_examples=draws(20, 200))
@given(case=cases(), dtype=DTYPES)
def test_random_geometries(case: Case, dtype: str, implementation: str) -> None:
    assume(implementation != "conv" or math.prod(case.x) <= CONV_ELEMENTS)
    check(case, dtype, implementation)


@pytest.mark.skipif("native" not in LOWERINGS, reason="no compiled kernels")
@settings(max_examples=draws(60, 500))  # they compile in no time
@given(case=cases(), dtype=DTYPES)
def test_random_geometries_of_the_compiled_kernels(case: Case, dtype: str) -> None:
    check(case, dtype, "native")
