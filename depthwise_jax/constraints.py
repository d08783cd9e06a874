"""Constraints: projections of a parameter onto a set, `constraint(w) -> array of w's shape and dtype`.

`MaxNorm`, `MinMaxNorm`, `UnitNorm` and `NonNeg` compute Keras' formulas; Keras lacks `Box`, `PerSlice` and `a & b`.
Any other callable that returns an array of the same shape and dtype is a constraint too.

What `axis` means for the kernel (3, 3, C, M) of a 2D depthwise convolution:

| axis | what is bounded |
|---|---|
| 0 (Keras' default) | each column of a filter, 3 numbers; the norm of a filter may reach sqrt(3) times the bound |
| "window" | each filter, its 3 x 3 numbers: all axes except the last two, as in papers on max norm |
| (0, 1, 2) | the filters of all C channels together, for each of the M multipliers |

A pointwise kernel (1, 1, C, F) or a dense one (C, F) has its filters along C: `axis=(0, 1, 2)` and `axis=0`.
"""

import functools
import math
import numbers
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from depthwise_jax._core.dtypes import at_least_float32, is_array
from depthwise_jax._core.introspect import per_instance
from depthwise_jax._core.norms import Axis, axes_of, checked_axis, plain_norms, polar, rounded, slice_norms, sum_error
from depthwise_jax._core.registry import Registry, shown

__all__ = [
    "Box",
    "Constraint",
    "Lifted",
    "MaxNorm",
    "MinMaxNorm",
    "NonNeg",
    "PerSlice",
    "UnitNorm",
    "as_constraint",
    "compose",
    "get",
    "serialize",
]

_KERAS_EPSILON = 1e-7  # keras.config.epsilon()


class Constraint:
    """The identity, and the base class of every constraint.

    A subclass defines `__call__`. The other methods help an update survive the rounding of `parameter + update`; their
    defaults promise nothing.
    """

    def __eq__(self, other: object) -> bool:
        if type(self) is type(other) is Constraint:
            return True
        return NotImplemented

    def __hash__(self) -> int:
        return hash(Constraint) if type(self) is Constraint else object.__hash__(self)

    @property
    def interval(self) -> tuple[Any, Any]:
        """Bounds (lower, upper) on every number, which `depthwise_jax.optim.project` keeps exactly."""
        return -math.inf, math.inf

    @property
    def keeps_finite(self) -> bool:
        """Whether finite input is known to give finite output; if not, `depthwise_jax.optim.project` tries it."""
        return False

    def __call__(self, w: jax.Array) -> jax.Array:
        """The projection of `w`, of its shape and dtype."""
        return w

    def project_with_margin(self, w: jax.Array) -> jax.Array:
        """The projection onto a set that is smaller by what rounding may add later; `self(w)` if there is no such set.

        Args:
            w: a real floating-point array.
        """
        return self(w)

    def excess(self, w: jax.Array) -> jax.Array | None:
        """How far each separately projected slice of `w` lies outside the set; None if that is unknown.

        Args:
            w: a real floating-point array.

        Returns:
            Distances >= 0, one for each slice, with the rank of `w`; each axis has the length of that of `w`, or 1.
        """
        return None

    def violation(self, w: jax.Array) -> jax.Array | None:
        """The largest of `excess(w)`, a scalar: 0 for a member, NaN if `w` has a NaN; None if unknown.

        Args:
            w: a real floating-point array.
        """
        excess = self.excess(w)
        return None if excess is None else jnp.max(excess, initial=0)

    def get_config(self, window_axes: tuple[int, ...] = ()) -> dict[str, Any]:
        """The arguments, as Keras writes them.

        Args:
            window_axes: the axes that `axis="window"` means for the parameter.

        Raises:
            ValueError: Keras has no such constraint.
        """
        return {}

    def __and__(self, other: Callable[..., Any]) -> "Constraint":
        return compose(self, other)

    def __rand__(self, other: Callable[..., Any]) -> "Constraint":
        return compose(other, self)


