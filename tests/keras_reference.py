"""Keras on its JAX backend, away from this user's Keras settings: the reference of the contract."""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-home-")

import keras

__all__ = ["keras"]
