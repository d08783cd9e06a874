"""Initializers against Keras: the same draws for a seed, the same distribution without, right fans on request."""

import json
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import initializers
from workloads.keras_reference import keras

KEY = jax.random.key(0)
RANDOM = [
    ("RandomNormal", {}),
    ("RandomNormal", {"mean": 1.0, "stddev": 2.0}),
    ("RandomUniform", {}),
    ("RandomUniform", {"minval": -1.0, "maxval": 3.0}),
    ("TruncatedNormal", {}),
    ("TruncatedNormal", {"mean": -1.0, "stddev": 0.5}),
    ("GlorotUniform", {}),
    ("GlorotNormal", {}),
    ("HeUniform", {}),
    ("HeNormal", {}),
    ("HeNormal", {"input_axes": (0, 1), "output_axes": (0, 1, 3)}),
    ("LecunUniform", {}),
    ("LecunNormal", {}),
    ("VarianceScaling", {}),
    ("VarianceScaling", {"scale": 3.0, "mode": "fan_out", "distribution": "untruncated_normal"}),
    ("VarianceScaling", {"scale": 0.5, "mode": "fan_avg", "distribution": "uniform"}),
    ("VarianceScaling", {"distribution": "normal"}),
    ("Orthogonal", {}),
    ("Orthogonal", {"gain": 2.0}),
]
CONSTANT = [
    ("Zeros", {}, (3, 2)),
    ("Ones", {}, (3, 2)),
    ("Constant", {"value": 3}, (3, 2)),
    ("Constant", {"value": -0.25}, (2,)),
    ("Identity", {}, (3, 3)),
    ("Identity", {"gain": 2.0}, (2, 4)),
    ("STFT", {}, (16, 1, 9)),
    ("STFT", {"side": "imag", "window": None}, (8, 1, 5)),
    ("STFT", {"window": "hamming", "scaling": "spectrum", "periodic": True}, (16, 1, 9)),
    ("STFT", {"scaling": None}, (16, 1, 9)),
]


def make(name, config) -> Any:
    return initializers.get({"class_name": name, "config": config})


@pytest.mark.parametrize("shape", [(3, 2, 4, 2), (5, 3, 1)])
@pytest.mark.parametrize(("name", "config"), RANDOM)
def test_a_seed_draws_what_keras_draws_bit_for_bit(name, config, shape):
    config = {axes: value for axes, value in config.items() if "axes" not in axes or len(shape) == 4}
    ours = make(name, {"seed": 11, **config})(KEY, shape, jnp.float32)
    theirs = getattr(keras.initializers, name)(seed=11, **config)(shape, "float32")
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("name", "dtype"), [("GlorotUniform", "bfloat16"), ("HeNormal", "float16")])
def test_a_seed_draws_what_keras_draws_in_narrow_dtypes(name, dtype):
    ours = make(name, {"seed": 3})(KEY, (3, 3, 4, 2), jnp.dtype(dtype))
    theirs = getattr(keras.initializers, name)(seed=3)((3, 3, 4, 2), dtype)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, np.int64(5)])
def test_the_key_of_a_seed(seed):
    key = jnp.array([int(seed), 0], jnp.uint32)
    expected = jax.random.uniform(key, (3, 3, 4, 1), jnp.float32, -math.sqrt(6 / 45), math.sqrt(6 / 45))
    np.testing.assert_array_equal(initializers.GlorotUniform(seed)(KEY, (3, 3, 4, 1)), expected)


@pytest.mark.parametrize("name", ["GlorotUniform", "HeNormal", "RandomNormal", "Orthogonal"])
def test_the_default_kind_of_key_does_not_change_a_seeded_draw(name):
    expected = make(name, {"seed": 5})(KEY, (3, 3, 4, 2), jnp.float32)
    with jax.default_prng_impl("rbg"):
        drawn = make(name, {"seed": 5})(jax.random.key(1), (3, 3, 4, 2), jnp.float32)
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize(("name", "config"), RANDOM)
def test_without_a_seed_the_key_draws_from_the_same_distribution(name, config):
    key = jax.random.wrap_key_data(jnp.array([11, 0], jnp.uint32), impl="threefry2x32")
    drawn = make(name, config)(key, (3, 2, 4, 2), jnp.float32)
    np.testing.assert_array_equal(drawn, make(name, {"seed": 11, **config})(KEY, (3, 2, 4, 2), jnp.float32))
    assert not np.array_equal(drawn, make(name, config)(jax.random.key(1), (3, 2, 4, 2), jnp.float32))


