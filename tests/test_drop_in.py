"""conv_general_dilated: lax's results, the fast path for depthwise calls, and lax itself, unchanged, for all others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from depthwise_jax import conv_general_dilated
from tests.support.assertions import assert_close
from tests.support.cases import Case

C, M = 3, 2


def operands(lhs: tuple[int, ...], rhs: tuple[int, ...], dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    draw = Case("drop-in", lhs, rhs).draw
    return jnp.asarray(draw(lhs, 0)).astype(dtype), jnp.asarray(draw(rhs, 1)).astype(dtype)


def is_fast(f: Callable[..., Any], *args: Any) -> bool:
    jaxpr = str(jax.make_jaxpr(f)(*args))
    fast, plain = "depthwise_conv[" in jaxpr, "conv_general_dilated[" in jaxpr
    assert fast != plain, jaxpr
    return fast


# How each library writes a depthwise call, 2D unless said: the shapes and the arguments besides feature_group_count.
WRITTEN = {
    # flax.linen and nnx: integer dimension numbers, everything positional or by name, dilations always given.
    "flax": (
        (2, 7, 6, C),
        (3, 2, 1, C * M),
        {
            "dimension_numbers": lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
            "lhs_dilation": (1, 1),
        },
    ),
    "flax 1d": (
        (2, 7, C),
        (3, 1, C * M),
        {"dimension_numbers": lax.ConvDimensionNumbers((0, 2, 1), (2, 1, 0), (0, 2, 1)), "lhs_dilation": (1,)},
    ),
    "flax 3d": (
        (1, 4, 5, 3, C),
        (2, 2, 3, 1, C),
        {
            "dimension_numbers": lax.ConvDimensionNumbers((0, 4, 1, 2, 3), (4, 3, 0, 1, 2), (0, 4, 1, 2, 3)),
            "lhs_dilation": (1, 1, 1),
        },
    ),
    # Keras: the same numbers, and channels first beside the same kernel.
    "keras": (
        (2, 7, 6, C),
        (3, 2, 1, C * M),
        {"dimension_numbers": lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))},
    ),
    "keras channels_first": (
        (2, C, 7, 6),
        (3, 2, 1, C * M),
        {"dimension_numbers": lax.ConvDimensionNumbers((0, 1, 2, 3), (3, 2, 0, 1), (0, 1, 2, 3))},
    ),
    "keras 1d channels_first": (
        (2, C, 7),
        (3, 1, C * M),
        {"dimension_numbers": lax.ConvDimensionNumbers((0, 1, 2), (2, 1, 0), (0, 1, 2))},
    ),
    # Haiku: strings.
    "haiku": ((2, 7, 6, C), (3, 2, 1, C * M), {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "lhs_dilation": (1, 1)}),
    "haiku NCHW": (
        (2, C, 7, 6),
        (3, 2, 1, C * M),
        {"dimension_numbers": ("NCHW", "HWIO", "NCHW"), "lhs_dilation": (1, 1)},
    ),
    "haiku 1d": ((2, 7, C), (3, 1, C * M), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
    "haiku 1d NCW": ((2, C, 7), (3, 1, C * M), {"dimension_numbers": ("NCW", "WIO", "NCW")}),
    "haiku 3d": ((1, 4, 5, 3, C), (2, 2, 3, 1, C), {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}),
    # Equinox: no dimension numbers, that is NCHW and OIHW.
    "equinox": ((1, C, 7, 6), (C * M, 1, 3, 2), {}),
    "equinox 1d": ((1, C, 7), (C * M, 1, 3), {}),
    "equinox 3d": ((1, C, 4, 5, 3), (C, 1, 2, 2, 3), {}),
    # lax itself takes strings for them, and a kernel in any order.
    "strings": ((2, C, 7, 6), (C * M, 1, 3, 2), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
}


def rank_of(written: str) -> int:
    return len(WRITTEN[written][0]) - 2


@pytest.mark.parametrize(
    ("written", "padding"),
    [(written, padding) for written in WRITTEN for padding in ("SAME", "pairs")]
    + [("flax", "VALID"), ("flax", "same")],
)
def test_each_librarys_depthwise_call(written: str, padding: str) -> None:
    lhs, rhs, options = WRITTEN[written]
    rank = rank_of(written)
    x, w = operands(lhs, rhs)
    strides, dilation = (2, 1, 1)[:rank], (1, 2, 1)[:rank]
    pads = [(1, 2), (0, 3), (2, 0)][:rank] if padding == "pairs" else padding
    options = {
        **options,
        "window_strides": strides,
        "padding": pads,
        "rhs_dilation": dilation,
        "feature_group_count": C,
    }
    f = lambda x, w: conv_general_dilated(x, w, **options)  # noqa: E731
    g = lambda x, w: lax.conv_general_dilated(x, w, **options)  # noqa: E731
    assert is_fast(f, x, w)
    (y, (dx, dw)), (ey, (edx, edw)) = (
        jax.jit(lambda x, w, h=h: (h(x, w), jax.grad(lambda x, w: jnp.sin(h(x, w)).sum(), (0, 1))(x, w)))(x, w)
        for h in (f, g)
    )
    assert y.dtype == ey.dtype
    for actual, expected in ((y, ey), (dx, edx), (dw, edw)):
        assert_close(actual, np.asarray(expected, np.float64), 1e-5)


def test_against_the_oracle() -> None:
    case = Case("drop-in-oracle", (2, 7, 6, C), (3, 2, C, M), {"padding": "same", "strides": (2, 1)})
    x, w = operands(case.x, case.kernel)
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = w.reshape(3, 2, 1, C * M)
    y = conv_general_dilated(x, kernel, (2, 1), "SAME", dimension_numbers=numbers, feature_group_count=C)
    assert_close(y, case.oracle.conv(x, w), 1e-5)


def test_arguments_by_position() -> None:
    x, w = operands((2, 7, 6, C), (3, 2, 1, C))
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))
    args = ((1, 2), "SAME", None, (2, 1), numbers, C, 1, lax.Precision.HIGHEST, jnp.float32)
    assert is_fast(lambda x, w: conv_general_dilated(x, w, *args), x, w)
    assert_close(conv_general_dilated(x, w, *args), np.asarray(lax.conv_general_dilated(x, w, *args), np.float64), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.complex64])
def test_dtypes(dtype: Any) -> None:
    x, w = operands((2, 7, 6, C), (3, 2, 1, C * M), dtype)
    options: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": C}
    y = conv_general_dilated(x, w, (1, 1), "SAME", **options)
    assert y.dtype == dtype
    wide = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    expected = lax.conv_general_dilated(x.astype(wide), w.astype(wide), (1, 1), "SAME", **options).astype(dtype)
    # Two sums in float32 in different orders may round to two neighbours.
    eps, least = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).smallest_subnormal)
    wide_y, wide_e = np.asarray(y, np.complex128), np.asarray(expected, np.complex128)
    assert np.all(np.abs(wide_y - wide_e) <= eps * np.abs(wide_e) + least + 1e-5)


def test_preferred_element_type() -> None:
    x, w = operands((2, 7, 6, C), (3, 2, 1, C * M), jnp.bfloat16)
    options: dict[str, Any] = {
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": C,
        "preferred_element_type": jnp.float32,
    }
    y = conv_general_dilated(x, w, (1, 1), "SAME", **options)
    assert y.dtype == jnp.float32
    assert_close(y, np.asarray(lax.conv_general_dilated(x, w, (1, 1), "SAME", **options), np.float64), 1e-5)


def test_an_empty_batch() -> None:
    x, w = operands((0, 7, 6, C), (3, 2, 1, C))
    y = conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=C)
    assert y.shape == (0, 7, 6, C)


# Calls for lax. Shapes and arguments; every one of them reaches lax as it came, as its program shows.

NHWC: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
X, W = (2, 7, 6, C), (3, 2, 1, C * M)
DEPTHWISE = {"feature_group_count": C, **NHWC}
UNCHANGED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any, dict[str, Any]]] = {
    "dense": (X, (3, 2, C, 4), jnp.float32, {**NHWC}),
    "dense without dimension numbers": ((2, C, 7, 6), (4, C, 3, 2), jnp.float32, {}),
    "grouped": ((2, 7, 6, 4), (3, 2, 2, 4), jnp.float32, {**NHWC, "feature_group_count": 2}),
    "negative pads": (X, W, jnp.float32, {**DEPTHWISE, "padding": [(-1, 0), (0, 1)]}),
    "SAME_LOWER": (X, W, jnp.float32, {**DEPTHWISE, "padding": "SAME_LOWER"}),
    "same_lower": (X, W, jnp.float32, {**DEPTHWISE, "padding": "same_lower"}),
    "empty output": ((2, 2, 6, C), W, jnp.float32, {**DEPTHWISE, "padding": "VALID"}),
    "empty input": ((2, 0, 6, C), W, jnp.float32, {**DEPTHWISE, "padding": "SAME"}),
    "int32": (X, W, jnp.int32, {**DEPTHWISE}),
    "int8 with an int32 result": (X, W, jnp.int8, {**DEPTHWISE, "preferred_element_type": jnp.int32}),
    "batch groups": ((4, 7, 6, C), (3, 2, C, 4), jnp.float32, {**NHWC, "batch_group_count": 2}),
    "batch groups, as the kernel gradient of a depthwise one": (
        (C, 7, 6, 2),
        (5, 5, 2, C),
        jnp.float32,
        {**NHWC, "padding": "VALID", "batch_group_count": C},
    ),
    "lhs_dilation of a dense call": (
        X,
        (3, 2, C, 4),
        jnp.float32,
        {**NHWC, "padding": [(1, 1), (1, 1)], "lhs_dilation": (2, 2)},
    ),
    "lhs_dilation with strides": (
        X,
        W,
        jnp.float32,
        {**DEPTHWISE, "padding": [(1, 1), (1, 1)], "lhs_dilation": (2, 3), "window_strides": (2, 2)},
    ),
    "lhs_dilation of an empty input": (
        (2, 0, 6, C),
        (3, 2, 1, C),
        jnp.float32,
        {**DEPTHWISE, "padding": [(2, 2), (1, 1)], "lhs_dilation": (2, 2)},
    ),
    "lhs_dilation with negative pads": (
        X,
        (3, 2, 1, C),
        jnp.float32,
        {**DEPTHWISE, "padding": [(-1, 1), (1, 1)], "lhs_dilation": (2, 2)},
    ),
    "lhs_dilation with more padding than the window's span": (
        X,
        (3, 2, 1, C),
        jnp.float32,
        {**DEPTHWISE, "padding": [(3, 3), (1, 1)], "lhs_dilation": (2, 2)},
    ),
    "lhs_dilation with an empty result": (
        (2, 1, 6, C),
        (3, 2, 1, C),
        jnp.float32,
        {**DEPTHWISE, "padding": [(0, 0), (1, 1)], "lhs_dilation": (2, 2)},
    ),
    "one channel": ((2, 7, 6, 1), (3, 2, 1, 1), jnp.float32, {**NHWC, "feature_group_count": 1}),
    "one channel with several kernels": ((2, 7, 6, 1), (3, 2, 1, 4), jnp.float32, {**NHWC}),
    "no output features": (X, (3, 2, 1, 0), jnp.float32, {**DEPTHWISE}),
    "no spatial axis": (
        (2, C),
        (1, C),
        jnp.float32,
        {"dimension_numbers": ("NC", "IO", "NC"), "feature_group_count": C, "window_strides": (), "padding": "VALID"},
    ),
    "four spatial axes": (
        (1, 3, 3, 3, 3, 2),
        (2, 2, 2, 2, 1, 2),
        jnp.float32,
        {"dimension_numbers": ("NABDEC", "ABDEIO", "NABDEC"), "feature_group_count": 2, "window_strides": (1,) * 4},
    ),
    "an output in another order": (
        X,
        W,
        jnp.float32,
        {"dimension_numbers": ("NHWC", "HWIO", "NCHW"), "feature_group_count": C},
    ),
    "spatial axes crossed": (
        X,
        W,
        jnp.float32,
        {"dimension_numbers": ("NHWC", "WHIO", "NHWC"), "feature_group_count": C},
    ),
    "channels before the batch": (
        (C, 2, 7, 6),
        W,
        jnp.float32,
        {"dimension_numbers": ("CNHW", "HWIO", "CNHW"), "feature_group_count": C},
    ),
}


@pytest.mark.parametrize("call", UNCHANGED)
def test_every_other_call_goes_to_lax_unchanged(call: str) -> None:
    lhs, rhs, dtype, options = UNCHANGED[call]
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    shapes = jax.ShapeDtypeStruct(lhs, dtype), jax.ShapeDtypeStruct(rhs, dtype)
    ours, theirs = (
        jax.make_jaxpr(lambda x, w, f=f: f(x, w, **options))(*shapes)
        for f in (conv_general_dilated, lax.conv_general_dilated)
    )
    if call in (
        "an output in another order",
        "spatial axes crossed",
        "channels before the batch",
    ) and "depthwise_conv[" in str(ours):
        # May be recognised, as long as the result is lax's.
        x, w = operands(lhs, rhs)
        assert_close(
            conv_general_dilated(x, w, **options),
            np.asarray(lax.conv_general_dilated(x, w, **options), np.float64),
            1e-5,
        )
        return
    assert str(ours) == str(theirs)


@pytest.mark.parametrize(
    ("padding", "fast"),
    [
        ([(2, 2), (1, 1)], True),
        ([(2, 3), (1, 2)], True),  # the input ended in a row and a column that no window reached
        ([(0, 1), (0, 0)], True),
        ([(3, 2), (1, 1)], False),
        ([(2, 4), (1, 1)], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, M])
@pytest.mark.parametrize("first", [False, True])
def test_a_strided_depthwise_dx(padding: Any, fast: bool, m: int, first: bool) -> None:
    # Written as lax writes the transpose, with lhs_dilation in the place of strides: the transposed map, lax's numbers.
    x, w = operands((2, C, 4, 3) if first else (2, 4, 3, C), (3, 2, 1, C * m))
    options: dict[str, Any] = {"window_strides": (1, 1), "padding": padding, "lhs_dilation": (2, 2), **DEPTHWISE}
    if first:
        options["dimension_numbers"] = ("NCHW", "HWIO", "NCHW")
    f, g = (lambda x, w, h=h: h(x, w, **options) for h in (conv_general_dilated, lax.conv_general_dilated))
    assert ("depthwise_input_grad[" in str(jax.make_jaxpr(f)(x, w))) == fast
    assert_close(f(x, w), np.asarray(g(x, w), np.float64), 1e-5)
    for argument in (0, 1):
        actual, expected = (jax.grad(lambda x, w, h=h: jnp.sin(h(x, w)).sum(), argument)(x, w) for h in (f, g))
        assert_close(actual, np.asarray(expected, np.float64), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"x": jnp.bfloat16},
        {"x": jnp.int32},
        {"feature_group_count": 2},
        {"feature_group_count": 0},
        {"feature_group_count": -3},
        {"window_strides": (0, 1)},
        {"window_strides": (1,)},
        {"padding": [(0, 0)]},
        {"padding": "FULL"},
        {"rhs_dilation": (0, 1)},
        {"lhs_dilation": (0, 1)},
        {"lhs_dilation": (2, 2)},
        {"dimension_numbers": ("NHW", "HWIO", "NHWC")},
        {"dimension_numbers": ("NHWC", "HWIO")},
        {"batch_group_count": 2},
        {"preferred_element_type": jnp.int32},
        {"preferred_element_type": jnp.bfloat16},
    ],
    ids=str,
)
def test_lax_says_what_is_wrong(options: dict[str, Any]) -> None:
    options = {"window_strides": (1, 1), "padding": "SAME", **DEPTHWISE, **options}
    shapes = jax.ShapeDtypeStruct(X, options.pop("x", jnp.float32)), jax.ShapeDtypeStruct(W, jnp.float32)
    caught = []
    for f in (conv_general_dilated, lax.conv_general_dilated):
        with pytest.raises(Exception) as error:  # noqa: PT011  whatever lax raises is what is expected
            jax.eval_shape(lambda x, w, f=f: f(x, w, **options), *shapes)
        caught.append(error.value)
    ours, theirs = caught
    assert type(ours) is type(theirs)
    assert re.sub(r"0x\w+", "", str(ours)) == re.sub(r"0x\w+", "", str(theirs))


# In the layers that take it


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", 1])
def test_in_linen(padding: Any) -> None:
    x, _ = operands((2, 7, 6, C), W)
    settings: dict[str, Any] = {
        "features": C * M,
        "kernel_size": (3, 3),
        "strides": (2, 1),
        "padding": padding,
        "feature_group_count": C,
    }
    plain, fast = nn.Conv(**settings), nn.Conv(**settings, conv_general_dilated=conv_general_dilated)
    params = plain.init(jax.random.key(0), x)
    assert is_fast(fast.apply, params, x)
    loss = lambda layer: jax.jit(jax.value_and_grad(lambda params, x: jnp.sin(layer.apply(params, x)).sum(), (0, 1)))  # noqa: E731
    for actual, expected in zip(
        jax.tree.leaves(loss(fast)(params, x)), jax.tree.leaves(loss(plain)(params, x)), strict=True
    ):
        assert_close(actual, np.asarray(expected, np.float64), 2e-5)


def test_in_linen_without_a_batch_and_causal() -> None:
    x, _ = operands((7, C), (3, 1, C))
    settings: dict[str, Any] = {"features": C, "kernel_size": 3, "padding": "CAUSAL", "feature_group_count": C}
    plain, fast = nn.Conv(**settings), nn.Conv(**settings, conv_general_dilated=conv_general_dilated)
    params = plain.init(jax.random.key(0), x)
    assert is_fast(fast.apply, params, x)
    assert_close(fast.apply(params, x), np.asarray(plain.apply(params, x), np.float64), 1e-5)


def test_in_linen_a_dense_layer_is_untouched() -> None:
    x, _ = operands((2, 7, 6, C), W)
    plain, ours = nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated)
    params = plain.init(jax.random.key(0), x)
    assert str(jax.make_jaxpr(plain.apply)(params, x)) == str(jax.make_jaxpr(ours.apply)(params, x))


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_in_nnx(preferred: Any) -> None:
    x, _ = operands((2, 7, 6, C), W)
    settings: dict[str, Any] = {"strides": 2, "feature_group_count": C, "preferred_element_type": preferred}
    plain = nnx.Conv(C, C * M, (3, 3), **settings, rngs=nnx.Rngs(0))
    fast = nnx.Conv(C, C * M, (3, 3), **settings, conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0))
    assert is_fast(lambda x: fast(x), x)
    assert_close(fast(x), np.asarray(plain(x), np.float64), 1e-5)


def test_under_vmap_and_scan() -> None:
    x, w = operands((4, 2, 7, 6, C), (4, 3, 2, 1, C))
    f, g = (
        lambda x, w, h=h: h(x, w, (1, 1), "SAME", **DEPTHWISE) for h in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert_close(jax.vmap(f)(x, w), np.asarray(jax.vmap(g)(x, w), np.float64), 1e-5)
    run = lambda h: lax.scan(lambda y, w: (h(y, w), None), x[0], w)[0]  # noqa: E731
    assert_close(run(f), np.asarray(run(g), np.float64), 1e-5)


def test_lhs_dilation_of_a_symbolic_size_goes_to_lax() -> None:
    (n,) = jax.export.symbolic_shape("n", constraints=["n >= 3"])
    shapes = jax.ShapeDtypeStruct((2, n, 6, C), jnp.float32), jax.ShapeDtypeStruct((3, 2, 1, C), jnp.float32)
    options = {"window_strides": (1, 1), "padding": [(1, 1), (1, 1)], "lhs_dilation": (2, 2), **DEPTHWISE}
    assert not is_fast(lambda x, w: conv_general_dilated(x, w, **options), *shapes)
