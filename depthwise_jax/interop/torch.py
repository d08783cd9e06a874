"""Converts between PyTorch's grouped convolutions and our layers: whole models, modules, state dicts, plain arrays.

Only `to_torch` imports PyTorch itself.
"""

import copy
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from depthwise_jax._contract.spec import Spec
from depthwise_jax._core.layout import DataFormat
from depthwise_jax._core.window import resolve_transposed
from depthwise_jax.interop.modules import Converted, Framework, causal_arguments, make, overridden, parts, real_array

# PyTorch's padding modes, and our paddings by half the window's span.
_PADDING_MODES = {"zeros": "same", "reflect": "reflect", "replicate": "edge", "circular": "circular"}
_CONVS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_NAMES = "Conv1d, Conv2d, Conv3d or ConvTranspose1d, 2d or 3d"

# What a subclass of torch.nn.Conv2d may redefine without changing the computation.
_HARMLESS = frozenset(
    {"extra_repr", "reset_parameters", "_get_name", "__constants__", "_version", "__setstate__", "__getstate__"}
    | {"__deepcopy__", "_load_from_state_dict", "_save_to_state_dict", "state_dict", "load_state_dict", "train"}
)
# The methods that compute a module's output and can be replaced on the module itself.
_CALLS = ("forward", "_conv_forward", "_call_impl", "_slow_forward", "_wrapped_call_impl")


def from_torch(
    conv: Any, *, causal: bool = False, data_format: DataFormat = "channels_first", framework: Framework = "linen"
) -> tuple[Any, Any]:
    """Converts a torch.nn.Conv1d, Conv2d or Conv3d with groups == in_channels into the layer that computes the same.

    A ConvTranspose1d, ConvTranspose2d or ConvTranspose3d becomes a DepthwiseConv1DTranspose and so on.

    Weights that torch.nn.utils computes before each call are taken as the next call would see them: weight_norm,
    spectral_norm (in eval mode), pruning, and every parametrization.

    Args:
        conv: the torch module; a subclass may add anything that does not change the computation.
        causal: True for a Conv1d that the code around it makes causal: it pads by `(kernel_size - 1)*dilation` and cuts
            off the last outputs, or pads the input first. The result is then a `CausalDepthwiseConv1D`, which needs
            neither and also returns the state for the tokens that follow. Its parameters are those of
            `DepthwiseConv1D(padding="causal")`, which returns only the output. False converts the module without
            regard to the code around it.
        data_format: the layer's data format; "channels_first" takes PyTorch's own inputs.
        framework: "linen" or "nnx", the kind of layer to make.

    Returns:
        `(module, params)`, with the weight `(C*M, 1, *window)`, or `(C, M, *window)` of a transposed convolution, as
        the kernel `(*window, C, M)`, and all values unchanged.

    Raises:
        TypeError: it is not such a module.
        ValueError: a subclass overrides the forward or another method; other hooks run before or after the forward
            pass; the weight differs each time it is read, or does not exist yet; or as `from_arrays`.
    """
    return _from_module(conv, type(conv).__name__, causal, data_format, framework)


