"""Every invalid argument and call of a layer: the error's type, and the names in its message."""

import re
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from depthwise_jax import linen
from tests.support.layers import DepthwiseConv1D, DepthwiseConv2D, DepthwiseConv3D, SeparableConv1D, SeparableConv2D

KEY = jax.random.key(0)
ONE_PER_AXIS = ("kernel_size", "strides", "dilation_rate")


def has(*parts):
    return "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


@pytest.mark.parametrize("argument", ONE_PER_AXIS)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        ((-1, 3), ValueError),
        ((0, 3), ValueError),
        ((3,), ValueError),
        ((3, 3, 3), ValueError),
        ((), ValueError),
        (3.0, TypeError),
        ("3", TypeError),
        ("33", TypeError),
        (None, TypeError),
        ((None, 3), TypeError),
        (("3", "3"), TypeError),
        ((3.5, 2), TypeError),
        ((3.0, 2.0), TypeError),
        (True, TypeError),
        ((True, 3), TypeError),
        ({3, 4}, TypeError),
        (np.float32(3), TypeError),
    ],
)
def test_sizes_that_are_none(argument, value, error):
    with pytest.raises(error, match=has(argument, "positive integer", repr(value))):
        DepthwiseConv2D(**{"kernel_size": 2, argument: value})


def test_sizes_of_one_axis():
    with pytest.raises(ValueError, match=has("kernel_size", "1 of them", "(3, 3)")):
        DepthwiseConv1D((3, 3))


@pytest.mark.parametrize("value", [np.int64(3), [3, 3], (3, 3), np.array([3, 3]), (np.int64(3), 3), jnp.array([3, 3])])
def test_integers_of_numpy_and_sequences_are_accepted(value):
    assert DepthwiseConv2D(value).compute_output_shape((None, 8, 8, 1)) == (None, 6, 6, 1)


