"""Explains which lowering computes a depthwise convolution or a transposed one and its gradients, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from depthwise_jax import lowering
from depthwise_jax._core import dtypes, sharding
from depthwise_jax._core.layout import DataFormat
from depthwise_jax._core.sharding import Partitioning
from depthwise_jax._core.window import Padding
from depthwise_jax.functional import Request, kernel_layout
from depthwise_jax.lowering import Implementation, primitives


@dataclass(frozen=True)
class Explanation:
    """Which lowering computes a call and its two gradients, and why. It prints as three lines.

    Attributes:
        forward, input_grad, kernel_grad: the choice for each map, with its `lowering` and `reason`.
    """

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
    data_format: DataFormat = "channels_last",
    dilation_rate: int | Sequence[int] = 1,
    implementation: Implementation | None = None,
    in_sharding: PartitionSpec | None = None,
    packed: bool = False,
    platform: str | None = None,
    partitioned: int | None = None,
    transposed: bool = False,
    output_padding: int | Sequence[int] | None = None,
) -> Explanation:
    """Tells which lowering depthwise_conv would use for the forward pass and for both gradients, and why.

    The choice also depends on what is known about sharding: the mesh that `jax.set_mesh` has set, in_sharding, and the
    shardings of x and kernel, if they have any.

    Args:
        x, kernel: as in depthwise_conv; anything with a shape and a dtype, `jax.ShapeDtypeStruct` too.
        strides, padding, data_format, dilation_rate, implementation, in_sharding: as in depthwise_conv.
        packed: whether several documents are packed into a row, as `causal_conv1d` takes them with segment_pos.
        platform: "cpu", "cuda", "rocm" or "tpu", or "gpu" for the GPU of this machine ("cuda" without one); the default
            backend's if None.
        partitioned: over how many mesh axes the compiler partitions the program in a way that no type shows, in place
            of what the mesh says; True means one.
        transposed: whether the call is one of depthwise_conv_transpose. Its forward pass is computed like the gradient
            of x of depthwise_conv, and its gradient of x like depthwise_conv.
        output_padding: as in depthwise_conv_transpose.

    Returns:
        An `Explanation`, which prints as three lines.

    Raises:
        TypeError, ValueError: as depthwise_conv; also an unknown platform, or an implementation that cannot compute the
            call.

    Examples:
        >>> import jax
        >>> x, kernel = jax.ShapeDtypeStruct((8, 28, 28, 32), "float32"), jax.ShapeDtypeStruct((3, 3, 32, 1), "float32")
        >>> explain(x, kernel, platform="tpu").forward.lowering
        'conv'
    """
    request = Request.of(
        kernel_layout(kernel.shape, data_format, "kernel"),
        strides=strides,
        padding=padding,
        output_padding=output_padding,
        dilation_rate=dilation_rate,
        activation=None,
        precision=None,
        implementation=implementation,
        in_sharding=in_sharding,
    )
    on = _platform(platform)
    types = [_type(x), _type(kernel)]
    *size, channels, multiplier = kernel.shape
    if transposed:
        if packed:
            raise ValueError("packed must be False with transposed=True; got True")
        convolution, _ = request.transposed_geometry(x.shape, kernel.shape)
        channels, multiplier = channels * multiplier, 1
        types[1] = types[1].update(shape=(*size, channels, 1))
        types[0] = types[0].update(shape=convolution.forward_shape(x.shape, types[1].shape))
    else:
        if output_padding is not None:
            raise ValueError(f"output_padding must be None without transposed=True; got {output_padding!r}")
        convolution, _ = request.geometry(x.shape, kernel.shape)
        # Padding that reads the input again comes before the convolution.
        types[0] = types[0].update(shape=convolution.input_grad_shape(x.shape, kernel.shape))
    if in_sharding is not None:
        stated = sharding.operand_specs(in_sharding, len(x.shape), request.layout)
        if stated is not None and stated[0]:
            types = [sharding.typed(aval, spec) for aval, spec in zip(types, stated[1], strict=False)]
    dtype = dtypes.promoted(x.dtype, kernel.dtype)
    given, kernel_type = types
    made = primitives.result_type(given, kernel_type, convolution, dtype, transposed)
    small, large = (given, made) if transposed else (made, given)  # the types of y and x of the convolution
    operands = {"forward": [large, kernel_type], "input_grad": [small, kernel_type], "kernel_grad": [large, small]}

    def choice(direction: str) -> lowering.Choice:
        if partitioned is None:
            known = Partitioning.of_call(direction, convolution, operands[direction])
        else:
            mesh = {f"axis {i}": 2 for i in range(partitioned)}
            known = Partitioning.of(direction, convolution, mesh, operands[direction])
        call = lowering.Call(
            direction, convolution, on, dtype, known, channels=channels, multiplier=multiplier, packed=packed
        )
        return lowering.choose(call, implementation)

    maps = ("input_grad", "forward", "kernel_grad") if transposed else lowering.MAPS
    return Explanation(*map(choice, maps))


def _type(operand: Any) -> Any:
    """The type of an operand, with its sharding if it has one."""
    known = isinstance(operand, jax.Array | jax.ShapeDtypeStruct)
    if not known:  # a NumPy array, which JAX would silently narrow
        operand = jax.ShapeDtypeStruct(operand.shape, jax.dtypes.canonicalize_dtype(operand.dtype))
    return jax.typeof(operand)


def _platform(platform: str | None) -> str:
    """The platform's name as the lowerings know it."""
    if platform in (None, "gpu"):
        default = jax.default_backend()
        if default != "gpu":
            return "cuda" if platform == "gpu" else default
        version = jax.local_devices()[0].client.platform_version.lower()
        return "rocm" if "rocm" in version else "cuda"
    if platform not in lowering.PLATFORMS:
        raise ValueError(f"platform must be one of {(*lowering.PLATFORMS, 'gpu')}; got {platform!r}")
    return platform
