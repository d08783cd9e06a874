"""PyTorch's depthwise convolutions and our layers: by arrays and state dict against lax, by module against PyTorch."""

import functools
import importlib
import re
import subprocess
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from depthwise_jax import depthwise_conv, linen
from depthwise_jax.interop.torch import (
    from_arrays,
    from_state_dict,
    from_torch,
    layers_from_torch,
    params_from_state_dict,
    to_arrays,
    to_torch,
)
from tests.support.draws import draws

MODES: dict[str, Any] = {"reflect": "reflect", "circular": "wrap", "replicate": "edge"}


def torch_convolution(x, weight, bias, *, stride, padding, dilation, groups, padding_mode, **_):
    """PyTorch's definition, (N, C, *spatial) -> (N, C*M, *out), by lax in float64 and NumPy's padding."""
    rank = weight.ndim - 2
    stride, dilation = ((v,) * rank if isinstance(v, int) else tuple(v) for v in (stride, dilation))
    if padding == "valid":
        pads = [(0, 0)] * rank
    elif padding == "same":
        totals = [(k - 1) * d for k, d in zip(weight.shape[2:], dilation, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in ((padding,) * rank if isinstance(padding, int) else padding)]
    x = np.pad(np.asarray(x, np.float64), [(0, 0), (0, 0), *pads], MODES.get(padding_mode, "constant"))
    with jax.enable_x64(True):
        y = np.asarray(
            lax.conv_general_dilated(
                jnp.asarray(x),
                jnp.asarray(weight, jnp.float64),
                stride,
                "VALID",
                rhs_dilation=dilation,
                feature_group_count=groups,
            )
        )
    return y if bias is None else y + np.asarray(bias, np.float64).reshape(-1, *(1,) * rank)


def random_convolution(seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """Arguments of torch.nn.ConvNd for a depthwise convolution, its state dict, and an input."""
    rng = np.random.default_rng(seed)
    rank, channels, multiplier = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    size = tuple(int(n) for n in rng.integers(1, 4, size=rank))
    kind = ("strides", "dilation", "plain")[rng.integers(3)]
    steps = tuple(int(n) for n in rng.integers(1, 3, size=rank))
    stride, dilation = steps if kind == "strides" else 1, steps if kind == "dilation" else 1
    padding = ["valid", 0, 1, tuple(int(n) for n in rng.integers(0, 3, size=rank)), "same"][rng.integers(5)]
    if padding == "same" and kind == "strides":
        padding = 2
    modes = ("zeros", "circular", "reflect", "replicate")
    mode = modes[rng.integers(4)] if padding in ("same", "valid", 0) else "zeros"
    arguments = {
        "in_channels": channels,
        "out_channels": channels * multiplier,
        "kernel_size": size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": channels,
        "padding_mode": mode,
        "bias": bool(rng.random() < 0.7),
    }
    state = {"weight": rng.normal(size=(channels * multiplier, 1, *size)).astype(np.float32)}
    if arguments["bias"]:
        state["bias"] = rng.normal(size=channels * multiplier).astype(np.float32)
    x = rng.normal(size=(2, channels, *rng.integers(5, 8, size=rank))).astype(np.float32)
    return arguments, state, x


def geometry(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: arguments[key] for key in ("stride", "padding", "dilation", "groups", "padding_mode")}


SEEDS = range(draws(10, 20))


@pytest.mark.parametrize("seed", SEEDS)
def test_round_trips_by_arrays_and_state_dict(seed):
    arguments, state, x = random_convolution(seed)
    expected = torch_convolution(x, state["weight"], state.get("bias"), **geometry(arguments))
    layer, params = from_state_dict(
        {f"features.3.{key}": value for key, value in state.items()}, "features.3", **geometry(arguments)
    )
    assert isinstance(layer, getattr(linen, f"DepthwiseConv{x.ndim - 2}D"))
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)
    back, weights = to_arrays(layer, params)
    assert set(weights) == set(state)
    for name, value in state.items():
        assert weights[name].dtype == value.dtype
        np.testing.assert_array_equal(weights[name], value)
    again = torch_convolution(x, weights["weight"], weights.get("bias"), **geometry(back))
    np.testing.assert_array_equal(again, expected)
    assert {key: back[key] for key in ("in_channels", "out_channels", "kernel_size", "groups", "bias")} == {
        key: arguments[key] for key in ("in_channels", "out_channels", "kernel_size", "groups", "bias")
    }
    nnx_layer, _ = from_arrays(
        state["weight"], state.get("bias"), **geometry(arguments), framework="nnx", data_format="channels_last"
    )
    assert isinstance(nnx_layer, nnx.Module)
    y = np.moveaxis(np.asarray(nnx_layer(np.moveaxis(x, 1, -1))), -1, 1)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert to_arrays(nnx_layer)[0] == back


@pytest.mark.parametrize(
    ("padding", "mode", "ours"),
    [
        (1, "circular", "circular"),
        ((1, 2), "reflect", "reflect"),
        (1, "replicate", "edge"),
        ("same", "replicate", "edge"),
        (0, "replicate", "valid"),
        ("valid", "reflect", "valid"),
    ],
)
def test_padding_modes_that_a_layer_has(padding, mode, ours):
    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 5 if padding == (1, 2) else 3)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(1, 2, 7, 7)).astype(np.float32)
    stride = 1 if padding == "same" else 2  # PyTorch's rule
    layer, params = from_arrays(weight, groups=2, stride=stride, padding=padding, padding_mode=mode)
    assert layer.padding == ours
    assert to_arrays(layer, params)[0]["padding_mode"] == (mode if ours != "valid" else "zeros")
    expected = torch_convolution(
        x,
        weight,
        None,
        stride=stride,
        padding=padding,
        dilation=1,
        groups=2,
        padding_mode=mode if ours != "valid" else "zeros",
    )
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_strides_with_dilation():
    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 3)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(1, 2, 9, 9)).astype(np.float32)
    arguments = {"stride": 2, "padding": 1, "dilation": (2, 1), "groups": 2, "padding_mode": "zeros"}
    layer, params = from_arrays(weight, **arguments)
    expected = torch_convolution(x, weight, None, **arguments)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