def compose(*constraints: Callable[..., Any]) -> Constraint:
    """The constraint that applies each of `constraints` in turn, the first one first; `a & b` is `compose(a, b)`.

    The result lies in the last set. It lies in all of them if each projection keeps the sets before it, as in
    `NonNeg() & MaxNorm(1.0)`.

    Args:
        *constraints: one or more callables.

    Raises:
        TypeError: one of them is not callable.
        ValueError: their intervals do not overlap.
    """
    parts = [as_constraint(constraint) for constraint in constraints]
    return _Composition(tuple(leaf for part in parts for leaf in getattr(part, "parts", (part,))))


def as_constraint(constraint: Any) -> Constraint:
    """`constraint` itself if it is a `Constraint`, else a `Constraint` that wraps the callable.

    Args:
        constraint: a `Constraint`, or any function from an array to an array of its shape and dtype.

    Raises:
        TypeError: it is not callable.
    """
    if isinstance(constraint, Constraint):
        return constraint
    if not callable(constraint):
        raise TypeError(f"a constraint must be callable, from an array to one of the same shape; got {constraint!r}")
    return _Function(constraint)


@dataclass(frozen=True)
class Box(Constraint):
    """Every number in `[lower, upper]`: `clip(w, lower, upper)`, the bounds rounded to the dtype of `w`.

    Attributes:
        lower: the least value, a number.
        upper: the greatest value, a number not below `lower`.

    Raises:
        ValueError: lower exceeds upper.
    """

    lower: Any = -math.inf
    upper: Any = math.inf

    def __post_init__(self) -> None:
        for argument, value in (("lower", self.lower), ("upper", self.upper)):
            _check_number(value, f"Box: {argument}")
        lower, upper = _known(self.lower), _known(self.upper)
        if lower is not None and upper is not None and not lower <= upper:
            raise ValueError(f"Box: lower must not exceed upper; got lower={self.lower!r}, upper={self.upper!r}")

    @property
    def interval(self) -> tuple[Any, Any]:
        return self.lower, self.upper

    @property
    def keeps_finite(self) -> bool:
        return True

    def __call__(self, w: jax.Array) -> jax.Array:
        w = _floating(w)
        return jnp.clip(w, *self._limits(w))

    def excess(self, w: jax.Array) -> jax.Array:
        lower, upper, w = (x.astype(at_least_float32(w.dtype)) for x in (*self._limits(w), w))
        return jnp.maximum(jnp.maximum(lower - w, w - upper), 0)

    def get_config(self, window_axes: tuple[int, ...] = ()) -> dict[str, Any]:
        raise ValueError(f"{self!r} has no Keras configuration; Keras lacks a box constraint")

    def _limits(self, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.lower, w.dtype), jnp.asarray(self.upper, w.dtype)


class NonNeg(Box):
    """Every number >= 0: `maximum(w, 0)`."""

    def __init__(self) -> None:
        super().__init__(lower=0.0)

    def __repr__(self) -> str:
        return "NonNeg()"

    def get_config(self, window_axes: tuple[int, ...] = ()) -> dict[str, Any]:
        return {}


