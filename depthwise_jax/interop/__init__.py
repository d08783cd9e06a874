"""To and from other libraries: layers and weights of Keras, PyTorch and Flax, and whole functions by their jaxpr.

* `keras`: from_keras, to_keras, whole models by layers_from_keras, files by read_weights
* `torch`: from_torch, to_torch, from a state dict or plain arrays, whole models by layers_from_torch
* `flax`: from_flax, to_flax, and whole trees of parameters
* `jaxpr`: accelerate, any function with its depthwise convolutions computed by this package

Where one of our layers comes out it is `(module, params)`. With `framework="nnx"` the module is one of
`depthwise_jax.nnx`, which holds the parameters that come beside it. What a layer cannot express is refused by name, and
so is a module that computes more than its library's own class.
"""

from depthwise_jax.interop import flax as flax
from depthwise_jax.interop import jaxpr as jaxpr
from depthwise_jax.interop import keras as keras
from depthwise_jax.interop import torch as torch
from depthwise_jax.interop.jaxpr import accelerate as accelerate