@pytest.mark.parametrize(("name", "config", "shape"), CONSTANT)
def test_constant_initializers(name, config, shape):
    ours = make(name, config)(KEY, shape, jnp.float32)
    theirs = getattr(keras.initializers, name)(**config)(shape, "float32")
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # Keras computes STFT's angles in float32


@pytest.mark.parametrize("name", sorted(set(keras.src.initializers.ALL_OBJECTS_DICT) - {"Initializer", "initializer"}))
def test_every_name_of_keras(name):
    # Keras' own get fails for "constant": it looks for a value in the empty configuration
    theirs = keras.src.initializers.ALL_OBJECTS_DICT[name]
    assert type(initializers.get(name)).__name__ == theirs.__name__


@pytest.mark.parametrize(
    ("name", "config"),
    [*RANDOM, *((name, {**config, "seed": 4}) for name, config in RANDOM), *((n, c) for n, c, _ in CONSTANT)],
)
def test_configurations_go_through_keras_and_back(name, config):
    ours = make(name, config)
    serialized = json.loads(json.dumps(initializers.serialize(ours)))
    theirs = keras.initializers.deserialize(serialized)
    assert initializers.get(serialized) == ours
    if name != "Identity":  # Keras forgets its gain
        assert initializers.get(json.loads(json.dumps(keras.initializers.serialize(theirs)))) == ours


# fan_in and fan_out of a kernel (3, 5, 4, 2): Keras' (window*C, window*M) and the right ones.
@pytest.mark.parametrize(("fan", "fan_in", "fan_out"), [(None, 60, 30), ("window", 15, 30)])
@pytest.mark.parametrize(
    ("name", "scale", "mode", "distribution"),
    [
        ("GlorotUniform", 1.0, "fan_avg", "uniform"),
        ("GlorotNormal", 1.0, "fan_avg", "truncated_normal"),
        ("HeUniform", 2.0, "fan_in", "uniform"),
        ("HeNormal", 2.0, "fan_in", "truncated_normal"),
        ("LecunUniform", 1.0, "fan_in", "uniform"),
        ("LecunNormal", 1.0, "fan_in", "truncated_normal"),
    ],
)
def test_fans(name, scale, mode, distribution, fan, fan_in, fan_out):
    initializer = make(name, {"seed": 1, "fan": fan})
    assert initializer.fans((3, 5, 4, 2)) == (fan_in, fan_out)
    variance = scale / {"fan_in": fan_in, "fan_avg": (fan_in + fan_out) / 2}[mode]
    unit = initializers.VarianceScaling(1.0, "fan_in", distribution, seed=1)(KEY, (1, 1, 1, 120))  # fan_in 1
    drawn = np.asarray(initializer(KEY, (3, 5, 4, 2))).ravel()
    np.testing.assert_allclose(drawn, np.asarray(unit).ravel() * math.sqrt(variance), rtol=1e-5, atol=1e-6)


def test_he_normal_by_window_keeps_the_variance_of_a_signal_where_keras_fans_lose_it():
    kernel = {fan: initializers.HeNormal(fan=fan)(KEY, (3, 3, 256, 1)) for fan in (None, "window")}
    assert np.std(kernel["window"]) == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert np.std(kernel[None]) == pytest.approx(math.sqrt(2 / 9) / 16, rel=0.05)


def test_fan_window_serializes_as_the_axes_that_keras_understands():
    config = initializers.serialize(initializers.HeNormal(seed=2, fan="window"), window_axes=(0, 1))
    assert config is not None
    assert config["config"]["input_axes"] == [0, 1]
    assert config["config"]["output_axes"] == [0, 1, 3]
    np.testing.assert_array_equal(
        keras.initializers.deserialize(config)((3, 3, 4, 2), "float32"),
        initializers.HeNormal(seed=2, fan="window")(KEY, (3, 3, 4, 2)),
    )


