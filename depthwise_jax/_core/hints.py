"""Kernels and arguments as other libraries have them, for the ends of error messages."""

from collections.abc import Iterable, Sequence

_GROUPS = "leave it out: each channel is its own group"
_FEATURES = "the output has depth_multiplier channels for each of the input's: give depth_multiplier"

# Arguments of convolutions of Flax, PyTorch, lax, Haiku and Keras, with what a layer of ours has for them.
_SPELLINGS = {
    "features": _FEATURES,
    "out_features": _FEATURES,
    "out_channels": _FEATURES,
    "output_channels": _FEATURES,
    "channel_multiplier": "depth_multiplier",
    "in_channels": "leave it out in Linen, whose layers read it off the input; in_features in NNX",
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
    "padding_mode": 'padding, which takes "reflect" and "circular" too',
}


def of_arguments(layer: str, names: Iterable[str]) -> str | None:
    """The message for arguments of a layer that are another library's; None if no argument is.

    Args:
        layer: the layer's name.
        names: the names of the given arguments that the layer does not have.
    """
    hints = [f"{name} (here: {_SPELLINGS[name]})" for name in names if name in _SPELLINGS]
    return f"{layer} has no argument {', '.join(hints)}" if hints else None


def of_kernel(shape: Sequence[int], channels: int | None, name: str = "kernel") -> str:
    """How to make a kernel `(*window, C, M)` of one that another library has, for the end of a message.

    Args:
        shape: the kernel's.
        channels: those of the input, C; None where they are not known.
        name: what the kernel is called.

    Returns:
        "" where it is not like one.
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
