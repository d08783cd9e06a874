"""How near a result must be to its truth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.oracle import widest


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Same shape, and every difference within `tolerance` times the largest expected magnitude."""
    actual, expected = widest(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if expected.size:
        bound = tolerance * np.max(np.abs(expected), initial=0.0)
        worst = np.max(np.abs(actual - expected))
        assert worst <= bound, f"{what}: off by {worst:.3e}, allowed {bound:.3e} ({tolerance} of the largest entry)"


def assert_within_roundings(actual: jax.Array, exact: np.ndarray, *roundings: np.ndarray) -> None:
    """Within float32's accumulation error of `exact`, and half a unit in the last place of each value rounded."""
    info = jnp.finfo(actual.dtype)
    allowed = 1e-6 * np.max(np.abs(exact)) + sum(
        np.abs(r) * float(info.eps) / 2 + float(info.smallest_subnormal) for r in roundings
    )
    excess = np.abs(widest(actual) - exact) - allowed
    assert np.max(excess) <= 0, f"beyond the allowed rounding by {np.max(excess):.3e}"
