"""The mistakes that newcomers make: each message names the argument at fault and says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import depthwise_jax as dj
from depthwise_jax import interop, optim
from depthwise_jax.constraints import Box, MaxNorm, MinMaxNorm, NonNeg

X, KERNEL = jnp.ones((8, 28, 28, 32)), jnp.ones((3, 3, 32, 1))
LAYER = dj.DepthwiseConv2D(3, depthwise_constraint="max_norm")
UNCHECKED: Any = dj.nnx  # for calls that a type checker refuses
UNCHECKED_LINEN: Any = dj
SHAPE = jax.ShapeDtypeStruct((1, 9, 9, 2), "float32")


def constraints_and_params() -> tuple[Any, Any]:
    return optim.constraints_of(LAYER, SHAPE), LAYER.init(jax.random.key(0), jnp.ones(SHAPE.shape))["params"]


def swapped() -> Any:
    constraints, params = constraints_and_params()
    return optim.feasibility(constraints, params)


def whole_variables() -> Any:
    conv = nn.Conv(32, (3, 3), feature_group_count=32)
    return interop.flax.from_flax(conv, conv.init(jax.random.key(0), X))


def call(**arguments: Any) -> Callable[[], Any]:
    return lambda: dj.depthwise_conv(**{"x": X, "kernel": KERNEL, **arguments})


# Each with what the message must say, in this order.
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "Flax' kernel": (
        call(kernel=jnp.ones((3, 3, 1, 32))),
        ValueError,
        r"kernel must have shape \(\*window, 32, .*\(3, 3, 1, 32\).*Flax.*kernel\.reshape\(3, 3, 32, 1\)",
    ),
    "PyTorch's weight": (
        call(kernel=jnp.ones((32, 1, 3, 3))),
        ValueError,
        r"kernel must have shape .*\(32, 1, 3, 3\).*PyTorch.*\.transpose\(2, 3, 0, 1\)",
    ),
    "no multiplier": (
        call(kernel=jnp.ones((3, 3, 32))),
        ValueError,
        r"kernel must have shape .*kernel\[\.\.\., None\]",
    ),
    "channels first": (
        call(x=jnp.ones((8, 32, 28, 28))),
        ValueError,
        r"x must have shape .*axis -3 has 32 entries: pass data_format='channels_first'",
    ),
    "channels last": (
        call(x=X, data_format="channels_first"),
        ValueError,
        r"x must have shape .*axis -1 has 32 entries: pass data_format='channels_last'",
    ),
    "no x": (call(x=None), TypeError, "^x must be an array; got None"),
    "no kernel": (call(kernel=None), TypeError, "^kernel must be an array; got None"),
    "a bias' name": (call(bias="zeros"), TypeError, "^bias must be an array; got 'zeros'"),
    "traced strides": (
        lambda: jax.jit(dj.depthwise_conv)(X, KERNEL, strides=2),
        TypeError,
        "strides must be .* traced: make it static.*static_argnames",
    ),
    "traced padding": (
        lambda: jax.jit(dj.depthwise_conv)(X, KERNEL, padding=1),
        TypeError,
        "padding must be .* traced: make it static",
    ),
    "cuDNN": (
        call(implementation="cudnn"),
        ValueError,
        r"implementation .*\('conv', 'taps', 'native'\); got 'cudnn'$",
    ),
    "variables for params": (whole_variables, ValueError, r"params must hold 'kernel'.*variables\['params'\]"),
    "swapped": (swapped, TypeError, r"constraint of 'kernel' .*float32\[3, 3, 2, 1\].* wrong order"),
    "an array for an activation": (
        call(activation=KERNEL),
        TypeError,
        r"activation must be .*; got an array float32\[3, 3, 32, 1\]",
    ),
    "max norm of a text": (lambda: MaxNorm("1"), TypeError, "MaxNorm: max_value must be a number; got '1'"),
    "max norm of a dtype": (lambda: MaxNorm(np.float32), TypeError, "MaxNorm: max_value must be a number; got <class"),
    "a dtype as constraint": (
        lambda: optim.project({"kernel": np.float32}).init({"kernel": jnp.ones(3)}),
        TypeError,
        "constraint of 'kernel': cannot make the constraint from the class float32: its instances are not callable",
    ),
    "a dtype as configuration": (
        lambda: dj.constraints.get({"class_name": "MaxNorm", "config": np.float32}),
        ValueError,
        "'config' a dict; got 'MaxNorm' and <class 'numpy.float32'>",
    ),
    "max norm of nothing": (lambda: MaxNorm(None), TypeError, "MaxNorm: max_value must be a number; got None"),
    "min-max norm of a text": (
        lambda: MinMaxNorm("a", 2.0),
        TypeError,
        "MinMaxNorm: min_value must be a number; got 'a'",
    ),
    "rate of a text": (lambda: MinMaxNorm(rate="a"), TypeError, "MinMaxNorm: rate must be a number; got 'a'"),
    "box of a list": (lambda: Box([0.0], 1), TypeError, r"Box: lower must be a number; got \[0\.0\]"),
    "a class": (lambda: optim.constraints_of(dj.DepthwiseConv2D, X), TypeError, r"got the class DepthwiseConv2D: make"),
    "a class alone": (lambda: optim.constraints_of(dj.nnx.DepthwiseConv2D), TypeError, "got the class DepthwiseConv2D"),
    "params for the model": (lambda: optim.constraints_of({"kernel": X}, X), TypeError, "model must be .*type dict"),
    "no example input": (lambda: optim.constraints_of(LAYER), TypeError, "example inputs.*'x'"),
    "no input for a loss": (lambda: dj.regularization_loss(LAYER, {}), TypeError, "example inputs.*'x'"),
    "NNX without in_features": (
        lambda: UNCHECKED.DepthwiseConv2D(3, rngs=nnx.Rngs(0)),
        TypeError,
        r"^DepthwiseConv2D\(in_features, kernel_size, \.\.\., rngs=nnx\.Rngs\(0\)\): .*'kernel_size'",
    ),
    "NNX without rngs": (
        lambda: UNCHECKED.SeparableConv2D(3, 4, 3),
        TypeError,
        r"^SeparableConv2D\(in_features, filters, kernel_size, \.\.\., rngs=nnx\.Rngs\(0\)\): .*'rngs'",
    ),
    "a number of features": (
        lambda: dj.DepthwiseConv2D(32, (3, 3)).init(jax.random.key(0), X),
        ValueError,
        r"kernel_size=\(32, 32\).*kernel_size, not a number of features",
    ),
    "half a name": (
        lambda: dj.DepthwiseConv2D(3, depthwise_initializer="he"),
        ValueError,
        "unknown initializer 'he'; closest valid names: .*'he_normal'",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_message_says_what_to_do(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert re.search(message, str(raised.value)), str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_larger_window_is_no_number_of_features() -> None:
    with pytest.raises(ValueError, match="would be empty") as raised:
        dj.depthwise_conv(jnp.ones((9, 9, 2)), jnp.ones((10, 2, 2, 1)))
    assert "features" not in str(raised.value)


def test_compositions_print_as_they_are_written() -> None:
    both = NonNeg() & MaxNorm(2.0)
    assert repr(both) == "NonNeg() & MaxNorm(max_value=2.0, axis=0, exact=False)"
    assert eval(repr(both), {"NonNeg": NonNeg, "MaxNorm": MaxNorm}) == both


def test_lists_do_for_tuples_in_a_static_module() -> None:
    listed = UNCHECKED_LINEN.DepthwiseConv2D([3, 3], strides=[1, 1], padding=[[1, 1], [0, 0]], dilation_rate=[1, 1])
    tupled = dj.DepthwiseConv2D((3, 3), strides=(1, 1), padding=((1, 1), (0, 0)), dilation_rate=(1, 1))
    assert listed == tupled
    assert hash(listed) == hash(tupled)
