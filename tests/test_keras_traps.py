"""Where Keras' documentation, its code and good sense disagree: which way we went, beside what Keras does.

Keras' side is asserted where a line shows it, so that a later Keras which mends a trap is noticed here.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from depthwise_jax import constraints, depthwise_conv, initializers, linen, optim, regularizers
from tests.support.layers import DepthwiseConv1D, DepthwiseConv2D, SeparableConv1D, SeparableConv2D
from workloads.keras_reference import keras

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(2, 6, 6, 2)).astype(np.float32)


def output_of(layer, x=X):
    return layer.init_with_output(KEY, jnp.asarray(x))


def filter_norms(kernel):
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=(0, 1)))


def test_1_strides_with_dilation_are_computed():
    """Documented as an error in Keras, but computed."""
    arguments = {"strides": (2, 1), "dilation_rate": (1, 2), "padding": "same"}
    theirs = keras.layers.DepthwiseConv2D(3, use_bias=False, **arguments)
    x = np.random.default_rng(0).normal(size=(1, 9, 9, 2)).astype(np.float32)
    y = theirs(x)
    layer = DepthwiseConv2D(3, use_bias=False, **arguments)
    np.testing.assert_allclose(layer.apply({"params": {"kernel": theirs.kernel.value}}, x), y, atol=1e-6)
    assert layer.compute_output_shape(x.shape) == y.shape
    assert keras.layers.DepthwiseConv2D.from_config(layer.get_config()).strides == (2, 1)
    theirs = keras.layers.SeparableConv1D(2, 3, 2, "same", None, 2, use_bias=False)
    x = x[:, 0]
    y = theirs(x)
    params = {name: getattr(theirs, name).value for name in ("depthwise_kernel", "pointwise_kernel")}
    layer = SeparableConv1D(2, 3, 2, "same", None, 2, use_bias=False)
    np.testing.assert_allclose(layer.apply({"params": params}, x), y, atol=1e-6)


def test_2_explicit_padding_works():
    padding = ((1, 0), (2, 1))
    y, variables = output_of(DepthwiseConv2D(3, padding=padding))
    kernel = variables["params"]["kernel"]
    padded = np.pad(X, ((0, 0), *padding, (0, 0)))
    np.testing.assert_allclose(y, depthwise_conv(padded, kernel), atol=1e-6)
    with pytest.raises(ValueError, match="padding"):
        keras.layers.DepthwiseConv2D(3, padding=padding).build(X.shape)


def test_3_floats_and_booleans_are_no_sizes_and_numpy_integers_are():
    for value in (3.0, (3.5, 2), True):
        with pytest.raises(TypeError, match="kernel_size must be a positive integer"):
            DepthwiseConv2D(value)
    assert output_of(DepthwiseConv2D(np.int64(3)))[0].shape == (2, 4, 4, 2)
    assert keras.layers.DepthwiseConv2D((3.5, 2)).kernel_size == (3.5, 2)


def test_4_no_initializer_means_the_documented_default():
    layer = DepthwiseConv2D(3, depthwise_initializer=None, bias_initializer=None)
    params = layer.init(KEY, X)["params"]
    expected = DepthwiseConv2D(3).init(KEY, X)["params"]
    chex.assert_trees_all_equal(params, expected)
    assert not params["bias"].any()
    theirs = keras.layers.DepthwiseConv2D(3, bias_initializer=None)
    theirs.build(X.shape)
    assert np.any(theirs.bias.value)


@pytest.mark.parametrize("make", [lambda m: m.DepthwiseConv1D(3, 3, 2), lambda m: m.SeparableConv2D(3, 4, 3, 2)])
def test_5_the_documented_positional_calls_work_and_the_integer_is_a_padding(make):
    assert make(linen).padding == 2
    with pytest.raises(AttributeError, match="lower"):
        make(keras.layers)


def test_6_an_empty_output_is_an_error_at_every_call():
    layer = DepthwiseConv2D(3)
    variables = layer.init(KEY, X)
    with pytest.raises(ValueError, match="the output would be empty"):
        layer.apply(variables, X[:, :2])
    theirs = keras.layers.DepthwiseConv2D(3)
    theirs(X)
    assert theirs(X[:, :2]).shape == (2, 0, 4, 2)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
@pytest.mark.parametrize("layer", [DepthwiseConv2D(3), SeparableConv2D(2, 3, dtype="bfloat16")])
def test_7_integers_and_booleans_are_cast_to_the_computation_dtype(layer, dtype):
    x = (X > 0).astype(dtype)
    y, variables = output_of(layer, x)
    np.testing.assert_array_equal(y, layer.apply(variables, x.astype(np.float32)))
    with pytest.raises(TypeError, match="same dtypes"):
        keras.layers.DepthwiseConv2D(3)(x)


@pytest.mark.parametrize("name", ["l1_l2", "l1l2", "L1L2"])
def test_8_l1_l2_is_valid_and_means_001(name):
    layer = DepthwiseConv2D(3, depthwise_regularizer=name)
    params = layer.init(KEY, X)["params"]
    kernel = np.asarray(params["kernel"], np.float64)
    expected = 0.01 * np.abs(kernel).sum() + 0.01 * np.square(kernel).sum()
    np.testing.assert_allclose(linen.regularization_loss(layer, params, X), expected, rtol=1e-6)


def test_9_named_initializers_have_keras_fans_and_the_right_ones_are_an_argument_away():
    x = np.zeros((1, 3, 3, 256), np.float32)
    kernels = {
        initializer: DepthwiseConv2D(3, depthwise_initializer=initializer).init(KEY, x)["params"]["kernel"]
        for initializer in ("he_normal", initializers.HeNormal(fan="window"))
    }
    theirs = keras.layers.DepthwiseConv2D(3, depthwise_initializer=keras.initializers.HeNormal(seed=0))
    theirs.build(x.shape)
    assert np.std(kernels["he_normal"]) == pytest.approx(np.std(theirs.kernel), rel=0.05)
    assert np.std(kernels[initializers.HeNormal(fan="window")]) == pytest.approx(np.sqrt(2 / 9), rel=0.05)


def test_10_orthogonal_makes_the_layer_one_unit_vector_as_in_keras_and_identity_is_refused():
    kernel = DepthwiseConv2D(3, depthwise_initializer="orthogonal").init(KEY, X)["params"]["kernel"]
    assert jnp.linalg.norm(kernel.ravel()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="depthwise_initializer: Identity initializes matrices"):
        DepthwiseConv2D(3, depthwise_initializer="identity").init(KEY, X)


def test_11_norm_constraints_have_keras_axis_and_window_is_per_filter():
    kernel = jnp.full((3, 3, 2, 2), 5.0)
    np.testing.assert_allclose(filter_norms(constraints.MaxNorm(2)(kernel)), 2 * np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(constraints.MaxNorm(2)(kernel), keras.constraints.MaxNorm(2)(kernel), rtol=1e-6)
    np.testing.assert_allclose(filter_norms(constraints.MaxNorm(2, axis="window")(kernel)), 2, rtol=1e-6)
    config = DepthwiseConv2D(3, depthwise_constraint=constraints.MaxNorm(2, axis="window")).get_config()
    assert config["depthwise_constraint"]["config"] == {"max_value": 2, "axis": [0, 1]}
    theirs = keras.constraints.deserialize(config["depthwise_constraint"])
    np.testing.assert_allclose(filter_norms(theirs(kernel)), 2, rtol=1e-6)
    # Each number of a bias is a filter's own: no axis is summed over.
    config_of_bias = DepthwiseConv2D(3, bias_constraint=constraints.MaxNorm(0.5, axis="window")).get_config()
    assert config_of_bias["bias_constraint"]["config"]["axis"] == []
    theirs = keras.constraints.deserialize(config_of_bias["bias_constraint"])
    np.testing.assert_allclose(theirs(np.array([0.25, -3, 0.5], np.float32)), [0.25, -0.5, 0.5], rtol=1e-6)
    config = DepthwiseConv1D(3, depthwise_constraint=constraints.MaxNorm(2, axis="window")).get_config()
    assert config["depthwise_constraint"]["config"] == {"max_value": 2, "axis": [0]}


def test_12_unit_norm_of_a_pointwise_kernel_along_its_default_axis_is_its_sign_as_in_keras():
    kernel = jax.random.normal(KEY, (1, 1, 3, 4))
    np.testing.assert_allclose(constraints.UnitNorm()(kernel), jnp.sign(kernel), rtol=1e-5)
    per_filter = constraints.UnitNorm(axis=-2)(kernel)
    np.testing.assert_allclose(jnp.linalg.norm(per_filter, axis=-2), 1, rtol=1e-6)


def test_13_keras_formula_shrinks_small_weights_and_exact_does_not():
    kernel = jnp.full((3, 3, 1, 1), 1e-6)
    keras_formula, exact = constraints.MaxNorm(2), constraints.MaxNorm(2, exact=True)
    np.testing.assert_allclose(keras_formula(kernel), keras.constraints.MaxNorm(2)(kernel), rtol=1e-6)
    assert (keras_formula(kernel) < 0.95e-6).all()
    np.testing.assert_array_equal(exact(kernel), kernel)
    tiny = jnp.full((3, 3, 1, 1), 1e-5, jnp.float16)
    assert np.isinf(np.asarray(keras.constraints.UnitNorm()(tiny))).all()
    assert jnp.isfinite(constraints.UnitNorm()(tiny)).all()


def train(tx, params, gradient, steps) -> Any:
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(lambda p: jnp.full_like(p, gradient), params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_14_an_accumulated_step_projects_once():
    slow = {"kernel": constraints.MinMaxNorm(0.0, 1.0, rate=0.5, axis=0)}
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), optim.project(slow)), every_k_schedule=4)
    params = train(tx, {"kernel": jnp.array([4.0])}, gradient=0.0, steps=4)
    np.testing.assert_allclose(params["kernel"], 2.5, rtol=1e-6)  # Keras: 4 -> 2.5 -> 1.75 -> 1.375 -> 1.1875

    variable = keras.Variable(np.array([4.0], "float32"))
    variable.constraint = keras.constraints.MinMaxNorm(0.0, 1.0, 0.5)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    for _ in range(4):
        optimizer.apply([jnp.zeros(1)], [variable])
    np.testing.assert_allclose(variable.value, 1.1875, rtol=1e-5)


def test_15_averages_are_of_projected_weights_and_may_be_projected_themselves():
    tx = optax.chain(optax.sgd(1.0), optim.project({"kernel": constraints.NonNeg()}))
    params: Any = {"kernel": jnp.array([1.0])}
    average = params
    for _ in range(3):
        params = train(tx, params, gradient=5.0, steps=1)
        average = jax.tree.map(lambda mean, new: (mean + new) / 2, average, params)
    np.testing.assert_allclose(average["kernel"], 0.125)  # of 1, 0, 0, 0; Keras averages 1, -4, ...
    # where the set is not convex the average leaves it
    unit = {"kernel": constraints.UnitNorm()}
    average = {"kernel": (jnp.array([1.0, 0.0]) + jnp.array([0.0, 1.0])) / 2}
    projected: Any = optim.project_params(average, unit)
    np.testing.assert_allclose(jnp.linalg.norm(projected["kernel"]), 1, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_16_no_parameter_skips_its_constraint(weight_decay):
    layer = DepthwiseConv2D(3, depthwise_constraint="non_neg", bias_constraint="non_neg")
    params = layer.init(KEY, X)["params"]
    tx = optax.chain(optax.adamw(1.0, weight_decay=weight_decay), optim.project(optim.constraints_of(layer, X)))
    params = train(tx, params, gradient=1.0, steps=2)
    assert all((leaf >= 0).all() for leaf in jax.tree.leaves(params))


def test_17_constraints_hold_in_a_plain_optax_loop_where_project_is_in_the_chain():
    layer = DepthwiseConv2D(3, depthwise_constraint="non_neg")
    params = layer.init(KEY, X)["params"]
    assert (train(optax.sgd(1.0), params, gradient=1.0, steps=1)["kernel"] < 0).any()  # a layer alone promises nothing
    tx = optax.chain(optax.sgd(1.0), optim.project(optim.constraints_of(layer, X)))
    assert (train(tx, params, gradient=1.0, steps=1)["kernel"] == 0).all()


def test_18_the_activity_loss_is_computed_in_float32():
    x = np.full((1, 258, 514, 1), 100.0, np.float16)
    layer = DepthwiseConv2D(
        3, depthwise_initializer="ones", activity_regularizer=regularizers.L1(1e-6), dtype="float16"
    )
    variables = layer.init(KEY, x)
    y, state = layer.apply(variables, x, mutable=["losses"])
    assert (y.dtype, state["losses"]["activity"].dtype) == (jnp.float16, jnp.float32)
    np.testing.assert_allclose(state["losses"]["activity"], 256 * 512 * 900 * 1e-6, rtol=1e-3)

    theirs = keras.layers.DepthwiseConv2D(
        3, depthwise_initializer="ones", activity_regularizer=keras.regularizers.L1(1e-6), dtype="mixed_float16"
    )
    theirs(x)
    assert not np.isfinite(theirs.losses[0])


@pytest.mark.parametrize("argument", ["depthwise_regularizer", "bias_regularizer", "activity_regularizer"])
def test_19_the_orthogonal_regularizer_is_refused_at_construction(argument):
    with pytest.raises(ValueError, match=f"{argument}: OrthogonalRegularizer needs a matrix"):
        DepthwiseConv2D(3, **{argument: "orthogonal_regularizer"})


def test_20_softmax_and_glu_act_along_the_channels():
    first = np.moveaxis(X, -1, 1)
    for activation, channels in (("softmax", 4), ("log_softmax", 4), ("glu", 2)):
        last = DepthwiseConv2D(3, activation=activation, depth_multiplier=2)
        y, variables = output_of(last)
        layer = last.clone(data_format="channels_first")
        np.testing.assert_allclose(layer.apply(variables, first), np.moveaxis(y, -1, 1), rtol=1e-5, atol=1e-6)
        assert layer.compute_output_shape(first.shape) == (2, channels, 4, 4)
    theirs = keras.layers.DepthwiseConv2D(3, activation="glu", depth_multiplier=2, data_format="channels_last")
    assert theirs.compute_output_shape(X.shape) == (2, 4, 4, 4)
    assert theirs(X).shape == (2, 4, 4, 2)


def test_21_keras_2_configurations_are_read():
    config = {
        "name": "dw",
        "trainable": True,
        "batch_input_shape": [None, 8, 8, 3],
        "dtype": "float32",
        "kernel_size": [3, 3],
        "strides": [1, 1],
        "padding": "same",
        "data_format": "channels_last",
        "dilation_rate": [1, 1],
        "groups": 1,
        "activation": "relu6",
        "use_bias": False,
        "kernel_initializer": {
            "class_name": "VarianceScaling",
            "config": {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None},
        },
        "bias_initializer": {"class_name": "Zeros", "config": {}, "shared_object_id": 2},
        "kernel_regularizer": None,
        "bias_regularizer": None,
        "activity_regularizer": None,
        "kernel_constraint": {"class_name": "MaxNorm", "config": {"max_value": 1.0, "axis": [0, 1]}},
        "bias_constraint": None,
        "depth_multiplier": 2,
    }
    expected = DepthwiseConv2D(
        (3, 3),
        (1, 1),
        padding="same",
        depth_multiplier=2,
        data_format="channels_last",
        dilation_rate=(1, 1),
        activation="relu6",
        use_bias=False,
        depthwise_initializer=initializers.VarianceScaling(1.0, "fan_avg", "uniform"),
        bias_initializer=initializers.Zeros(),
        depthwise_constraint=constraints.MaxNorm(1.0, axis=(0, 1)),
        name="dw",
    )
    assert DepthwiseConv2D.from_config(config) == expected
    assert DepthwiseConv2D.from_config({"class_name": "DepthwiseConv2D", "config": config}) == expected
    # where both are named, Keras 2 used the depthwise one
    both = {**config, "depthwise_initializer": {"class_name": "Ones", "config": {}}}
    assert DepthwiseConv2D.from_config(both).depthwise_initializer == initializers.Ones()
    with pytest.raises(ValueError, match="groups must be 1"):
        DepthwiseConv2D.from_config({**config, "groups": 2})
    with pytest.raises(TypeError, match="groups"):
        keras.layers.DepthwiseConv2D.from_config({"kernel_size": 3, "groups": 1})


def test_22_a_norm_per_filter_is_a_constraint_and_spectral_norm_is_flax_own():
    kernel = jax.random.normal(KEY, (3, 3, 4, 1))
    np.testing.assert_allclose(filter_norms(constraints.UnitNorm(axis="window")(kernel)), 1, rtol=1e-6)

    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.SpectralNorm(SeparableConv2D(3, 3), n_steps=3)(x, update_stats=True)

    y, _ = Normalised().init_with_output(KEY, X)  # Keras' wrapper raises for a separable layer
    assert jnp.isfinite(y).all()
    with pytest.raises(ValueError, match=r"(?i)invalid|kernel"):
        keras.layers.SpectralNormalization(keras.layers.SeparableConv2D(3, 3))(X)
