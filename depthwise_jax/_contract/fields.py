"""The layers' arguments as dataclass fields, which the Linen and the NNX layers inherit.

Order and defaults are Keras', except for the causal layer, which Keras does not have.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from depthwise_jax import initializers
from depthwise_jax._core.layout import DataFormat
from depthwise_jax._core.window import Padding, TransposedPadding
from depthwise_jax.lowering import Implementation

# PyTorch's initializer for a convolution with one group per channel.
CAUSAL_INITIALIZER = initializers.VarianceScaling(1 / 3, "fan_in", "uniform", fan="window")


@dataclasses.dataclass(eq=False, repr=False)
class _Window:
    """The first arguments of a depthwise layer."""

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "valid"


@dataclasses.dataclass(eq=False, repr=False)
class _TransposedWindow:
    """The first arguments of a transposed layer, which has fewer paddings."""

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: TransposedPadding = "valid"


@dataclasses.dataclass(eq=False, repr=False)
class _CausalWindow:
    """The first argument of a causal layer, which has neither strides nor padding."""

    kernel_size: int | Sequence[int] = 4


@dataclasses.dataclass(eq=False, repr=False)
class _Depthwise:
    """The arguments after those of the window."""

    depth_multiplier: int = 1
    data_format: DataFormat | None = None
    dilation_rate: int | Sequence[int] = 1
    activation: Any = None
    use_bias: bool = True
    depthwise_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    depthwise_regularizer: Any = None
    bias_regularizer: Any = None
    activity_regularizer: Any = None
    depthwise_constraint: Any = None
    bias_constraint: Any = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: lax.PrecisionLike = None
    implementation: Implementation | None = None
    in_sharding: PartitionSpec | None = None


# The fields of a dataclass's last base come first.
@dataclasses.dataclass(eq=False, repr=False)
class DepthwiseFields(_Depthwise, _Window):
    """The arguments of a depthwise layer; `linen.DepthwiseConv2D` documents each."""


@dataclasses.dataclass(eq=False, repr=False)
class TransposedFields(_Depthwise, _TransposedWindow):
    """The arguments of a transposed depthwise layer; `linen.DepthwiseConv2DTranspose` documents each."""

    output_padding: int | Sequence[int] | None = None


@dataclasses.dataclass(eq=False, repr=False)
class CausalFields(_Depthwise, _CausalWindow):
    """The arguments of a causal depthwise layer; `linen.CausalDepthwiseConv1D` documents them."""

    depthwise_initializer: Any = CAUSAL_INITIALIZER


@dataclasses.dataclass(eq=False, repr=False)
class SeparableFields:
    """The arguments of a separable layer; `linen.SeparableConv2D` documents each."""

    filters: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "valid"
    data_format: DataFormat | None = None
    dilation_rate: int | Sequence[int] = 1
    depth_multiplier: int = 1
    activation: Any = None
    use_bias: bool = True
    depthwise_initializer: Any = "glorot_uniform"
    pointwise_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    depthwise_regularizer: Any = None
    pointwise_regularizer: Any = None
    bias_regularizer: Any = None
    activity_regularizer: Any = None
    depthwise_constraint: Any = None
    pointwise_constraint: Any = None
    bias_constraint: Any = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: lax.PrecisionLike = None
    implementation: Implementation | None = None
    in_sharding: PartitionSpec | None = None


_FRAMEWORK = ("parent", "name", "in_features")  # fields that only Linen or only NNX has


@functools.cache
def names(layer: type) -> tuple[str, ...]:
    """The names of a layer class's arguments, with those that a subclass adds."""
    return tuple(field.name for field in dataclasses.fields(layer) if field.init and field.name not in _FRAMEWORK)