WEIGHT = np.ones((4, 1, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": np.ones((4, 4, 3, 3), np.float32), "groups": 1}, r"groups=1, 4 input channels"),
        ({"weight": np.ones((4, 2, 3, 3), np.float32), "groups": 2}, r"groups=2, 4 input channels"),
        ({"groups": 3}, r"groups=3.*4 output channels"),
        ({"groups": 0}, r"groups=0"),
        ({"padding": 2, "padding_mode": "replicate"}, r"padding_mode='replicate' with padding=2.*depthwise_conv"),
        ({"padding": 2, "padding_mode": "circular"}, r"padding_mode='circular' with padding=2.*depthwise_conv"),
        ({"padding_mode": "wrap"}, r"padding_mode.*'wrap'"),
        ({"padding": "full"}, r"padding.*'full'"),
        ({"padding": -1}, r"padding"),
        ({"padding": (1, 2, 3)}, r"padding"),
        ({"stride": 0}, r"strides"),
        ({"bias": np.ones(3, np.float32)}, r"dw: the parameter 'bias' must have the shape \(4,\); got \(3,\)"),
        ({"weight": np.ones((4, 1), np.float32)}, r"dw: weight must have the shape.*\(4, 1\)"),
        ({"weight": np.ones((4, 1, 2, 2, 2, 2), np.float32)}, r"weight must have"),
        ({"weight": np.ones((4, 1, 3, 3))}, r"dw: the weight is float64.*jax_enable_x64"),
        ({"data_format": "NCHW"}, r"data_format"),
        ({"output_padding": 1}, r"dw: output_padding must be 0 without transposed=True; got 1"),
        ({"transposed": True, "groups": 2}, r"dw is not depthwise.*groups=2, 4 input channels and 2 output"),
        ({"transposed": True, "padding": "same"}, r"dw: a ConvTranspose must have numbers.*padding='same'"),
        ({"transposed": True, "padding_mode": "circular"}, r"dw: a ConvTranspose must.*padding_mode='circular'"),
        ({"transposed": True, "stride": 2, "output_padding": 2}, r"dw: output_padding must be smaller.*\(2, 2\)"),
        ({"causal": True}, r"dw: causal=True needs one spatial axis, time; got 2"),
        (
            {"weight": WEIGHT[..., 0], "causal": True, "padding": 1},
            r"dw: with causal=True .* must be 2 = .*got \(\(1, 1",
        ),
        (
            {"weight": WEIGHT[..., 0], "causal": True, "stride": (2,)},
            r"dw: causal=True needs strides of 1; got \(2,\)",
        ),
        ({"weight": WEIGHT[..., 0], "causal": True, "padding": "same"}, r"dw: with causal=True .*got 'same'"),
        (
            {"weight": WEIGHT[..., 0], "causal": True, "padding": "same", "padding_mode": "circular"},
            r"dw: causal=True needs a convolution padded with zeros; got padding_mode='circular'",
        ),
        ({"weight": WEIGHT[..., 0], "causal": True, "transposed": True}, r"dw: causal=True.*transposed"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(**{"weight": WEIGHT, "groups": 4, "name": "dw", **arguments})


def test_a_missing_entry_of_a_state_dict_is_named():
    with pytest.raises(ValueError, match=r"'features\.4\.weight'"):
        from_state_dict({"features.3.weight": WEIGHT}, "features.4", groups=4)
    with pytest.raises(ValueError, match=r"features\.3 is not depthwise"):
        from_state_dict({"features.3.weight": WEIGHT}, "features.3", groups=3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (linen.DepthwiseConv2D(3, padding="same", strides=2), "padding='same' with strides"),
        (linen.DepthwiseConv1D(3, padding="causal"), "padding='causal'"),
        (linen.DepthwiseConv2D(3, padding=((0, 1), (0, 0))), "padding="),
        (linen.DepthwiseConv2D(3, activation="relu"), "'relu'"),
        (linen.SeparableConv2D(3, 3), "SeparableConv2D"),
    ],
)
def test_what_pytorch_cannot_spell_is_refused(layer, message):
    x = jnp.ones((1, 5, 5, 2)) if "2D" in type(layer).__name__ else jnp.ones((1, 5, 2))
    with pytest.raises(ValueError, match=message):
        to_arrays(layer, layer.init(jax.random.key(0), x)["params"])


def test_bfloat16_keeps_its_bits():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 3)), jnp.bfloat16)
    layer, params = from_arrays(weight, groups=2)
    assert layer.param_dtype == jnp.bfloat16
    _, state = to_arrays(layer, params)
    assert state["weight"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(state["weight"], np.asarray(weight))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (WEIGHT + 1j, r"dw: the weight must hold real floating-point numbers; got complex64"),
        (WEIGHT.astype(np.int32), r"dw: the weight must hold real floating-point numbers; got int32"),
        (WEIGHT.astype(bool), r"dw: the weight must hold real floating-point numbers; got bool"),
        (WEIGHT.astype(np.longdouble), r"dw: the weight is .*long double"),
    ],
)
def test_arrays_that_no_layer_computes_with(value, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(value, groups=4, name="dw")
    with pytest.raises(ValueError, match=message.replace("weight", "bias")):
        from_arrays(WEIGHT, value[:, 0, 0, 0], groups=4, name="dw")


@pytest.mark.parametrize("dtype", [">f4", ">f2", "<f4", "=f2"])
def test_arrays_of_any_byte_order(dtype):
    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 3)).astype(dtype)
    layer, params = from_arrays(weight, weight[:, 0, 0, 0], groups=4)
    assert layer.param_dtype == params["kernel"].dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(to_arrays(layer, params)[1]["weight"], weight)


