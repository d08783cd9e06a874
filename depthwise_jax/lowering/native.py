"""The three maps in compiled CPU kernels, called through jax.ffi.

The library is built when the package is installed (CMakeLists.txt), from the sources in csrc/; it needs no Python. It
picks the instruction set when it is loaded, or takes the one that the environment variable DEPTHWISE_JAX_ISA names:
"avx512", "avx2" or "baseline" on x86-64, "neon" on aarch64; "none" turns it off. Where there is no library, status()
says why, and the other lowerings serve.

The kernels know one form: three spatial axes, channels last, one kernel per channel. Fewer axes are filled up with axes
of size 1; channels first are moved; for several kernels per channel each channel of x is repeated. Narrow floats are
summed in float32 and rounded once; the kernel and its gradient are float32 throughout.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from depthwise_jax.convolution import Convolution
from depthwise_jax.lowering.call import MAPS, Call

# What the shapes and attributes of the calls mean; csrc/ffi.cc has the same number in its symbols' names.
_ABI = 1
_LIBRARY = "libdepthwise_jax.so"
# The activations that the kernels apply at their store, in the order of csrc/depthwise.h.
ACTIVATIONS = ("linear", "relu", "relu6")
_DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Status:
    """Whether the compiled kernels are there.

    Attributes:
        instruction_set: the one that they use; None if they are not there.
        reason: why they are not there, or "".
    """

    instruction_set: str | None
    reason: str = ""


@functools.cache
def status() -> Status:
    """Loads the library at the first call, and tells which instruction set it uses or why it is not used."""
    asked = os.environ.get("DEPTHWISE_JAX_ISA", "")
    if asked == "none":
        return Status(None, "turned off by DEPTHWISE_JAX_ISA=none")
    from depthwise_jax import lowering  # not above: it imports this module

    paths = [Path(entry) / _LIBRARY for entry in lowering.__path__]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return Status(None, "not built: no C++ compiler was found when the package was installed, or the build failed")
    try:
        library = ctypes.CDLL(str(path))
        instruction_set = library.depthwise_jax_instruction_set
        instruction_set.restype = ctypes.c_char_p
        name = instruction_set()
        if name is None:
            return Status(None, f"DEPTHWISE_JAX_ISA={asked!r} names no instruction set of this machine")
        for direction in MAPS:
            handler = getattr(library, f"depthwise_jax_{direction}_v{_ABI}")
            jax.ffi.register_ffi_target(_target(direction), jax.ffi.pycapsule(handler), platform="cpu")
    except Exception as error:  # whatever is wrong with a library, plain XLA serves
        return Status(None, f"{path.name} could not be used: {error}")
    return Status(name.decode())


def refusal(call: Call) -> str | None:
    """Why the compiled kernels cannot serve a call, or None."""
    if call.platform != "cpu":
        return "the kernels are compiled for CPUs"
    if call.exported:
        return "an exported program must run where this package is not installed"
    if call.partitioned:
        return "the compiler cannot partition a compiled kernel over a mesh; jax.shard_map can"
    if call.dtype not in _DTYPES:
        return f"there are kernels for {', '.join(_DTYPES)}, not for {call.dtype}"
    if call.symbolic:
        return f"the kernels need known spatial sizes, got the symbolic {call.convolution.spatial}"
    return status().reason or None


def forward(x: Array, kernel: Array, call: Call) -> Array:
    """y, in the operands' common dtype."""
    return fused(x, kernel, activation="linear", call=call)


def fused(x: Array, kernel: Array, bias: Array | None = None, *, activation: str, call: Call) -> Array:
    """activation(y + bias), in the operands' common dtype, rounded once.

    Args:
        x: (*batch, *spatial, C), or channels first.
        kernel: (*window, C, M).
        bias: (C*M,), or None.
        activation: one of ACTIVATIONS.
        call: the call.
    """
    convolution = call.convolution
    batch, *_, multiplier = convolution.batch(x.shape), *kernel.shape
    operands = [_canonical(_repeated(x, convolution, multiplier), convolution), _canonical_kernel(kernel)]
    if bias is not None:
        operands.append(bias.astype(_sums(bias.dtype)))
    shape = (operands[0].shape[0], *_three(convolution.out, 1), operands[0].shape[-1])
    code = np.int64(ACTIVATIONS.index(activation))
    y = _call("forward", shape, x.dtype, operands, convolution, activation=code)
    return _original(y, batch, convolution.out, convolution)