def layers_from_torch(
    module: Any, *, data_format: DataFormat = "channels_first", framework: Framework = "linen"
) -> Converted:
    """Converts every depthwise convolution of a PyTorch module as `from_torch` does, transposed ones too, by path.

    A Conv1d that the code around it makes causal is converted without regard to that code; `from_torch(conv,
    causal=True)` makes it a causal layer. A convolution at several paths is converted at each of them; tied weights
    become copies.

    Args:
        module: a torch.nn.Module.
        data_format, framework: as for `from_torch`.

    Returns:
        A dict of `(module, params)` by path, "features.3.0". Its attribute `skipped` has the reason why a grouped
        convolution, or one that differs from its library's class, was skipped, by path. The dict prints one line each.

    Raises:
        TypeError: it is not a torch.nn.Module.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
    converted, skipped = {}, {}
    for path, part in module.named_modules(remove_duplicate=False):
        groups = getattr(part, "groups", 1)
        if not isinstance(groups, int) or groups == 1:
            continue  # neither grouped nor a convolution
        if not _is_conv(part):
            skipped[path] = f"{_class(part)} is not a torch.nn.{_NAMES}"
            continue
        try:
            converted[path] = _from_module(part, path, False, data_format, framework)
        except ValueError as error:
            skipped[path] = _without_name(error, path)
    return Converted(converted, skipped)


def params_from_state_dict(state: Mapping[str, Any], *, groups: Mapping[str, int] | None = None) -> Converted:
    """The parameters of every depthwise convolution in a state dict, by path, in our layers' shapes.

    A state dict holds only weights. A weight of shape `(C*M, 1, *window)` is taken for a depthwise one; `groups` gives
    C if M is not 1. The weight of a depthwise ConvTranspose with one kernel per channel has the same shape, and its
    parameters fit our transposed layer. For the layers themselves, which also need strides and padding, see
    `from_state_dict` and `layers_from_torch`.

    Args:
        state: a module's state dict, of tensors or arrays.
        groups: the number of input channels by path, if it differs from that of the output channels; 1 for an ordinary
            convolution of a single input channel, to skip it.

    Returns:
        A dict by path, "features.3.0", of `{"kernel": ..., "bias": ...}` with the kernel `(*window, C, M)`. Its
        attribute `skipped` has the reason why a convolution was skipped, by path.

    Raises:
        ValueError: `groups` has a path that the state dict lacks, or a number that does not divide the outputs.

    Examples:
        >>> import numpy as np
        >>> state = {"dw.weight": np.ones((8, 1, 3, 3), np.float32), "head.weight": np.ones((2, 8), np.float32)}
        >>> {path: params["kernel"].shape for path, params in params_from_state_dict(state).items()}
        {'dw': (3, 3, 8, 1)}
    """
    groups = dict(groups or {})
    converted, skipped = {}, {}
    for key, value in state.items():
        end = next((end for end in ("weight", *_COMPUTED) if key == end or key.endswith(f".{end}")), None)
        shape: Any = tuple(getattr(value, "shape", ()))
        if end is None or not 3 <= len(shape) <= 5 or 0 in shape:
            continue
        path = key.removesuffix(end).rstrip(".")
        channels = groups.pop(path, shape[0] if shape[1] == 1 else 1)
        if channels == 1:
            continue
        if end != "weight":
            skipped[path] = f"its weight is computed from {key!r}; convert the module with layers_from_torch"
            continue
        try:
            _, converted[path] = from_state_dict(state, path, groups=channels)
        except ValueError as error:
            skipped[path] = _without_name(error, path)
    if groups:
        raise ValueError(f"groups must name convolutions of the state dict; got {next(iter(groups))!r}")
    return Converted(converted, skipped)


# Endings of keys from which a weight of the same shape is computed: parametrizations, spectral_norm, pruning and
# weight_norm, as modules and as hooks.
_COMPUTED = ("parametrizations.weight.original", "parametrizations.weight.original1", "weight_orig", "weight_v")


def _without_name(error: ValueError, name: str) -> str:
    """A refusal's text, for a table that already shows the name."""
    return str(error).removeprefix(name).lstrip(": ").removeprefix("is ")


