"""Activations against Keras, value by value."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import activations
from workloads.keras_reference import keras

NAMES = sorted(set(keras.src.activations.ALL_OBJECTS_DICT) - {"threshold", "sparsemax"})
X = np.concatenate([np.linspace(-8, 8, 65), np.linspace(-1, 1, 63)]).astype(np.float32).reshape(2, 4, 4, 4)


def apply(function, x):
    return x if function is None else function(x)


@pytest.mark.parametrize("name", NAMES)
def test_names_compute_what_keras_computes(name):
    result = apply(activations.get(name), jnp.asarray(X))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, keras.activations.get(name)(X), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_names_keep_bfloat16(name):
    assert apply(activations.get(name), jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_serialized_names_are_keras_own(name):
    assert activations.serialize(name) == keras.activations.serialize(keras.activations.get(name))


def simplex_projection(row):
    """The projection by bisection on its threshold, in float64."""
    row = np.asarray(row, np.float64)
    low, high = row.min() - 1, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - low, 0)


def test_sparsemax_is_the_projection_onto_the_simplex_where_keras_is_not():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = np.array([simplex_projection(row) for row in x])
    np.testing.assert_allclose(apply(activations.get("sparsemax"), x), expected, atol=1e-6)
    np.testing.assert_allclose(
        apply(activations.get("sparsemax", channel_axis=-2), jnp.asarray(x.T)), expected.T, atol=1e-6
    )
    assert not np.allclose(np.sum(keras.activations.sparsemax(x), axis=-1), 1, atol=1e-2)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "glu"])
def test_named_channelwise_activations_take_the_channel_axis(name):
    first = apply(activations.get(name, channel_axis=-3), jnp.moveaxis(jnp.asarray(X), -1, 1))
    np.testing.assert_array_equal(jnp.moveaxis(first, 1, -1), apply(activations.get(name), jnp.asarray(X)))


def test_a_callable_acts_as_it_does_by_itself():
    assert activations.get(jax.nn.softmax, channel_axis=-3) is jax.nn.softmax
    function = partial(jax.nn.gelu, approximate=True)
    assert activations.get(function) is function


def test_none_and_linear_are_none():
    assert activations.get(None) is None
    assert activations.get("linear") is None
    assert activations.serialize(None) == "linear"


def test_the_activations_that_a_lowering_may_fuse_are_jax_nn_own():
    assert activations.get("relu") is jax.nn.relu
    assert activations.get("relu6") is jax.nn.relu6


def test_keras_configuration_of_a_function():
    config = keras.saving.serialize_keras_object(keras.activations.silu)
    assert activations.get(config) is jax.nn.silu
    assert activations.serialize(config) == "silu"


@pytest.mark.parametrize(
    ("identifier", "error", "match"),
    [
        ("nope", ValueError, r"act: unknown activation 'nope'"),
        ("RELU", ValueError, r"act: unknown activation 'RELU'; closest valid names: 'relu'"),
        ("threshold", ValueError, "act: unknown activation 'threshold'"),
        (3, TypeError, "act must be"),
        (dict, TypeError, "act must be a function.*class dict"),
        ({"class_name": "Nope", "config": {}}, ValueError, "act: unknown activation 'Nope'"),
        ({"module": "keras.layers", "class_name": "ReLU", "config": {}}, ValueError, "act: .*'keras.layers'"),
    ],
)
def test_bad_activations(identifier, error, match):
    with pytest.raises(error, match=match):
        activations.get(identifier, "act")


def test_a_function_of_ones_own_has_no_keras_name():
    with pytest.raises(ValueError, match=r"activation: .* has no Keras configuration"):
        activations.serialize(lambda x: x)
