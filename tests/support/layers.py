"""The layers as Any: what Flax's init and apply are said to return is too wide to compute with."""

from typing import Any

from depthwise_jax import linen

DepthwiseConv1D: Any = linen.DepthwiseConv1D
DepthwiseConv2D: Any = linen.DepthwiseConv2D
DepthwiseConv3D: Any = linen.DepthwiseConv3D
SeparableConv1D: Any = linen.SeparableConv1D
SeparableConv2D: Any = linen.SeparableConv2D
SeparableConv3D: Any = linen.SeparableConv3D
