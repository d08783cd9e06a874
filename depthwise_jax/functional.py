"""The pure functions: depthwise_conv and separable_conv, and explain, which tells how they would be computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from depthwise_jax import activations, lowering, primitives
from depthwise_jax.convolution import Convolution
from depthwise_jax.layout import Layout
from depthwise_jax.registry import closest
from depthwise_jax.window import InputPadding, Padding, resolve

# The activations that conv_fused_p applies.
_FUSED = ((None, "linear"), (jax.nn.relu, "relu"), (jax.nn.relu6, "relu6"))


def depthwise_conv(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    data_format: str = "channels_last",
    dilation_rate: int | Sequence[int] = 1,
    activation: Any = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    in_sharding: PartitionSpec | None = None,
) -> Array:
    """Convolves each input channel with its own kernels; no channels are mixed.

    `y[..., o, c*M + m] = sum over t of x[..., o*strides + t*dilation_rate - low, c] * kernel[t, c, m]`, a
    cross-correlation, where taps outside the input contribute nothing. Sums are taken in float32 for narrower floats,
    and rounded once.

    Args:
        x: `(*batch, *spatial, C)`, or `(*batch, C, *spatial)` with channels_first; any number of leading batch axes.
        kernel: `(*window, C, M)`, one to three window axes; its rank decides how many spatial axes x has.
        bias: `(C*M,)`, added to the convolution.
        strides: steps of the window in input positions, one or one per spatial axis.
        padding: "valid", "same" (`ceil(n / strides)` outputs, the odd zero at the end), "causal" (one spatial axis: all
            zeros before), "reflect" or "circular" (the input again, `(span - 1) // 2` before and `span // 2` after), in
            any case; an integer; or one (low, high) pair per spatial axis.
        data_format: "channels_last" or "channels_first".
        dilation_rate: distance between taps in input positions, one or one per spatial axis; goes with any strides.
        activation: a name ("relu", "gelu", ...) or a callable, applied last.
        precision: as in `jax.lax.conv_general_dilated`.
        preferred_element_type: the result's dtype, at least as wide as what JAX promotes the operands to, which it is
            by default.
        implementation: "conv", "taps" or "native" to insist on a lowering; None chooses one (see explain).
        in_sharding: how x is sharded over the mesh that `jax.set_mesh` has set. Say it on a mesh of several automatic
            axes, where it is not known otherwise and the gradients have to allow for every sharding. An x that is
            sharded differently is moved, and the kernel's channels are sharded as those of x. Without a mesh it says
            nothing.

    Returns:
        `(*batch, *out, C*M)`, or `(*batch, C*M, *out)` with channels_first, in the dtype that the operands promote to.
        It carries the checkpoint name "depthwise_conv" (after a bias and the activations "relu" and "relu6", before
        others), for policies such as
        `jax.checkpoint_policies.save_only_these_names("depthwise_conv")`.

    Raises:
        TypeError, ValueError: an argument that does not fit, naming it, what came and what is expected.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((8, 28, 28, 32)), jnp.ones((3, 3, 32, 2))
        >>> depthwise_conv(x, kernel, strides=2, padding="same", activation="relu").shape
        (8, 14, 14, 64)
        >>> jax.grad(lambda kernel: depthwise_conv(x, kernel).sum())(kernel).shape
        (3, 3, 32, 2)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    layout, function = _arguments(kernel, "kernel", data_format, activation, implementation)
    bias = _checked_bias(bias, kernel.shape[-2] * kernel.shape[-1], "C*M")
    dtype = _result_dtype(preferred_element_type, x, kernel, bias)
    return _convolve(
        x,
        kernel,
        layout,
        strides,
        padding,
        dilation_rate,
        precision,
        dtype,
        implementation,
        in_sharding,
        bias,
        function,
    )


