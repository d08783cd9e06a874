"""Regularizers: Keras' penalties as functions of one array, and their value as a loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from depthwise_jax._core.dtypes import at_least_float32
from depthwise_jax._core.registry import Registry

__all__ = ["L1", "L1L2", "L2", "OrthogonalRegularizer", "Regularizer", "get", "penalty", "serialize"]


class Regularizer:
    """The penalty 0, and the base class of the others; Keras has a name for it too."""

    def __eq__(self, other: object) -> bool:
        if type(self) is type(other) is Regularizer:
            return True
        return NotImplemented

    def __hash__(self) -> int:
        return hash(Regularizer) if type(self) is Regularizer else object.__hash__(self)

    def __call__(self, x: Array) -> Array:
        """The penalty of an array of any shape, a scalar."""
        return jnp.zeros((), x.dtype)

    def get_config(self, window_axes: tuple[int, ...] = ()) -> dict[str, Any]:
        """Keras' configuration.

        Args:
            window_axes: as for initializers and constraints; regularizers do not depend on them.
        """
        return {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class L1(Regularizer):
    """`l1 * sum(|x|)`.

    Args:
        l1: the factor, finite and not negative; any other value raises ValueError.
    """

    l1: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "l1", _factor("l1", self.l1))

    def __call__(self, x: Array) -> Array:
        return self.l1 * jnp.sum(jnp.abs(x))


@dataclass(frozen=True)
class L2(Regularizer):
    """`l2 * sum(x^2)`.

    Args:
        l2: the factor, finite and not negative; any other value raises ValueError.
    """

    l2: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "l2", _factor("l2", self.l2))

    def __call__(self, x: Array) -> Array:
        return self.l2 * jnp.sum(jnp.square(x))


@dataclass(frozen=True)
class L1L2(Regularizer):
    """`l1 * sum(|x|) + l2 * sum(x^2)`.

    Args:
        l1, l2: the factors, finite and not negative; any other value raises ValueError.
    """

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "l1", _factor("l1", self.l1))
        object.__setattr__(self, "l2", _factor("l2", self.l2))

    def __call__(self, x: Array) -> Array:
        return self.l1 * jnp.sum(jnp.abs(x)) + self.l2 * jnp.sum(jnp.square(x))


@dataclass(frozen=True)
class OrthogonalRegularizer(Regularizer):
    """`factor` times the mean of `|cos|` over the pairs of rows (or columns) of a matrix.

    Attributes:
        factor: finite and not negative; any other value raises ValueError.
        mode: "rows" or "columns"; any other value raises ValueError.
    """

    factor: float = 0.01
    mode: str = "rows"

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", _factor("factor", self.factor))
        if self.mode not in ("rows", "columns"):
            raise ValueError(f"mode must be 'rows' or 'columns'; got {self.mode!r}")

    def __call__(self, x: Array) -> Array:
        if x.ndim != 2:
            raise ValueError(f"OrthogonalRegularizer takes a matrix; got an array of shape {x.shape}")
        rows = x if self.mode == "rows" else x.T
        rows = rows * jnp.minimum(1 / jnp.sqrt(jnp.sum(jnp.square(rows), axis=1, keepdims=True)), 1e7)
        count = len(rows)
        cosines = jnp.abs(rows @ rows.T) * (1 - jnp.eye(count, dtype=x.dtype))
        return self.factor * jnp.sum(cosines) / (count * (count - 1))


_REGISTRY = Registry(
    "regularizer",
    "keras.regularizers",
    {
        L1: ("L1", "l1"),
        L2: ("L2", "l2"),
        L1L2: ("L1L2", "l1l2", "l1_l2"),
        OrthogonalRegularizer: ("OrthogonalRegularizer", "orthogonal_regularizer"),
        Regularizer: ("Regularizer", "regularizer"),
    },
)


def get(identifier: Any, argument: str = "regularizer") -> Callable[[Array], Array] | None:
    """Resolves a regularizer.

    Args:
        identifier: None, one of Keras' names, Keras' configuration, a class or any callable from an array to its
            penalty. The names "l1_l2", "l1l2" and "L1L2" mean `L1L2(0.01, 0.01)`, as Keras documents.
        argument: the argument's name in messages.

    Raises:
        ValueError: an unknown name or configuration.
        TypeError: the identifier is none of these.
    """
    regularizer = _REGISTRY.get(identifier, argument)
    if isinstance(identifier, str) and isinstance(regularizer, L1L2):
        return L1L2(0.01, 0.01)
    return regularizer


def serialize(regularizer: Callable[[Array], Array] | None, argument: str = "regularizer") -> dict[str, Any] | None:
    """Keras' configuration of a resolved regularizer.

    Args:
        regularizer: what `get` returned.
        argument: the argument's name in messages.

    Raises:
        ValueError: it is not one of this module's.
    """
    return _REGISTRY.serialize(regularizer, argument)


def penalty(regularizer: Callable[[Array], Array], x: Array) -> Array:
    """The loss that a regularizer adds for `x`, a scalar computed in float32 (in x's dtype if that is wider).

    Args:
        regularizer: a function from an array to its penalty.
        x: an array of any shape.
    """
    return jnp.sum(regularizer(x.astype(at_least_float32(x.dtype))))


def _factor(name: str, value: Any) -> float:
    if (
        not isinstance(value, float | int | np.floating | np.integer)
        or isinstance(value, bool)
        or not (0 <= value < math.inf)
    ):
        raise ValueError(f"{name} must be a finite, non-negative number; got {value!r}")
    return float(value)