class _Norm(Constraint):
    """Slices whose Euclidean norm lies in [least, greatest]. Narrow dtypes are computed in float32.

    In a narrow dtype, a slice that was scaled down is rounded toward zero, and a slice that was scaled up away from it.
    Rounding then does not undo the projection. If the bounds are too close for that (UnitNorm's), it is to nearest.
    """

    axis: Any
    exact: bool
    rate: Any = 1.0

    @property
    def keeps_finite(self) -> bool:
        return True

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "axis", checked_axis(self.axis, name))
        least, greatest = self._norm_bounds()
        for argument, value in (("min_value", least), ("max_value", greatest), ("rate", self.rate)):
            _check_number(value, f"{name}: {argument}")
        for argument, value in (("min_value", least), ("max_value", greatest)):
            known = _known(value)
            if known is not None and not 0 <= known < math.inf:
                raise ValueError(f"{name}: {argument} must be finite and not negative; got {value!r}")
        low, high, rate = map(_known, (least, greatest, self.rate))
        if low is not None and high is not None and low > high:
            raise ValueError(f"{name}: min_value must not exceed max_value; got {least!r} and {greatest!r}")
        if rate is not None and not 0 <= rate <= 1:
            raise ValueError(f"{name}: rate must lie in [0, 1]; got {self.rate!r}")
        if self.exact and not self._at_once:
            raise ValueError(f"{name}: exact=True needs rate=1, since no other rate is idempotent; got {self.rate!r}")

    def _norm_bounds(self) -> tuple[Any, Any]:
        """The bounds (least, greatest) on the norm."""
        raise NotImplementedError

    def _keras_formula(self, x: jax.Array, norms: jax.Array) -> jax.Array:
        """The slices of `x`, whose norms are `norms`, as Keras projects them."""
        raise NotImplementedError

    def __call__(self, w: jax.Array) -> jax.Array:
        w = _floating(w)
        axes = axes_of(self.axis, w.ndim, type(self).__name__)
        x = w.astype(at_least_float32(w.dtype))
        least, greatest = self._norm_bounds()
        # Rounding w may change the norm by this much, relative to itself; computing it, by less than 4 eps.
        slack = max(float(jnp.finfo(w.dtype).eps), 4 * float(jnp.finfo(x.dtype).eps))
        thin = least * (1 + 2 * slack) > greatest
        if self.exact:
            direction, length, norms = polar(x, axes)
            zero = jnp.all(direction == 0, axes, keepdims=True)  # norms of subnormal slices underflow
            slightly = 4 * float(jnp.finfo(x.dtype).eps)
            target = jnp.where(
                norms > greatest,
                jnp.maximum(greatest * (1 - slightly), least),
                jnp.minimum(least * (1 + slightly), greatest),
            )
            tolerance = jnp.where(thin, slack * greatest, 0)
            member = (norms <= greatest + tolerance) & (norms >= least - tolerance) | zero
            projected = jnp.where(member, x, direction * (target / length))
        else:
            norms = plain_norms(x, axes)
            projected = self._keras_formula(x, norms)
        if w.dtype == x.dtype:
            return projected
        roomy = jnp.logical_not(thin)
        return rounded(projected, w.dtype, (norms > greatest) & roomy, (norms < least) & roomy)

    def project_with_margin(self, w: jax.Array) -> jax.Array:
        least, greatest = self._norm_bounds()
        if w.dtype != at_least_float32(w.dtype) or _known(least) != 0 or not self._at_once:
            return self(w)
        axes = axes_of(self.axis, w.ndim, type(self).__name__)
        # Computing the projection costs 4 eps, the sum parameter + update 3 half-eps, and a step inward 4 more. The
        # norm has half the error of its sum of squares, here and again in `excess`.
        margin = 8 + sum_error(w, axes)
        target = greatest * (1 - margin * float(jnp.finfo(w.dtype).eps))
        norms = slice_norms(w, axes)
        if self.exact:
            return w * (target / jnp.maximum(jnp.maximum(norms, target), jnp.finfo(w.dtype).tiny))
        return w * (jnp.minimum(norms, target) / (_KERAS_EPSILON + norms))

    @property
    def _at_once(self) -> bool:
        """Whether one projection reaches the bounds."""
        return _known(self.rate) == 1

    def excess(self, w: jax.Array) -> jax.Array:
        least, greatest = self._norm_bounds()
        norms = slice_norms(w.astype(at_least_float32(w.dtype)), axes_of(self.axis, w.ndim, type(self).__name__))
        return jnp.maximum(jnp.maximum(norms - greatest, least - norms), 0)

    def get_config(self, window_axes: tuple[int, ...] = ()) -> dict[str, Any]:
        if self.exact:
            raise ValueError(f"{self!r} has no Keras configuration; Keras lacks exact=True")
        config = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "exact"}  # type: ignore[arg-type]
        axis = window_axes if self.axis == "window" else self.axis
        return config | {"axis": list(axis) if isinstance(axis, tuple) else axis}


