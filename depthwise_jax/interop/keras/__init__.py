"""Converts between Keras' depthwise and separable layers and ours: single layers, whole models, and Keras' files.

Only `to_keras` imports Keras itself; files are read with h5py. All data read is checked, and sizes are bounded before
anything is inflated. But a damaged file can send the underlying HDF5 library into a loop, so read untrusted files in a
process with a time limit.
"""

from depthwise_jax.interop.keras.files import read_weights as read_weights
from depthwise_jax.interop.keras.layers import LAYERS as LAYERS
from depthwise_jax.interop.keras.layers import SavedLayer as SavedLayer
from depthwise_jax.interop.keras.layers import from_keras as from_keras
from depthwise_jax.interop.keras.layers import layers_from_keras as layers_from_keras
from depthwise_jax.interop.keras.layers import to_keras as to_keras

__all__ = ["LAYERS", "SavedLayer", "from_keras", "layers_from_keras", "read_weights", "to_keras"]
