"""The three maps in compiled CPU kernels, called through jax.ffi.

The library is built when the package is installed (CMakeLists.txt), from the sources in csrc/; it does not use Python.
It selects the instruction set when it is loaded, or takes that in the environment variable DEPTHWISE_JAX_ISA: "avx512",
"avx2" or "baseline" on x86-64, "neon" on aarch64; "none" turns it off. Without a library, status() says why, and the
other lowerings are used.

The kernels support one layout: channels last, and a channel's M kernels outermost in kernel and y; other axes are
moved. If M is 1 that axis is left out, and a program's arrays are passed as they are: XLA copies narrow floats if an
axis of size 1 is added or moved. Narrow floats are summed in float32 and rounded once. Operands and result have one
dtype: the kernels convert inside, because XLA would wake its threads for a conversion.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from depthwise_jax._core.convolution import Convolution
from depthwise_jax._core.fused import ACTIVATIONS
from depthwise_jax.lowering import library
from depthwise_jax.lowering.call import MAPS, Call

# The version of the calls' shapes and attributes; csrc/ffi.cc has the same number in its symbols' names.
_ABI = 4
_DTYPES = ("float32", "float64", "float16", "bfloat16")
# The largest size or step along an axis that the kernels accept.
_LARGEST = 2**31


@dataclass(frozen=True)
class Status:
    """Whether the compiled kernels are available.

    Attributes:
        instruction_set: the one that they use; None if they are not available.
        reason: why they are not available, or "".
    """

    instruction_set: str | None
    reason: str = ""


@functools.cache
def status() -> Status:
    """Loads the library at the first call; returns its instruction set, or why it is not used."""
    asked = os.environ.get("DEPTHWISE_JAX_ISA", "")
    if asked == "none":
        return Status(None, "turned off by DEPTHWISE_JAX_ISA=none")
    path = library.find()
    if isinstance(path, str):
        return Status(None, path)
    try:
        library.check_whole(path)
        loaded = ctypes.CDLL(str(path))
        names = (*MAPS, *(f"packed_{direction}" for direction in MAPS))
        handlers = {name: getattr(loaded, f"depthwise_jax_{name}_v{_ABI}") for name in names}
        instruction_set = loaded.depthwise_jax_instruction_set
        instruction_set.restype = ctypes.c_char_p
        name = instruction_set()
        if name is None:
            return Status(None, f"DEPTHWISE_JAX_ISA={asked!r} is not an instruction set that this machine supports")
        for target, handler in handlers.items():
            jax.ffi.register_ffi_target(_target(target), jax.ffi.pycapsule(handler), platform="cpu")
    except AttributeError as error:
        return Status(None, f"{path} belongs to another version of depthwise_jax, install it again: {error}")
    except (OSError, RuntimeError) as error:  # it is not a library, or XLA refuses it
        return Status(None, f"{path} could not be used, install depthwise_jax again: {error}")
    return Status(name.decode())


def refusal(call: Call) -> str | None:
    """Why the compiled kernels cannot compute a call, or None."""
    if call.platform != "cpu":
        return "the kernels are compiled for CPUs"
    if call.exported:
        return "an exported program must run where this package is not installed"
    if call.partitioning.devices > 1:
        return "the compiler cannot partition a compiled kernel over a mesh; jax.shard_map can"
    if call.dtype not in _DTYPES:
        return f"there are kernels for {', '.join(_DTYPES)}, but not for {call.dtype}"
    if call.symbolic:
        return f"the kernels need known spatial sizes, not the symbolic {call.convolution.spatial}"
    return _too_large(call.convolution) or status().reason or None


def _too_large(convolution: Convolution) -> str | None:
    """Which number of a convolution is too large for the kernels, or None; csrc/geometry.cc checks the same."""
    window = convolution.window
    numbers = {
        "spatial sizes": convolution.spatial,
        "output sizes": convolution.out,
        "kernel_size": window.size,
        "strides": window.strides,
        "dilation_rate": window.dilation,
        "padding before the input": tuple(low for low, _ in window.padding),
    }
    for name, values in numbers.items():
        if max(values) > _LARGEST:
            return f"the kernels take {name} up to 2**31, but not {values}"
    return None


def operand_dtype(call: Call) -> Any:
    """The call's dtype: the kernels convert narrow floats themselves."""
    return call.dtype


def forward(x: Array, kernel: Array, call: Call) -> Array:
    """y, in the operands' common dtype."""
    return fused(x, kernel, activation="linear", call=call)


def fused(x: Array, kernel: Array, bias: Array | None = None, *, activation: str, call: Call) -> Array:
    """activation(y + bias), in the operands' common dtype, rounded once.

    Args:
        x: (*batch, *spatial, C), or channels first.
        kernel: (*window, C, M).
        bias: (C*M,), or None.
        activation: one of fused.ACTIVATIONS.
        call: the call.
    """
    convolution = call.convolution
    *_, channels, multiplier = kernel.shape
    operands = [_from_x(x, convolution), _from_kernel(kernel)]
    if bias is not None:
        operands.append(bias.reshape(channels, multiplier).T)
    shape = (*_multiplied(multiplier), operands[0].shape[0], *convolution.out, channels)
    code = np.int64(ACTIVATIONS.index(activation))
    y = _call("forward", shape, x.dtype, operands, convolution, activation=code)
    return _to_y(y, x, multiplier, convolution)


