"""Hints for the ends of error messages: how to convert other libraries' kernels, arguments and layouts."""

from collections.abc import Iterable, Sequence
from typing import Any

from depthwise_jax._core.layout import Layout

_GROUPS = "leave it out: each channel is its own group"
_FEATURES = "pass depth_multiplier, the number of output channels for each input channel"

# Arguments of Flax's, PyTorch's, lax's, Haiku's and Keras' convolutions, with their counterparts here.
_SPELLINGS = {
    "features": _FEATURES,
    "out_features": _FEATURES,
    "out_channels": _FEATURES,
    "output_channels": _FEATURES,
    "channel_multiplier": "depth_multiplier",
    "in_channels": "leave it out in Linen, whose layers infer it from the input; in_features in NNX",
    "kernel_shape": "kernel_size",
    "stride": "strides",
    "window_strides": "strides",
    "dilation": "dilation_rate",
    "kernel_dilation": "dilation_rate",
    "rhs_dilation": "dilation_rate",
    "rate": "dilation_rate",
    "groups": _GROUPS,
    "feature_group_count": _GROUPS,
    "bias": "use_bias",
    "with_bias": "use_bias",
    "kernel_init": "depthwise_initializer",
    "w_init": "depthwise_initializer",
    "bias_init": "bias_initializer",
    "b_init": "bias_initializer",
    "kernel_initializer": "depthwise_initializer",
    "kernel_regularizer": "depthwise_regularizer",
    "kernel_constraint": "depthwise_constraint",
    "padding_mode": 'padding, which takes "reflect", "circular" and "edge" too',
}

# Paddings of PyTorch and NumPy, with their names here.
_PADDINGS = {"replicate": "edge", "wrap": "circular"}


def of_arguments(layer: str, names: Iterable[str]) -> str | None:
    """The message for arguments that belong to another library's layer; None if there are none.

    Args:
        layer: the layer's name.
        names: the names of the given arguments that the layer does not have.
    """
    hints = [f"{name} (here: {_SPELLINGS[name]})" for name in names if name in _SPELLINGS]
    return f"{layer} has no argument {', '.join(hints)}" if hints else None


def of_padding(padding: Any, rank: int, names: Sequence[str]) -> str:
    """Another library's padding as it is written here, for the end of a message; "" if it does not look like one.

    Args:
        padding: the padding.
        rank: the number of spatial axes.
        names: the names that a padding may have.
    """
    if isinstance(padding, str):
        name = _PADDINGS.get(padding.lower())
        return f"; padding={padding!r} is padding={name!r} here" if name in names else ""
    if not isinstance(padding, list | tuple) or not all(isinstance(amount, int) for amount in padding):
        return ""
    if len(padding) == rank:
        return f"; PyTorch's padding={padding!r} is {tuple((amount, amount) for amount in padding)} here"
    return f"; the pair {padding!r} is {(tuple(padding),)} here" if rank == 1 and len(padding) == 2 else ""


def of_kernel(shape: Sequence[int], channels: int | None, name: str = "kernel") -> str:
    """How to turn another library's kernel into `(*window, C, M)`, for the end of a message.

    Args:
        shape: the kernel's shape.
        channels: the input's channels, C; None if unknown.
        name: the kernel's name in the message.

    Returns:
        The hint; "" if the kernel does not look like another library's.
    """
    shape = tuple(shape)
    if len(shape) == 2:
        return (
            f"; a kernel (K, C) of a one-dimensional convolution becomes {name}[..., None], and one window for all "
            f"channels jnp.broadcast_to({name}[..., None, None], (*window, C, 1))"
        )
    if not isinstance(channels, int) or channels < 2 or len(shape) < 3:
        return ""
    *window, inputs, outputs = shape
    found = []
    if outputs == channels and inputs != 1:
        found.append(f"a kernel (*window, C) without a multiplier becomes {name}[..., None]")
    if inputs == 1 and outputs % channels == 0:
        ours = (*window, channels, outputs // channels)
        found.append(f"a kernel (*window, 1, C*M) of lax or Flax becomes {name}.reshape{ours}")
    elif inputs == 1:
        ours = (*window, channels, outputs)
        found.append(f"one kernel for all channels becomes jnp.broadcast_to({name}, {ours})")
    features, one, *window = shape
    if one == 1 and features % channels == 0:
        axes = (*range(2, len(window) + 2), 0, 1)
        inner = (channels, features // channels, *window)
        found.append(f"a weight (C*M, 1, *window) of PyTorch becomes {name}.reshape{inner}.transpose{axes}")
    return "".join(f"; {hint}" for hint in found)


def of_input(shape: Sequence[int], layout: Layout, channels: int) -> str:
    """The other data format, for the end of a message, if it would put the channels where the input has them.

    Args:
        shape: the input's shape.
        layout: the expected layout.
        channels: the expected number of channels.
    """
    other = "channels_last" if layout.data_format == "channels_first" else "channels_first"
    axis = Layout(layout.rank, other).channels
    if len(shape) <= layout.rank or shape[axis] != channels:
        return ""
    return f"; axis {axis} has {channels} entries: pass data_format={other!r} if those are the channels"


def of_window(size: Sequence[int], spatial: Sequence[int]) -> str:
    """What a window that is larger than the whole input may have been meant to be, for the end of a message.

    Args:
        size: the window's taps along each axis.
        spatial: the input's size along each axis.
    """
    if len({*size}) > 1 or not all(isinstance(n, int) and size[0] > n for n in spatial):
        return ""
    return "; a layer's first argument is kernel_size, not a number of features"