def test_a_state_dict_gives_its_depthwise_parameters_by_path():
    rng = np.random.default_rng(0)
    state = {
        "stem.weight": rng.normal(size=(8, 3, 3, 3)),
        "blocks.0.dw.weight": rng.normal(size=(8, 1, 3, 3)),
        "blocks.0.dw.bias": rng.normal(size=8),
        "blocks.0.norm.weight": rng.normal(size=8),
        "blocks.1.dw.weight": rng.normal(size=(8, 1, 5)),
        "gray.weight": rng.normal(size=(8, 1, 3, 3)),
        "tied.weight_g": rng.normal(size=(8, 1, 1)),
        "tied.weight_v": rng.normal(size=(8, 1, 3)),
        "odd.weight": np.ones((8, 1, 3), np.complex64),
        "head.weight": rng.normal(size=(2, 8)),
    }
    state = {key: v if v.dtype == np.complex64 else v.astype(np.float32) for key, v in state.items()}
    found = params_from_state_dict(state, groups={"blocks.1.dw": 4, "gray": 1})
    assert set(found) == {"blocks.0.dw", "blocks.1.dw"}
    assert found["blocks.1.dw"]["kernel"].shape == (5, 4, 2)
    assert set(found.skipped) == {"tied", "odd"}
    assert "weight_g" in found.skipped["tied"] or "weight_v" in found.skipped["tied"]
    assert "complex64" in str(found)
    x = rng.normal(size=(2, 8, 6, 6)).astype(np.float32)
    weight, bias = state["blocks.0.dw.weight"], state["blocks.0.dw.bias"]
    arguments = {"stride": 1, "padding": 0, "dilation": 1, "groups": 8, "padding_mode": "zeros"}
    y = depthwise_conv(x, **found["blocks.0.dw"], data_format="channels_first")
    np.testing.assert_allclose(y, torch_convolution(x, weight, bias, **arguments), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="groups must name convolutions of the state dict; got 'none'"):
        params_from_state_dict(state, groups={"none": 4})
    assert str(params_from_state_dict({})) == "no depthwise convolution"


