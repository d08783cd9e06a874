"""The four layers that Keras has, against Keras: hundreds of random configurations."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import linen
from depthwise_jax._contract import spec
from depthwise_jax._core import introspect
from tests.support.draws import draws
from tests.support.keras_layers import LAYERS, build, draw, keras_layer, weights_for
from workloads.keras_reference import keras

CONFIGURATIONS_PER_LAYER = draws(14, 75)


def names_of(layer: Any) -> list[str]:
    return [variable.name for variable in layer.trainable_variables]


def sum_of_losses(losses: Any) -> Any:
    return sum(jax.tree.leaves(losses), start=jnp.zeros(()))


def both(theirs: Any, ours: Any, weights: list[Any], x: Any, cotangent: Any) -> Any:
    """(output, losses, gradients in weights and x of <output, cotangent> + losses) of Keras' layer and of ours."""
    names = names_of(theirs)

    def run_theirs(weights: list[Any], x: Any) -> Any:
        # stateless_call leaves the activity loss of a lone layer out
        values = list(zip(theirs.trainable_variables, weights, strict=True))
        with keras.StatelessScope(state_mapping=values, collect_losses=True):
            y = theirs(x)
            return y, sum_of_losses(theirs.losses)

    def run_ours(weights: list[Any], x: Any) -> Any:
        params = dict(zip(names, weights, strict=True))
        y, state = ours.apply({"params": params}, x, mutable=["losses"])
        return y, sum_of_losses(state)

    def results(run: Any, *operands: Any) -> Any:
        (y, losses), vjp = jax.vjp(run, *operands)
        return y, losses, vjp((cotangent, jnp.ones(())))

    # One compilation for both.
    return jax.jit(lambda *operands: (results(run_theirs, *operands), results(run_ours, *operands)))(weights, x)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Equal but for rounding, relative to the largest number where that is above 1."""
    for mine, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(1.0, float(np.max(np.abs(reference), initial=0)))
        np.testing.assert_allclose(mine, reference, rtol=tolerance, atol=tolerance * scale)


def as_json(config: Any) -> Any:
    """A configuration as it comes back from a file, its floats rounded: Keras holds some in float32."""
    if isinstance(config, float):
        return round(config, 6)
    if isinstance(config, dict):
        return {key: as_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [as_json(value) for value in config]
    return config


def through_a_file(config: Any) -> Any:
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("seed", range(CONFIGURATIONS_PER_LAYER))
@pytest.mark.parametrize("name", LAYERS)
def test_random_configuration(name, seed):
    config, shape = draw(name, seed)
    rng = np.random.default_rng(seed)
    theirs, ours = build(name, config, shape), getattr(linen, name)(**config)
    weights = weights_for(theirs, rng)
    x = rng.normal(size=shape).astype(np.float32)

    # output shapes, known and not
    output_shape = theirs.compute_output_shape(shape)
    assert ours.compute_output_shape(shape) == output_shape
    channels = 1 if config["data_format"] == "channels_first" else len(shape) - 1
    unknown = tuple(size if axis == channels else None for axis, size in enumerate(shape))
    assert ours.compute_output_shape(unknown) == theirs.compute_output_shape(unknown)

    # parameters, outputs, losses, gradients
    expected_shapes = {v.name: tuple(v.shape) for v in theirs.trainable_variables}
    params = jax.eval_shape(ours.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(lambda p: p.shape, params) == expected_shapes
    cotangent = rng.normal(size=output_shape).astype(np.float32)
    (y, losses, gradients), (our_y, our_losses, our_gradients) = both(theirs, ours, weights, x, cotangent)
    assert our_y.shape == output_shape
    assert_close(our_y, y)
    assert_close(our_losses, losses)
    assert_close(our_gradients, gradients)

    # constraints
    found = introspect.collect(ours, x)
    for variable, weight in zip(theirs.trainable_variables, weights, strict=True):
        constraint = found[variable.name] and found[variable.name].constraint
        assert (constraint is None) == (variable.constraint is None)
        if constraint is not None:
            pair = jax.jit(lambda w, ours=constraint, theirs=variable.constraint: (ours(w), theirs(w)))(weight)
            assert_close(*pair)

    # the configuration, from ours to Keras and from Keras to ours
    original = keras_layer(name, config)
    named = getattr(linen, name)(**config, name=original.name)
    expected_config = as_json(original.get_config())
    assert as_json(named.get_config()) == expected_config
    rebuilt = keras.saving.deserialize_keras_object(through_a_file(spec.serialize(named)))
    assert as_json(rebuilt.get_config()) == expected_config
    assert as_json(type(original).from_config(through_a_file(named.get_config())).get_config()) == expected_config
    whole = through_a_file(keras.saving.serialize_keras_object(original))
    for form in (whole, whole["config"]):
        assert as_json(getattr(linen, name).from_config(form).get_config()) == expected_config


@pytest.mark.parametrize("name", LAYERS)
def test_seeded_initializers_make_keras_weights_bit_for_bit(name):
    config = {"kernel_size": 3, "data_format": "channels_last", "depth_multiplier": 2}
    config["depthwise_initializer"] = {"class_name": "HeNormal", "config": {"seed": 3}}
    config["bias_initializer"] = {"class_name": "RandomUniform", "config": {"seed": 4}}
    if name.startswith("Separable"):
        config |= {"filters": 5, "pointwise_initializer": {"class_name": "GlorotUniform", "config": {"seed": 5}}}
    shape = (1, *(4,) * int(name[-2]), 3)
    theirs = keras_layer(name, config)
    theirs.build(shape)
    params = getattr(linen, name)(**config).init(jax.random.key(0), jnp.zeros(shape))["params"]
    assert set(params) == set(names_of(theirs))
    for variable in theirs.trainable_variables:
        np.testing.assert_array_equal(params[variable.name], variable.value)


def test_what_keras_writes_for_a_lambda_is_refused():
    # of an activation Keras writes the bytecode alone, without saying what it is
    for argument, value, match in (
        ("activation", lambda x: x, "activation: a configuration must have the keys .*'value'"),
        ("depthwise_constraint", lambda w: w, "depthwise_constraint: .*'__lambda__'"),
    ):
        with pytest.warns(UserWarning, match="unsafe"):
            whole = keras.saving.serialize_keras_object(keras.layers.DepthwiseConv2D(3, **{argument: value}))
        with pytest.raises(ValueError, match=match):
            linen.DepthwiseConv2D.from_config(whole)


def test_an_activation_layer_of_keras_is_refused_by_name():
    whole = keras.saving.serialize_keras_object(keras.layers.DepthwiseConv2D(3, activation=keras.layers.ReLU(3.0)))
    with pytest.raises(ValueError, match=r"activation: .*'keras\.layers'"):
        linen.DepthwiseConv2D.from_config(whole)
