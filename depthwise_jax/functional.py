"""The pure functions: depthwise_conv, separable_conv and depthwise_conv_transpose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from depthwise_jax import activations, lowering
from depthwise_jax._core import dtypes, fused, hints, sharding
from depthwise_jax._core.convolution import Convolution, hashable_precision
from depthwise_jax._core.layout import DataFormat, Layout
from depthwise_jax._core.window import (
    InputPadding,
    Padding,
    Transposed,
    TransposedPadding,
    Window,
    resolve,
    resolve_transposed,
)
from depthwise_jax.lowering import Implementation, primitives


def depthwise_conv(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    data_format: DataFormat = "channels_last",
    dilation_rate: int | Sequence[int] = 1,
    activation: Any = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation | None = None,
    in_sharding: PartitionSpec | None = None,
) -> Array:
    """Convolves each input channel with its own kernels; channels are not mixed.

    `y[..., o, c*M + m] = sum over t of x[..., o*strides + t*dilation_rate - low, c] * kernel[t, c, m]`, a
    cross-correlation, where taps outside the input contribute nothing. Sums are taken in float32 for narrower floats,
    and rounded once.

    Args:
        x: `(*batch, *spatial, C)`, or `(*batch, C, *spatial)` with channels_first; any number of leading batch axes,
            none included: with a kernel of one window axis `(B, C)` is one series of B steps, not a batch of B.
        kernel: `(*window, C, M)`, one to three window axes; its rank decides how many spatial axes x has.
        bias: `(C*M,)`, added to the convolution.
        strides: steps of the window in input positions, one or one per spatial axis.
        padding: "valid", "same" (`ceil(n / strides)` outputs, the odd zero at the end), "causal" (one spatial axis: all
            zeros before), "reflect", "circular" or "edge" (the input mirrored, wrapped or its outermost value repeated,
            `(span - 1) // 2` before and `span // 2` after), in lower or upper case; an integer; or one (low, high) pair
            per spatial axis.
        data_format: "channels_last" or "channels_first".
        dilation_rate: distance between taps in input positions, one or one per spatial axis; goes with any strides.
        activation: a name ("relu", "gelu", ...) or a callable, applied last.
        precision: as in `jax.lax.conv_general_dilated`.
        preferred_element_type: the result's dtype, at least as wide as the dtype to which JAX promotes the operands;
            that dtype by default.
        implementation: "conv", "taps" or "native" to require a lowering (a way to compute the call); None chooses one
            (see explain).
        in_sharding: how x is sharded over the mesh that `jax.set_mesh` has set. Pass it on meshes with several
            automatic axes: otherwise the sharding of x is unknown there, and the gradients assume the worst. An x that
            is sharded differently is moved, and the kernel's channels are sharded like those of x. Ignored without a
            mesh.

    Returns:
        `(*batch, *out, C*M)`, or `(*batch, C*M, *out)` with channels_first, in the dtype that the operands promote to.
        It has the checkpoint name "depthwise_conv" (after a bias and the activations "relu" and "relu6", before
        others), for policies such as `jax.checkpoint_policies.save_only_these_names("depthwise_conv")`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what came and what is expected.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((8, 28, 28, 32)), jnp.ones((3, 3, 32, 2))
        >>> depthwise_conv(x, kernel, strides=2, padding="same", activation="relu").shape
        (8, 14, 14, 64)
        >>> jax.grad(lambda kernel: depthwise_conv(x, kernel).sum())(kernel).shape
        (3, 3, 32, 2)
    """
    x, kernel = array("x", x), array("kernel", kernel)
    request = Request.of(
        kernel_layout(kernel.shape, data_format, "kernel"),
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        activation=activation,
        precision=precision,
        implementation=implementation,
        in_sharding=in_sharding,
    )
    return convolve(request, x, kernel, bias, preferred_element_type=preferred_element_type)


def separable_conv(
    x: ArrayLike,
    depthwise_kernel: ArrayLike,
    pointwise_kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "valid",
    data_format: DataFormat = "channels_last",
    dilation_rate: int | Sequence[int] = 1,
    activation: Any = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation | None = None,
    in_sharding: PartitionSpec | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Array:
    """A depthwise convolution, then a pointwise one that mixes the channels: a matrix product over the channel axis.

    Args:
        x: `(*batch, *spatial, C)`, or `(*batch, C, *spatial)` with channels_first.
        depthwise_kernel: `(*window, C, M)`.
        pointwise_kernel: `(1, ..., 1, C*M, F)`, with as many axes as depthwise_kernel.
        bias: `(F,)`.
        strides, padding, data_format, dilation_rate: as in depthwise_conv, for the depthwise half.
        activation: applied last; there is no activation between the two halves.
        precision, preferred_element_type, implementation: as in depthwise_conv; the first two apply to both halves.
        in_sharding: as in depthwise_conv.
        out_sharding: the result's sharding, needed under explicit sharding when the channels are sharded, since the sum
            over them can be sharded in several ways.

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
    x, kernel = array("x", x), array("depthwise_kernel", depthwise_kernel)
    pointwise = array("pointwise_kernel", pointwise_kernel)
    request = Request.of(
        kernel_layout(kernel.shape, data_format, "depthwise_kernel"),
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        activation=activation,
        precision=precision,
        implementation=implementation,
        in_sharding=in_sharding,
    )
    return convolve_separably(
        request, x, kernel, pointwise, bias, preferred_element_type=preferred_element_type, out_sharding=out_sharding
    )