def test_another_object_is_no_torch_module():
    with pytest.raises(TypeError, match=r"Conv1d.*dict"):
        from_torch({})


# --- with PyTorch ---------------------------------------------------------------------------------------------------


def random_transposed(seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """Arguments of torch.nn.ConvTransposeNd for a depthwise convolution, and an input."""
    rng = np.random.default_rng(seed)
    rank, channels, multiplier = seed % 3 + 1, int(rng.integers(1, 4)), int(rng.integers(1, 4))
    size, stride, dilation = (tuple(int(n) for n in rng.integers(1, 4, size=rank)) for _ in range(3))
    arguments = {
        "in_channels": channels,
        "out_channels": channels * multiplier,
        "kernel_size": size,
        "stride": stride,
        "padding": tuple(int(rng.integers(0, (k - 1) * d + 1)) for k, d in zip(size, dilation, strict=True)),
        "output_padding": tuple(int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True)),
        "groups": channels,
        "bias": bool(rng.random() < 0.7),
        "dilation": dilation,
    }
    return arguments, rng.normal(size=(2, channels, *rng.integers(4, 6, size=rank))).astype(np.float32)


@pytest.mark.parametrize("seed", range(draws(12, 24)))
def test_transposed_round_trips_by_module(torch, seed):
    arguments, x = random_transposed(seed)
    torch.manual_seed(seed)
    conv = getattr(torch.nn, f"ConvTranspose{x.ndim - 2}d")(**arguments)
    with torch.no_grad():
        expected = conv(torch.from_numpy(x)).numpy()
    layer, params = from_torch(conv)
    assert isinstance(layer, getattr(linen, f"DepthwiseConv{x.ndim - 2}DTranspose"))
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)
    back, state = to_arrays(layer, params)
    assert back == arguments
    for name, value in conv.state_dict().items():
        np.testing.assert_array_equal(state[name], value.numpy())
    with torch.no_grad():
        np.testing.assert_array_equal(to_torch(layer, params)(torch.from_numpy(x)).numpy(), expected)
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    again, ours = from_state_dict(
        {f"up.{name}": value for name, value in state.items()},
        "up",
        transposed=True,
        framework="nnx",
        data_format="channels_last",
        **{name: arguments[name] for name in names},
    )
    np.testing.assert_array_equal(ours["kernel"], params["kernel"])
    y = np.moveaxis(np.asarray(again(np.moveaxis(x, 1, -1))), -1, 1)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [
        ({"strides": 2, "kernel_size": 4, "padding": "same"}, {"padding": (1,), "output_padding": (0,)}),
        ({"strides": 2, "kernel_size": 4}, {"padding": (0,), "output_padding": (0,)}),
        ({"strides": 3, "kernel_size": 2}, {"padding": (0,), "output_padding": (1,)}),
        ({"strides": 3, "kernel_size": 2, "output_padding": 2}, {"padding": (0,), "output_padding": (2,)}),
        ({"strides": 2, "kernel_size": 3, "padding": ((1, 0),)}, {"padding": (1,), "output_padding": (1,)}),
        ({"strides": 2, "kernel_size": 3, "padding": "same"}, None),  # one more at the end is cut
        ({"strides": 2, "kernel_size": 3, "padding": ((0, 1),)}, None),
        ({"strides": 2, "kernel_size": 5, "padding": ((3, 1),)}, None),
    ],
    ids=str,
)
def test_paddings_of_a_transposed_layer_in_pytorch(torch, arguments, theirs):
    layer: Any = linen.DepthwiseConv1DTranspose(**arguments)
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    if theirs is None:
        with pytest.raises(ValueError, match="PyTorch has no equivalent of padding="):
            to_torch(layer, params)
        return
    assert {name: to_arrays(layer, params)[0][name] for name in theirs} == theirs
    with torch.no_grad():
        y = to_torch(layer, params)(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    np.testing.assert_allclose(layer.apply({"params": params}, x), np.moveaxis(y, 1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (4, 1), (4, 2)])
def test_causal_spellings(torch, kernel_size, dilation, framework):
    span = (kernel_size - 1) * dilation
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    cut = torch.nn.Conv1d(3, 6, kernel_size, padding=span, groups=3, dilation=dilation)
    before = torch.nn.Conv1d(3, 6, kernel_size, groups=3, dilation=dilation)
    before.load_state_dict(cut.state_dict())
    with torch.no_grad():
        expected = before(torch.nn.functional.pad(x, (span, 0))).numpy()
        np.testing.assert_allclose(cut(x)[..., :9], expected, rtol=1e-6, atol=1e-6)
    state = {f"mixer.conv1d.{name}": value for name, value in cut.state_dict().items()}
    options = {"groups": 3, "dilation": dilation, "padding": span, "framework": framework}
    made = [from_torch(conv, causal=True, framework=framework) for conv in (cut, before)]
    for layer, params in [*made, from_state_dict(state, "mixer.conv1d", causal=True, **options)]:
        assert type(layer).__name__ == "CausalDepthwiseConv1D"
        call = layer if framework == "nnx" else functools.partial(layer.apply, {"params": params})
        y, after = call(x.numpy()[..., :5])
        z, _ = call(x.numpy()[..., 5:], after)
        np.testing.assert_allclose(np.concatenate([y, z], -1), expected, rtol=1e-5, atol=1e-5)
        plain: Any = linen.DepthwiseConv1D(
            kernel_size, padding="causal", depth_multiplier=2, data_format="channels_first", dilation_rate=dilation
        )
        y = plain.apply({"params": params}, x.numpy())  # the same parameters
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    # Faithful unless it is asked for: a symmetric padding may be meant.
    layer, params = from_torch(cut)
    with torch.no_grad():
        np.testing.assert_allclose(layer.apply({"params": params}, x.numpy()), cut(x), rtol=1e-5, atol=1e-5)


def test_a_causal_subclass_is_told_of_the_argument(torch):
    class CausalConv1d(torch.nn.Conv1d):
        def forward(self, x):
            return super().forward(torch.nn.functional.pad(x, (3, 0)))

    conv = CausalConv1d(4, 4, 4, groups=4)
    with pytest.raises(ValueError, match=r"overrides CausalConv1d\.forward.*from_state_dict\(\.\.\., causal=True\)"):
        from_torch(conv)
    layer, params = from_state_dict(conv.state_dict(), "", groups=4, causal=True)
    x = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        np.testing.assert_allclose(layer.apply({"params": params}, x.numpy())[0], conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_round_trips_by_module(torch, seed):
    arguments, state, x = random_convolution(seed)
    conv = getattr(torch.nn, f"Conv{x.ndim - 2}d")(**arguments)
    conv.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    with torch.no_grad():
        expected = conv(torch.from_numpy(x)).numpy()
    layer, params = from_torch(conv)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)
    back = to_torch(layer, params)
    assert type(back) is type(conv)
    for name, value in conv.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.from_numpy(x)).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_modules(torch):
    conv = torch.nn.Conv1d(2, 4, 3, groups=2, dtype=torch.bfloat16)
    layer, params = from_torch(conv)
    assert params["kernel"].dtype == jnp.bfloat16
    assert torch.equal(to_torch(layer, params).weight, conv.weight)
    before = np.asarray(params["kernel"])
    with torch.no_grad():
        conv.weight.zero_()  # the module's memory is not ours
    np.testing.assert_array_equal(params["kernel"], before)