@dataclass(frozen=True)
class MaxNorm(_Norm):
    """Norms of at most `max_value`: `w * clip(n, 0, max_value) / (1e-7 + n)`, n the norm along `axis`.

    Keras' formula scales every slice by n / (1e-7 + n), so members shrink a little each time.

    Attributes:
        max_value: the bound, a number >= 0.
        axis: the axes along which the norm is taken: an int, a tuple of ints, "window" (each filter of a depthwise
            kernel `(*window, C, M)`), or None for all.
        exact: whether to compute the exact projection instead: it leaves members unchanged, and applying it twice
            changes nothing.

    Raises:
        TypeError, ValueError: an argument has an invalid type or value, or the array lacks the axis.

    Examples:
        >>> import jax.numpy as jnp
        >>> kernel = jnp.ones((3, 3, 8, 1))  # filters of norm 3
        >>> print(f"{jnp.linalg.norm(MaxNorm(1.0, axis='window')(kernel)[..., 0, 0]):.3f}")
        1.000
        >>> print(f"{jnp.linalg.norm(MaxNorm(1.0)(kernel)[..., 0, 0]):.3f}")  # axis 0: each column's norm is 1
        1.732
    """

    max_value: Any = 2
    axis: Axis = 0
    _: KW_ONLY
    exact: bool = False

    def _norm_bounds(self) -> tuple[Any, Any]:
        return 0, self.max_value

    def _keras_formula(self, x: jax.Array, norms: jax.Array) -> jax.Array:
        return x * (jnp.clip(norms, 0, self.max_value) / (_KERAS_EPSILON + norms))


@dataclass(frozen=True)
class MinMaxNorm(_Norm):
    """Norms in [min_value, max_value]: `w * (rate * clip(n, min_value, max_value) + (1 - rate) * n) / (1e-7 + n)`.

    Attributes:
        min_value: the lower bound, a number >= 0.
        max_value: the upper bound, a number >= min_value.
        rate: in [0, 1]; 1 enforces the bounds at once, a smaller rate moves the norm that part of the way per step.
        axis: as in `MaxNorm`.
        exact: as in `MaxNorm`; it needs rate=1. A slice of zeros has no direction and is left unchanged.

    Raises:
        TypeError, ValueError: as `MaxNorm`.
    """

    min_value: Any = 0.0
    max_value: Any = 1.0
    rate: Any = 1.0
    axis: Axis = 0
    _: KW_ONLY
    exact: bool = False

    def _norm_bounds(self) -> tuple[Any, Any]:
        return self.min_value, self.max_value

    def _keras_formula(self, x: jax.Array, norms: jax.Array) -> jax.Array:
        desired = self.rate * jnp.clip(norms, self.min_value, self.max_value) + (1 - self.rate) * norms
        return x * (desired / (_KERAS_EPSILON + norms))


@dataclass(frozen=True)
class UnitNorm(_Norm):
    """Norms of 1: `w / (1e-7 + n)`.

    Attributes:
        axis: as in `MaxNorm`.
        exact: as in `MaxNorm`. A slice of zeros has no direction and is left unchanged.

    Raises:
        TypeError, ValueError: as `MaxNorm`.
    """

    axis: Axis = 0
    _: KW_ONLY
    exact: bool = False

    def _norm_bounds(self) -> tuple[Any, Any]:
        return 1, 1

    def _keras_formula(self, x: jax.Array, norms: jax.Array) -> jax.Array:
        return x / (_KERAS_EPSILON + norms)


@dataclass(frozen=True)
class PerSlice(Constraint):
    """Any projection of one array, applied separately to each slice along `axis`, in float32 or wider.

    Use it for `optax.projections`, whose functions take a whole tree as one vector:
    `PerSlice(functools.partial(optax.projections.projection_l1_ball, scale=2.0), axis="window")`.

    Attributes:
        projection: array to array of the same shape.
        axis: the axes of a slice, as in `MaxNorm`.

    Raises:
        TypeError, ValueError: `projection` is not callable, or `axis` is invalid as for `MaxNorm`.
    """

    projection: Callable[[Any], Any]
    axis: Axis = 0

    def __post_init__(self) -> None:
        if not callable(self.projection):
            raise TypeError(f"PerSlice: projection must be callable; got {self.projection!r}")
        object.__setattr__(self, "axis", checked_axis(self.axis, "PerSlice"))

    def __call__(self, w: jax.Array) -> jax.Array:
        w = _floating(w)
        axes = axes_of(self.axis, w.ndim, "PerSlice")
        others = tuple(axis for axis in range(w.ndim) if axis not in axes)
        return per_instance(self.projection, others)(w.astype(at_least_float32(w.dtype))).astype(w.dtype)


def _mapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `Lifted`: the instance's of that name, mapped over the lifted axes."""

    @functools.wraps(method)
    def mapped(self: "Lifted", w: jax.Array) -> Any:
        return per_instance(getattr(self.constraint, method.__name__), self.axes)(w)

    return mapped