def input_grad(g: Array, kernel: Array, call: Call) -> Array:
    """dx, in the operands' common dtype."""
    return _input_grad("input_grad", g, kernel, call)


def kernel_grad(x: Array, g: Array, call: Call) -> Array:
    """dw, in the operands' common dtype."""
    return _kernel_grad("kernel_grad", x, g, call)


def packed_forward(x: Array, kernel: Array, reach: Array, call: Call) -> Array:
    """y, where each output sums the taps within its reach."""
    convolution = call.convolution
    *_, channels, multiplier = kernel.shape
    operands = [_from_x(x, convolution), _from_kernel(kernel), _from_reach(reach)]
    shape = (*_multiplied(multiplier), operands[0].shape[0], *convolution.out, channels)
    y = _call("packed_forward", shape, x.dtype, operands, convolution)
    return _to_y(y, x, multiplier, convolution)


def packed_input_grad(g: Array, kernel: Array, reach: Array, call: Call) -> Array:
    """dx."""
    return _input_grad("packed_input_grad", g, kernel, call, _from_reach(reach))


def packed_kernel_grad(x: Array, g: Array, reach: Array, call: Call) -> Array:
    """dw."""
    return _kernel_grad("packed_kernel_grad", x, g, call, _from_reach(reach))


def _input_grad(target: str, g: Array, kernel: Array, call: Call, *reach: Array) -> Array:
    convolution = call.convolution
    channels = kernel.shape[-2]
    operands = [_from_y(g, channels, convolution), _from_kernel(kernel), *reach]
    batch = convolution.batch(g.shape)
    shape = (math.prod(batch), *convolution.spatial, channels)
    dx = _call(target, shape, g.dtype, operands, convolution)
    return jnp.moveaxis(dx.reshape(*batch, *shape[1:]), -1, convolution.layout.channels)


def _kernel_grad(target: str, x: Array, g: Array, call: Call, *reach: Array) -> Array:
    convolution = call.convolution
    channels = convolution.channels(x.shape)
    multiplier = convolution.channels(g.shape) // channels
    operands = [_from_x(x, convolution), _from_y(g, channels, convolution), *reach]
    size = (*convolution.window.size, channels)
    dw = _call(target, (*_multiplied(multiplier), *size), x.dtype, operands, convolution)
    return _last(dw, multiplier).reshape(*size, multiplier)


def _multiplied(multiplier: int) -> tuple[int, ...]:
    """The axis of a channel's kernels, unless it is left out."""
    return () if multiplier == 1 else (multiplier,)


def _last(a: Array, multiplier: int) -> Array:
    """a (M, ..., C) as (..., C, M); if M is 1, both lack the axis."""
    return a if multiplier == 1 else jnp.moveaxis(a, 0, -1)


def _from_x(x: Array, convolution: Convolution) -> Array:
    """x as (batch, *spatial, C)."""
    x = jnp.moveaxis(x, convolution.layout.channels, -1)
    return x.reshape(math.prod(convolution.batch(x.shape)), *convolution.spatial, x.shape[-1])


def _from_kernel(kernel: Array) -> Array:
    """A kernel (*window, C, M) as (M, *window, C), or (*window, C) if M is 1."""
    return kernel.reshape(kernel.shape[:-1]) if kernel.shape[-1] == 1 else jnp.moveaxis(kernel, -1, 0)


def _from_y(y: Array, channels: int, convolution: Convolution) -> Array:
    """A y or g as (M, batch, *out, C), or (batch, *out, C) if M is 1."""
    y = jnp.moveaxis(y, convolution.layout.channels, -1)
    shape = (math.prod(convolution.batch(y.shape)), *convolution.out, channels)
    multiplier = y.shape[-1] // channels
    return y.reshape(shape) if multiplier == 1 else jnp.moveaxis(y.reshape(*shape, multiplier), -1, 0)


def _from_reach(reach: Array) -> Array:
    """A reach as (batch, out)."""
    return reach.reshape(math.prod(reach.shape[:-1]), reach.shape[-1])


def _to_y(y: Array, x: Array, multiplier: int, convolution: Convolution) -> Array:
    """The y of an x from one of shape (M, batch, *out, C), or (batch, *out, C) if M is 1."""
    y = _last(y, multiplier)
    y = y.reshape(*convolution.batch(x.shape), *convolution.out, convolution.channels(x.shape) * multiplier)
    return jnp.moveaxis(y, -1, convolution.layout.channels)


def _call(
    name: str,
    shape: Sequence[int],
    dtype: Any,
    operands: Sequence[Array],
    convolution: Convolution,
    **attributes: Any,
) -> Array:
    window = convolution.window
    # Axes over which both operands are mapped lead all shapes; each index is a separate convolution.
    call = jax.ffi.ffi_call(_target(name), jax.ShapeDtypeStruct(shape, dtype), vmap_method="broadcast_all")
    return call(
        *operands,
        stride=np.array(window.strides, np.int64),
        low=np.array([low for low, _ in window.padding], np.int64),
        dilation=np.array(window.dilation, np.int64),
        **attributes,
    )


def _target(name: str) -> str:
    return f"depthwise_jax.{name}.v{_ABI}"