@pytest.mark.parametrize(
    ("kwargs", "error", "parts"),
    [
        ({"depth_multiplier": 0}, ValueError, ["depth_multiplier", "0"]),
        ({"depth_multiplier": -1}, ValueError, ["depth_multiplier", "-1"]),
        ({"depth_multiplier": "2"}, TypeError, ["depth_multiplier", "'2'"]),
        ({"depth_multiplier": (1, 2)}, ValueError, ["depth_multiplier", "(1, 2)"]),
        ({"depth_multiplier": None}, TypeError, ["depth_multiplier", "None"]),
        ({"depth_multiplier": 1.5}, TypeError, ["depth_multiplier", "1.5"]),
        ({"depth_multiplier": 2.0}, TypeError, ["depth_multiplier", "2.0"]),
        ({"padding": "foo"}, ValueError, ["padding", "'foo'", "valid", "same"]),
        ({"padding": ""}, ValueError, ["padding", "''"]),
        ({"padding": "full"}, ValueError, ["padding", "'full'"]),
        ({"padding": "causal"}, ValueError, ["padding", "causal"]),
        ({"padding": None}, TypeError, ["padding", "None"]),
        ({"padding": 1.5}, TypeError, ["padding", "1.5"]),
        ({"padding": -1}, ValueError, ["padding", "-1"]),
        ({"padding": ((1, 1),)}, ValueError, ["padding", "((1, 1),)"]),
        ({"padding": (1, 1)}, TypeError, ["padding", "(1, 1)"]),
        ({"data_format": "NHWC"}, ValueError, ["data_format", "'NHWC'", "channels_first"]),
        ({"data_format": 3}, ValueError, ["data_format", "3"]),
        ({"activation": "nope"}, ValueError, ["activation", "'nope'"]),
        ({"activation": "RELU"}, ValueError, ["activation", "'RELU'", "'relu'"]),
        ({"activation": 3}, TypeError, ["activation", "3"]),
        ({"activation": {"class_name": "Nope", "config": {}}}, ValueError, ["activation", "'Nope'"]),
        ({"use_bias": "no"}, TypeError, ["use_bias", "'no'"]),
        ({"use_bias": 1}, TypeError, ["use_bias", "1"]),
        ({"use_bias": None}, TypeError, ["use_bias", "None"]),
        *(
            ({f"{prefix}_{kind}": value}, error, [f"{prefix}_{kind}", part])
            for prefix, kind in [
                ("depthwise", "initializer"),
                ("bias", "initializer"),
                ("depthwise", "regularizer"),
                ("bias", "regularizer"),
                ("activity", "regularizer"),
                ("depthwise", "constraint"),
                ("bias", "constraint"),
            ]
            for value, error, part in [
                ("nope", ValueError, f"unknown {kind} 'nope'"),
                (3, TypeError, "3"),
                ({"class_name": "Nope", "config": {}}, ValueError, "'Nope'"),
                ({"module": "os", "class_name": "system", "config": {"command": "false"}}, ValueError, "'os'"),
                ({"class_name": "__lambda__", "config": {"value": "lambda x: x"}}, ValueError, "'__lambda__'"),
            ]
        ),
        ({"depthwise_regularizer": "orthogonal_regularizer"}, ValueError, ["depthwise_regularizer", "matrices"]),
        ({"activity_regularizer": "orthogonal_regularizer"}, ValueError, ["activity_regularizer", "matrices"]),
        ({"dtype": "foo"}, TypeError, ["dtype", "'foo'"]),
        ({"dtype": jnp.int32}, TypeError, ["dtype", "int32"]),
        ({"param_dtype": None}, TypeError, ["param_dtype", "None"]),
        ({"param_dtype": "int8"}, TypeError, ["param_dtype", "int8"]),
        ({"implementation": "tapes"}, ValueError, ["implementation", "'tapes'", "'taps'"]),
        ({"precision": "hihg"}, ValueError, ["precision", "'hihg'"]),
        ({"in_sharding": ("b",)}, TypeError, ["in_sharding", "PartitionSpec", "('b',)"]),
    ],
)
def test_invalid_arguments_fail_at_construction(kwargs, error, parts):
    with pytest.raises(error, match=has(*parts)):
        DepthwiseConv2D(3, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "parts"),
    [
        ({"filters": 0}, ValueError, ["filters", "0"]),
        ({"filters": -1}, ValueError, ["filters", "-1"]),
        ({"filters": None}, TypeError, ["filters", "None"]),
        ({"filters": 2.0}, TypeError, ["filters", "2.0"]),
        ({"depth_multiplier": 0}, ValueError, ["depth_multiplier", "0"]),
        ({"kernel_size": (1, 0)}, ValueError, ["kernel_size", "(1, 0)"]),
        ({"strides": (1, 0)}, ValueError, ["strides", "(1, 0)"]),
        ({"pointwise_initializer": "nope"}, ValueError, ["pointwise_initializer", "'nope'"]),
        ({"pointwise_regularizer": "nope"}, ValueError, ["pointwise_regularizer", "'nope'"]),
        ({"pointwise_constraint": "nope"}, ValueError, ["pointwise_constraint", "'nope'"]),
    ],
)
def test_invalid_arguments_of_separable_layers(kwargs, error, parts):
    with pytest.raises(error, match=has(*parts)):
        SeparableConv2D(**{"filters": 2, "kernel_size": 3, **kwargs})


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: DepthwiseConv2D(3, foo=1), "foo"),
        (lambda: DepthwiseConv2D(3, rank=1), "rank"),
        (lambda: DepthwiseConv2D(), "kernel_size"),
        (lambda: DepthwiseConv2D(3, groups=1), "groups"),
        (lambda: DepthwiseConv2D(3, trainable=1), "trainable"),
        (lambda: SeparableConv2D(3), "kernel_size"),
    ],
)
def test_missing_and_unknown_arguments_are_pythons_own_type_error(make, part):
    with pytest.raises(TypeError, match=part):
        make()


@pytest.mark.parametrize(
    ("layer", "shape", "parts"),
    [
        (DepthwiseConv2D(3), (3,), ["DepthwiseConv2D", "(*batch, height, width, channels)", "(3,)"]),
        (DepthwiseConv2D(3), (8, 8), ["(8, 8)"]),
        (DepthwiseConv2D(3, data_format="channels_first"), (8, 8), ["(*batch, channels, height, width)", "(8, 8)"]),
        (DepthwiseConv1D(3), (8,), ["DepthwiseConv1D", "(*batch, steps, channels)", "(8,)"]),
        (DepthwiseConv3D(3), (8, 8, 8), ["DepthwiseConv3D", "(*batch, height, width, depth, channels)"]),
        (SeparableConv1D(2, 3), (8,), ["SeparableConv1D", "(8,)"]),
        (DepthwiseConv2D(3), (1, 5, 5, 0), ["channel", "(1, 5, 5, 0)"]),
        (DepthwiseConv2D(3), (1, 2, 5, 3), ["output would be empty", "(2, 5)", "(3, 3)"]),
        (DepthwiseConv2D(5, strides=2), (2, 4, 4, 3), ["output would be empty"]),
        (SeparableConv2D(8, 5, strides=2), (2, 4, 4, 3), ["output would be empty"]),
        (DepthwiseConv2D(3, padding="same"), (1, 0, 5, 3), ["empty"]),
        (DepthwiseConv2D(3, padding="reflect"), (1, 0, 5, 3), ["(0, 5)"]),
    ],
)
def test_inputs_that_do_not_fit(layer, shape, parts):
    with pytest.raises(ValueError, match=has(*parts)):
        layer.init(KEY, jnp.zeros(shape))
    with pytest.raises(ValueError, match=has(*parts)):
        layer.compute_output_shape(shape)


