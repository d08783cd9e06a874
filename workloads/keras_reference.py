"""Keras on its JAX backend, away from this user's Keras settings: the reference of the contract."""

import importlib
import os
import tempfile
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-home-")

# Any, for Keras' own annotations know only half of it.
keras: Any = importlib.import_module("keras")