def depthwise_conv_transpose(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: TransposedPadding = "valid",
    output_padding: int | Sequence[int] | None = None,
    data_format: DataFormat = "channels_last",
    dilation_rate: int | Sequence[int] = 1,
    activation: Any = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation | None = None,
    in_sharding: PartitionSpec | None = None,
) -> Array:
    """Spreads each input channel by its own kernels: the transposed depthwise convolution, which makes x larger.

    `y[..., i*strides + t*dilation_rate - low, c*M + m] += x[..., i, c] * kernel[t, c, m]` for all i and t. The kernel
    is not flipped. For M = 1 this is the transpose of depthwise_conv in x, the same map as its gradient. It is
    PyTorch's ConvTranspose with one group per channel, whose weight is `(C, M, *window)`.

    Args:
        x: `(*batch, *spatial, C)`, or `(*batch, C, *spatial)` with channels_first; any number of leading batch axes.
        kernel: `(*window, C, M)`, one to three window axes; its rank decides how many spatial axes x has.
        bias: `(C*M,)`, added to the result.
        strides: outputs between the windows of two neighbouring inputs, one or one per spatial axis.
        padding: how many of the `(n - 1)*strides + span` outputs that n inputs reach are cut off. As in Keras: "valid"
            (none) or "same" (`n*strides` outputs), in lower or upper case; with strides above the span, zeros follow at
            the end. As in PyTorch: an integer, or one (low, high) pair per spatial axis.
        output_padding: outputs to add at the end, one or one per spatial axis, fewer than strides or dilation_rate.
            None adds none to pairs, and to "valid" and "same" as many as their definitions need. As in Keras, a number
            p gives `(n - 1)*strides + span + p` outputs with "valid" and `(n - 1)*strides + span % 2 + p` with "same".
        data_format, dilation_rate, activation, precision, preferred_element_type, implementation, in_sharding: as in
            depthwise_conv; in_sharding is that of x.

    Returns:
        `(*batch, *out, C*M)`, or `(*batch, C*M, *out)` with channels_first, in the dtype that the operands promote to.
        Before bias and activation it carries the checkpoint name "depthwise_conv".

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what came and what is expected.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((8, 14, 14, 32)), jnp.ones((4, 4, 32, 1))
        >>> depthwise_conv_transpose(x, kernel, strides=2, padding="same").shape
        (8, 28, 28, 32)
    """
    x, kernel = array("x", x), array("kernel", kernel)
    request = Request.of(
        kernel_layout(kernel.shape, data_format, "kernel"),
        strides=strides,
        padding=padding,
        output_padding=output_padding,
        dilation_rate=dilation_rate,
        activation=activation,
        precision=precision,
        implementation=implementation,
        in_sharding=in_sharding,
    )
    return convolve_transposed(request, x, kernel, bias, preferred_element_type=preferred_element_type)