def from_state_dict(state: Mapping[str, Any], name: str, *, groups: int, **arguments: Any) -> tuple[Any, Any]:
    """Converts the convolution called `name` in a state dict into a layer.

    Args:
        state: a module's state dict, of tensors or arrays.
        name: the convolution's name in it, "features.3.0", the prefix of its weight's key; "" for a state dict of the
            convolution itself.
        groups: as for `from_arrays`; a state dict holds only weights.
        **arguments: the other arguments of `from_arrays`, from stride to framework; `causal=True` for a convolution
            that the code around it makes causal, `transposed=True` for a ConvTranspose.

    Returns:
        `(module, params)`, as `from_torch`.

    Raises:
        ValueError: `state` has no such convolution; or as `from_arrays`.
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
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    causal: bool = False,
    data_format: DataFormat = "channels_first",
    framework: Framework = "linen",
    name: str = "the convolution",
) -> tuple[Any, Any]:
    """Converts the arrays and arguments of PyTorch's convolution into the layer of ours that computes the same.

    Args:
        weight: `(C*M, 1, *window)`, with one to three window axes, or `(C, M, *window)` of a transposed convolution; a
            tensor or an array.
        bias: `(C*M,)`, or None.
        groups: the number of groups, which must equal that of the input's channels, C.
        stride, padding, dilation, padding_mode: as in torch.nn.Conv2d. padding_mode "reflect", "circular" and
            "replicate" need a padding of half the window's span, as "same" is.
        transposed: whether it is a torch.nn.ConvTranspose1d, ConvTranspose2d or ConvTranspose3d.
        output_padding: as in torch.nn.ConvTranspose2d.
        causal: as for `from_torch`.
        data_format: the layer's data format; "channels_first" takes PyTorch's own inputs.
        framework: "linen" or "nnx", the kind of layer to make.
        name: its name in messages.

    Returns:
        `(module, params)`, as `from_torch`.

    Raises:
        ValueError: the convolution is not depthwise; the arrays do not fit; or our layers cannot express an argument,
            though `depthwise_conv` on a padded input can. The message names it.

    Examples:
        >>> import numpy as np
        >>> weight, bias = np.ones((64, 1, 3, 3), np.float32), np.zeros(64, np.float32)
        >>> layer, params = from_arrays(weight, bias, groups=32, stride=2, padding=1)
        >>> type(layer).__name__, params["kernel"].shape
        ('DepthwiseConv2D', (3, 3, 32, 2))
    """
    weight = real_array(_array(weight, f"{name}: the weight"), f"{name}: the weight")
    bias = None if bias is None else real_array(_array(bias, f"{name}: the bias"), f"{name}: the bias")
    rank = weight.ndim - 2
    if not 1 <= rank <= 3 or 0 in weight.shape:
        raise ValueError(
            f"{name}: weight must have the shape (C*M, 1, *window) with one to three window axes; got {weight.shape}"
        )
    first, second, *window = weight.shape
    inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
    if inputs != groups or groups < 1 or outputs % groups:
        raise ValueError(
            f"{name} is not depthwise: groups must be the number of input channels, and divide the output channels; "
            f"got groups={groups}, {inputs} input channels and {outputs} output channels"
        )
    multiplier = outputs // groups
    arguments = {
        "kernel_size": tuple(window),
        "strides": stride,
        "padding": _padding(padding, padding_mode, window, dilation, name),
        "depth_multiplier": multiplier,
        "data_format": data_format,
        "dilation_rate": dilation,
        "use_bias": bias is not None,
        "param_dtype": weight.dtype,
    }
    if transposed:
        arguments |= _transposed_arguments(padding, padding_mode, output_padding, rank, name)
    elif any(_per_axis(output_padding, rank)):
        raise ValueError(f"{name}: output_padding must be 0 without transposed=True; got {output_padding!r}")
    layer = f"DepthwiseConv{rank}D" + "Transpose" * transposed
    if causal:
        if transposed or padding_mode != "zeros":
            what = "a transposed convolution" if transposed else f"padding_mode={padding_mode!r}"
            raise ValueError(f"{name}: causal=True needs a convolution padded with zeros; got {what}")
        arguments, layer = causal_arguments(arguments, name), "CausalDepthwiseConv1D"
    kernel = weight.reshape(groups, multiplier, *window).transpose(*range(2, rank + 2), 0, 1)
    values = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    return make(layer, arguments, values, framework, name)


def to_arrays(module: Any, params: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Converts a depthwise layer of ours into PyTorch's arguments and arrays: the inverse of `from_arrays`.

    Args:
        module: a depthwise layer of `depthwise_jax.linen`, or of `depthwise_jax.nnx`.
        params: the Linen layer's parameters; None for an NNX layer.

    Returns:
        `(arguments, state)`: the arguments of torch.nn.Conv1d, Conv2d or Conv3d, and the state dict's arrays, "weight"
        `(C*M, 1, *window)` and "bias" `(C*M,)`. For a transposed layer, those of torch.nn.ConvTranspose1d,
        ConvTranspose2d or ConvTranspose3d, with "weight" `(C, M, *window)`. PyTorch's input is channels first for any
        data_format of the layer.

    Raises:
        TypeError: it is not one of our layers, or its parameters are missing or given without need.
        ValueError: PyTorch cannot express the layer; the message names the argument.
    """
    contract, values = parts(module, params)
    if contract.separable:
        raise ValueError(f"a {contract.layer} is two convolutions in PyTorch")
    if contract.arguments["activation"] not in (None, "linear"):
        raise ValueError(f"PyTorch's convolution has no activation; got {contract.arguments['activation']!r}")
    kernel = np.asarray(values["kernel"])
    *window, channels, multiplier = kernel.shape
    rank = len(window)
    arguments = {
        "in_channels": channels,
        "out_channels": channels * multiplier,
        "kernel_size": contract.kernel_size,
        "stride": contract.strides,
        "dilation": contract.dilation_rate,
        "groups": channels,
        "bias": "bias" in values,
    }
    weight = kernel.transpose(rank, rank + 1, *range(rank))
    if contract.transposed:
        arguments["padding"], arguments["output_padding"] = _torch_transposed_padding(contract)
    else:
        arguments["padding"], arguments["padding_mode"] = _torch_padding(
            contract.padding, window, contract.strides, contract.dilation_rate
        )
        weight = weight.reshape(channels * multiplier, 1, *window)
    state = {"weight": np.ascontiguousarray(weight)}
    return arguments, state | ({"bias": np.array(values["bias"])} if "bias" in values else {})