@dataclass(frozen=True)
class Lifted(Constraint):
    """A constraint on one instance's parameter, mapped over the lifted axes of the parameter of many instances.

    Attributes:
        constraint: the constraint on one instance.
        axes: the axes that nn.vmap or nn.scan added, ascending.
    """

    constraint: Constraint
    axes: tuple[int, ...]

    @property
    def interval(self) -> tuple[Any, Any]:
        return self.constraint.interval

    @property
    def keeps_finite(self) -> bool:
        return self.constraint.keeps_finite

    __call__ = _mapped(Constraint.__call__)
    project_with_margin = _mapped(Constraint.project_with_margin)
    excess = _mapped(Constraint.excess)


@dataclass(frozen=True)
class _Function(Constraint):
    """A callable that is not a `Constraint`; it may offer `violation(w) -> scalar`."""

    function: Callable[..., Any]

    def __call__(self, w: jax.Array) -> jax.Array:
        return self.function(w)

    def excess(self, w: jax.Array) -> jax.Array | None:
        violation = getattr(self.function, "violation", None)
        return None if violation is None else jnp.reshape(violation(w), (1,) * w.ndim)


@dataclass(frozen=True)
class _Composition(Constraint):
    parts: tuple[Constraint, ...]

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))

    def __post_init__(self) -> None:
        lower, upper = map(_known, self.interval)
        if lower is not None and upper is not None and lower > upper:
            raise ValueError(f"constraints must overlap; no number satisfies all of {', '.join(map(repr, self.parts))}")

    @property
    def interval(self) -> tuple[Any, Any]:
        lowers, uppers = zip(*(part.interval for part in self.parts), strict=True)
        return functools.reduce(_greater, lowers), functools.reduce(_lesser, uppers)

    @property
    def keeps_finite(self) -> bool:
        return all(part.keeps_finite for part in self.parts)

    def __call__(self, w: jax.Array) -> jax.Array:
        for part in self.parts:
            w = part(w)
        return w

    def project_with_margin(self, w: jax.Array) -> jax.Array:
        for part in self.parts:
            w = part.project_with_margin(w)
        return w

    def excess(self, w: jax.Array) -> jax.Array | None:
        each = [excess for part in self.parts if (excess := part.excess(w)) is not None]
        if len(each) < len(self.parts):
            return None
        shape = tuple(map(min, zip(*(excess.shape for excess in each), strict=True)))
        return functools.reduce(jnp.maximum, (_largest(excess, shape) for excess in each))


REGISTRY = Registry(
    "constraint",
    "keras.constraints",
    {
        Constraint: ("Constraint", "constraint"),
        MaxNorm: ("MaxNorm", "max_norm"),
        MinMaxNorm: ("MinMaxNorm", "min_max_norm"),
        NonNeg: ("NonNeg", "non_neg"),
        UnitNorm: ("UnitNorm", "unit_norm"),
    },
)
get = REGISTRY.get
serialize = REGISTRY.serialize


def _known(value: Any) -> Any:
    """A bound as Python or NumPy compare it; None for a traced one, which is not known yet.

    JAX compares an array while it traces a function to a traced result, even where the array itself is known.
    """
    if isinstance(value, Tracer):
        return None
    return np.asarray(value)[()] if isinstance(value, jax.Array) else value


def _check_number(value: Any, what: str) -> None:
    """Raises TypeError unless a bound is a real number or an array, traced or not."""
    if not isinstance(value, numbers.Real) and not is_array(value):
        raise TypeError(f"{what} must be a number; got {shown(value)}")


def _greater(a: Any, b: Any) -> Any:
    known = _known(a), _known(b)
    return jnp.maximum(a, b) if None in known else max(known)


def _lesser(a: Any, b: Any) -> Any:
    known = _known(a), _known(b)
    return jnp.minimum(a, b) if None in known else min(known)


def _largest(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The maximum along each axis where `shape` has 1 and `x` may have more."""
    return jnp.max(x, axis=tuple(axis for axis in range(x.ndim) if x.shape[axis] != shape[axis]), keepdims=True)


def _floating(w: Any) -> jax.Array:
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"a constraint expects a real floating-point array; got {w.dtype} of shape {w.shape}")
    return w