def test_what_is_refused_of_modules(torch):
    with pytest.raises(ValueError, match=r"Conv2d is not depthwise.*groups=2, 4 input channels"):
        from_torch(torch.nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="replicate"):
        from_torch(torch.nn.Conv2d(4, 4, 3, groups=4, padding=2, padding_mode="replicate"))
    with pytest.raises(ValueError, match=r"ConvTranspose2d is not depthwise.*groups=2, 4 input channels"):
        from_torch(torch.nn.ConvTranspose2d(4, 4, 3, groups=2))
    with pytest.raises(TypeError, match=r"Conv1d, Conv2d, Conv3d or ConvTranspose1d.*Linear"):
        from_torch(torch.nn.Linear(4, 4))


def members(torch: Any) -> dict[str, tuple[Any, str | None]]:
    """Modules that are more than a stock convolution: each with what its refusal says, or None where it is right."""
    nn, utils = torch.nn, torch.nn.utils
    arguments: dict[str, Any] = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 4}

    class Named(nn.Conv2d):  # as model zoos have it: other defaults, helpers, another representation
        scale = 3

        def __init__(self, channels):
            super().__init__(channels, 2 * channels, 3, padding=1, groups=channels)
            self.note = "mine"

        def reset_parameters(self):
            nn.init.normal_(self.weight)
            if self.bias is not None:
                nn.init.normal_(self.bias)

        def extra_repr(self):
            return "mine"

        def fuse(self):
            return self.weight * self.scale

    class Forward(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    class ConvForward(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    class Getattr(nn.Conv2d):
        def __getattr__(self, name):
            value = super().__getattr__(name)
            return value * 2 if name == "weight" else value

    class Doubling:
        def forward(self, x):
            return super().forward(2 * x)  # pyright: ignore[reportAttributeAccessIssue]

    class Mixed(Doubling, nn.Conv2d):
        pass

    class Deep(Forward):
        pass

    class Up(nn.ConvTranspose2d):
        def _output_padding(self, *args, **kwargs):
            return [1, 1]

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    class Dropping(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x)

    def stock(**kwargs):
        return nn.Conv2d(**{**arguments, **kwargs})

    def replaced(module, **attributes):
        for name, value in attributes.items():
            setattr(module, name, value)
        return module

    def hooked(module, kind, hook):
        getattr(module, kind)(hook)
        return module

    def stale(module):
        """With weights that the next call computes anew, as after load_state_dict."""
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(3)
        return module

    def called(module):
        module(torch.ones(1, 4, 5, 5))
        return module

    tied = stock()
    sharing = stock()
    sharing.weight = tied.weight
    prune = importlib.import_module("torch.nn.utils.prune")
    qat = importlib.import_module("torch.ao.nn.qat")
    config = importlib.import_module("torch.ao.quantization").get_default_qat_qconfig("x86")
    return {
        "stock": (stock(), None),
        "subclass that computes the same": (Named(4), None),
        "shared weight": (sharing, None),
        "frozen": (stock().requires_grad_(False), None),
        "transposed": (nn.ConvTranspose2d(**arguments, stride=2), None),
        "transposed and parametrized": (
            utils.parametrizations.weight_norm(nn.ConvTranspose2d(**arguments, stride=2, dilation=2)),
            None,
        ),
        "transposed, lazy and called": (called(nn.LazyConvTranspose2d(8, 3, groups=4)), None),
        "transposed and lazy": (nn.LazyConvTranspose2d(8, 3, groups=4), "LazyConvTranspose2d has no weight yet"),
        "transposed, with a part of its own": (Up(**arguments, stride=2), r"overrides Up\._output_padding"),
        "compiled in place": (replaced(stock(), _compiled_call_impl=None), None),
        "attributes changed": (replaced(stock(), padding=(2, 0), stride=(2, 1)), None),
        "weight_norm": (stale(utils.weight_norm(stock())), None),
        "spectral_norm": (stale(utils.spectral_norm(stock()).eval()), None),
        "pruned": (stale(prune.l1_unstructured(stock(), "weight", 0.5)), None),
        "pruned twice": (
            stale(prune.random_unstructured(prune.ln_structured(stock(), "weight", 0.5, 2, 0), "bias", 0.5)),
            None,
        ),
        "parametrized by weight_norm": (stale(utils.parametrizations.weight_norm(stock())), None),
        "parametrized by spectral_norm": (utils.parametrizations.spectral_norm(stock()).eval(), None),
        "parametrized": (utils.parametrize.register_parametrization(stock(), "weight", Double()), None),
        "parametrized bias": (utils.parametrize.register_parametrization(stock(), "bias", Double()), None),
        "parametrized subclass": (utils.parametrize.register_parametrization(Named(4), "weight", Double()), None),
        "lazy and called": (called(nn.LazyConv2d(8, 3, groups=4)), None),
        "forward": (Forward(**arguments), r"overrides Forward\.forward"),
        "_conv_forward": (ConvForward(**arguments), r"overrides ConvForward\._conv_forward"),
        "__getattr__": (Getattr(**arguments), r"overrides Getattr\.__getattr__"),
        "mixin": (Mixed(**arguments), r"overrides Doubling\.forward"),
        "subclass of a subclass": (Deep(**arguments), r"Deep overrides Forward\.forward"),
        "forward of the instance": (replaced(stock(), forward=lambda x: x), "forward"),
        "parametrized forward": (
            utils.parametrize.register_parametrization(Forward(**arguments), "weight", Double()),
            r"overrides Forward\.forward",
        ),
        "random parametrization": (
            utils.parametrize.register_parametrization(stock(), "weight", Dropping()),
            r"whose value changes; call eval\(\)",
        ),
        "parametrized by spectral_norm in training": (
            utils.parametrizations.spectral_norm(stock(), n_power_iterations=3),
            r"whose value changes; call eval\(\)",
        ),
        "spectral_norm in training": (utils.spectral_norm(stock()), r"spectral_norm.*call eval\(\)"),
        "forward hook": (hooked(stock(), "register_forward_hook", lambda m, x, y: 2 * y), "forward hook.*lambda"),
        "pre-hook": (hooked(stock(), "register_forward_pre_hook", lambda m, x: (2 * x[0],)), "pre-hook.*lambda"),
        "weight_norm and a pre-hook": (
            hooked(utils.weight_norm(stock()), "register_forward_pre_hook", lambda m, x: (2 * x[0],)),
            "pre-hook.*lambda",
        ),
        "quantisation-aware": (qat.Conv2d(**arguments, qconfig=config), r"qat.*overrides Conv2d\.forward"),
        "lazy": (nn.LazyConv2d(8, 3, groups=4), "LazyConv2d has no weight yet"),
        "padding changed": (
            replaced(stock(padding_mode="circular"), padding=(2, 2)),
            "padding=.*was changed after the module was made",
        ),
        "complex": (stock(dtype=torch.complex64), "real floating-point numbers; got torch.complex64"),
        "meta": (stock(device="meta"), "'meta'"),
    }


MEMBERS = (
    "stock", "subclass that computes the same", "shared weight", "frozen", "compiled in place", "attributes changed",
    "weight_norm", "spectral_norm", "pruned", "pruned twice", "parametrized by weight_norm",
    "parametrized by spectral_norm", "parametrized", "parametrized bias", "parametrized subclass", "lazy and called",
    "forward", "_conv_forward", "__getattr__", "mixin", "subclass of a subclass", "forward of the instance",
    "parametrized forward", "random parametrization", "parametrized by spectral_norm in training",
    "spectral_norm in training", "forward hook", "pre-hook", "weight_norm and a pre-hook", "quantisation-aware", "lazy",
    "padding changed", "complex", "meta", "transposed", "transposed and parametrized", "transposed, lazy and called",
    "transposed and lazy", "transposed, with a part of its own",
)  # fmt: skip


@pytest.fixture(scope="module")
def table(torch: Any) -> dict[str, tuple[Any, str | None]]:
    with warnings.catch_warnings(action="ignore"):  # old ways of PyTorch, which modules still have
        table = members(torch)
    assert set(table) == set(MEMBERS)
    return table


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MEMBERS)
def test_modules_are_right_or_refused_by_name(torch, table, name):
    module, message = table[name]
    if message is not None:
        with pytest.raises(ValueError, match=message):
            from_torch(module)
        skipped = layers_from_torch(torch.nn.Sequential(module)).skipped
        assert set(skipped) == {"0"}
        assert re.search(message, skipped["0"])
        return
    x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    layer, params = from_torch(module)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())  # left alone
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(layer.apply({"params": params}, x.numpy()), expected, rtol=1e-5, atol=1e-5)


