"""Random calls: the oracle's numbers for value, dx and dw, or the oracle's refusal."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import jax
import pytest
from hypothesis import example, given, settings

from tests.cases import LOWERINGS, Case
from tests.oracle import EmptyOutputError, assert_close


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    largest = {1: 9, 2: 6, 3: 4}[rank]
    spatial = [draw(st.integers(0, largest)) for _ in range(rank)]
    window = [draw(st.integers(1, 4 if rank < 3 else 3)) for _ in range(rank)]
    channels, multiplier = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    batch = draw(st.sampled_from([(), (1,), (2,), (2,), (0,), (2, 3)]))
    per_axis = lambda values: st.one_of(values, st.tuples(*[values] * rank))  # noqa: E731
    pairs = st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * rank)
    names = ["valid", "same", "reflect", "circular", *(["causal"] if rank == 1 else [])]
    data_format = draw(st.sampled_from(["channels_last", "channels_first"]))
    return Case(
        "random",
        (*batch, *spatial, channels) if data_format == "channels_last" else (*batch, channels, *spatial),
        (*window, channels, multiplier),
        {
            "strides": draw(per_axis(st.integers(1, 4))),
            "padding": draw(st.one_of(st.sampled_from(names), st.integers(0, 3), pairs)),
            "dilation_rate": draw(per_axis(st.integers(1, 4))),
            "data_format": data_format,
        },
    )


@pytest.mark.parametrize("implementation", LOWERINGS)
@settings(max_examples=60)
@given(case=cases())
@example(case=Case("size-0 axis, padded", (1, 0, 3, 1), (2, 2, 1, 1), {"padding": ((1, 2), (0, 0))}))
@example(case=Case("size-0 axis, same", (1, 0, 3, 1), (2, 2, 1, 1), {"padding": "same"}))
@example(case=Case("size-1 axis, reflect", (1, 1, 3, 1), (3, 2, 1, 1), {"padding": "reflect"}))
@example(case=Case("size-1 axis, circular", (1, 1, 3, 1), (4, 2, 1, 1), {"padding": "circular"}))
@example(case=Case("stride beyond the input", (1, 3, 3, 1), (2, 2, 1, 1), {"strides": 9}))
@example(case=Case("every tap but one outside", (1, 2, 1), (4, 1, 1), {"padding": 6, "dilation_rate": 4, "strides": 3}))
@example(case=Case("a tap that never meets the input", (1, 2, 1), (3, 1, 1), {"padding": ((3, 0),), "strides": 5}))
@example(case=Case("all taps outside", (1, 1, 1), (2, 1, 1), {"padding": 1, "dilation_rate": 2, "strides": 4}))
def test_value_and_gradients_or_the_same_refusal(case: Case, implementation: str) -> None:
    f = case.conv(implementation)
    try:
        oracle = case.oracle
    except EmptyOutputError:
        shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in (case.x, case.kernel)]
        with pytest.raises(ValueError, match=r"empty|needs an input to read"):
            jax.eval_shape(f, *shapes)
        return
    x, w, g = case.operands()

    @jax.jit
    def run(x: Any, w: Any, g: Any) -> Any:
        y, vjp = jax.vjp(f, x, w)
        return y, *vjp(g)

    y, dx, dw = run(x, w, g)
    assert_close(y, oracle.conv(x, w), 1e-5, "value")
    assert_close(dx, oracle.input_grad(g, w), 1e-5, "dx")
    assert_close(dw, oracle.kernel_grad(x, g), 1e-5, "dw")
