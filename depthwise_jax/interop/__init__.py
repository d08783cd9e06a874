"""Conversion to and from other libraries: layers and weights of Keras, PyTorch and Flax, and any function's jaxpr.

* `keras`: from_keras, to_keras, whole models by layers_from_keras, files by read_weights
* `torch`: from_torch, to_torch, state dicts and plain arrays, whole models by layers_from_torch
* `flax`: from_flax, to_flax, and whole trees of parameters
* `jaxpr`: accelerate, any function with its depthwise convolutions computed by this package

A converted layer is returned as `(module, params)`. With `framework="nnx"` the module is one of `depthwise_jax.nnx`,
which also holds these parameters. An argument that a layer cannot express is refused by name, and so is a module that
computes more than its library's own class.
"""

from depthwise_jax.interop import flax as flax
from depthwise_jax.interop import jaxpr as jaxpr
from depthwise_jax.interop import keras as keras
from depthwise_jax.interop import torch as torch
from depthwise_jax.interop.flax import from_flax as from_flax
from depthwise_jax.interop.flax import params_from_flax as params_from_flax
from depthwise_jax.interop.flax import params_to_flax as params_to_flax
from depthwise_jax.interop.flax import to_flax as to_flax
from depthwise_jax.interop.jaxpr import accelerate as accelerate
from depthwise_jax.interop.keras import from_keras as from_keras
from depthwise_jax.interop.keras import layers_from_keras as layers_from_keras
from depthwise_jax.interop.keras import read_weights as read_weights
from depthwise_jax.interop.keras import to_keras as to_keras
from depthwise_jax.interop.torch import from_state_dict as from_state_dict
from depthwise_jax.interop.torch import from_torch as from_torch
from depthwise_jax.interop.torch import layers_from_torch as layers_from_torch
from depthwise_jax.interop.torch import params_from_state_dict as params_from_state_dict
from depthwise_jax.interop.torch import to_torch as to_torch
