"""Depthwise convolution for JAX: pure functions, Flax layers, and Optax transforms that keep constrained weights."""

import importlib
from typing import TYPE_CHECKING, Any

from depthwise_jax.version import __version__ as __version__

# isort: split
from depthwise_jax.drop_in import conv_general_dilated as conv_general_dilated
from depthwise_jax.explanation import explain as explain
from depthwise_jax.functional import depthwise_conv as depthwise_conv
from depthwise_jax.functional import depthwise_conv_transpose as depthwise_conv_transpose
from depthwise_jax.functional import separable_conv as separable_conv
from depthwise_jax.linen import CausalDepthwiseConv1D as CausalDepthwiseConv1D
from depthwise_jax.linen import DepthwiseConv1D as DepthwiseConv1D
from depthwise_jax.linen import DepthwiseConv1DTranspose as DepthwiseConv1DTranspose
from depthwise_jax.linen import DepthwiseConv2D as DepthwiseConv2D
from depthwise_jax.linen import DepthwiseConv2DTranspose as DepthwiseConv2DTranspose
from depthwise_jax.linen import DepthwiseConv3D as DepthwiseConv3D
from depthwise_jax.linen import DepthwiseConv3DTranspose as DepthwiseConv3DTranspose
from depthwise_jax.linen import SeparableConv1D as SeparableConv1D
from depthwise_jax.linen import SeparableConv2D as SeparableConv2D
from depthwise_jax.linen import SeparableConv3D as SeparableConv3D
from depthwise_jax.linen import regularization_loss as regularization_loss
from depthwise_jax.lowering import native
from depthwise_jax.sequences import causal_conv1d as causal_conv1d
from depthwise_jax.sequences import causal_conv1d_state as causal_conv1d_state

if TYPE_CHECKING:
    from depthwise_jax import interop as interop
    from depthwise_jax import nnx as nnx
    from depthwise_jax import optim as optim

# A compiled program that is loaded from a file finds its kernels among the targets that this registers.
native.status()

# Loaded when first used: what they import takes longer than all the rest.
_LAZY = ("interop", "nnx", "optim")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"depthwise_jax.{name}")
    raise AttributeError(f"module 'depthwise_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    own = {name for name, item in globals().items() if getattr(item, "__module__", "").startswith("depthwise_jax.")}
    return sorted({*own, *_LAZY, "activations", "constraints", "initializers", "linen", "regularizers", "settings"})
