"""The version of this package and the oldest JAX that it runs on, both as in pyproject.toml."""

import jax

__version__ = "0.2.0"
OLDEST_JAX = (0, 10)

# Before any other module is imported: an older JAX lacks what they import.
if jax.__version_info__ < OLDEST_JAX:
    raise ImportError(
        f"depthwise_jax {__version__} needs jax {'.'.join(map(str, OLDEST_JAX))} or newer; got jax {jax.__version__}: "
        "run pip install --upgrade jax"
    )