def to_torch(module: Any, params: Mapping[str, Any] | None = None) -> Any:
    """Converts a depthwise layer of ours into a torch.nn.Conv1d, Conv2d, Conv3d or ConvTranspose, on the CPU.

    Args:
        module: a depthwise layer of `depthwise_jax.linen`, or of `depthwise_jax.nnx`.
        params: the Linen layer's parameters; None for an NNX layer.

    Raises:
        TypeError, ValueError: as `to_arrays`.
        ImportError: PyTorch is not installed.
    """
    torch: Any = importlib.import_module("torch")  # an optional package, so without its types
    arguments, state = to_arrays(module, params)
    dtype = getattr(torch, str(state["weight"].dtype))
    kind = "ConvTranspose" if "output_padding" in arguments else "Conv"
    conv = getattr(torch.nn, f"{kind}{state['weight'].ndim - 2}d")(**arguments, dtype=dtype)
    # PyTorch does not accept NumPy's bfloat16; a detour through float32 is exact.
    wide = {name: a.astype(np.promote_types(a.dtype, np.float32)) for name, a in state.items()}
    conv.load_state_dict({name: torch.from_numpy(a).to(dtype) for name, a in wide.items()})
    return conv


def _from_module(conv: Any, name: str, causal: bool, data_format: DataFormat, framework: Framework) -> tuple[Any, Any]:
    """`from_torch` of a module called `name` in messages."""
    if not _is_conv(conv):
        raise TypeError(f"conv must be a torch.nn.{_NAMES}; got {_class(conv)}")
    conv = _settled(conv, name)
    if conv.padding_mode != "zeros" and not isinstance(conv.padding, str):
        # The module fixed the amounts by which its forward pads when it was made.
        amounts = tuple(
            amount for pad in reversed(_per_axis(conv.padding, conv.weight.ndim - 2)) for amount in (pad, pad)
        )
        if tuple(conv._reversed_padding_repeated_twice) != amounts:
            raise ValueError(
                f"{name}: padding={conv.padding!r} was changed after the module was made, and with "
                f"padding_mode={conv.padding_mode!r} its forward pass ignores that; make a new module"
            )
    return from_arrays(
        conv.weight,
        conv.bias,
        groups=conv.groups,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        padding_mode=conv.padding_mode,
        transposed=conv.transposed,
        output_padding=conv.output_padding,
        causal=causal,
        data_format=data_format,
        framework=framework,
        name=name,
    )


def _is_conv(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, _stock_classes(torch))


