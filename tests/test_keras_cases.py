"""The cases of Keras' own tests of depthwise and separable convolutions, and their like in 3D, against the loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthwise_jax import depthwise_conv, separable_conv
from tests.support import layers as linen
from tests.support.oracle import Oracle

KEY = jax.random.key(0)
LAST, FIRST = "channels_last", "channels_first"


def pointwise(y, kernel, data_format):
    """The contraction of the channels with a (*1s, channels, filters) kernel, in float64."""
    axis = -1 if data_format == LAST else 1
    product = np.moveaxis(np.asarray(y, np.float64), axis, -1) @ np.asarray(kernel, np.float64).reshape(
        kernel.shape[-2:]
    )
    return np.moveaxis(product, -1, axis)


def biased(y, bias, data_format):
    return y + np.asarray(bias, np.float64).reshape((-1,) if data_format == LAST else (-1, *(1,) * (y.ndim - 2)))


# Keras' layer tests: depth_multiplier (and filters of the separable layer), kernel_size, the rest, input, output shape
LAYER_CASES = [
    (1, 5, 2, {"padding": "valid"}, (3, 5, 4), (3, 4, 20)),
    (1, 6, 2, {"padding": "same", "dilation_rate": (2,)}, (3, 4, 4), (3, 4, 24)),
    (1, 6, 2, {"strides": (2,)}, (3, 5, 4), (3, 2, 24)),
    (1, 6, (2,), {"strides": (2,)}, (2, 8, 4), (2, 4, 24)),
    (1, 6, 2, {"padding": "same", "dilation_rate": (2,), "data_format": FIRST}, (3, 4, 10), (3, 24, 10)),
    (1, 6, 2, {"padding": "same", "dilation_rate": (2,), "data_format": FIRST}, (2, 4, 8), (2, 24, 8)),
    (2, 5, 2, {}, (3, 5, 5, 4), (3, 4, 4, 20)),
    (2, 6, 2, {"padding": "same", "dilation_rate": (2, 2)}, (3, 4, 4, 4), (3, 4, 4, 24)),
    (2, 6, (2, 2), {"strides": (2, 2), "dilation_rate": (1, 1)}, (3, 5, 5, 4), (3, 2, 2, 24)),
    (2, 6, (2, 2), {"strides": (2, 2)}, (2, 8, 8, 4), (2, 4, 4, 24)),
    # what Keras does not have or does not test
    (3, 2, 2, {"padding": "same"}, (2, 3, 4, 5, 2), (2, 3, 4, 5, 4)),
    (3, 1, (3, 2, 1), {"strides": (1, 2, 2)}, (2, 4, 4, 5, 3), (2, 2, 2, 3, 3)),
    (3, 2, 2, {"dilation_rate": (1, 2, 3), "data_format": FIRST}, (1, 2, 4, 5, 6), (1, 4, 3, 3, 3)),
    (3, 1, 3, {"padding": "same", "strides": 2, "data_format": FIRST}, (2, 3, 4, 3, 5), (2, 3, 2, 2, 3)),
]


def run_layer_case(layer, shape, separable):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    shapes = jax.eval_shape(layer.init, KEY, jnp.asarray(x))["params"]
    params = {name: rng.normal(size=p.shape) for name, p in shapes.items()}
    kernel = params["depthwise_kernel" if separable else "kernel"]
    options = {name: getattr(layer, name) for name in ("strides", "padding", "data_format", "dilation_rate")}
    expected = Oracle(shape, kernel.shape, **options).conv(x, kernel)
    if separable:
        expected = pointwise(expected, params["pointwise_kernel"], layer.data_format)
    expected = biased(expected, params["bias"], layer.data_format)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    y = layer.apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    return y, {name: p.shape for name, p in shapes.items()}


@pytest.mark.parametrize(("rank", "multiplier", "kernel_size", "options", "shape", "output_shape"), LAYER_CASES)
def test_depthwise_layers(rank, multiplier, kernel_size, options, shape, output_shape):
    layer = getattr(linen, f"DepthwiseConv{rank}D")(kernel_size, depth_multiplier=multiplier, data_format=LAST)
    layer = layer.clone(**options)
    y, shapes = run_layer_case(layer, shape, separable=False)
    assert y.shape == layer.compute_output_shape(shape) == output_shape
    channels = shape[-1] if layer.data_format == LAST else shape[1]
    window = (kernel_size,) * rank if isinstance(kernel_size, int) else kernel_size
    assert shapes == {"kernel": (*window, channels, multiplier), "bias": (channels * multiplier,)}


@pytest.mark.parametrize(("rank", "filters", "kernel_size", "options", "shape", "output_shape"), LAYER_CASES)
def test_separable_layers(rank, filters, kernel_size, options, shape, output_shape):
    layer = getattr(linen, f"SeparableConv{rank}D")(filters, kernel_size, depth_multiplier=2, data_format=LAST)
    layer = layer.clone(**options)
    y, shapes = run_layer_case(layer, shape, separable=True)
    axis = len(shape) - 1 if layer.data_format == LAST else 1
    assert y.shape == layer.compute_output_shape(shape) == (*output_shape[:axis], filters, *output_shape[axis + 1 :])
    window = (kernel_size,) * rank if isinstance(kernel_size, int) else kernel_size
    assert shapes == {
        "depthwise_kernel": (*window, shape[axis], 2),
        "pointwise_kernel": (*(1,) * rank, shape[axis] * 2, filters),
        "bias": (filters,),
    }


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: linen.DepthwiseConv1D(depth_multiplier=0, kernel_size=1), "depth_multiplier"),
        (lambda: linen.DepthwiseConv2D(depth_multiplier=2, kernel_size=(1, 0)), "kernel_size"),
        (lambda: linen.DepthwiseConv2D(depth_multiplier=2, kernel_size=(2, 2), strides=(1, 0)), "strides"),
        (lambda: linen.SeparableConv1D(filters=1, kernel_size=1, depth_multiplier=0), "depth_multiplier"),
        (lambda: linen.SeparableConv1D(filters=0, kernel_size=1), "filters"),
        (lambda: linen.SeparableConv2D(filters=2, kernel_size=(1, 0)), "kernel_size"),
        (lambda: linen.SeparableConv2D(filters=2, kernel_size=(2, 2), strides=(1, 0)), "strides"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (linen.DepthwiseConv1D(11, strides=5), (4, 10, 3)),
        (linen.DepthwiseConv2D(5, strides=2), (2, 4, 4, 3)),
        (linen.SeparableConv1D(64, 11, strides=5), (4, 10, 12)),
        (linen.SeparableConv2D(8, 5, strides=2), (2, 4, 4, 3)),
    ],
)
def test_outputs_that_would_be_empty(layer, shape):
    with pytest.raises(ValueError, match="output would be empty"):
        layer.compute_output_shape(shape)
    with pytest.raises(ValueError, match="output would be empty"):
        layer.init(KEY, jnp.zeros(shape))


@pytest.mark.parametrize("filters", [None, 5])
@pytest.mark.parametrize(
    ("kernel_size", "options", "shape", "spatial"),
    [
        ((4,), {"padding": "VALID"}, (None, 20, 3), (17,)),
        ((4,), {"padding": "SAME", "strides": (1,)}, (None, 20, 3), (20,)),
        ((4,), {"padding": "same", "strides": 2}, (None, 20, 3), (10,)),
        ((4,), {"dilation_rate": 2}, (None, 20, 3), (14,)),
        ((2, 2), {}, (None, 10, 10, 3), (9, 9)),
        ((2, 2), {"padding": "same", "strides": (1, 2)}, (None, 10, 10, 3), (10, 5)),
        ((2, 2), {}, (None, None, 9, 3), (None, 8)),
        ((2, 2), {"padding": "same", "strides": 3}, (None, 10, None, 3), (4, None)),
        ((2, 2), {"dilation_rate": (2, 1)}, (2, 10, 10, 3), (8, 9)),
        ((2, 2, 2), {}, (None, None, 9, 4, 3), (None, 8, 3)),
    ],
)
@pytest.mark.parametrize("data_format", [LAST, FIRST])
def test_output_shapes_with_unknown_axes(kernel_size, options, shape, spatial, filters, data_format):
    rank = len(kernel_size)
    options = {**options, "data_format": data_format}
    if filters is None:
        layer, channels = getattr(linen, f"DepthwiseConv{rank}D")(kernel_size, **options), 3
    else:
        layer, channels = getattr(linen, f"SeparableConv{rank}D")(filters, kernel_size, **options), filters
    if data_format == LAST:
        assert layer.compute_output_shape(shape) == (shape[0], *spatial, channels)
    else:
        assert layer.compute_output_shape((shape[0], 3, *shape[1:-1])) == (shape[0], channels, *spatial)


def test_output_shapes_without_a_known_number_of_channels():
    assert linen.DepthwiseConv2D(3).compute_output_shape((None, 9, 9, None)) == (None, 7, 7, None)
    assert linen.SeparableConv2D(4, 3).compute_output_shape((None, 9, None, None)) == (None, 7, None, 4)
    assert linen.DepthwiseConv2D(3).compute_output_shape((9, None, 2)) == (7, None, 2)  # no batch axis
    assert linen.DepthwiseConv2D(3).compute_output_shape((2, 0, 9, 9, 2)) == (2, 0, 7, 7, 2)
    assert linen.DepthwiseConv2D(3, activation="glu").compute_output_shape((None, 9, 9, 4)) == (None, 7, 7, 2)
    assert linen.DepthwiseConv2D(3, activation="glu").compute_output_shape((2, 9, 9, None)) == (2, 7, 7, None)
    assert linen.DepthwiseConv2D(3, activation="glu", data_format="channels_first").compute_output_shape(
        (2, None, 9, 9)
    ) == (2, None, 7, 7)


# Keras' tests of the functions: integers in float32, which must come out exactly; strides and dilation together.
FUNCTION_CASES = [
    (rank, strides, padding, dilation, data_format)
    for rank, all_strides in ((1, (1, 2)), (2, (1, (1, 1), (2, 2))))
    for strides, padding, dilation, data_format in itertools.product(
        all_strides, ("valid", "same"), (1, (2,) * rank), (LAST, FIRST)
    )
]


@pytest.mark.parametrize(("rank", "strides", "padding", "dilation", "data_format"), FUNCTION_CASES)
def test_functions_on_integers(rank, strides, padding, dilation, data_format):
    shape = (2, *(10,) * rank, 3) if data_format == LAST else (2, 3, *(10,) * rank)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    kernel = np.arange(2**rank * 6, dtype=np.float32).reshape(*(2,) * rank, 3, 2)
    options = {"strides": strides, "padding": padding, "data_format": data_format, "dilation_rate": dilation}
    expected = Oracle(shape, kernel.shape, **options).conv(x, kernel)
    np.testing.assert_array_equal(depthwise_conv(x, kernel, **options), expected)
    mixing = np.arange(72, dtype=np.float32).reshape(*(1,) * rank, 6, 12)
    np.testing.assert_allclose(
        separable_conv(x, kernel, mixing, **options), pointwise(expected, mixing, data_format), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "function", [depthwise_conv, lambda x, kernel: separable_conv(x, kernel, jnp.zeros((1, 5, 4)))]
)
def test_input_channels_must_match_the_kernel(function):
    with pytest.raises(ValueError, match=r"with 5 channels.*\(3, 5, 1\).*\(2, 10, 3\)"):
        function(jnp.zeros((2, 10, 3)), jnp.zeros((3, 5, 1)))


@pytest.mark.parametrize("data_format", [LAST, FIRST])
def test_3d_is_what_lax_computes(data_format):
    layer = linen.DepthwiseConv3D((3, 2, 2), (1, 2, 1), "same", 2, data_format)
    shape = (2, 5, 4, 6, 3) if data_format == LAST else (2, 3, 5, 4, 6)
    x = jax.random.normal(KEY, shape)
    variables = layer.init(jax.random.key(1), x)
    layout = ("NHWDC", "HWDIO", "NHWDC") if data_format == LAST else ("NCHWD", "HWDIO", "NCHWD")
    expected = jax.lax.conv_general_dilated(
        x,
        variables["params"]["kernel"].reshape(3, 2, 2, 1, 6),
        (1, 2, 1),
        "SAME",
        dimension_numbers=layout,
        feature_group_count=3,
    )
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_the_example_of_the_documentation():
    x = jax.random.uniform(KEY, (4, 10, 10, 12))
    layer = linen.DepthwiseConv2D(3, 3, activation="relu")
    y, _ = layer.init_with_output(jax.random.key(1), x)
    assert y.shape == (4, 3, 3, 12)
    assert (y >= 0).all()
    assert (y > 0).any()
