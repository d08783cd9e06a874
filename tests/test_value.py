"""Values: against the loops of the oracle, and beside them lax, Keras and Flax.

test_vjp.py has more, beside the gradients: of all cases, in float64 and half precision, with bias and activation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from depthwise_jax import depthwise_conv, separable_conv
from depthwise_jax.lowering import Implementation
from tests.support.assertions import assert_close, assert_within_roundings
from tests.support.cases import CASES, CORE, LOWERINGS, Case, label, reduced
from tests.support.oracle import widest
from workloads.keras_reference import keras
from workloads.layers import NETWORKS

ONE = CORE[1]  # "same", two kernels per channel


# Eagerly.
@pytest.mark.parametrize("case", CORE, ids=str)
def test_value(case: Case, implementation: Implementation) -> None:
    x, w, _ = case.operands()
    y = case.conv(implementation)(x, w)
    assert isinstance(y, jax.Array)
    assert y.dtype == jnp.float32
    assert_close(y, case.oracle.conv(x, w), 1e-5)


@pytest.mark.parametrize("case", [*CORE, reduced(NETWORKS[-1])], ids=str)
def test_value_of_the_chosen_implementation(case: Case) -> None:
    x, w, _ = case.operands()
    assert_close(case.conv()(x, w), case.oracle.conv(x, w), 1e-5)


@pytest.mark.parametrize("place", [0, 4, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_accumulator_would_lose_the_ones(implementation: Implementation, dtype: Any, place: int) -> None:
    large = 2 / float(jnp.finfo(dtype).eps)  # large + 1 rounds to large, large + 8 is a number
    x = np.ones((1, 9, 2))
    x[:, place] = large
    y = depthwise_conv(jnp.asarray(x, dtype), jnp.ones((9, 2, 1), dtype), implementation=implementation)
    np.testing.assert_array_equal(widest(y), np.full((1, 1, 2), large + 8))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_bias_in_half_precision_costs_at_most_one_more_rounding(implementation: Implementation, dtype: Any) -> None:
    x, w, _ = (jnp.asarray(a, dtype) for a in ONE.operands())
    b = jnp.asarray(ONE.draw((6,), 9), dtype)
    conv = ONE.oracle.conv(x, w)
    exact = ONE.oracle.add_bias(conv, b)
    y = ONE.conv(implementation)(x, w, b)
    assert y.dtype == dtype
    assert_within_roundings(y, exact, conv, exact)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_preferred_element_type_float32_keeps_the_accumulator(implementation: Implementation, dtype: Any) -> None:
    x, w, _ = (jnp.asarray(a, dtype) for a in ONE.operands())
    y = ONE.conv(implementation, preferred_element_type=jnp.float32)(x, w)
    assert y.dtype == jnp.float32
    assert_close(y, ONE.oracle.conv(x, w), 1e-6)


def test_float8(plain: str) -> None:
    # It promotes to nothing by itself, but is summed in float32 like every narrow type.
    x, w, _ = (jnp.asarray(a).astype(jnp.float8_e4m3fn) for a in ONE.operands())
    y = ONE.conv(plain)(x, w)
    exact = ONE.oracle.conv(x.astype(jnp.float32), w.astype(jnp.float32))
    assert y.dtype == jnp.float8_e4m3fn
    assert_within_roundings(y, exact, exact)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.uint32])
@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=str)
def test_integers_are_exact(case: Case, plain: str, dtype: Any) -> None:
    random = np.random.default_rng(0)
    low, high = (0, 3) if np.issubdtype(dtype, np.unsignedinteger) else (-2, 2)  # the sums stay within 8 bits
    x = random.integers(low, high, case.x, dtype, endpoint=True)
    w = random.integers(low, high, case.kernel, dtype, endpoint=True)
    y = case.conv(plain)(x, w)
    assert y.dtype == dtype
    np.testing.assert_array_equal(widest(y), case.oracle.conv(x, w))


@pytest.mark.parametrize("case", CORE, ids=str)
def test_int8_with_an_int32_accumulator(case: Case, plain: str) -> None:
    random = np.random.default_rng(0)
    x = random.integers(-128, 127, case.x, np.int8, endpoint=True)
    w = random.integers(-128, 127, case.kernel, np.int8, endpoint=True)
    y = case.conv(plain, preferred_element_type=jnp.int32)(x, w)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(widest(y), case.oracle.conv(x, w))


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("case", CORE[:3], ids=str)
def test_complex(case: Case, plain: str, dtype: Any, x64: None) -> None:
    x, w, _ = (a + 1j * b for a, b in zip(case.operands(0), case.operands(1), strict=True))
    y = case.conv(plain)(x.astype(dtype), w.astype(dtype))
    assert y.dtype == dtype
    assert_close(y, case.oracle.conv(x, w), 1e-5 if dtype == np.complex64 else 1e-14)


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
        (jnp.float16, jnp.bfloat16),
        (jnp.int8, jnp.float32),
        (jnp.bool_, jnp.bfloat16),
    ],
)
def test_operands_promote_as_in_jax(implementation: Implementation, x_dtype: Any, w_dtype: Any) -> None:
    x, w, _ = ONE.operands()
    x, w = jnp.asarray(x).astype(x_dtype), jnp.asarray(w).astype(w_dtype)
    y = ONE.conv(implementation)(x, w)
    exact = ONE.oracle.conv(x, w)
    assert y.dtype == jnp.promote_types(x_dtype, w_dtype)
    assert_within_roundings(y, exact, exact)


def test_a_bias_promotes_too(implementation: Implementation) -> None:
    x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in ONE.operands())
    b = ONE.draw((6,), 9)
    y = ONE.conv(implementation)(x, w, b)
    assert y.dtype == jnp.float32


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.geometry.get("padding") not in ("reflect", "circular", "edge", "causal")], ids=str
)
def test_oracle_agrees_with_lax(case: Case, x64: None) -> None:
    # The oracle is ours, so it has a judge as well.
    x, w, _ = case.operands()
    oracle, rank = case.oracle, len(case.kernel) - 2
    padding = case.geometry.get("padding", "valid")
    padding = (
        padding.upper()
        if isinstance(padding, str)
        else [(padding, padding)] * rank
        if isinstance(padding, int)
        else padding
    )
    spatial = "DHW"[3 - rank :]
    layout = f"N{spatial}C" if oracle.channel_axis == -1 else f"NC{spatial}"
    y = lax.conv_general_dilated(
        jax.device_put(x.astype(np.float64).reshape((int(np.prod(oracle.batch)), *x.shape[len(oracle.batch) :]))),
        jax.device_put(w.astype(np.float64).reshape((*oracle.window, 1, -1))),
        oracle.strides,
        padding,
        rhs_dilation=oracle.dilation,
        dimension_numbers=(layout, f"{spatial}IO", layout),
        feature_group_count=oracle.channels,
    )
    assert_close(np.reshape(y, oracle.y_shape), oracle.conv(x, w), 1e-14)


@pytest.mark.parametrize("case", [c for c in CORE if c.geometry.get("padding", "valid") in ("valid", "same")], ids=str)
def test_keras_agrees(case: Case) -> None:
    x, w, _ = case.operands()
    options = {"padding": "valid", "data_format": "channels_last", **case.geometry}
    expected = keras.ops.depthwise_conv(x, w, **options)
    assert_close(case.conv()(x, w), widest(expected), 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c.geometry.get("padding") in ("reflect", "circular", "causal")
        and c.geometry.get("data_format") != "channels_first"
    ],
    ids=str,
)
def test_flax_agrees_on_its_own_paddings(case: Case) -> None:
    x, w, _ = case.operands()
    *window, channels, multiplier = case.kernel
    layer = nn.Conv(
        channels * multiplier,
        window,
        strides=case.geometry.get("strides", 1),
        padding=case.geometry["padding"].upper(),
        kernel_dilation=case.geometry.get("dilation_rate", 1),
        feature_group_count=channels,
        use_bias=False,
    )
    expected = layer.apply({"params": {"kernel": w.reshape((*window, 1, -1))}}, x)
    assert_close(case.conv()(x, w), widest(expected), 1e-5)


@pytest.mark.parametrize("padding", ["SAME", "Valid", "Causal", "REFLECT", "Circular"])
def test_padding_in_any_case(padding: Any) -> None:
    x, w = np.ones((1, 6, 2), np.float32), np.ones((3, 2, 1), np.float32)
    np.testing.assert_array_equal(depthwise_conv(x, w, padding=padding), depthwise_conv(x, w, padding=padding.lower()))


def test_output_channels_go_by_input_channel_first(implementation: Implementation) -> None:
    x = jnp.asarray([[[1.0, 10.0]]])
    w = jnp.asarray([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    np.testing.assert_array_equal(depthwise_conv(x, w, implementation=implementation), [[[1, 2, 3, 40, 50, 60]]])


def test_the_kernel_is_not_flipped(implementation: Implementation) -> None:
    x = jnp.asarray([[0.0], [1.0], [0.0], [0.0]])
    w = jnp.asarray([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    np.testing.assert_array_equal(
        depthwise_conv(x, w, padding="same", implementation=implementation)[:, 0], [3, 2, 1, 0]
    )


@pytest.mark.parametrize(
    ("activation", "formula"),
    [("relu", lambda y: np.maximum(y, 0)), ("relu6", lambda y: np.clip(y, 0, 6)), ("tanh", np.tanh), (jnp.cos, np.cos)],
    ids=label,
)
def test_an_activation_without_bias(implementation: Implementation, activation: Any, formula: Any) -> None:
    x, w, _ = ONE.operands()
    assert_close(ONE.conv(implementation, activation=activation)(3 * x, w), formula(ONE.oracle.conv(3 * x, w)), 1e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_softmax_is_over_the_channels(data_format: str) -> None:
    shape = (2, 3, 5, 4) if data_format == "channels_first" else (2, 5, 4, 3)
    case = Case("softmax", shape, (2, 2, 3, 2), {"data_format": data_format})
    x, w, _ = case.operands()
    e = np.exp(case.oracle.conv(x, w))
    exact = e / e.sum(case.oracle.channel_axis, keepdims=True)
    assert_close(case.conv(activation="softmax")(x, w), exact, 1e-5)


@pytest.mark.parametrize(
    "precision", ["highest", lax.Precision.HIGHEST, (lax.Precision.DEFAULT, lax.Precision.HIGHEST)], ids=str
)
def test_precision_is_taken(implementation: Implementation, precision: Any) -> None:
    x, w, _ = ONE.operands()
    assert_close(ONE.conv(implementation, precision=precision)(x, w), ONE.oracle.conv(x, w), 1e-5)


@pytest.mark.parametrize("case", [CORE[0], CORE[2], CORE[4], CORE[5]], ids=str)
def test_a_nan_stays_where_it_is_read(case: Case, implementation: Implementation) -> None:
    x, w, _ = case.operands()
    x[0, 2, ..., 1] = np.nan
    y = case.conv(implementation)(x, w)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(case.oracle.conv(x, w)))


@pytest.mark.parametrize(
    "lowering", [name for name in LOWERINGS if name != "conv"]
)  # lax multiplies the zeros of the padding by it
def test_a_nan_in_the_kernel_does_not_reach_through_the_padding(lowering: Implementation) -> None:
    w = np.ones((3, 1, 1), np.float32)
    w[0] = np.nan
    y = depthwise_conv(np.ones((4, 1), np.float32), w, padding="same", implementation=lowering)
    np.testing.assert_array_equal(y[:, 0], [2, np.nan, np.nan, np.nan])


@pytest.mark.parametrize("lowering", [name for name in LOWERINGS if name != "conv"])
def test_nor_in_a_window_of_many_taps(lowering: Implementation) -> None:
    # More than 64: taps runs them in a loop. Tap 0 reads the input for the outputs from 34 on, tap 69 for the first 5.
    w = np.ones((70, 1, 1), np.float32)
    for tap, broken in ((0, lambda o: o >= 34), (69, lambda o: o < 5)):
        a = w.copy()
        a[tap] = np.nan
        y = depthwise_conv(np.ones((40, 1), np.float32), a, padding="same", implementation=lowering)
        np.testing.assert_array_equal(np.isnan(y[:, 0]), [broken(o) for o in range(40)])


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_separable(implementation: Implementation, data_format: str, rank: int) -> None:
    spatial = (5, 4, 6)[:rank]
    shape = (2, 3, *spatial) if data_format == "channels_first" else (2, *spatial, 3)
    case = Case(
        f"separable-{rank}",
        shape,
        (*(3, 2, 2)[:rank], 3, 2),
        {"padding": "same", "strides": 2, "data_format": data_format},
    )
    x, w, _ = case.operands()
    pointwise, b = case.draw(((1,) * rank) + (6, 5), 7), case.draw((5,), 8)
    axis = case.oracle.channel_axis
    mixed = np.moveaxis(np.moveaxis(case.oracle.conv(x, w), axis, -1) @ widest(pointwise).reshape(6, 5), -1, axis)
    exact = np.maximum(case.oracle.add_bias(mixed, b), 0)
    y = separable_conv(x, w, pointwise, b, **case.geometry, activation="relu", implementation=implementation)
    assert_close(y, exact, 1e-5)
    assert_close(separable_conv(x, w, pointwise, **case.geometry, implementation=implementation), mixed, 1e-5)


@pytest.mark.parametrize("batch", [(), (2, 1, 3)], ids=str)
def test_separable_with_any_batch_axes(implementation: Implementation, batch: tuple[int, ...]) -> None:
    case = Case("separable-batch", (*batch, 5, 4, 3), (3, 3, 3, 2))
    x, w, _ = case.operands()
    pointwise = case.draw((1, 1, 6, 4), 7)
    y = separable_conv(x, w, pointwise, implementation=implementation)
    assert_close(y, case.oracle.conv(x, w) @ widest(pointwise)[0, 0], 1e-5)


def test_separable_in_bfloat16(implementation: Implementation) -> None:
    case = Case("separable-bf16", (2, 5, 4, 3), (3, 3, 3, 2))
    x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in case.operands())
    pointwise = jnp.asarray(case.draw((1, 1, 6, 4), 7), jnp.bfloat16)
    y = separable_conv(x, w, pointwise, implementation=implementation)
    depthwise = case.oracle.conv(x, w)
    exact = depthwise @ widest(pointwise)[0, 0]
    # The depthwise half is rounded to bfloat16 before the pointwise half reads it, and the sum once more.
    assert y.dtype == jnp.bfloat16
    assert_within_roundings(y, exact, exact, np.abs(depthwise) @ np.abs(widest(pointwise)[0, 0]))
