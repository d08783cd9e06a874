"""Flax's own Conv and our layers: round trips, whole trees of parameters, refusals."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import depthwise_jax
from depthwise_jax import linen
from depthwise_jax.interop.flax import from_flax, params_from_flax, params_to_flax, to_flax
from tests.support.draws import draws


def random_conv(seed: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments of a depthwise Conv, and an input shape for it."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    channels, multiplier = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    size = tuple(int(n) for n in rng.integers(1, 4, size=rank))
    paddings: list[Any] = ["SAME", "VALID", "CIRCULAR", "REFLECT", 1, [(1, 0)] * rank, [2] * rank]
    if rank == 1:
        paddings.append("CAUSAL")
    steps = tuple(int(n) for n in rng.integers(1, 3, size=rank))
    arguments = {
        "features": channels * multiplier,
        "kernel_size": size,
        "padding": paddings[rng.integers(len(paddings))],
        "feature_group_count": channels,
        "use_bias": bool(rng.random() < 0.7),
    }
    for name in (["strides"], ["kernel_dilation"], ["strides", "kernel_dilation"])[rng.integers(3)]:
        arguments[name] = [steps, int(rng.integers(1, 3)), None][rng.integers(3)]
    return arguments, (2, *(int(n) for n in rng.integers(6, 8, size=rank)), channels)


def random_params(conv: nn.Conv, x: jax.Array, seed: int) -> Any:
    shapes = jax.eval_shape(conv.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def as_nnx(arguments: dict[str, Any], params: Any) -> nnx.Conv:
    arguments = dict(arguments)
    conv = nnx.Conv(arguments["feature_group_count"], arguments.pop("features"), **arguments, rngs=nnx.Rngs(0))
    nnx.update(conv, params)
    return conv


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(draws(8, 16)))
def test_round_trips_over_random_configurations(seed):
    arguments, shape = random_conv(seed)
    conv: Any = nn.Conv(**arguments)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    params = random_params(conv, x, seed)
    expected = conv.apply({"params": params}, x)
    nnx_conv = as_nnx(arguments, params)

    layer, ours = from_flax(conv, params)
    assert isinstance(layer, getattr(linen, f"DepthwiseConv{len(shape) - 2}D"))
    np.testing.assert_allclose(layer.apply({"params": ours}, x), expected, rtol=1e-5, atol=1e-5)
    back, weights = to_flax(layer, ours)
    assert isinstance(back, nn.Conv)
    assert_same_bits(weights, params)
    np.testing.assert_array_equal(back.apply({"params": weights}, x), expected)

    nnx_layer, nnx_ours = from_flax(nnx_conv)
    assert isinstance(nnx_layer, getattr(depthwise_jax.nnx, f"DepthwiseConv{len(shape) - 2}D"))
    assert_same_bits(nnx_ours, ours)
    np.testing.assert_array_equal(nnx_layer(x), layer.apply({"params": ours}, x))
    nnx_back, nnx_weights = to_flax(nnx_layer)
    assert_same_bits(nnx_weights, params)
    np.testing.assert_array_equal(nnx_back(x), nnx_conv(x))


@pytest.mark.parametrize("padding", ["CAUSAL", "VALID", 0, 6, [(6, 0)], [[6, 6]], [6]], ids=str)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_causal_spellings(padding, framework):
    arguments: dict[str, Any] = {"features": 6, "kernel_size": (4,), "feature_group_count": 3, "kernel_dilation": 2}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 3)), jnp.float32)
    causal: Any = nn.Conv(**arguments, padding="CAUSAL")
    params = random_params(causal, x, 0)
    conv: Any = nn.Conv(**arguments, padding=padding)
    given: Any = (conv, params) if framework == "linen" else (as_nnx({**arguments, "padding": padding}, params),)
    layer, ours = from_flax(*given, causal=True)
    assert type(layer).__name__ == "CausalDepthwiseConv1D"
    y, _ = layer.apply({"params": ours}, x) if framework == "linen" else layer(x)
    np.testing.assert_allclose(y, causal.apply({"params": params}, x), rtol=1e-5, atol=1e-5)
    back, theirs = to_flax(layer, ours if framework == "linen" else None)
    y = back.apply({"params": theirs}, x) if framework == "linen" else back(x)
    np.testing.assert_allclose(y, causal.apply({"params": params}, x), rtol=1e-5, atol=1e-5)
    plain, ours = from_flax(*given)  # as it stands
    y = plain.apply({"params": ours}, x) if framework == "linen" else plain(x)
    np.testing.assert_allclose(y, conv.apply({"params": params}, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": (3,), "padding": "SAME"}, r"with causal=True the padding must be 2 .*'SAME'"),
        ({"kernel_size": (3,), "padding": 1}, r"with causal=True the padding must be 2 .*got 1"),
        ({"kernel_size": (3,), "padding": "CAUSAL", "strides": 2}, r"causal=True needs strides of 1; got 2"),
        ({"kernel_size": (3, 3), "padding": 2}, r"causal=True needs one spatial axis, time; got 2"),
    ],
)
def test_what_is_not_causal(arguments, message):
    conv: Any = nn.Conv(3, feature_group_count=3, **arguments)
    x = jnp.ones((1, *[5] * len(arguments["kernel_size"]), 3))
    with pytest.raises(ValueError, match=message):
        from_flax(conv, random_params(conv, x, 0), causal=True)


def test_a_causal_subclass_is_told_of_the_argument():
    class Causal(nn.Conv):
        def __call__(self, x):
            return super().__call__(jnp.pad(x, ((0, 0), (2, 0), (0, 0))))

    conv = Causal(3, (3,), padding="VALID", feature_group_count=3)
    with pytest.raises(ValueError, match=r"overrides Causal\.__call__.*causal=True"):
        from_flax(conv, {"kernel": jnp.ones((3, 1, 3)), "bias": jnp.ones(3)})


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (linen.DepthwiseConv1D(3, padding="edge"), "a flax Conv has no padding 'edge'"),
        (linen.DepthwiseConv1DTranspose(3), "a flax ConvTranspose has no groups; got a DepthwiseConv1DTranspose"),
    ],
)
def test_what_flax_does_not_have(layer: Any, message: str) -> None:
    params = layer.init(jax.random.key(0), jnp.ones((1, 5, 2)))["params"]
    with pytest.raises(ValueError, match=message):
        to_flax(layer, params)


def test_across_the_frameworks_and_with_names_and_dtypes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 2)), jnp.float32)
    conv: Any = nn.Conv(4, (3, 3), feature_group_count=2, dtype=jnp.bfloat16, precision="highest", name="dw")
    params = random_params(conv, x, 0)
    module, _ = from_flax(conv, params, framework="nnx")
    y = module(x)
    assert y.dtype == jnp.bfloat16
    expected = conv.apply({"params": params}, x).astype(jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.02, atol=0.02)
    back, weights = to_flax(module, framework="linen")
    assert (back.dtype, back.precision) == (jnp.bfloat16, "highest")
    assert_same_bits(weights, params)
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    layer, ours = from_flax(conv, halves)
    assert layer.name == "dw"
    assert layer.param_dtype == jnp.bfloat16
    assert ours["kernel"].dtype == jnp.bfloat16


class Flaxen(nn.Module):
    """A network with depthwise Convs at several depths, lifted ones and others."""

    conv: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), name="stem")(x)
        x = self.conv(3, 1, "dw")(x)
        block = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2, variable_broadcast=False
        )
        x, _ = block(self.conv, name="blocks")(x, None)
        x = nn.remat(Branch)(self.conv, name="branch")(x)
        return nn.Dense(2, name="head")(x)


class Block(nn.Module):
    conv: Any

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(self.conv(3, 1, "dw")(x)), None


class Branch(nn.Module):
    conv: Any

    @nn.compact
    def __call__(self, x):
        return nn.Conv(6, (1, 1), feature_group_count=3, name="grouped")(self.conv(3, 2, "dw")(x))


def flax_conv(channels, multiplier, name):
    return nn.Conv(channels * multiplier, (3, 3), feature_group_count=channels, name=name)


def our_conv(channels, multiplier, name):
    return linen.DepthwiseConv2D(3, padding="same", depth_multiplier=multiplier, name=name)


def test_a_whole_tree_moves_by_path():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 1)), jnp.float32)
    old: Any = Flaxen(flax_conv)
    new: Any = Flaxen(our_conv)
    params = old.init(jax.random.key(0), x)["params"]
    params_from_flax(old, params, x)  # traces that Flax has cached change nothing
    moved = params_from_flax(old, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert moved["dw"]["kernel"].shape == (3, 3, 3, 1)
    assert moved["blocks"]["dw"]["kernel"].shape == (2, 3, 3, 3, 1)
    assert moved["branch"]["dw"]["kernel"].shape == (3, 3, 3, 2)
    assert moved["stem"]["kernel"].shape == (3, 3, 1, 3)  # one input channel, one group: no depthwise one
    assert moved["branch"]["grouped"]["kernel"].shape == (1, 1, 2, 6)
    np.testing.assert_allclose(new.apply({"params": moved}, x), old.apply({"params": params}, x), rtol=1e-5, atol=1e-5)
    shapes = jax.eval_shape(old.init, jax.random.key(0), x)["params"]
    assert_same_bits(params_to_flax(moved, shapes), params)


def test_a_whole_tree_of_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.blocks = nnx.List([nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs)])

    model = Model(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = params_from_flax(model, params)
    assert moved["blocks"][0]["kernel"].shape == (3, 3, 4, 2)
    assert moved["stem"]["kernel"].shape == (3, 3, 2, 4)
    assert_same_bits(params_to_flax(moved, params), params)


def test_a_tree_that_does_not_fit_is_refused_by_path():
    x = jnp.ones((1, 6, 6, 1))
    model = Flaxen(flax_conv)
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="'branch/dw/kernel'"):
        params_from_flax(model, {**params, "branch": {"grouped": params["branch"]["grouped"]}}, x)
    with pytest.raises(ValueError, match=r"'dw/kernel'.*3 channels.*\(3, 3, 3, 1\)"):
        params_from_flax(model, {**params, "dw": {"kernel": jnp.ones((3, 3, 3, 1))}}, x)
    moved = params_from_flax(model, params, x)
    with pytest.raises(ValueError, match=r"'stem/bias' must have the shape \(3,\); got \(4,\)"):
        params_to_flax({**moved, "stem": {**moved["stem"], "bias": jnp.ones(4)}}, params)
    with pytest.raises(ValueError, match=r"'dw/kernel' must be a depthwise kernel that fits \(3, 3, 1, 3\)"):
        params_to_flax({**moved, "dw": {**moved["dw"], "kernel": jnp.ones((3, 3, 2, 1))}}, params)
    with pytest.raises(ValueError, match="params must be a tree like params_of_convs"):
        params_to_flax({name: moved[name] for name in moved if name != "stem"}, params)


PARAMS = {"kernel": np.ones((3, 3, 1, 4), np.float32), "bias": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("arguments", "params", "message"),
    [
        ({"feature_group_count": 1}, {"kernel": np.ones((3, 3, 4, 4))}, "feature_group_count=1, 4 input channels"),
        ({"feature_group_count": 2}, {"kernel": np.ones((3, 3, 2, 4))}, "feature_group_count=2, 4 input channels"),
        ({"feature_group_count": 3}, PARAMS, "feature_group_count=3.*features=4"),
        ({"input_dilation": 2}, PARAMS, "input_dilation"),
        ({"mask": np.ones((3, 3, 1, 4))}, PARAMS, "mask"),
        ({"conv_general_dilated": lambda *a, **k: a[0]}, PARAMS, "conv_general_dilated"),
        ({"padding": "SAME_LOWER"}, PARAMS, "padding"),
        ({"padding": [(-1, 0), (0, 0)]}, PARAMS, "padding"),
        (
            {},
            {"kernel": np.ones((3, 2, 1, 4))},
            r"dw: the parameter 'kernel' must have.*\(3, 3, 1, 4\).*\(3, 2, 1, 4\)",
        ),
        (
            {},
            {**PARAMS, "bias": np.ones(3, np.float32)},
            r"dw: the parameter 'bias' must have the shape \(4,\); got \(3,\)",
        ),
        ({}, {"kernel": PARAMS["kernel"]}, r"dw: the parameter 'bias'.*got None"),
        ({"use_bias": False}, PARAMS, "no parameter 'bias'"),
    ],
)
def test_what_is_refused(arguments, params, message):
    conv = nn.Conv(**{"features": 4, "kernel_size": (3, 3), "feature_group_count": 4, "name": "dw", **arguments})
    with pytest.raises(ValueError, match=message):
        from_flax(conv, params)


class Standardized(nn.Conv):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value if name != "kernel" else value - value.mean((0, 1, 2))


class Doubling(nn.Conv):
    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Mixin:
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)  # pyright: ignore[reportAttributeAccessIssue]


class Mixed(Mixin, nn.Conv):
    pass


class Local(nn.Conv):
    @property
    def shared_weights(self):
        return False


class Convolving(nn.Conv):
    def conv_general_dilated(self, *args, **kwargs):  # pyright: ignore[reportIncompatibleVariableOverride]
        return 2 * jax.lax.conv_general_dilated(*args, **kwargs)


class Named(nn.Conv):
    """As model zoos have it: other defaults, more arguments, helpers."""

    strides: Any = 2
    use_bias: bool = False
    drop_rate: float = 0.1

    def count(self):
        return self.features


def linen_conv(cls: Any = nn.Conv, **kwargs: Any) -> Any:
    return cls(**{"features": 4, "kernel_size": (3, 3), "feature_group_count": 4, **kwargs})


# Linen's convolutions that are more than a stock one: what a refusal says, or None where it is right.
LINEN: dict[str, tuple[Any, str | None]] = {
    "stock": (linen_conv(), None),
    "subclass that computes the same": (linen_conv(Named, drop_rate=0.5), None),
    "boxed parameters": (linen_conv(kernel_init=nn.with_partitioning(nn.initializers.normal(), (None,) * 4)), None),
    "this package's convolution": (linen_conv(conv_general_dilated=depthwise_jax.conv_general_dilated), None),
    "lax' convolution": (linen_conv(conv_general_dilated=jax.lax.conv_general_dilated), None),
    "integers for axes": (linen_conv(padding=(1, 2), strides=2, kernel_dilation=2), None),
    "param": (linen_conv(Standardized), r"overrides Standardized\.param"),
    "__call__": (linen_conv(Doubling), r"overrides Doubling\.__call__"),
    "mixin": (linen_conv(Mixed), r"Mixed overrides Mixin\.__call__"),
    "shared_weights": (linen_conv(Local), r"overrides Local\.shared_weights"),
    "convolution of its own": (linen_conv(Convolving), r"overrides Convolving\.conv_general_dilated"),
    "convolution given": (linen_conv(conv_general_dilated=lambda *args, **_: args[0]), "is a custom function"),
    "class of convolution": (linen_conv(conv_general_dilated_cls=lambda: jax.lax.conv_general_dilated), "_cls"),
    "promotion": (linen_conv(promote_dtype=lambda *args, **_: [2 * arg for arg in args]), "promote_dtype"),
    "mask": (linen_conv(mask=jnp.zeros((3, 3, 1, 4))), "mask"),
    "remat": (linen_conv(nn.remat(nn.Conv)), r"overrides CheckpointConv\.__call__"),
    "map_variables": (
        linen_conv(nn.map_variables(nn.Conv, "params", lambda params: jax.tree.map(jnp.abs, params))),
        r"overrides .*Conv\.__call__",
    ),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_convolutions_are_right_or_refused_by_name(name):
    conv, message = LINEN[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 4)), jnp.float32)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            from_flax(conv, PARAMS)
        return
    variables = conv.init(jax.random.key(0), x)
    for given in (conv, conv.bind(variables)):
        layer, ours = from_flax(given, variables["params"])
        np.testing.assert_allclose(layer.apply({"params": ours}, x), conv.apply(variables, x), rtol=1e-5, atol=1e-5)


class NnxNamed(nnx.Conv):
    def __init__(self, channels, rngs):
        super().__init__(channels, channels, (3, 3), feature_group_count=channels, use_bias=False, rngs=rngs)
        self.drop_rate = 0.5


class NnxDoubling(nnx.Conv):
    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs, out_sharding)


def nnx_conv(cls: Any = nnx.Conv, **kwargs: Any) -> Any:
    return cls(4, 4, (3, 3), feature_group_count=4, **kwargs, rngs=nnx.Rngs(0))


def with_attributes(module: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Doubled(nnx.Param):
    """Gives another value than it holds."""

    def get_value(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().get_value(*args, **kwargs)


NNX: dict[str, tuple[Any, str | None]] = {
    "stock": (nnx_conv(), None),
    "subclass that computes the same": (NnxNamed(4, nnx.Rngs(0)), None),
    "shared kernel": (with_attributes(nnx_conv(), kernel=nnx_conv().kernel), None),
    "variable of its own": (with_attributes(nnx_conv(), kernel=Doubled(jnp.ones((3, 3, 1, 4)))), None),
    "metadata": (nnx_conv(kernel_init=nnx.with_metadata(nnx.initializers.normal(), note="mine")), None),
    "other variable": (with_attributes(nnx_conv(), kernel=nnx.BatchStat(jnp.ones((3, 3, 1, 4)))), None),
    "attributes changed": (with_attributes(nnx_conv(), strides=2, padding=1), None),
    "__call__": (nnx_conv(NnxDoubling), r"overrides NnxDoubling\.__call__"),
    "convolution given": (nnx_conv(conv_general_dilated=lambda *args, **_: args[0]), "is a custom function"),
    "convolution set": (with_attributes(nnx_conv(), conv_general_dilated=jnp.tanh), "is a custom function"),
    "promotion": (nnx_conv(promote_dtype=lambda args, **_: [2 * arg for arg in args]), "promote_dtype"),
    "mask": (nnx_conv(mask=jnp.zeros((3, 3, 1, 4))), "mask"),
    "element type": (nnx_conv(preferred_element_type=jnp.float32), "preferred_element_type"),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx_convolutions_are_right_or_refused_by_name(name):
    conv, message = NNX[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 4)), jnp.float32)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            from_flax(conv)
        return
    layer, _ = from_flax(conv)
    np.testing.assert_allclose(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_modules_that_wrap_a_convolution_are_named():
    for module in (
        nn.WeightNorm(linen_conv()),
        nn.SpectralNorm(linen_conv()),
        nn.ConvLocal(4, (3, 3)),
        nn.ConvTranspose(4, (3, 3)),
    ):
        with pytest.raises(TypeError, match=f"got {type(module).__name__}"):
            from_flax(module, PARAMS)
    with pytest.raises(TypeError, match="got ConvTranspose"):
        from_flax(nnx.ConvTranspose(4, 4, (3, 3), rngs=nnx.Rngs(0)))


def test_a_tree_leaves_what_computes_something_else():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = linen_conv(Standardized, name="standardized")(x)
            return linen_conv(Named, name="plain")(x)

    x = jnp.ones((1, 9, 9, 4))
    params = Model().init(jax.random.key(0), x)["params"]
    with pytest.warns(UserWarning, match=r"left as it is: standardized: .*overrides Standardized\.param"):
        moved = params_from_flax(Model(), params, x)
    assert moved["standardized"]["kernel"].shape == (3, 3, 1, 4)
    assert moved["plain"]["kernel"].shape == (3, 3, 4, 1)
    model = nnx.List([nnx_conv(NnxDoubling), nnx_conv()])
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.warns(UserWarning, match=r"left as it is: 0: .*overrides NnxDoubling\.__call__"):
        moved = params_from_flax(model, params)
    assert [moved[index]["kernel"].shape for index in (0, 1)] == [(3, 3, 1, 4), (3, 3, 4, 1)]


def test_what_a_conv_cannot_spell_is_refused():
    x = jnp.ones((1, 4, 4, 4))
    for layer, message in (
        (linen.DepthwiseConv2D(3, activation="relu"), "activation='relu'"),
        (linen.DepthwiseConv2D(3, data_format="channels_first"), "channels_first"),
        (linen.SeparableConv2D(3, 3), "SeparableConv2D"),
    ):
        with pytest.raises(ValueError, match=message):
            to_flax(layer, layer.init(jax.random.key(0), x)["params"])


def test_wrong_types_are_named():
    conv = nn.Conv(4, (3, 3), feature_group_count=4)
    with pytest.raises(TypeError, match="params"):
        from_flax(conv)
    with pytest.raises(TypeError, match="Dense"):
        from_flax(nn.Dense(3), {})
    with pytest.raises(TypeError, match="its own parameters"):
        from_flax(nnx.Conv(2, 2, (3,), feature_group_count=2, rngs=nnx.Rngs(0)), {})
    with pytest.raises(TypeError, match="Conv"):
        to_flax(conv, PARAMS)
    framework: Any = "haiku"
    with pytest.raises(ValueError, match=r"framework.*'haiku'"):
        from_flax(conv, PARAMS, framework=framework)
