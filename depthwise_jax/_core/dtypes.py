"""Dtypes for computing, also under `jax_numpy_dtype_promotion="strict"`; what is an array."""

from typing import Any

import jax
import jax.numpy as jnp


def promoted(a: Any, b: Any) -> Any:
    """The dtype to which two promote by JAX's standard rules, in any promotion mode."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def added(a: Any, b: Any) -> Any:
    """`a + b`, promoted by JAX's standard rules in any promotion mode."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.add(a, b)


def at_least_float32(dtype: Any) -> Any:
    """The dtype to sum in: float32 for narrower floats, `dtype` itself for wider ones."""
    return promoted(dtype, jnp.float32)


def widened(dtype: Any) -> Any:
    """float32 for narrower floats, and any other dtype itself."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else dtype


def is_array(value: Any) -> bool:
    """Whether a value is an array or has an array's type; NumPy's scalar classes have the attributes too."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type)