def _stock_classes(torch: Any) -> tuple[type, ...]:
    return tuple(getattr(torch.nn, name) for name in _CONVS)


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _settled(conv: Any, name: str) -> Any:
    """The module with the weights that its next call uses, if it computes what its library's class does.

    Raises:
        ValueError: it does something else; the message says what, and what to do.
    """
    torch = sys.modules["torch"]
    stock = next(cls for cls in _stock_classes(torch) if isinstance(conv, cls))
    advice = f"convert a plain torch.nn.{stock.__name__} with its weights, or write that part in JAX"
    if stock is torch.nn.Conv1d:
        advice += "; if it pads or cuts to be causal, from_state_dict(..., causal=True) makes the causal layer"
    if any(torch.nn.parameter.is_lazy(parameter) for parameter in conv.parameters()):
        raise ValueError(f"{name}: {_class(conv)} has no weight yet; call the lazy module once")
    parametrized = torch.nn.utils.parametrize.is_parametrized(conv)
    # A parametrized module has its own class, whose weight computes the parametrization.
    cls = torch.nn.utils.parametrize.type_before_parametrizations(conv)
    what = overridden(cls, stock, _HARMLESS) or next((f"forward ({key})" for key in _CALLS if key in vars(conv)), None)
    if what is not None:
        raise ValueError(f"{name}: {_class(conv)} overrides {what} of torch.nn.{stock.__name__}; {advice}")
    if parametrized and any(_is_unsettled(conv, key, steps) for key, steps in conv.parametrizations.items()):
        raise ValueError(f"{name}: {_class(conv)} has a parametrization whose value changes; call eval() first")
    if conv._forward_hooks:
        hook = next(iter(conv._forward_hooks.values()))
        raise ValueError(f"{name}: {_class(conv)} has the forward hook {_hook(hook)}; remove it, or {advice}")
    if not conv._forward_pre_hooks:
        return conv
    conv = copy.copy(conv)  # the hooks set its weight, and the caller's stays unchanged
    for hook in conv._forward_pre_hooks.values():
        recomputes = isinstance(hook, _recomputing_hooks())
        if not recomputes:
            raise ValueError(f"{name}: {_class(conv)} has the forward pre-hook {_hook(hook)}; remove it, or {advice}")
        if conv.training and type(hook).__name__ == "SpectralNorm":
            raise ValueError(f"{name}: {_class(conv)} has spectral_norm, whose weight changes; call eval() first")
        hook(conv, ())
    return conv


def _is_unsettled(conv: Any, key: str, steps: Any) -> bool:
    """Whether a parametrized weight or bias differs from call to call, as after each step of a power iteration."""
    torch = sys.modules["torch"]
    iterating = any(type(step).__name__ == "_SpectralNorm" and step.training for step in steps)
    return iterating or not torch.equal(getattr(conv, key), getattr(conv, key))


def _recomputing_hooks() -> tuple[type, ...]:
    """The hooks of torch.nn.utils that set a module's weight before each call, and do nothing else."""
    modules = {"weight_norm": "WeightNorm", "spectral_norm": "SpectralNorm", "prune": "BasePruningMethod"}
    return tuple(getattr(importlib.import_module(f"torch.nn.utils.{file}"), cls) for file, cls in modules.items())


