"""Imports Keras on its JAX backend without this user's settings, as the reference for the layers."""

import importlib
import os
import tempfile
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-home-")

# Any, since Keras' own annotations are incomplete.
keras: Any = importlib.import_module("keras")