def separable_conv(
    x: ArrayLike,
    depthwise_kernel: ArrayLike,
    pointwise_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    data_format: str = "channels_last",
    dilation_rate: int | Sequence[int] = 1,
    activation: Any = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    in_sharding: PartitionSpec | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Array:
    """A depthwise convolution, then a pointwise one that mixes the channels: a matrix product over the channel axis.

    Args:
        x: `(*batch, *spatial, C)`, or `(*batch, C, *spatial)` with channels_first.
        depthwise_kernel: `(*window, C, M)`.
        pointwise_kernel: `(1, ..., 1, C*M, F)`, with as many axes as depthwise_kernel.
        bias: `(F,)`.
        strides, padding, data_format, dilation_rate: as in depthwise_conv, for its half.
        activation: applied last; nothing stands between the two halves.
        precision, preferred_element_type, implementation: as in depthwise_conv; the first two hold for both halves.
        in_sharding: as in depthwise_conv.
        out_sharding: the result's sharding, needed under explicit sharding when the channels are sharded, since the sum
            over them may end sharded in more ways than one.

    Returns:
        `(*batch, *out, F)`, or `(*batch, F, *out)` with channels_first.

    Raises:
        TypeError, ValueError: as depthwise_conv.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, depthwise, pointwise = jnp.ones((8, 28, 28, 3)), jnp.ones((3, 3, 3, 4)), jnp.ones((1, 1, 12, 16))
        >>> separable_conv(x, depthwise, pointwise, padding="same").shape
        (8, 28, 28, 16)
    """
    x, kernel, pointwise = jnp.asarray(x), jnp.asarray(depthwise_kernel), jnp.asarray(pointwise_kernel)
    layout, function = _arguments(kernel, "depthwise_kernel", data_format, activation, implementation)
    channels = kernel.shape[-2] * kernel.shape[-1]
    expected = (*(1,) * layout.rank, channels)
    if pointwise.ndim != kernel.ndim or pointwise.shape[:-1] != expected or pointwise.shape[-1] == 0:
        raise ValueError(
            f"pointwise_kernel must have shape ({', '.join(map(str, expected))}, F) with F > 0, to follow the "
            f"depthwise_kernel of shape {kernel.shape}; got shape {pointwise.shape}"
        )
    bias = _checked_bias(bias, pointwise.shape[-1], "F")
    dtype = _result_dtype(preferred_element_type, x, kernel, pointwise, bias)
    y = _convolve(x, kernel, layout, strides, padding, dilation_rate, precision, dtype, implementation, in_sharding)
    y = _pointwise(y, pointwise.reshape(pointwise.shape[-2:]).astype(dtype), layout, precision, out_sharding)
    return _finish(y, bias, function, layout)


@dataclass(frozen=True)
class Explanation:
    """Which lowering computes a call and its two gradients, and why; prints as three lines."""

    forward: lowering.Choice
    input_grad: lowering.Choice
    kernel_grad: lowering.Choice

    def __str__(self) -> str:
        return "\n".join(f"{name}: {getattr(self, name)}" for name in lowering.MAPS)


def explain(
    x: Any,
    kernel: Any,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    data_format: str = "channels_last",
    dilation_rate: int | Sequence[int] = 1,
    implementation: str | None = None,
    platform: str | None = None,
    partitioned: int = 0,
) -> Explanation:
    """Tells which lowering depthwise_conv would use for the forward pass and for both gradients, and why.

    Args:
        x, kernel: as in depthwise_conv; anything with a shape and a dtype, `jax.ShapeDtypeStruct` too.
        strides, padding, data_format, dilation_rate, implementation: as in depthwise_conv.
        platform: "cpu", "cuda", "rocm" or "tpu"; the default backend's if None.
        partitioned: over how many mesh axes the compiler splits the program (automatic or explicit sharding); True is
            one.

    Returns:
        An `Explanation`, which prints as three lines.

    Raises:
        TypeError, ValueError: as depthwise_conv; also an unknown platform, or an implementation that cannot serve the
            call.

    Examples:
        >>> import jax
        >>> x, kernel = jax.ShapeDtypeStruct((8, 28, 28, 32), "float32"), jax.ShapeDtypeStruct((3, 3, 32, 1), "float32")
        >>> explain(x, kernel, platform="tpu").forward.lowering
        'conv'
    """
    layout, _ = _arguments(kernel, "kernel", data_format, None, implementation)
    convolution, _ = _geometry(x.shape, kernel, layout, strides, padding, dilation_rate, None)
    batch = convolution.batch(x.shape)
    if platform is None:
        device = jax.local_devices()[0]
        platform = device.platform
        if platform == "gpu":
            platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    if platform not in lowering.PLATFORMS:
        raise ValueError(f"platform must be one of {lowering.PLATFORMS}, got platform={platform!r}")
    return Explanation(
        *(
            lowering.choose(
                lowering.Call(
                    name,
                    convolution,
                    platform,
                    jnp.result_type(x.dtype, kernel.dtype),
                    partitioned=(2,) * partitioned,
                    slabs=lowering.has_slabs(x.shape, convolution),
                    batch=None if partitioned or not lowering.has_slabs(x.shape, convolution) else math.prod(batch),
                    channels=kernel.shape[-2],
                    multiplier=kernel.shape[-1],
                    whole_channels=not partitioned,
                ),
                implementation,
            )
            for name in lowering.MAPS
        )
    )


def _arguments(
    kernel: Any, name: str, data_format: str, activation: Any, implementation: str | None
) -> tuple[Layout, activations.Activation | None]:
    """The layout and the activation, after the checks that need no more than the kernel's shape."""
    rank = len(kernel.shape) - 2
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{name} must have shape (*window, channels, multiplier) with one to three window axes; "
            f"got shape {kernel.shape}"
        )
    if 0 in kernel.shape:
        raise ValueError(f"{name} must have no empty axis, (*window, channels, multiplier), got shape {kernel.shape}")
    layout = Layout(rank, data_format)
    check_implementation(implementation)
    return layout, activations.get(activation, channel_axis=layout.channels)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or the name of a lowering."""
    if implementation is not None and not (isinstance(implementation, str) and implementation in lowering.LOWERINGS):
        raise ValueError(
            f"implementation must be None or one of {tuple(lowering.LOWERINGS)}, "
            f"got implementation={implementation!r}; " + closest(str(implementation), lowering.LOWERINGS)
        )


def check_in_sharding(in_sharding: PartitionSpec | None) -> None:
    """Raises TypeError unless `in_sharding` is None or a PartitionSpec."""
    if in_sharding is not None and not isinstance(in_sharding, PartitionSpec):
        raise TypeError(f"in_sharding must be None or a jax.sharding.PartitionSpec; got {in_sharding!r}")


def _geometry(
    shape: Sequence[int],
    kernel: Any,
    layout: Layout,
    strides: int | Sequence[int],
    padding: Padding,
    dilation_rate: int | Sequence[int],
    precision: lax.PrecisionLike,
) -> tuple[Convolution, InputPadding | None]:
    """The static convolution, and the padding that reads the input again."""
    rank, channels = layout.rank, kernel.shape[-2]
    axes = layout.arrange(["*batch"], [f"spatial{i}" for i in range(rank)], "channels")
    expected = (
        f"x must have shape ({', '.join(axes)}) with {channels} channels, to fit the kernel of shape {kernel.shape}"
    )
    if len(shape) < rank + 1 or shape[layout.channels] != channels:
        raise ValueError(f"{expected} and data_format={layout.data_format!r}; got shape {tuple(shape)}")
    spatial = layout.spatial_shape(shape)
    window, input_padding = resolve(spatial, kernel.shape[:rank], strides, padding, dilation_rate)
    if input_padding is not None:
        spatial = tuple(n + low + high for n, (low, high) in zip(spatial, input_padding.amounts, strict=True))
    return Convolution(window, layout, spatial, hashable_precision(precision)), input_padding


def _convolve(
    x: Array,
    kernel: Array,
    layout: Layout,
    strides: int | Sequence[int],
    padding: Padding,
    dilation_rate: int | Sequence[int],
    precision: lax.PrecisionLike,
    dtype: Any,
    implementation: str | None,
    in_sharding: PartitionSpec | None,
    bias: Array | None = None,
    activation: activations.Activation | None = None,
) -> Array:
    """The convolution, then bias and activation: in one primitive where it knows them."""
    convolution, input_padding = _geometry(x.shape, kernel, layout, strides, padding, dilation_rate, precision)
    if input_padding is not None:
        amounts = layout.arrange([(0, 0)] * (x.ndim - layout.rank - 1), input_padding.amounts, (0, 0))
        x = jnp.pad(x, amounts, mode=input_padding.mode)
    bind = functools.partial(primitives.bind, convolution=convolution, dtype=dtype, implementation=implementation)
    if in_sharding is not None:
        bind = _with_sharding(bind, x.ndim, in_sharding, layout)
    known = jnp.issubdtype(dtype, jnp.floating) and (activation is not None or bias is not None)
    fused = next((name for function, name in _FUSED if known and function is activation), None)
    if fused is None:
        return _finish(bind(primitives.conv_p, x, kernel), bias, activation, layout)
    operands = (x, kernel) if bias is None else (x, kernel, bias)
    return bind(primitives.conv_fused_p, *operands, activation=fused)


def _with_sharding(bind: Callable[..., Array], ndim: int, x: PartitionSpec, layout: Layout) -> Callable[..., Array]:
    """The same under explicit mesh axes, so that types say to the primitives and their gradients what is sharded."""
    check_in_sharding(x)
    if len(x) > ndim:
        raise ValueError(f"in_sharding must have at most an entry for each of the {ndim} axes of x; got {x}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return bind
    entries = (*x, *(None,) * (ndim - len(x)))
    names = {name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))} - {None}
    if not names.isdisjoint(mesh.manual_axes) or not names <= {*mesh.axis_names}:
        raise ValueError(
            f"in_sharding must name automatic or explicit axes of the mesh, which has the axes {mesh.axis_names}, of "
            f"which {mesh.manual_axes} are manual (inside shard_map, where x is a shard already); got {x}"
        )
    axes = tuple(name for name in mesh.axis_names if name not in mesh.manual_axes)
    channels = entries[layout.channels]
    specs = x, PartitionSpec(*(None,) * layout.rank, channels, None), PartitionSpec(channels)

    def under_explicit_axes(primitive: Any, *operands: Array, **params: Any) -> Array:
        bound = functools.partial(bind, primitive, **params)
        typed: Any = jax.sharding.explicit_axes(bound, axes=axes, in_sharding=specs[: len(operands)])
        return typed(*operands)

    return under_explicit_axes


def _pointwise(
    y: Array,
    kernel: Array,
    layout: Layout,
    precision: lax.PrecisionLike,
    out_sharding: NamedSharding | PartitionSpec | None,
) -> Array:
    """Contracts the channel axis of y with a (C*M, F) kernel."""
    if out_sharding is not None:
        spec = out_sharding.spec if isinstance(out_sharding, NamedSharding) else out_sharding
        entries = [*spec, *(None,) * (y.ndim - len(spec))]
        entries.append(entries.pop(layout.channels))
        spec = PartitionSpec(*entries)
        out_sharding = NamedSharding(out_sharding.mesh, spec) if isinstance(out_sharding, NamedSharding) else spec
    y = lax.dot_general(
        jnp.moveaxis(y, layout.channels, -1),
        kernel,
        (((y.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        out_sharding=out_sharding,
    )
    return jnp.moveaxis(y, -1, layout.channels)


def _finish(y: Array, bias: Array | None, activation: activations.Activation | None, layout: Layout) -> Array:
    if bias is not None:
        y = y + lowering.align_bias(bias.astype(y.dtype), layout, y.ndim)
    return y if activation is None else activation(y)


def _checked_bias(bias: ArrayLike | None, channels: int, what: str) -> Array | None:
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({what},) = ({channels},), got shape {bias.shape}")
    return bias


def _result_dtype(preferred: DTypeLike | None, *operands: Array | None) -> Any:
    natural = jnp.result_type(*(operand for operand in operands if operand is not None))
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    kind = next((kind for kind in kinds if jnp.issubdtype(natural, kind)), None)
    if kind is None:
        raise TypeError(f"the operands must be numbers, got operands that promote to {natural}")
    if preferred is None:
        return natural
    dtype = jax.dtypes.canonicalize_dtype(preferred)
    if not jnp.issubdtype(dtype, kind) or jnp.promote_types(natural, dtype) != dtype:
        raise TypeError(
            f"preferred_element_type must be {natural}, to which the operands promote, or a wider type of its kind; "
            f"got preferred_element_type={jnp.dtype(preferred)}"
        )
    return dtype


def hashable_precision(precision: Any) -> Any:
    """A precision that a jaxpr can hold, checked at once: lax takes lists too, and checks no earlier than at lowering.

    Raises:
        ValueError: no precision.
    """
    pair = isinstance(precision, list | tuple)
    values = tuple(precision) if pair else (precision,)
    names = {"default", "high", "highest", "bfloat16", "tensorfloat32", "float32", "fastest"}
    valid = (v in names if isinstance(v, str) else isinstance(v, lax.Precision | None) for v in values)
    if (pair and len(values) != 2) or not all(valid):
        raise ValueError(
            "precision must be None, a jax.lax.Precision, its name, or a pair of them for x and kernel; "
            f"got precision={precision!r}"
        )
    return values if pair else precision
