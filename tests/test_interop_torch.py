"""PyTorch's depthwise convolutions and our layers: by arrays and state dict against lax, by module against PyTorch."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from depthwise_jax import depthwise_conv, linen
from depthwise_jax.interop.torch import from_arrays, from_state_dict, from_torch, to_arrays, to_torch

MODES: dict[str, Any] = {"reflect": "reflect", "circular": "wrap"}


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
    mode = ("zeros", "circular", "reflect")[rng.integers(3)] if padding in ("same", "valid", 0) else "zeros"
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


SEEDS = range(20)


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
        (0, "replicate", "valid"),
        ("valid", "reflect", "valid"),
    ],
)
def test_padding_modes_that_a_layer_has(padding, mode, ours):
    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 5 if padding == (1, 2) else 3)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(1, 2, 7, 7)).astype(np.float32)
    layer, params = from_arrays(weight, groups=2, stride=2, padding=padding, padding_mode=mode)
    assert layer.padding == ours
    expected = torch_convolution(
        x,
        weight,
        None,
        stride=2,
        padding=padding,
        dilation=1,
        groups=2,
        padding_mode=mode if ours != "valid" else "zeros",
    )
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_what_a_layer_cannot_spell_is_what_depthwise_conv_computes():
    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 3)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(1, 2, 9, 9)).astype(np.float32)
    with pytest.raises(ValueError, match=r"strides.*dilation_rate.*depthwise_conv"):
        from_arrays(weight, groups=2, stride=2, dilation=2)
    expected = torch_convolution(x, weight, None, stride=2, padding=0, dilation=2, groups=2, padding_mode="zeros")
    kernel = weight.reshape(2, 2, 3, 3).transpose(2, 3, 0, 1)
    y = depthwise_conv(x, kernel, strides=2, dilation_rate=2, data_format="channels_first")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


WEIGHT = np.ones((4, 1, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": np.ones((4, 4, 3, 3), np.float32), "groups": 1}, r"groups=1, 4 input channels"),
        ({"weight": np.ones((4, 2, 3, 3), np.float32), "groups": 2}, r"groups=2, 4 input channels"),
        ({"groups": 3}, r"groups=3.*4 output channels"),
        ({"groups": 0}, r"groups=0"),
        ({"padding": 1, "padding_mode": "replicate"}, r"padding_mode='replicate'.*depthwise_conv"),
        ({"padding": 2, "padding_mode": "circular"}, r"padding_mode='circular' with padding=2.*depthwise_conv"),
        ({"padding_mode": "wrap"}, r"padding_mode.*'wrap'"),
        ({"padding": "full"}, r"padding.*'full'"),
        ({"padding": -1}, r"padding"),
        ({"padding": (1, 2, 3)}, r"padding"),
        ({"stride": 0}, r"strides"),
        ({"bias": np.ones(3, np.float32)}, r"dw: the parameter 'bias' must have the shape \(4,\); got \(3,\)"),
        ({"weight": np.ones((4, 1), np.float32)}, r"dw: weight must have the shape.*\(4, 1\)"),
        ({"weight": np.ones((4, 1, 2, 2, 2, 2), np.float32)}, r"weight must have"),
        ({"weight": np.ones((4, 1, 3, 3))}, r"'kernel' is float64.*jax_enable_x64"),
        ({"data_format": "NCHW"}, r"data_format"),
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


def test_another_object_is_no_torch_module():
    with pytest.raises(TypeError, match=r"Conv1d.*dict"):
        from_torch({})


# --- with PyTorch ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed: the extra `torch` brings it")


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
        from_torch(torch.nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="replicate"))
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        from_torch(torch.nn.ConvTranspose2d(4, 4, 3, groups=4))


def test_conversions_of_arrays_import_no_torch():
    code = (
        "import sys, numpy as np; from depthwise_jax import interop; "
        "layer, params = interop.torch.from_arrays(np.ones((2, 1, 3), np.float32), groups=2); "
        "interop.torch.to_arrays(layer, params); "
        "assert not {'torch', 'keras', 'h5py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
