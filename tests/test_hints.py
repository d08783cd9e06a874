"""Kernels, arguments and initializers as other libraries have them: the message says what they are here."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import depthwise_jax.nnx
from depthwise_jax import depthwise_conv, initializers, linen, separable_conv
from depthwise_jax.initializers import HeNormal, LecunNormal

# A kernel of another library, what x it is for, and the hint.
KERNELS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "lax, one dimension": ((4, 1, 6), (2, 10, 6)),
    "lax, a multiplier": ((3, 3, 1, 12), (2, 8, 8, 6)),
    "PyTorch, one dimension": ((6, 1, 4), (2, 10, 6)),
    "PyTorch": ((12, 1, 3, 3), (2, 8, 8, 6)),
    "PyTorch, two channels": ((2, 1, 3, 3), (2, 8, 8, 2)),
    "PyTorch, three dimensions": ((6, 1, 2, 3, 3), (2, 4, 5, 6, 6)),
    "one for all channels": ((3, 3, 1, 1), (2, 8, 8, 6)),
    "some for all channels": ((3, 3, 1, 4), (2, 8, 8, 6)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_another_library_gets_its_reshape(name):
    shape, input_shape = KERNELS[name]
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x = np.random.default_rng(1).normal(size=input_shape).astype(np.float32)
    rank, channels = len(shape) - 2, input_shape[-1]
    with pytest.raises(ValueError, match=r"kernel must have shape") as refused:
        depthwise_conv(x, kernel)
    message = str(refused.value)
    cures = re.findall(r"becomes (.*?)(?=; (?:a |one )|$)", message)
    if name.startswith("PyTorch"):
        expression = next(text for text in cures if "transpose" in text)
        grouped = kernel.transpose(*range(2, rank + 2), 1, 0)
    elif name.startswith("lax"):
        expression = next(text for text in cures if ".reshape" in text and "transpose" not in text)
        grouped = kernel
    else:
        expression = next(text for text in cures if "broadcast_to" in text)
        grouped = np.tile(kernel, (*(1,) * (rank + 1), channels))
    ours = eval(expression, {"kernel": kernel, "jnp": jnp})  # as a reader would type it
    letters = "DHW"[3 - rank :]
    expected = jax.lax.conv_general_dilated(
        jnp.asarray(x), jnp.asarray(grouped), (1,) * rank, "VALID", feature_group_count=channels,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )  # fmt: skip
    np.testing.assert_allclose(depthwise_conv(x, ours), expected, rtol=1e-5, atol=1e-5)


def test_a_kernel_without_a_multiplier_gets_its_axis():
    kernel = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    with pytest.raises(ValueError, match=r"\(K, C\).*becomes kernel\[\.\.\., None\]"):
        depthwise_conv(np.ones((2, 10, 6)), kernel, padding="causal")
    assert depthwise_conv(np.ones((2, 10, 6), np.float32), kernel[..., None], padding="causal").shape == (2, 10, 6)
    with pytest.raises(ValueError, match=r"becomes depthwise_kernel\[\.\.\., None\]"):
        separable_conv(np.ones((2, 10, 6)), kernel, np.ones((1, 6, 2)))


PADDINGS: dict[Any, tuple[int, str | None]] = {
    # A padding of another library, the rank, and what it is here.
    (1, 1): (2, "((1, 1), (1, 1))"),
    (1, 2): (2, "((1, 1), (2, 2))"),
    (0, 1, 2): (3, "((0, 0), (1, 1), (2, 2))"),
    (2,): (1, "((2, 2),)"),
    (2, 0): (1, "((2, 0),)"),
    (1, 1, 1): (2, None),
    ("same", "valid"): (2, None),
    "replicate": (2, "'edge'"),
    "Wrap": (1, "'circular'"),
    "full": (1, None),
}


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_a_padding_of_another_library_is_told_as_ours(padding: Any) -> None:
    rank, ours = PADDINGS[padding]
    x, kernel = np.ones((2, *(7,) * rank, 2), np.float32), np.ones((*(3,) * rank, 2, 1), np.float32)
    layer = (linen.DepthwiseConv1D, linen.DepthwiseConv2D, linen.DepthwiseConv3D)[rank - 1]
    for call in (lambda padding: depthwise_conv(x, kernel, padding=padding), lambda padding: layer(3, padding=padding)):
        with pytest.raises((TypeError, ValueError), match=re.escape(f"got {padding!r}")) as refused:
            call(padding)
        cure = re.search(r" is (?:padding=)?(.*) here$", str(refused.value))
        assert (cure and cure[1]) == ours
        if ours is not None:
            call(eval(ours))  # as a reader would type it


def test_a_transposed_convolution_is_told_of_no_padding_that_it_lacks() -> None:
    padding: Any = "replicate"
    with pytest.raises(ValueError, match=r"'valid', 'same'.*got 'replicate'$"):
        linen.DepthwiseConv2DTranspose(3, padding=padding)


def test_causal_padding_of_several_axes_says_what_it_is_for() -> None:
    with pytest.raises(ValueError, match=r"'causal' is for sequences.*; got 2 spatial axes: pass pairs") as refused:
        linen.DepthwiseConv2D(3, padding="causal")
    pair = re.search(r"(\(\(kernel_size.*?, 0\)) for", str(refused.value))
    assert pair is not None
    assert eval(pair[1], {"kernel_size": 3, "dilation_rate": 2}) == (4, 0)


@pytest.mark.parametrize("shape", [(3, 3, 5, 1), (3, 3, 4, 2)])
def test_other_kernels_get_no_hint(shape):
    with pytest.raises(ValueError, match="x must have shape") as refused:
        depthwise_conv(np.ones((1, 8, 8, 6), np.float32), np.ones(shape, np.float32))
    assert "becomes" not in str(refused.value)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_parameters_of_flax_get_their_reshape(rank):
    layer = (linen.DepthwiseConv1D, linen.DepthwiseConv2D, linen.DepthwiseConv3D)[rank - 1]
    params = {"kernel": np.ones((*(3,) * rank, 1, 12), np.float32), "bias": np.ones(12, np.float32)}
    with pytest.raises(ValueError, match=rf"params\['kernel'\]\.reshape\({'3, ' * rank}6, 2\)"):
        layer(3, depth_multiplier=2).apply({"params": params}, np.ones((1, *(8,) * rank, 6), np.float32))


SPELLINGS = {
    "features": "depth_multiplier", "out_channels": "depth_multiplier", "kernel_init": "depthwise_initializer",
    "bias_init": "bias_initializer", "kernel_dilation": "dilation_rate", "dilation": "dilation_rate",
    "groups": "each channel is its own group", "feature_group_count": "each channel is its own group",
    "bias": "use_bias", "stride": "strides", "padding_mode": "padding", "in_channels": "in_features",
    "kernel_initializer": "depthwise_initializer", "channel_multiplier": "depth_multiplier",
}  # fmt: skip


@pytest.mark.parametrize("given", SPELLINGS)
def test_arguments_of_other_libraries_get_ours(given):
    message = rf"has no argument {given} \(here: .*{SPELLINGS[given]}"
    arguments: dict[str, Any] = {given: 1}
    with pytest.raises(TypeError, match=f"^DepthwiseConv2D {message}"):
        linen.DepthwiseConv2D(kernel_size=3, **arguments)
    with pytest.raises(TypeError, match=f"^SeparableConv1D {message}"):
        linen.SeparableConv1D(4, 3, **arguments)
    with pytest.raises(TypeError, match=f"^DepthwiseConv3D {message}"):
        depthwise_jax.nnx.DepthwiseConv3D(4, 3, **arguments, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        linen.DepthwiseConv2D(3, nonsense=1)  # pyright: ignore[reportCallIssue]


JAX = jax.nn.initializers
FANS = {
    "lecun_normal": (JAX.lecun_normal(), LecunNormal(fan="window")),
    "he_normal": (JAX.he_normal(), HeNormal(fan="window")),
    "kaiming_normal": (JAX.kaiming_normal(), HeNormal(fan="window")),
    "variance_scaling": (JAX.variance_scaling(1.0, "fan_in", "truncated_normal"), LecunNormal(fan="window")),
}


@pytest.mark.parametrize("name", FANS)
def test_a_fan_in_of_jax_is_told_once(name):
    """And the cure draws what Flax' Conv draws with it."""
    foreign, cure = FANS[name]
    initializers._warn_of_fans_once.cache_clear()
    x = jnp.ones((1, 5, 5, 64))
    layer = linen.DepthwiseConv2D(3, depthwise_initializer=foreign)
    with pytest.warns(UserWarning, match=r"sqrt\(C\) too small.*fan='window'"):
        kernel = layer.init(jax.random.key(0), x)["params"]["kernel"]
    layer.init(jax.random.key(0), x)  # not again
    right = foreign(jax.random.key(0), (3, 3, 1, 64), jnp.float32)
    assert float(jnp.std(jnp.asarray(kernel))) * 8 == pytest.approx(float(jnp.std(right)), rel=0.1)
    cured = linen.DepthwiseConv2D(3, depthwise_initializer=cure).init(jax.random.key(0), x)["params"]["kernel"]
    assert float(jnp.std(jnp.asarray(cured))) == pytest.approx(float(jnp.std(right)), rel=0.1)
    initializers._warn_of_fans_once.cache_clear()
    with pytest.warns(UserWarning, match=r"sqrt\(C\) too small"):
        depthwise_jax.nnx.DepthwiseConv1D(4, 3, depthwise_initializer=foreign, rngs=nnx.Rngs(0))


SOUND: dict[str, Any] = {
    "a name": "lecun_normal",
    "ours": HeNormal(),
    "the fan of the window": JAX.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(), batch_axis=-2),
    "fan_out": JAX.variance_scaling(1.0, "fan_out", "truncated_normal"),
    "fan_avg, as Keras' default": JAX.glorot_uniform(),
    "no fans": JAX.normal(0.02),
    "a function": lambda key, shape, dtype: jnp.ones(shape, dtype),
}


@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name):
    initializers._warn_of_fans_once.cache_clear()
    with warnings.catch_warnings(action="error"):
        linen.DepthwiseConv2D(3, depthwise_initializer=SOUND[name]).init(jax.random.key(0), jnp.ones((1, 5, 5, 4)))
        one = linen.DepthwiseConv2D(3, depthwise_initializer=JAX.he_normal())  # one channel: nothing to count
        one.init(jax.random.key(0), jnp.ones((1, 5, 5, 1)))
        pointwise = linen.SeparableConv2D(4, 3, pointwise_initializer=JAX.he_normal())
        pointwise.init(jax.random.key(0), jnp.ones((1, 5, 5, 4)))