@pytest.mark.parametrize("value", [("a", 3, 3, 1), (1, -3, 3, 1), (1.0, 3, 3, 1)])
def test_input_shapes_that_are_none(value):
    with pytest.raises(TypeError, match=has("input_shape", "None")):
        DepthwiseConv2D(3).compute_output_shape(value)


def test_an_empty_output_is_refused_at_every_call_and_an_empty_batch_is_not():
    layer = DepthwiseConv2D(3)
    variables = layer.init(KEY, jnp.zeros((1, 5, 5, 2)))
    for call in (layer.apply, jax.jit(layer.apply)):
        with pytest.raises(ValueError, match="output would be empty"):
            call(variables, jnp.zeros((1, 2, 5, 2)))
    assert layer.apply(variables, jnp.zeros((0, 5, 5, 2))).shape == (0, 3, 3, 2)


def test_another_number_of_channels_names_the_parameter_and_both_shapes():
    layer = DepthwiseConv2D(3)
    variables = layer.init(KEY, jnp.zeros((1, 5, 5, 3)))
    with pytest.raises(ValueError, match=has("'kernel'", "(3, 3, 3, 1)", "(3, 3, 4, 1)", "channels")):
        layer.apply(variables, jnp.zeros((1, 5, 5, 4)))
    first = DepthwiseConv2D(3, data_format="channels_first")
    with pytest.raises(ValueError, match=has("'kernel'", "(3, 3, 3, 1)", "(3, 3, 5, 1)")):
        first.apply(variables, jnp.zeros((1, 5, 5, 3)))


@pytest.mark.parametrize(
    ("name", "shape"), [("depthwise_kernel", (3, 3, 2, 2)), ("pointwise_kernel", (1, 1, 3, 2)), ("bias", (3,))]
)
def test_weights_of_the_wrong_shape_name_the_parameter_and_both_shapes(name, shape):
    layer = SeparableConv2D(2, 3)
    x = jnp.zeros((1, 5, 5, 2))
    params = layer.init(KEY, x)["params"]
    with pytest.raises(ValueError, match=has(repr(name), str(shape), str(params[name].shape))):
        layer.apply({"params": {**params, name: jnp.zeros(shape)}}, x)


@pytest.mark.parametrize(
    ("initializer", "parts"),
    [
        (np.zeros((3, 3, 1, 1)), ["depthwise_initializer", "(3, 3, 2, 1)", "(3, 3, 1, 1)"]),
        (lambda key, shape, dtype: jnp.zeros(3), ["depthwise_initializer", "(3, 3, 2, 1)", "(3,)"]),
        ("identity", ["depthwise_initializer", "Identity", "(3, 3, 2, 1)"]),
        ("stft", ["depthwise_initializer", "STFT", "(3, 3, 2, 1)"]),
    ],
)
def test_initializers_that_do_not_fit_the_kernel(initializer, parts):
    with pytest.raises(ValueError, match=has(*parts)):
        DepthwiseConv2D(3, depthwise_initializer=initializer).init(KEY, jnp.zeros((1, 5, 5, 2)))


@pytest.mark.parametrize(
    ("config", "error", "parts"),
    [
        ({"kernel_size": 3, "foo": 1}, ValueError, ["DepthwiseConv2D", "'foo'"]),
        ({"kernel_size": 3, "depth_multiplyer": 1}, ValueError, ["'depth_multiplyer'", "'depth_multiplier'"]),
        ({"kernel_size": 3, "groups": 2}, ValueError, ["groups", "2"]),
        ({"class_name": "Conv2D", "config": {"kernel_size": 3}}, ValueError, ["DepthwiseConv2D", "'Conv2D'"]),
        ({"class_name": "DepthwiseConv1D", "config": {"kernel_size": 3}}, ValueError, ["'DepthwiseConv1D'"]),
        (
            {"module": "evil", "class_name": "DepthwiseConv2D", "config": {"kernel_size": 3}},
            ValueError,
            ["DepthwiseConv2D", "'evil'"],
        ),
        (
            {"module": None, "class_name": "DepthwiseConv2D", "config": {}, "registered_name": "mine>DepthwiseConv2D"},
            ValueError,
            ["'mine>DepthwiseConv2D'"],
        ),
        ({"kernel_size": 3, "dtype": "int8"}, ValueError, ["dtype", "'int8'"]),
        (
            {"kernel_size": 3, "dtype": {"class_name": "Evil", "config": {"name": "float32"}}},
            ValueError,
            ["dtype", "Evil"],
        ),
        ({"class_name": "DepthwiseConv2D"}, ValueError, ["config"]),
        ({"class_name": "DepthwiseConv2D", "config": 3}, ValueError, ["config", "3"]),
        ("DepthwiseConv2D", TypeError, ["config", "dict"]),
        ({}, TypeError, ["kernel_size"]),
        (
            {"kernel_size": 3, "activation": {"module": "builtins", "class_name": "function", "config": "eval"}},
            ValueError,
            ["activation", "'eval'"],
        ),
        (
            {"kernel_size": 3, "depthwise_constraint": {"class_name": "__lambda__", "config": {"value": "4wEA"}}},
            ValueError,
            ["depthwise_constraint", "'__lambda__'"],
        ),
    ],
)
def test_configurations_that_are_refused(config, error, parts):
    with pytest.raises(error, match=has(*parts)):
        DepthwiseConv2D.from_config(config)


