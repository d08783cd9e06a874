"""Between PyTorch's grouped convolutions and our layers: by module, by an entry of a state dict, or by plain arrays.

PyTorch itself is needed, and imported, by `to_torch` alone.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from depthwise_jax.interop.modules import make, parts

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def from_torch(conv: Any, *, data_format: str = "channels_first", framework: str = "linen") -> tuple[Any, Any]:
    """The layer of ours that computes what a torch.nn.Conv1d, Conv2d or Conv3d with groups == in_channels does.

    Args:
        conv: the torch module.
        data_format: that of the layer; "channels_first" takes PyTorch's own inputs.
        framework: "linen" or "nnx", the kind of layer to make.

    Returns:
        `(module, params)`, the weight `(C*M, 1, *window)` as the kernel `(*window, C, M)` and every value as it was.

    Raises:
        TypeError: no such module.
        ValueError: as `from_arrays`.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(conv, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        raise TypeError(f"conv must be a torch.nn.Conv1d, Conv2d or Conv3d; got {type(conv).__name__}")
    return from_arrays(
        conv.weight,
        conv.bias,
        groups=conv.groups,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        padding_mode=conv.padding_mode,
        data_format=data_format,
        framework=framework,
        name=type(conv).__name__,
    )


def from_state_dict(state: Mapping[str, Any], name: str, *, groups: int, **arguments: Any) -> tuple[Any, Any]:
    """The layer for the convolution called `name` in a state dict.

    Args:
        state: a module's state dict, of tensors or arrays.
        name: the convolution's name in it, "features.3.0", which its weight's key begins with; "" if it is the whole.
        groups: as for `from_arrays`: a state dict holds weights alone.
        **arguments: the other arguments of `from_arrays`, stride to framework.

    Returns:
        `(module, params)`, as `from_torch`.

    Raises:
        ValueError: no such convolution in `state`, and as `from_arrays`.
    """
    prefix = f"{name}." if name else ""
    if f"{prefix}weight" not in state:
        raise ValueError(f"the state dict has no {prefix + 'weight'!r}")
    arguments = {"name": name or "the convolution", **arguments}
    return from_arrays(state[f"{prefix}weight"], state.get(f"{prefix}bias"), groups=groups, **arguments)


def from_arrays(
    weight: Any,
    bias: Any = None,
    *,
    groups: int,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    padding_mode: str = "zeros",
    data_format: str = "channels_first",
    framework: str = "linen",
    name: str = "the convolution",
) -> tuple[Any, Any]:
    """The layer of ours that computes what PyTorch's convolution with these arrays and arguments does.

    Args:
        weight: `(C*M, 1, *window)`, with one to three window axes; a tensor or an array.
        bias: `(C*M,)`, or None.
        groups: the number of groups, which must be that of the input's channels, C.
        stride, padding, dilation, padding_mode: as in torch.nn.Conv2d. padding_mode "reflect" and "circular" need a
            padding of half the window's span, which "same" is.
        data_format: that of the layer; "channels_first" takes PyTorch's own inputs.
        framework: "linen" or "nnx", the kind of layer to make.
        name: what the messages call it.

    Returns:
        `(module, params)`, as `from_torch`.

    Raises:
        ValueError: the convolution is not depthwise; the arrays do not fit; or a layer of ours cannot spell an
            argument, which `depthwise_conv` on a padded input computes. The message names it.

    Examples:
        >>> import numpy as np
        >>> weight, bias = np.ones((64, 1, 3, 3), np.float32), np.zeros(64, np.float32)
        >>> layer, params = from_arrays(weight, bias, groups=32, stride=2, padding=1)
        >>> type(layer).__name__, params["kernel"].shape
        ('DepthwiseConv2D', (3, 3, 32, 2))
    """
    weight, bias = _array(weight), None if bias is None else _array(bias)
    rank = weight.ndim - 2
    if not 1 <= rank <= 3 or 0 in weight.shape:
        raise ValueError(
            f"{name}: weight must have the shape (C*M, 1, *window) with one to three window axes; got {weight.shape}"
        )
    outputs, inputs, *window = weight.shape
    if inputs != 1 or groups < 1 or outputs % groups:
        raise ValueError(
            f"{name} is not depthwise: groups must be the number of input channels, and divide the output channels; "
            f"got groups={groups}, {groups * inputs} input channels and {outputs} output channels"
        )
    arguments = {
        "kernel_size": tuple(window),
        "strides": stride,
        "padding": _padding(padding, padding_mode, window, dilation, name),
        "depth_multiplier": outputs // groups,
        "data_format": data_format,
        "dilation_rate": dilation,
        "use_bias": bias is not None,
        "param_dtype": weight.dtype,
    }
    kernel = weight.reshape(groups, outputs // groups, *window).transpose(*range(2, rank + 2), 0, 1)
    values = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    return make(f"DepthwiseConv{rank}D", arguments, values, framework, name)


def to_arrays(module: Any, params: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What PyTorch needs to compute a depthwise layer of ours: the way back of `from_arrays`.

    Args:
        module: a depthwise layer of `depthwise_jax.linen`, or of `depthwise_jax.nnx`.
        params: the Linen layer's parameters; an NNX layer has its own.

    Returns:
        `(arguments, state)`, the arguments of torch.nn.Conv1d, Conv2d or Conv3d, and the state dict's arrays, "weight"
        `(C*M, 1, *window)` and "bias" `(C*M,)`. PyTorch's input is channels first, whatever the layer's data_format is.

    Raises:
        TypeError: no layer of ours, or its parameters missing or given twice.
        ValueError: PyTorch cannot spell the layer; the message names the argument.
    """
    contract, values = parts(module, params)
    if contract.separable:
        raise ValueError(f"a {contract.layer} is two convolutions in PyTorch")
    if contract.arguments["activation"] not in (None, "linear"):
        raise ValueError(f"PyTorch's convolution has no activation; got {contract.arguments['activation']!r}")
    kernel = np.asarray(values["kernel"])
    *window, channels, multiplier = kernel.shape
    rank = len(window)
    padding, mode = _torch_padding(contract.padding, window, contract.strides, contract.dilation_rate)
    arguments = {
        "in_channels": channels,
        "out_channels": channels * multiplier,
        "kernel_size": contract.kernel_size,
        "stride": contract.strides,
        "padding": padding,
        "dilation": contract.dilation_rate,
        "groups": channels,
        "bias": "bias" in values,
        "padding_mode": mode,
    }
    weight = kernel.transpose(rank, rank + 1, *range(rank)).reshape(channels * multiplier, 1, *window)
    state = {"weight": np.ascontiguousarray(weight)}
    return arguments, state | ({"bias": np.array(values["bias"])} if "bias" in values else {})


def to_torch(module: Any, params: Mapping[str, Any] | None = None) -> Any:
    """The torch.nn.Conv1d, Conv2d or Conv3d that computes a depthwise layer of ours, on the CPU.

    Args:
        module: a depthwise layer of `depthwise_jax.linen`, or of `depthwise_jax.nnx`.
        params: the Linen layer's parameters; an NNX layer has its own.

    Raises:
        TypeError, ValueError: as `to_arrays`.
        ImportError: PyTorch is not installed.
    """
    torch: Any = importlib.import_module("torch")  # an optional package, so without its types
    arguments, state = to_arrays(module, params)
    dtype = getattr(torch, str(state["weight"].dtype))
    conv = getattr(torch.nn, f"Conv{state['weight'].ndim - 2}d")(**arguments, dtype=dtype)
    # NumPy's bfloat16 is none to PyTorch; through float32 nothing is lost.
    wide = {name: a.astype(np.promote_types(a.dtype, np.float32)) for name, a in state.items()}
    conv.load_state_dict({name: torch.from_numpy(a).to(dtype) for name, a in wide.items()})
    return conv


def _array(value: Any) -> Any:
    """A tensor or an array in NumPy, its dtype kept."""
    if not hasattr(value, "detach"):
        return value if isinstance(value, Array) else np.asarray(value)
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":  # NumPy's is none to PyTorch; through float32 nothing is lost
        return value.float().numpy().astype(jnp.bfloat16)
    return value.numpy().copy()


def _padding(padding: Any, mode: str, window: Sequence[int], dilation: Any, name: str) -> Any:
    """Our padding for PyTorch's."""
    if mode not in _PADDING_MODES:
        raise ValueError(f"{name}: padding_mode must be one of {_PADDING_MODES}; got {mode!r}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"{name}: padding must be 'same', 'valid', or numbers; got {padding!r}")
        named, pairs = padding, None
    else:
        amounts = [padding] * len(window) if isinstance(padding, int) else list(padding)
        named, pairs = "valid" if not any(amounts) else None, tuple((amount, amount) for amount in amounts)
    if mode == "zeros" or named == "valid":
        return named or pairs
    dilations = [dilation] * len(window) if isinstance(dilation, int) else list(dilation)
    if mode != "replicate" and (named == "same" or pairs == _half_spans(window, dilations)):
        return mode
    raise ValueError(
        f"{name}: padding_mode={mode!r} with padding={padding!r} is nothing that a layer has a word for; "
        "depthwise_conv computes it on an input padded by jax.numpy.pad"
    )


def _half_spans(window: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """What "same" adds to each axis where the stride is 1."""
    return tuple(((k - 1) * d // 2, (k - 1) * d - (k - 1) * d // 2) for k, d in zip(window, dilation, strict=True))


def _torch_padding(padding: Any, window: Sequence[int], strides: Any, dilation: Any) -> tuple[Any, str]:
    """PyTorch's padding and padding_mode for ours."""
    mode = padding if padding in ("reflect", "circular") else "zeros"
    if padding == "valid":
        return 0, mode
    if max(strides) == 1 and padding in ("same", "reflect", "circular"):
        return "same", mode
    pairs = _half_spans(window, dilation) if mode != "zeros" else padding
    if isinstance(pairs, str) or any(low != high for low, high in pairs):
        raise ValueError(
            f"PyTorch has no word for padding={padding!r} with strides={tuple(strides)}: it pads both ends alike, and "
            "'same' is for strides of 1"
        )
    return tuple(low for low, _ in pairs), mode
