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
from tests.keras_reference import keras

LAYERS = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D")
CONFIGURATIONS_PER_LAYER = 75
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # gone from later versions
    **({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}),
}


def chance(rng, values):
    """One of `values`, or None half of the time."""
    return values[rng.integers(len(values))] if rng.random() < 0.5 else None


def per_axis(rng, rank, high):
    """An integer for all axes, or one per axis."""
    values = tuple(int(n) for n in rng.integers(1, high + 1, size=rank))
    return values if rng.random() < 0.7 else values[0]


def draw(name: str, seed: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A random valid configuration of a layer, as Keras' own arguments, and an input shape for it."""
    rng = np.random.default_rng([LAYERS.index(name), seed])
    rank = int(name[-2])
    separable = name.startswith("Separable")
    config: dict[str, Any] = {
        "kernel_size": per_axis(rng, rank, 3),
        "padding": str(rng.choice(["valid", "same", "SAME", "Valid"])),
        "data_format": str(rng.choice(["channels_last", "channels_first"])),
        "depth_multiplier": int(rng.integers(1, 4)),
        "use_bias": bool(rng.random() < 0.8),
    }
    if separable:
        config["filters"] = int(rng.integers(1, 5))
    steps = (["strides"], ["dilation_rate"], ["strides", "dilation_rate"])[rng.integers(3)]
    config |= {name: per_axis(rng, rank, 3) for name in steps}
    # Those that act along the channels differ on purpose with channels_first, see test_keras_traps.
    names = ["relu", "relu6", "gelu", "silu", "elu", "tanh", "sigmoid", "softplus", "leaky_relu", "hard_silu", "mish"]
    if config["data_format"] == "channels_last":
        names += ["log_softmax"]  # at softmax Keras warns where there is one channel
    config["activation"] = chance(rng, names)
    l1, l2 = (round(float(value), 3) for value in rng.uniform(0.01, 0.5, size=2))
    regularizers = [
        {"class_name": "L1", "config": {"l1": l1}},
        {"class_name": "L2", "config": {"l2": l2}},
        {"class_name": "L1L2", "config": {"l1": l1, "l2": l2}},
        "l2",
    ]
    axis = [0, -1, list(range(rank)), list(range(rank + 1))][rng.integers(4)]
    norms = [
        {"class_name": "MaxNorm", "config": {"max_value": 0.5, "axis": axis}},
        {"class_name": "MinMaxNorm", "config": {"min_value": 0.4, "max_value": 0.6, "rate": 0.7, "axis": axis}},
        {"class_name": "UnitNorm", "config": {"axis": axis}},
    ]
    initializers = ["he_normal", "lecun_uniform", "ones", {"class_name": "GlorotUniform", "config": {"seed": 5}}]
    for prefix in ("depthwise", "pointwise", "bias") if separable else ("depthwise", "bias"):
        config[f"{prefix}_initializer"] = (
            chance(rng, initializers[-2:] if prefix == "bias" else initializers) or "zeros"
        )
        config[f"{prefix}_regularizer"] = chance(rng, regularizers)
        config[f"{prefix}_constraint"] = chance(
            rng, ["non_neg", "max_norm"] if prefix == "bias" else [*norms, "NonNeg"]
        )
    config["activity_regularizer"] = chance(rng, regularizers)
    spatial = [int(n) for n in rng.integers(7, 9, size=rank)]  # not below the span of 3 taps with dilation 3
    channels, batch = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    last = config["data_format"] == "channels_last"
    return config, (batch, *spatial, channels) if last else (batch, channels, *spatial)


def keras_layer(name: str, config: dict[str, Any], **more: Any) -> Any:
    return getattr(keras.layers, name)(**{**config, **more})


def build(name: str, config: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """Keras' layer with its variables, for an input of this shape."""
    # The values are replaced; zeros spare a compilation of each shape's draw.
    zeros = {key: "zeros" for key in config if key.endswith("_initializer")}
    zeros |= {"depthwise_initializer": "zeros"} | ({"pointwise_initializer": "zeros"} if "filters" in config else {})
    layer = keras_layer(name, config, **zeros)
    layer.build(shape)
    return layer


def weights_for(layer: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """Random values of Keras' variables, in Keras' order."""
    return [rng.normal(scale=0.5, size=v.shape).astype(np.float32) for v in layer.trainable_variables]


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

    # One compilation for both, and a quick one: this module's time is XLA's.
    run_both = jax.jit(lambda *operands: (results(run_theirs, *operands), results(run_ours, *operands)))
    return run_both.lower(weights, x).compile(compiler_options=QUICKLY)(weights, x)


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
            assert_close(constraint(jnp.asarray(weight)), variable.constraint(jnp.asarray(weight)))

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
        ("activation", lambda x: x, "activation: a configuration has the keys .*'value'"),
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