@pytest.mark.parametrize(
    ("layer", "parts"),
    [
        (DepthwiseConv3D(3), ["DepthwiseConv3D", "Keras"]),
        (DepthwiseConv1D(3, padding="causal"), ["padding", "causal", "Keras"]),
        (DepthwiseConv2D(3, padding=1), ["padding", "1"]),
        (DepthwiseConv2D(3, activation=lambda x: x), ["activation"]),
        (DepthwiseConv2D(3, depthwise_initializer=jax.nn.initializers.zeros), ["depthwise_initializer"]),
        (DepthwiseConv2D(3, depthwise_initializer=np.zeros((3, 3, 1, 1))), ["depthwise_initializer"]),
        (DepthwiseConv2D(3, bias_regularizer=jnp.sum), ["bias_regularizer"]),
        (DepthwiseConv2D(3, activity_regularizer=jnp.sum), ["activity_regularizer"]),
        (DepthwiseConv2D(3, depthwise_constraint=jnp.abs), ["depthwise_constraint"]),
        (DepthwiseConv2D(3, dtype="float64"), ["dtype", "float64", "float32"]),
        (DepthwiseConv2D(3, precision="highest"), ["precision", "highest"]),
        (DepthwiseConv2D(3, implementation="conv"), ["implementation", "conv"]),
        (DepthwiseConv2D(3, in_sharding=PartitionSpec("b")), ["in_sharding", "'b'"]),
    ],
)
def test_what_keras_has_no_word_for_is_not_serialized(layer, parts):
    with pytest.raises(ValueError, match=has(*parts, "Keras")):
        layer.get_config()


def test_regularization_loss_refuses_other_params():
    layer = DepthwiseConv2D(3, depthwise_regularizer="l2")
    x = jnp.zeros((1, 5, 5, 2))
    params = layer.init(KEY, x)["params"]
    with pytest.raises(ValueError, match=r"params must hold the model's parameter \['kernel'\]"):
        linen.regularization_loss(layer, {"params": params}, x)
    with pytest.raises(ValueError, match=has("['kernel']", "(3, 3, 2, 1)", "(3, 3, 4, 1)")):
        linen.regularization_loss(layer, {**params, "kernel": jnp.zeros((3, 3, 4, 1))}, x)


ARGUMENTS = [field.name for field in fields(linen.SeparableConv2D) if field.name not in ("parent", "name")]


def configurations(**values):
    return [{"class_name": name, "config": config} for name, configs in values.items() for config in configs]


NONSENSE = [
    *(object(), [], {}, {1: 2}, {"class_name": None}, {"class_name": []}, float("nan"), b"x", 1j, "xyz", -1, -1.5, ""),
    *(set(), ["same", "same", "same"], [[1], [1]], ((1, "a"), (1, 1)), ("high", "high", "high"), ["conv"]),
    *configurations(
        MaxNorm=[{"axis": "q"}, {"max_value": None}],
        HeNormal=[{"input_axes": 3, "output_axes": 2}],
        VarianceScaling=[{"scale": "a"}, {"mode": []}],
        STFT=[{"side": []}, {"window": 3}],
        L1=[{"l1": []}, {"l1": np.zeros(2)}],
        OrthogonalRegularizer=[{"mode": []}],
        Constant=[{"value": 1j}],
    ),
]


@pytest.mark.parametrize(
    "argument", [field.name for field in fields(linen.SeparableConv2D)[: -len(("parent", "name"))]]
)
def test_nonsense_is_a_value_or_type_error_that_names_the_argument(argument):
    for value in [*NONSENSE, *([np.zeros((2, 2)), np.array(2.5)] if "initializer" not in argument else [])]:
        with pytest.raises((ValueError, TypeError), match=argument):
            SeparableConv2D(**{"filters": 2, "kernel_size": 3, argument: value})