@dataclass(frozen=True)
class Request:
    """The arguments of a convolution except its arrays, checked and normalised.

    Attributes:
        layout: the positions of channels and spatial axes.
        strides, padding, dilation_rate: as depthwise_conv takes them.
        activation: a function, or None.
        precision: as in Convolution.
        implementation: the name of a lowering, or None.
        in_sharding: as depthwise_conv takes it.
        output_padding: as depthwise_conv_transpose takes it; None for all others.
    """

    layout: Layout
    strides: int | Sequence[int]
    padding: Padding
    dilation_rate: int | Sequence[int]
    activation: activations.Activation | None
    precision: lax.PrecisionLike
    implementation: Implementation | None
    in_sharding: PartitionSpec | None
    output_padding: int | Sequence[int] | None

    @classmethod
    def of(
        cls,
        layout: Layout,
        *,
        strides: int | Sequence[int],
        padding: Padding,
        dilation_rate: int | Sequence[int],
        activation: Any,
        precision: lax.PrecisionLike,
        implementation: Implementation | None,
        in_sharding: PartitionSpec | None,
        output_padding: int | Sequence[int] | None = None,
    ) -> Request:
        """Checks all arguments that do not depend on shapes; `geometry` or `transposed_geometry` checks the rest.

        Raises:
            TypeError, ValueError: an argument is invalid.
        """
        lowering.check_implementation(implementation)
        sharding.check_in_sharding(in_sharding)
        return cls(
            layout,
            strides,
            padding,
            dilation_rate,
            activations.get(activation, channel_axis=layout.channels),
            hashable_precision(precision),
            implementation,
            in_sharding,
            output_padding,
        )

    def geometry(self, x: Sequence[int], kernel: Sequence[int]) -> tuple[Convolution, InputPadding | None]:
        """The static convolution for operands of these shapes, and the padding that reads the input again.

        Raises:
            TypeError, ValueError: the shapes do not fit each other, or the window does not fit x.
        """
        layout, spatial = self.layout, self.spatial(x, kernel)
        window, input_padding = resolve(spatial, kernel[: layout.rank], self.strides, self.padding, self.dilation_rate)
        if input_padding is not None:
            spatial = tuple(n + low + high for n, (low, high) in zip(spatial, input_padding.amounts, strict=True))
        return Convolution(window, layout, spatial, self.precision), input_padding

    def transposed_geometry(self, x: Sequence[int], kernel: Sequence[int]) -> tuple[Convolution, Transposed]:
        """The static convolution whose transpose in x is computed, and the zeros that follow its result.

        Raises:
            TypeError, ValueError: the shapes do not fit each other, or the window does not fit x.
        """
        size = kernel[: self.layout.rank]
        geometry = (size, self.strides, self.padding, self.output_padding, self.dilation_rate)
        transposed = resolve_transposed(self.spatial(x, kernel), *geometry)
        return Convolution(transposed.window, self.layout, transposed.spatial, self.precision), transposed

    def spatial(self, x: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """The spatial shape of an x that fits the kernel.

        Raises:
            ValueError: x lacks an axis, or its channels differ from the kernel's.
        """
        layout, channels = self.layout, kernel[-2]
        axes = layout.arrange(["*batch"], [f"spatial{i}" for i in range(layout.rank)], "channels")
        if len(x) < layout.rank + 1 or x[layout.channels] != channels:
            came = x[layout.channels] if len(x) > layout.rank else None
            if hint := hints.of_kernel(kernel, came):
                raise ValueError(
                    f"kernel must have shape (*window, {came}, multiplier) for x of shape {tuple(x)} and "
                    f"data_format={layout.data_format!r}; got shape {tuple(kernel)}{hint}"
                )
            raise ValueError(
                f"x must have shape ({', '.join(axes)}) with {channels} channels, to fit the kernel of shape "
                f"{tuple(kernel)} and data_format={layout.data_format!r}; got shape {tuple(x)}"
                f"{hints.of_input(x, layout, channels)}"
            )
        return layout.spatial_shape(x)


def kernel_layout(kernel: Sequence[int], data_format: DataFormat, name: str) -> Layout:
    """The layout for a kernel of this shape, (*window, C, M), passed as an argument of this name.

    Raises:
        ValueError: the shape cannot be a kernel's, or the data format is unknown.
    """
    rank = len(kernel) - 2
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{name} must have shape (*window, channels, multiplier) with one to three window axes; "
            f"got shape {tuple(kernel)}{hints.of_kernel(kernel, None, name)}"
        )
    if 0 in kernel:
        raise ValueError(f"{name} must have no empty axis, (*window, channels, multiplier); got shape {tuple(kernel)}")
    return Layout(rank, data_format)