def _hook(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _array(value: Any, what: str) -> Any:
    """A tensor or an array in NumPy, its dtype kept.

    Raises:
        ValueError: the tensor holds no numbers itself; the message begins with `what`.
    """
    if not hasattr(value, "detach"):
        return value if isinstance(value, Array) else np.asarray(value)
    torch: Any = sys.modules["torch"]
    if not isinstance(value, torch.nn.Parameter | torch.nn.Buffer) and type(value) is not torch.Tensor:
        raise ValueError(f"{what} is a {_class(value)}; convert it to a plain torch.Tensor")
    if torch.nn.parameter.is_lazy(value):
        raise ValueError(f"{what} is not initialized; call the lazy module once")
    if value.is_meta:
        raise ValueError(f"{what} is on the device 'meta', which holds no numbers; load it onto a device")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        raise ValueError(f"{what} must be a dense tensor; got a {kind} one: call dequantize() or to_dense() first")
    if not value.is_floating_point():
        raise ValueError(f"{what} must hold real floating-point numbers; got {value.dtype}")
    value = value.detach().resolve_neg().cpu()
    if value.dtype == torch.bfloat16:  # NumPy cannot read PyTorch's bfloat16; a detour through float32 is exact
        return value.float().numpy().astype(jnp.bfloat16)
    if value.dtype not in (torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{what} is {value.dtype}, in which layers cannot compute; convert it to bfloat16 first")
    return value.numpy().copy()


def _per_axis(value: Any, rank: int) -> list[int]:
    return [value] * rank if isinstance(value, int) else list(value)


def _padding(padding: Any, mode: str, window: Sequence[int], dilation: Any, name: str) -> Any:
    """Our padding for PyTorch's."""
    if mode not in _PADDING_MODES:
        raise ValueError(f"{name}: padding_mode must be one of {tuple(_PADDING_MODES)}; got {mode!r}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"{name}: padding must be 'same', 'valid' or numbers; got {padding!r}")
        named, pairs = padding, None
    else:
        amounts = _per_axis(padding, len(window))
        named, pairs = "valid" if not any(amounts) else None, tuple((amount, amount) for amount in amounts)
    if mode == "zeros" or named == "valid":
        return named or pairs
    if named == "same" or pairs == _half_spans(window, _per_axis(dilation, len(window))):
        return _PADDING_MODES[mode]
    raise ValueError(
        f"{name}: padding_mode={mode!r} with padding={padding!r} has no equivalent in a layer; "
        "depthwise_conv computes it on an input padded by jax.numpy.pad"
    )


def _transposed_arguments(
    padding: Any, mode: str, output_padding: Any, rank: int, name: str
) -> dict[str, tuple[Any, ...]]:
    """Our arguments for the padding of a PyTorch ConvTranspose, which is always numbers."""
    if isinstance(padding, str) or mode != "zeros":
        raise ValueError(
            f"{name}: a ConvTranspose must have numbers for padding and padding_mode='zeros'; "
            f"got padding={padding!r} and padding_mode={mode!r}"
        )
    pairs = tuple((amount, amount) for amount in _per_axis(padding, rank))
    return {"padding": pairs, "output_padding": tuple(_per_axis(output_padding, rank))}


def _half_spans(window: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The amounts that "same" adds to each axis at stride 1."""
    return tuple(((k - 1) * d // 2, (k - 1) * d - (k - 1) * d // 2) for k, d in zip(window, dilation, strict=True))


def _torch_padding(padding: Any, window: Sequence[int], strides: Any, dilation: Any) -> tuple[Any, str]:
    """PyTorch's padding and padding_mode for ours."""
    mode = next((theirs for theirs, ours in _PADDING_MODES.items() if ours == padding), "zeros")
    if padding == "valid":
        return 0, mode
    if max(strides) == 1 and padding in _PADDING_MODES.values():
        return "same", mode
    pairs = _half_spans(window, dilation) if mode != "zeros" else padding
    if isinstance(pairs, str) or any(low != high for low, high in pairs):
        raise ValueError(
            f"PyTorch has no equivalent of padding={padding!r} with strides={tuple(strides)}: it pads both ends "
            "equally, and its 'same' needs strides of 1"
        )
    return tuple(low for low, _ in pairs), mode


def _torch_transposed_padding(contract: Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """PyTorch's padding and output_padding of a ConvTranspose for those of a transposed layer.

    PyTorch cuts equally at both ends. If a layer cuts less at the end, the difference is output_padding.
    """
    pads = ((0, 0),) * contract.layout.rank if isinstance(contract.padding, str) else contract.padding
    inputs = [2 + low + high for low, high in pads]  # enough for some output
    geometry = (contract.kernel_size, contract.strides, contract.padding, contract.output_padding)
    resolved = resolve_transposed(inputs, *geometry, contract.dilation_rate)
    window = resolved.window
    padding, extra = [], []
    for axis, (n, s, e) in enumerate(zip(inputs, window.strides, window.extent, strict=True)):
        low, outputs = window.padding[axis][0], resolved.spatial[axis] + resolved.beyond[axis]
        padding.append(low)
        extra.append(outputs - ((n - 1) * s + e - 2 * low))
    if not all(0 <= p < max(s, d) for p, s, d in zip(extra, contract.strides, contract.dilation_rate, strict=True)):
        raise ValueError(
            f"PyTorch has no equivalent of padding={contract.padding!r}, output_padding={contract.output_padding!r} "
            f"and strides={contract.strides}: it cuts equally at both ends, and adds less than a stride at the end"
        )
    return tuple(padding), tuple(extra)