def test_flax_initializers_and_boxes_pass_through():
    init = nn.initializers.lecun_normal()
    assert initializers.get(init) is init
    boxed = initializers.get(nn.with_partitioning(initializers.Ones(), ("a", None)))
    assert boxed is not None
    assert isinstance(boxed(KEY, (2, 3), jnp.float32), nn.Partitioned)


def test_an_array_is_an_initializer_of_its_own_shape():
    array = np.arange(6.0).reshape(2, 3)
    given = initializers.get(array)
    assert given is not None
    np.testing.assert_array_equal(given(KEY, (2, 3), jnp.float32), array)
    with pytest.raises(ValueError, match=r"shape \(3, 2\); got one of shape \(2, 3\)"):
        given(KEY, (3, 2), jnp.float32)
    with pytest.raises(ValueError, match="has no Keras configuration"):
        initializers.serialize(given)


@pytest.mark.parametrize(
    ("identifier", "error", "match"),
    [
        ("nope", ValueError, "init: unknown initializer 'nope'"),
        ("glorot_unifrom", ValueError, "closest valid names: 'glorot_uniform'"),
        ("initializer", ValueError, "unknown initializer 'initializer'"),
        (3, TypeError, "init must be"),
        ({"class_name": "Nope", "config": {}}, ValueError, "'Nope'"),
        ({"class_name": "GlorotUniform", "config": {"seed": "a"}}, ValueError, "seed must be"),
        ({"class_name": "GlorotUniform", "config": {"seed": -1}}, ValueError, "seed must be"),
        (
            {"class_name": "HeNormal", "config": {"seed": {"class_name": "SeedGenerator", "config": {}}}},
            ValueError,
            "seed must be",
        ),
        ({"class_name": "Constant", "config": {"value": [1.0, 2.0]}}, ValueError, "value must be a finite number"),
        ({"class_name": "RandomNormal", "config": {"stddev": math.nan}}, ValueError, "stddev must be a finite number"),
        ({"class_name": "VarianceScaling", "config": {"scale": 0.0}}, ValueError, "scale must be positive"),
        ({"class_name": "VarianceScaling", "config": {"mode": "fan"}}, ValueError, "mode must be one of"),
        ({"class_name": "VarianceScaling", "config": {"distribution": "x"}}, ValueError, "distribution must be one of"),
        ({"class_name": "HeNormal", "config": {"fan": "channel"}}, ValueError, "fan must be None or 'window'"),
        (
            {"class_name": "HeNormal", "config": {"fan": "window", "input_axes": [0]}},
            ValueError,
            "input_axes and output_axes must be None with fan='window'",
        ),
        ({"class_name": "STFT", "config": {"side": "left"}}, ValueError, "side must be"),
        ({"class_name": "STFT", "config": {"scaling": "left"}}, ValueError, "scaling must be"),
        ({"class_name": "STFT", "config": {"window": "nope"}}, ValueError, "init: cannot make"),
        (lambda shape: jnp.zeros(shape), TypeError, r"init must take \(key, shape, dtype\)"),
        (keras.initializers.HeNormal(), TypeError, r"init must take \(key, shape, dtype\)"),
    ],
)
def test_bad_initializers(identifier, error, match):
    with pytest.raises(error, match=match):
        initializers.get(identifier, "init")


@pytest.mark.parametrize(
    ("initializer", "shape", "match"),
    [
        (initializers.Identity(), (3, 3, 1, 1), "Identity initializes matrices"),
        (initializers.Orthogonal(), (3,), "Orthogonal initializes arrays of two axes"),
        (initializers.STFT(), (3, 2, 4), "STFT initializes the shape"),
        (initializers.HeNormal(fan="window"), (4,), "fan='window' needs a kernel"),
    ],
)
def test_shapes_that_an_initializer_refuses(initializer, shape, match):
    with pytest.raises(ValueError, match=match):
        initializer(KEY, shape)
