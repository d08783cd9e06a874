"""Bad input: refused when the call is traced, in words that name the argument, what came and what was expected."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import depthwise_conv, explain, separable_conv
from depthwise_jax.lowering import MAPS, Implementation
from tests.support.cases import LOWERINGS

X = jax.ShapeDtypeStruct((2, 8, 9, 3), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 3, 2), jnp.float32)


def shape(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def refused(
    error: type[Exception] | tuple[type[Exception], ...],
    words: tuple[str, ...],
    x: Any = X,
    kernel: Any = KERNEL,
    bias: Any = None,
    **options: Any,
) -> None:
    """Traced, not run: nothing is computed before the refusal."""
    operands = (x, kernel) if bias is None else (x, kernel, bias)
    with pytest.raises(error) as caught:
        jax.eval_shape(lambda *z: depthwise_conv(*z, **options), *operands)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    ("x", "kernel", "words"),
    [
        # ranks
        (shape(8, 9), KERNEL, ("x", "(8, 9)", "(3, 3, 3, 2)")),
        (shape(3), KERNEL, ("x", "(3,)")),
        (X, shape(3, 3), ("kernel", "(3, 3)", "window")),
        (X, shape(3), ("kernel", "(3,)")),
        (X, shape(), ("kernel", "()")),
        (shape(1, 5, 5, 5, 5, 3), shape(2, 2, 2, 2, 3, 1), ("kernel", "(2, 2, 2, 2, 3, 1)", "one to three")),
        # channels
        (shape(2, 8, 9, 4), KERNEL, ("x", "(2, 8, 9, 4)", "(3, 3, 3, 2)", "3 channels")),
        (shape(2, 8, 9, 1), KERNEL, ("(2, 8, 9, 1)",)),
        (shape(2, 8, 9, 0), KERNEL, ("(2, 8, 9, 0)",)),
        # empty kernels
        (shape(2, 8, 9, 0), shape(3, 3, 0, 2), ("kernel", "(3, 3, 0, 2)")),
        (X, shape(3, 3, 3, 0), ("kernel", "(3, 3, 3, 0)")),
        (X, shape(0, 3, 3, 2), ("kernel", "(0, 3, 3, 2)")),
        # empty outputs
        (shape(2, 2, 9, 3), KERNEL, ("empty", "(2, 9)", "(3, 3)", "padding")),
        (shape(2, 0, 9, 3), KERNEL, ("empty", "(0, 9)")),
    ],
    ids=str,
)
def test_shapes(x: Any, kernel: Any, words: tuple[str, ...]) -> None:
    refused(ValueError, words, x, kernel)


def test_channels_first_says_where_it_looked() -> None:
    refused(ValueError, ("x", "(2, 8, 9, 3)", "channels_first"), data_format="channels_first")


def test_empty_output_by_dilation_names_it() -> None:
    refused(ValueError, ("empty", "dilation_rate", "(5, 1)", "(8, 9)"), dilation_rate=(5, 1))


@pytest.mark.parametrize("padding", ["same", "reflect", "circular", "edge"])
def test_an_empty_axis_is_no_input(padding: str) -> None:
    refused(ValueError, ("(0, 9)",), shape(2, 0, 9, 3), padding=padding)


@pytest.mark.parametrize("argument", ["strides", "dilation_rate"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        ((1, 0), ValueError),
        ((1, -2), ValueError),
        ((1,), ValueError),
        ((1, 1, 1), ValueError),
        ((), ValueError),
        (1.0, TypeError),
        ((1, 2.0), TypeError),
        (True, TypeError),
        ((1, True), TypeError),
        ("2", (TypeError, ValueError)),
        (None, TypeError),
        ((1, None), TypeError),
        (np.array([1.0, 2.0]), TypeError),
        (np.array([[1, 2]]), (TypeError, ValueError)),
        (np.True_, TypeError),
        ({1, 2}, (TypeError, ValueError)),
    ],
    ids=str,
)
def test_strides_and_dilation(argument: str, value: Any, error: Any) -> None:
    refused(error, (f"{argument} must be a positive integer", f"; got {value!r}"), **{argument: value})


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("full", ValueError),
        ("", ValueError),
        ("causal", ValueError),
        ("same_lower", ValueError),
        (-1, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        ((1, 1), TypeError),
        (((1, 1),), ValueError),
        (((1, 1), (1, 1), (1, 1)), ValueError),
        (((1, 1), (1, -1)), ValueError),
        (((1, 1), (1, 1.0)), TypeError),
        (((1, 1), (1, 1, 1)), ValueError),
        (((1, 1), (True, 1)), TypeError),
        (((1, 1), ()), ValueError),
        (("same", "valid"), (TypeError, ValueError)),
    ],
    ids=str,
)
def test_padding(value: Any, error: Any) -> None:
    refused(error, ("padding", repr(value) if value != "causal" else "causal"), padding=value)


@pytest.mark.parametrize("value", ["NHWC", "channels", "", None, 3, "CHANNELS-LAST"], ids=str)
def test_data_format(value: Any) -> None:
    refused((TypeError, ValueError), ("data_format", repr(value), "channels_last", "channels_first"), data_format=value)


@pytest.mark.parametrize("value", ["tap", "cuda", "", "CONV"], ids=repr)
def test_unknown_implementation(value: str) -> None:
    refused(ValueError, ("implementation", repr(value), "conv", "taps"), implementation=value)


@pytest.mark.parametrize("value", [3, True, ["conv"]], ids=str)
def test_implementations_are_names(value: Any) -> None:
    refused((TypeError, ValueError), ("implementation",), implementation=value)


@pytest.mark.parametrize(
    "bias", [shape(5), shape(1), shape(), shape(6, 1), shape(1, 1, 1, 6), shape(3), shape(0)], ids=str
)
def test_bias(bias: Any) -> None:
    refused(ValueError, ("bias", str(bias.shape), "(6,)"), bias=bias)


@pytest.mark.parametrize(("value", "close"), [("rellu", "relu"), ("RELU", "relu"), ("gelo", "gelu")])
def test_unknown_activation(value: str, close: str) -> None:
    refused(ValueError, ("activation", repr(value), close), activation=value)


@pytest.mark.parametrize("value", [3, 1.5, ["relu"]], ids=str)
def test_an_activation_is_a_name_or_a_callable(value: Any) -> None:
    refused((TypeError, ValueError), ("activation", str(value)), activation=value)


@pytest.mark.parametrize("value", ["lowest", 7, (None,), ("highest", "highest", "highest"), [["high"]]], ids=str)
def test_precision(value: Any) -> None:
    refused((TypeError, ValueError), ("precision",), precision=value)


@pytest.mark.parametrize("value", [jnp.bfloat16, jnp.int32, jnp.complex64, jnp.bool_], ids=str)
def test_preferred_element_type_is_as_wide_and_of_the_same_kind(value: Any) -> None:
    # lax.conv_general_dilated refuses to narrow, too.
    refused(
        (TypeError, ValueError),
        ("preferred_element_type", "float32", jnp.dtype(value).name),
        preferred_element_type=value,
    )


@pytest.mark.parametrize("value", ["float33", object()], ids=["name", "object"])
def test_preferred_element_type_is_a_dtype(value: Any) -> None:
    refused(TypeError, (), preferred_element_type=value)


@pytest.mark.parametrize("x", [None, "image", object(), [[1.0], [2.0, 3.0]]], ids=["None", "text", "object", "ragged"])
def test_operands_are_arrays(x: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        depthwise_conv(x, np.ones((2, 1, 1)))
    with pytest.raises((TypeError, ValueError)):
        depthwise_conv(np.ones((4, 1)), x)


def test_booleans_are_no_numbers() -> None:
    refused(TypeError, ("bool",), shape(1, 5, 5, 3, dtype=jnp.bool_), shape(3, 3, 3, 1, dtype=jnp.bool_))


def test_prng_keys_are_no_numbers() -> None:
    with pytest.raises((TypeError, ValueError), match="key"):
        depthwise_conv(jax.random.split(jax.random.key(0), (5, 1)), np.ones((2, 1, 1)))


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        depthwise_conv(np.ones((5, 1)), np.ones((2, 1, 1)), np.ones(1), 2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="stride"):
        depthwise_conv(np.ones((5, 1)), np.ones((2, 1, 1)), stride=2)  # pyright: ignore[reportCallIssue]


def test_every_call_is_checked_not_only_the_first() -> None:
    kernel = np.ones((3, 1, 1))
    depthwise_conv(np.ones((5, 1)), kernel)
    with pytest.raises(ValueError, match="empty"):
        depthwise_conv(np.ones((2, 1)), kernel)


def test_an_empty_batch_is_fine(implementation: Implementation) -> None:
    y = depthwise_conv(
        np.ones((0, 5, 4, 3), np.float32), np.ones((3, 3, 3, 2), np.float32), implementation=implementation
    )
    assert y.shape == (0, 3, 2, 6)


POINTWISE = shape(1, 1, 6, 5)


@pytest.mark.parametrize(
    ("kernel", "pointwise", "bias", "words"),
    [
        (KERNEL, shape(1, 1, 5, 5), None, ("pointwise_kernel", "(1, 1, 5, 5)", "(1, 1, 6, F)")),
        (KERNEL, shape(6, 5), None, ("pointwise_kernel", "(6, 5)")),
        (KERNEL, shape(1, 6, 5), None, ("pointwise_kernel", "(1, 6, 5)")),
        (KERNEL, shape(3, 3, 6, 5), None, ("pointwise_kernel", "(3, 3, 6, 5)")),
        (KERNEL, shape(1, 1, 6, 0), None, ("pointwise_kernel", "(1, 1, 6, 0)")),
        (KERNEL, POINTWISE, shape(6), ("bias", "(6,)", "(5,)")),
        (shape(3, 3, 4, 2), shape(1, 1, 8, 5), None, ("x", "(2, 8, 9, 3)", "4 channels")),
        (shape(3, 3, 0, 2), shape(1, 1, 0, 5), None, ("depthwise_kernel", "(3, 3, 0, 2)")),
        (shape(3, 3), POINTWISE, None, ("depthwise_kernel", "(3, 3)")),
    ],
    ids=str,
)
def test_separable(kernel: Any, pointwise: Any, bias: Any, words: tuple[str, ...]) -> None:
    operands = (X, kernel, pointwise) if bias is None else (X, kernel, pointwise, bias)
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        jax.eval_shape(separable_conv, *operands)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    "options",
    [{"strides": 0}, {"padding": "full"}, {"data_format": "NHWC"}, {"implementation": "tap"}, {"activation": "rellu"}],
    ids=str,
)
def test_separable_checks_its_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        jax.eval_shape(lambda *z: separable_conv(*z, **options), X, KERNEL, POINTWISE)


# A lowering that is required and cannot compute the call (test_sharding.py has another)


def symbolic_length() -> jax.ShapeDtypeStruct:
    (length,) = jax.export.symbolic_shape("l", constraints=["l >= 3"])
    return jax.ShapeDtypeStruct((1, length, 2), jnp.float32)


def test_a_forced_lowering_that_cannot_serve_says_why_at_lowering() -> None:
    f = jax.jit(lambda x, w: depthwise_conv(x, w, implementation="taps"))
    traced = f.trace(symbolic_length(), shape(3, 2, 1))  # no error yet: tracing knows no platform
    with pytest.raises(ValueError, match=r"'taps'.*symbolic"):
        traced.lower()


def test_a_choice_never_fails() -> None:
    f = jax.jit(lambda x, w: depthwise_conv(x, w))
    exported = jax.export.export(f)(symbolic_length(), shape(3, 2, 1))
    assert "stablehlo.convolution" in exported.mlir_module()
    x, w = np.arange(10.0, dtype=np.float32).reshape(1, 5, 2), np.ones((3, 2, 1), np.float32)
    np.testing.assert_array_equal(exported.call(x, w), [[[6, 9], [12, 15], [18, 21]]])


# explain


# What serves forward, dx and dw on each platform: on one device, and partitioned over one mesh axis and two.
CONV, TAPS = ("conv",) * 3, ("taps",) * 3
PLATFORMS = {
    "cpu": (("native",) * 3 if "native" in LOWERINGS else TAPS, TAPS, TAPS),
    "cuda": (CONV, CONV, ("conv", "conv", "taps")),
    "rocm": (CONV, CONV, ("conv", "conv", "taps")),
    "tpu": (CONV, CONV, CONV),
}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("axes", [0, 1, 2])
@pytest.mark.parametrize("geometry", [{}, {"strides": 2, "padding": "same"}, {"dilation_rate": 2}], ids=str)
def test_what_serves_each_platform(platform: str, axes: int, geometry: dict[str, Any]) -> None:
    explained = explain(X, KERNEL, **geometry, platform=platform, partitioned=axes)
    choices = {name: getattr(explained, name) for name in MAPS}
    assert tuple(choice.lowering for choice in choices.values()) == PLATFORMS[platform][axes]
    for name, choice in choices.items():
        assert re.search(rf"{name}\W+{choice.lowering}: {re.escape(choice.reason)}", str(explained))


def test_explain_repeats_what_was_asked_for(implementation: Implementation) -> None:
    explained = explain(X, KERNEL, implementation=implementation, platform="cpu")
    assert {explained.forward.lowering, explained.input_grad.lowering, explained.kernel_grad.lowering} == {
        implementation
    }


def test_explain_uses_the_default_platform() -> None:
    assert explain(X, KERNEL) == explain(X, KERNEL, platform=jax.default_backend())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"platform": "metal"}, ("platform", "'metal'", "cuda", "rocm")),
        ({"platform": "abacus"}, ("platform", "'abacus'", "cpu")),
        ({"strides": 0}, ("strides",)),
        ({"implementation": "tap"}, ("implementation",)),
        ({"padding": "full"}, ("padding",)),
    ],
    ids=str,
)
def test_explain_refuses_what_the_call_refuses(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=words[0]) as caught:
        explain(X, KERNEL, **options)
    for word in words:
        assert word in str(caught.value)


def test_explain_refuses_a_lowering_that_cannot_serve() -> None:
    with pytest.raises(ValueError, match=r"'taps'.*symbolic"):
        explain(symbolic_length(), shape(3, 2, 1), implementation="taps", platform="cpu")


def test_conv_says_that_a_symbolic_batch_has_no_slabs() -> None:
    (n,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 8, 9, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"'conv' cannot compute this kernel_grad on tpu: .*its size is symbolic"):
        explain(x, KERNEL, implementation="conv", platform="tpu", partitioned=2)
    explained = explain(x, KERNEL, platform="tpu", partitioned=2)
    assert (explained.forward.lowering, explained.kernel_grad.lowering) == ("conv", "taps")


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_conv_says_where_slabs_were_not_tried(platform: str) -> None:
    with pytest.raises(ValueError, match=f"cannot compute this kernel_grad on {platform}: .*tried on cpu and tpu"):
        explain(X, KERNEL, implementation="conv", platform=platform, partitioned=2)
    explained = explain(X, KERNEL, platform=platform, partitioned=2)
    assert (explained.forward.lowering, explained.kernel_grad.lowering) == ("conv", "taps")