TENSORS: dict[str, tuple[Any, str | None]] = {
    "plain": (lambda torch, w: w, None),
    "parameter": (lambda torch, w: torch.nn.Parameter(w), None),
    "negated view": (lambda torch, w: torch._neg_view(w), None),
    "imaginary part": (lambda torch, w: (1j * w).conj().imag, None),
    "not contiguous": (lambda torch, w: w.flip(-1).transpose(-1, -2), None),
    "half": (lambda torch, w: w.half(), None),
    "bfloat16": (lambda torch, w: w.bfloat16(), None),
    "complex": (lambda torch, w: w + 1j, "real floating-point numbers; got torch.complex64"),
    "integers": (lambda torch, w: w.int(), "real floating-point numbers; got torch.int32"),
    "meta": (lambda torch, w: w.to("meta"), "'meta'"),
    "sparse": (lambda torch, w: w.to_sparse(), "dense tensor; got a torch.sparse_coo"),
    "quantized": (
        lambda torch, w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
        "dense tensor; got a quantized",
    ),
    "float8": (lambda torch, w: w.to(torch.float8_e4m3fn), "float8_e4m3fn.*convert it to bfloat16"),
    "double": (lambda torch, w: w.double(), "float64.*jax_enable_x64"),
    "uninitialized": (lambda torch, w: torch.nn.UninitializedParameter(), "not initialized"),
    "subclass": (
        lambda torch, w: w.as_subclass(type("Mine", (torch.Tensor,), {})),
        "Mine; convert it to a plain",
    ),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_right_or_refused_by_name(torch, name):
    make, message = TENSORS[name]
    weight = torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    value = make(torch, weight)
    if message is None:
        _, params = from_state_dict({"f.weight": value}, "f", groups=4)
        kernel = np.asarray(params["kernel"], np.float32).transpose(2, 3, 0, 1).reshape(8, 1, 3, 3)
        np.testing.assert_array_equal(kernel, value.detach().float().resolve_neg().numpy())
        return
    with pytest.raises(ValueError, match=f"f: the weight.*{message}"):
        from_state_dict({"f.weight": value}, "f", groups=4)
    with pytest.raises(ValueError, match=f"f: the bias.*{message}"):
        from_state_dict({"f.weight": weight, "f.bias": value}, "f", groups=4)


def test_whole_models(torch):
    nn = torch.nn

    class Grouped(nn.Module):
        groups = 4

    shared = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(shared, nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, stride=2, dilation=2, groups=8)),
        nn.Conv2d(16, 16, 1, groups=4),
        Grouped(),
        nn.Conv2d(16, 16, 3, padding=2, padding_mode="replicate", groups=16),
        shared,
        nn.ModuleDict({"series": nn.Conv1d(4, 4, 3, groups=4), "clips": nn.Conv3d(4, 4, 3, groups=4)}),
        nn.ConvTranspose2d(16, 32, 4, stride=2, padding=1, groups=16),
        nn.ConvTranspose2d(16, 16, 3, groups=16),
    )
    layers = layers_from_torch(nn.DataParallel(model))
    assert set(layers) == {"module." + path for path in ("1.0", "1.2", "5", "6.series", "6.clips", "7", "8")}
    assert set(layers.skipped) == {"module.2", "module.3", "module.4"}
    assert "groups=4, 16 input channels" in layers.skipped["module.2"]
    assert "Grouped is not a torch.nn.Conv1d" in layers.skipped["module.3"]
    assert "module.4: skipped: padding_mode='replicate'" in str(layers)
    for path, (layer, params) in layers_from_torch(model).items():
        conv = model.get_submodule(path)
        x = torch.randn(2, conv.in_channels, *[9] * (conv.weight.ndim - 2))
        with torch.no_grad():
            expected = conv(x).numpy()
        np.testing.assert_allclose(layer.apply({"params": params}, x.numpy()), expected, rtol=1e-5, atol=1e-5)
    nnx_layer, _ = layers_from_torch(model, framework="nnx", data_format="channels_last")["1.0"]
    assert nnx_layer(np.ones((1, 5, 5, 8), np.float32)).shape == (1, 5, 5, 8)
    with pytest.raises(TypeError, match="OrderedDict"):
        layers_from_torch(model.state_dict())
    found = params_from_state_dict(model.state_dict(), groups={"1.2": 8})
    for path in ("1.0", "1.2", "5", "6.clips", "8"):
        np.testing.assert_array_equal(found[path]["kernel"], layers_from_torch(model)[path][1]["kernel"])


def test_conversions_of_arrays_import_no_torch():
    code = (
        "import sys, numpy as np; from depthwise_jax import interop; "
        "layer, params = interop.torch.from_arrays(np.ones((2, 1, 3), np.float32), groups=2); "
        "interop.torch.to_arrays(layer, params); "
        "assert not {'torch', 'keras', 'h5py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