def convolve(
    request: Request,
    x: Array,
    kernel: Array,
    bias: ArrayLike | None = None,
    *,
    reach: Array | None = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """depthwise_conv of a request.

    Args:
        request: the request.
        x, kernel, bias, preferred_element_type: as in depthwise_conv.
        reach: for a packed convolution, as in primitives.
    """
    bias = _checked_bias(bias, kernel.shape[-2] * kernel.shape[-1], "C*M")
    dtype = _result_dtype(preferred_element_type, x, kernel, bias)
    if reach is not None:
        return _finish(_bind(request, primitives.conv_p, dtype, x, kernel, reach), bias, request)
    known = jnp.issubdtype(dtype, jnp.floating) and (request.activation is not None or bias is not None)
    name = fused.name_of(request.activation) if known else None
    if name is None:
        return _finish(_bind(request, primitives.conv_p, dtype, x, kernel), bias, request)
    operands = (x, kernel) if bias is None else (x, kernel, bias)
    return _bind(request, primitives.conv_fused_p, dtype, *operands, activation=name)


def empty_output(
    request: Request,
    x: Array,
    kernel: Array,
    bias: ArrayLike | None = None,
    *,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """The result of `convolve` for an x without positions, where each position would have an output."""
    channels = kernel.shape[-2] * kernel.shape[-1]
    bias = _checked_bias(bias, channels, "C*M")
    layout = request.layout
    batch = x.shape[: x.ndim - layout.rank - 1]
    shape = layout.arrange(batch, layout.spatial_shape(x.shape), channels)
    y = jnp.zeros(shape, _result_dtype(preferred_element_type, x, kernel, bias))
    return _finish(y, bias, request)


def convolve_separably(
    request: Request,
    x: Array,
    kernel: Array,
    pointwise: Array,
    bias: ArrayLike | None = None,
    *,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Array:
    """separable_conv of a request."""
    channels = kernel.shape[-2] * kernel.shape[-1]
    expected = (*(1,) * request.layout.rank, channels)
    if pointwise.ndim != kernel.ndim or pointwise.shape[:-1] != expected or pointwise.shape[-1] == 0:
        raise ValueError(
            f"pointwise_kernel must have shape ({', '.join(map(str, expected))}, F) with F > 0, to follow the "
            f"depthwise_kernel of shape {kernel.shape}; got shape {pointwise.shape}"
        )
    bias = _checked_bias(bias, pointwise.shape[-1], "F")
    dtype = _result_dtype(preferred_element_type, x, kernel, pointwise, bias)
    y = _bind(request, primitives.conv_p, dtype, x, kernel)
    y = _pointwise(y, pointwise.reshape(pointwise.shape[-2:]).astype(dtype), request, out_sharding)
    return _finish(y, bias, request)


def convolve_transposed(
    request: Request,
    x: Array,
    kernel: Array,
    bias: ArrayLike | None = None,
    *,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """depthwise_conv_transpose of a request."""
    bias = _checked_bias(bias, kernel.shape[-2] * kernel.shape[-1], "C*M")
    dtype = _result_dtype(preferred_element_type, x, kernel, bias)
    convolution, transposed = request.transposed_geometry(x.shape, kernel.shape)
    layout = request.layout

    def spread(x: Array, kernel: Array) -> Array:
        operands = transposed_operands(x, kernel, layout)
        params: dict[str, Any] = {"convolution": convolution, "implementation": request.implementation}
        return primitives.bind(primitives.input_grad_p, *operands, dtype=dtype, **params)

    y = _under_in_sharding(request, spread, x, kernel)
    if any(transposed.beyond):
        behind = [(0, zeros) for zeros in transposed.beyond]
        y = jnp.pad(y, layout.arrange([(0, 0)] * (y.ndim - layout.rank - 1), behind, (0, 0)))
    return _finish(y, bias, request)


def transposed_operands(x: Array, kernel: Array, layout: Layout) -> tuple[Array, Array]:
    """x and kernel of a transposed convolution as input_grad_p takes them: M copies of each channel, one kernel each.

    y is larger than the copies, so interleaving M results costs more: at x (8, 28, 28, 32), M = 2, a window of 4 and a
    stride of 2, it takes 2.1 ms on CPU with copies and 6.5 ms by M transposes. The copies are made by a convolution of
    one tap with ones: with a broadcast the whole call takes 1.7 times as long on TPU, and its gradients 3.3 times.
    """
    *size, channels, multiplier = kernel.shape
    if multiplier == 1:
        return x, kernel
    one, none = (1,) * layout.rank, ((0, 0),) * layout.rank
    spatial = layout.spatial_shape(x.shape)
    # At the highest precision a product with one is exact.
    copying = Convolution(Window(one, one, none, one), layout, spatial, lax.Precision.HIGHEST)
    ones = jnp.ones((*one, channels, multiplier), x.dtype)
    copies = primitives.bind(primitives.conv_p, x, ones, convolution=copying, dtype=x.dtype, implementation=None)
    # Merged before the last axis is added: sharded channels can be merged where JAX checks types.
    return copies, kernel.reshape(*size, channels * multiplier)[..., None]


def _bind(request: Request, primitive: Primitive, dtype: Any, x: Array, *others: Array, **params: Any) -> Array:
    """Binds a primitive to x, the kernel and perhaps a bias; first applies a padding that reads x again."""
    convolution, input_padding = request.geometry(x.shape, others[0].shape)
    if input_padding is not None:
        x = _padded(x, input_padding, request.layout)
    bind: Callable[..., Array] = functools.partial(
        primitives.bind,
        primitive,
        convolution=convolution,
        dtype=dtype,
        implementation=request.implementation,
        **params,
    )
    return _under_in_sharding(request, bind, x, *others, reach=primitive is primitives.conv_p)


def _padded(x: Array, padding: InputPadding, layout: Layout) -> Array:
    """x surrounded by the values that its padding repeats."""
    if padding.mode != "edge":
        amounts = layout.arrange([(0, 0)] * (x.ndim - layout.rank - 1), padding.amounts, (0, 0))
        return jnp.pad(x, amounts, mode=padding.mode)
    # With "edge", jnp.pad slices even the axes that it does not pad; JAX refuses that if their types are sharded.
    for axis, (low, high) in zip(layout.spatial, padding.amounts, strict=True):
        axis, n = axis + x.ndim, x.shape[axis]
        edges = ((lax.slice_in_dim(x, 0, 1, axis=axis), low), (lax.slice_in_dim(x, n - 1, n, axis=axis), high))
        before, after = (
            jnp.broadcast_to(edge, (*x.shape[:axis], times, *x.shape[axis + 1 :])) for edge, times in edges
        )
        x = lax.concatenate([before, x, after], axis)
    return x


def _under_in_sharding(
    request: Request, function: Callable[..., Array], x: Array, *others: Array, reach: bool = False
) -> Array:
    """Calls a function of x, the kernel and perhaps a bias or a reach, under explicit mesh axes if in_sharding asks.

    The types then show the primitives and their gradients what is sharded.
    """
    if request.in_sharding is not None:
        stated = sharding.operand_specs(request.in_sharding, x.ndim, request.layout)
        if stated is not None:
            axes, specs = stated
            if reach:
                tokens = [*sharding.entries(specs[0], x.ndim)]
                tokens.pop(request.layout.channels)
                specs = (*specs[:2], PartitionSpec(*tokens))
            if axes:
                typed: Any = jax.sharding.explicit_axes(function, axes=axes, in_sharding=specs[: 1 + len(others)])
                function = typed
            else:
                x = lax.with_sharding_constraint(x, specs[0])
    return function(x, *others)


def _pointwise(y: Array, kernel: Array, request: Request, out_sharding: NamedSharding | PartitionSpec | None) -> Array:
    """Contracts the channel axis of y with a (C*M, F) kernel."""
    layout = request.layout
    if out_sharding is not None:
        spec = out_sharding.spec if isinstance(out_sharding, NamedSharding) else out_sharding
        entries = [*sharding.entries(spec, y.ndim)]
        entries.append(entries.pop(layout.channels))
        spec = PartitionSpec(*entries)
        out_sharding = NamedSharding(out_sharding.mesh, spec) if isinstance(out_sharding, NamedSharding) else spec
    y = lax.dot_general(
        jnp.moveaxis(y, layout.channels, -1),
        kernel,
        (((y.ndim - 1,), (0,)), ((), ())),
        precision=request.precision,
        out_sharding=out_sharding,
    )
    return jnp.moveaxis(y, -1, layout.channels)


def _finish(y: Array, bias: Array | None, request: Request) -> Array:
    if bias is not None:
        y = y + fused.align_bias(bias.astype(y.dtype), request.layout, y.ndim)
    return y if request.activation is None else request.activation(y)


def array(name: str, value: Any) -> Array:
    """An argument as an array.

    Raises:
        TypeError: None or a string was passed.
    """
    if value is None or isinstance(value, str):
        raise TypeError(f"{name} must be an array; got {value!r}")
    return jnp.asarray(value)


def _checked_bias(bias: ArrayLike | None, channels: int, what: str) -> Array | None:
    if bias is None:
        return None
    bias = array("bias", bias)
    if bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({what},) = ({channels},); got shape {bias.shape}")
    return bias


def _result_dtype(preferred: DTypeLike | None, *operands: Array | None) -> Any:
    natural = jnp.result_type(*(operand for operand in operands if operand is not None))
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    kind = next((kind for kind in kinds if jnp.issubdtype(natural, kind)), None)
    if kind is None:
        raise TypeError(f"the operands must be numeric; got operands that promote to {natural}")
    if preferred is None:
        return natural
    dtype = jax.dtypes.canonicalize_dtype(preferred)
    if not jnp.issubdtype(dtype, kind) or dtypes.promoted(natural, dtype) != dtype:
        raise TypeError(
            f"preferred_element_type must be {natural}, to which the operands promote, or a wider dtype of the same "
            f"kind; got {jnp.dtype(preferred)}"
        )
    return dtype