def input_grad(g: Array, kernel: Array, call: Call) -> Array:
    """dx, in the operands' common dtype; for several kernels per channel in that of the sums."""
    convolution = call.convolution
    batch, *_, channels, multiplier = convolution.batch(g.shape), *kernel.shape
    if multiplier > 1:
        g = g.astype(_sums(g.dtype))  # what is still to be added must not be rounded
    operands = [_canonical(g, convolution), _canonical_kernel(kernel)]
    shape = (operands[0].shape[0], *_three(convolution.spatial, 1), channels * multiplier)
    dx = _call("input_grad", shape, g.dtype, operands, convolution)
    if multiplier > 1:
        dx = dx.reshape(*shape[:-1], channels, multiplier).sum(-1)
    return _original(dx, batch, convolution.spatial, convolution)


def kernel_grad(x: Array, g: Array, call: Call) -> Array:
    """dw, in the dtype of the sums."""
    convolution = call.convolution
    channels = convolution.channels(x.shape)
    multiplier = convolution.channels(g.shape) // channels
    operands = [_canonical(_repeated(x, convolution, multiplier), convolution), _canonical(g, convolution)]
    shape = (*_three(convolution.window.size, 1), channels * multiplier)
    dw = _call("kernel_grad", shape, _sums(x.dtype), operands, convolution)
    return dw.reshape(*convolution.window.size, channels, multiplier)


def _sums(dtype: Any) -> Any:
    """The dtype in which products of a dtype are summed."""
    return jnp.promote_types(dtype, jnp.float32)


def _three(values: Sequence[int], filling: int) -> tuple[int, ...]:
    """Three values, one per spatial axis: those that are missing come first."""
    return (*(filling,) * (3 - len(values)), *values)


def _repeated(x: Array, convolution: Convolution, multiplier: int) -> Array:
    return x if multiplier == 1 else jnp.repeat(x, multiplier, axis=convolution.layout.channels)


def _canonical(array: Array, convolution: Convolution) -> Array:
    """An x or y as (batch, *three spatial axes, channels)."""
    layout = convolution.layout
    array = jnp.moveaxis(array, layout.channels, -1)
    spatial = array.shape[array.ndim - 1 - layout.rank : -1]
    batch = math.prod(array.shape[: array.ndim - 1 - layout.rank])
    return array.reshape(batch, *_three(spatial, 1), array.shape[-1])


def _canonical_kernel(kernel: Array) -> Array:
    """A kernel (*window, C, M) as (*three window axes, C*M), in the dtype of the sums."""
    *size, channels, multiplier = kernel.shape
    return kernel.astype(_sums(kernel.dtype)).reshape(*_three(size, 1), channels * multiplier)


def _original(array: Array, batch: Sequence[int], spatial: Sequence[int], convolution: Convolution) -> Array:
    """The inverse of _canonical."""
    array = array.reshape(*batch, *spatial, array.shape[-1])
    return jnp.moveaxis(array, -1, convolution.layout.channels)


def _call(
    direction: str,
    shape: Sequence[int],
    dtype: Any,
    operands: Sequence[Array],
    convolution: Convolution,
    **attributes: Any,
) -> Array:
    window = convolution.window
    # Axes that both operands are mapped over lead all shapes, each index a convolution of its own.
    call = jax.ffi.ffi_call(_target(direction), jax.ShapeDtypeStruct(shape, dtype), vmap_method="broadcast_all")
    return call(
        *operands,
        stride=np.array(_three(window.strides, 1), np.int64),
        low=np.array(_three([low for low, _ in window.padding], 0), np.int64),
        dilation=np.array(_three(window.dilation, 1), np.int64),
        **attributes,
    )


def _target(direction: str) -> str:
    return f"depthwise_jax.{direction}.v{_ABI}"
